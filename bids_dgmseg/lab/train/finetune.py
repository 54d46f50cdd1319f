"""Fine-tune the segmenter of dgm16 or dgm24 on the labelled scans of a dataset, and compare it with before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bids_dgmseg.bids.labelled_scans import (
    LabelledMap,
    describe_learned,
    label_checksums,
    labelled_structures,
    manual_labels,
    read_labelled_maps,
)
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import StoredVolume
from bids_dgmseg.io.files import MISSING, copy_file, read_json, sha256, write_json, write_tsv
from bids_dgmseg.io.mapped_arrays import arrays_folder, store
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW
from bids_dgmseg.lab.train.core import Run, State, StepResult, train, use_all_cores
from bids_dgmseg.lab.train.log import Log, StepLog, write_record
from bids_dgmseg.lab.train.losses import dice_and_cross_entropy
from bids_dgmseg.lab.train.patches import LabelledPatches, prepare_map
from bids_dgmseg.lab.train.schedule import StepSchedule
from bids_dgmseg.lab.train.simulated import Outcome
from bids_dgmseg.lab.train.splits import check_holdout
from bids_dgmseg.models.model_folder import (
    TRAINING,
    list_learned_maps,
    load_weights,
    pick_device,
    read_model_folder,
    save_weights,
    segmenter_network,
    to_channels_last,
    write_model_toml,
)
from bids_dgmseg.models.registry import Model, weights_folder
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

_NO_LIMIT = 1_000_000

FEWEST_STEPS = 100
"""On five scans, 5 steps changed nothing and 105 raised the Dice of held-out scans from 0.77 to 0.84."""

_FIRST_STEPS = 3
"""After which the number of steps is estimated."""

CHANGED_DICE = 0.8
"""Dice of the weights before and after below which a nucleus without labels has changed."""

_CHECKPOINT = "segmenter_checkpoint.pt"

SCORE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scan": {"Description": "Entities of the map's file name"},
    "part": {"Description": "training (Dice after fine-tuning is optimistic) or held-out (not used for training)"},
    "abbreviation": {"Description": "Nucleus and hemisphere, such as DN_L; left is the patient's left"},
    "n_reference": {"Description": "Voxels of the manual label; n/a if the nucleus is not labelled in the scan"},
    "dice_before": {"Description": "Dice of the manual label and the starting weights"},
    "dice_after": {"Description": "Dice of the manual label and the fine-tuned weights"},
    "dice_between": {"Description": "Dice of the starting and the fine-tuned weights"},
}


@dataclass(frozen=True)
class FineTuning:
    """Length and learning rate of a fine-tuning."""

    minutes: float = 10.0
    """Total training time; with `steps` the time limit of this call."""
    steps: int | None = None
    """Total length in steps; by default the training time determines the learning rate."""
    learning_rate: float = 5e-4
    """A quarter of that of the training on simulated maps."""
    seed: int = 1
    device: str = "auto"
    workers: int = 1
    checkpoint_minutes: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FineTuningRequest:
    """Model, dataset and output of a fine-tuning."""

    model: Model
    dataset: Path
    out: Path
    start: Path | None = None
    """Folder of the starting weights; None for those in the package."""
    training: FineTuning = field(default_factory=FineTuning)
    holdout: tuple[str, ...] = ()
    """Participants that are only evaluated, without ``sub-``."""
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()


def finetune(request: FineTuningRequest, *, log: Log) -> tuple[Outcome, pd.DataFrame]:
    """Fine-tune, and compare the labelled scans before and after.

    ``OUT`` gets ``segmenter.safetensors``, ``localizer.safetensors`` (copied), ``model.toml`` with the temperatures of
    the starting weights, the learning curve, a checkpoint, ``training.json``, ``dice.tsv`` with its dictionary, and
    figures of the manual labels and of the segmentations before and after.

    Returns
    -------
    Outcome
        Where the training is.
    DataFrame
        The columns of `SCORE_COLUMNS`, one row per scan and nucleus of the model.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    model, device = request.model, request.training.device
    with arrays_folder(request.out) as arrays:
        maps = read_labelled_maps(
            request.dataset,
            model,
            derivatives=request.derivatives,
            choose=request.choose,
            warn=log.log,
            progress=log.update,
            arrays=arrays,
        )
        training_maps = check_holdout(maps, request.holdout)
        _prepare_folder(request, maps, n_training=len(training_maps))
        start = request.start or weights_folder(model)
        held_out = [one for one in maps if one.participant in request.holdout]
        if line := describe_learned(held_out, list_learned_maps(start / "segmenter.safetensors")):
            log.log(line)
        names = [structure.abbreviation for structure in labelled_structures(training_maps, model)]
        log.log(f"{len(training_maps)} training scans, labelled {', '.join(names)}")
        if others := [name for name in model.labels if name not in names]:
            log.log(f"not labelled, trained to stay as the starting weights predict them: {', '.join(others)}")
        before, locations = {}, {}
        for one in maps:
            found = segment_map(one.chi, model, weights=request.start, device=device)
            before[one.name] = store(one.chi.with_array(found.labels), StoredVolume, arrays)
            locations[one.name] = found.location
        prepared = [
            prepare_map(one, locations[one.name].box, model, weights=request.start, device=device).stored(arrays)
            for one in training_maps
        ]
        # At most as large as samples of the training on simulated maps: a whole patch takes twice as long.
        seen_mm = (size * SEGMENTER_VIEW.spacing_mm for size in SEGMENTER_VIEW.shape)
        x, y, z = (min(sizes) for sizes in zip(model.input.patch_mm, seen_mm, strict=True))
        samples = LabelledPatches(prepared, model, seed=request.training.seed, size_mm=(x, y, z))
        outcome = train_segmenter(model, samples, request.out, request.training, start=request.start, log=log)
        tables = []
        for one in maps:
            location = locations[one.name]
            after = segment_map(one.chi, model, weights=request.out, device=device, location=location).labels
            part = "held-out" if one.participant in request.holdout else "training"
            tables.append(compare(one, before[one.name].array, after, model, part=part))
            _draw(one, model, request.out / "figures", before=before[one.name].array, after=after)
    table = pd.concat(tables, ignore_index=True)
    write_tsv(table, request.out / "dice.tsv", float_format="%.4f")
    write_json(SCORE_COLUMNS, request.out / "dice.json")
    if line := describe_changes(table):
        log.log(f"warning: {line}")
    return outcome, table


def describe_changes(table: pd.DataFrame) -> str:
    """Describe which nuclei without any label in the training scans were changed by the fine-tuning; empty if none.

    `table` has the columns of `SCORE_COLUMNS`.
    """
    training = table[table["part"] == "training"]
    labelled = training.groupby("abbreviation")["n_reference"].count()
    means = table[table["abbreviation"].map(labelled) == 0].groupby("abbreviation", sort=False)["dice_between"].mean()
    changed = [f"{name} ({value:.2f})" for name, value in means.items() if value < CHANGED_DICE]
    if not changed:
        return ""
    return (
        f"{', '.join(changed)}: not labelled, but segmented differently than before (Dice of before and after); labels "
        "of their neighbours may cover them; measure these nuclei with the starting weights, or label them, too"
    )


def train_segmenter(
    model: Model, samples: LabelledPatches, out: Path, training: FineTuning, *, start: Path | None, log: Log
) -> Outcome:
    """Train the segmenter from the starting weights; resumes the training in ``OUT``.

    ``OUT`` gets ``segmenter_checkpoint.pt``, ``segmenter_curve.tsv`` and ``segmenter.safetensors``. The network is
    trained with the temperatures in its ``model.toml``, so that its labels are right with them. `start` is the folder
    of the starting weights; None for those in the package.
    """
    model = read_model_folder(model, out)
    use_all_cores()
    torch.manual_seed(training.seed)
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(training.device)
    schedule = StepSchedule(
        steps=training.steps or _NO_LIMIT,
        minutes=None if training.steps is not None else training.minutes,
        learning_rate=training.learning_rate,
        warmup_steps=20,
    )
    network = load_weights(segmenter_network(model), model, "segmenter", start).requires_grad_(True)
    state = State.start(to_channels_last(network, device), schedule)
    if (checkpoint := out / _CHECKPOINT).is_file():
        state.load(checkpoint)
    state.record = read_json(out / TRAINING) if (out / TRAINING).is_file() else {}
    curve = StepLog(out / "segmenter_curve.tsv", model.classes, log, steps=training.steps)
    curve.start(state)
    run = Run(
        schedule,
        lambda network, logits, labels: dice_and_cross_entropy(logits, labels),
        checkpoint,
        seed=training.seed,
        device=device,
        workers=training.workers,
        minutes=training.minutes,
        checkpoint_minutes=training.checkpoint_minutes,
        temperatures=model.temperatures,
    )

    def report(state: State, result: StepResult) -> None:
        curve.step(state, result)
        if training.steps is None and state.step == _FIRST_STEPS:
            expected = round(state.step * (1 + result.seconds_left / max(state.seconds, 1e-9)))
            if expected < FEWEST_STEPS:
                log.log(
                    f"warning: about {expected} steps fit into {training.minutes:g} minutes on this machine; fewer "
                    f"than {FEWEST_STEPS} hardly change the weights; raise `minutes` to "
                    f"{math.ceil(FEWEST_STEPS * state.seconds / state.step / 60)} or more"
                )

    train(state, samples, run, report=report)
    if schedule.finished(state) and state.step < FEWEST_STEPS:
        log.log(
            f"warning: only {state.step} steps; fewer than {FEWEST_STEPS} hardly change the weights; run the same "
            f"command with a larger `{'minutes' if training.steps is None else 'steps'}`"
        )
    return Outcome(state.step, schedule.finished(state), save_weights(state.weights, out / "segmenter.safetensors"))


def _prepare_folder(request: FineTuningRequest, maps: Sequence[LabelledMap], *, n_training: int) -> None:
    """Write ``training.json``, the localizer and ``model.toml``, or check that the training in the folder is the same.

    The temperatures are those of the starting weights; a folder without them is resumed without them.
    """
    source = request.start or weights_folder(request.model)
    weights = source / "segmenter.safetensors"
    if request.model.localizer.network and not (source / "localizer.safetensors").is_file():
        raise InputError(f"{source}: has no localizer.safetensors; copy that of other weights of {request.model.name}")
    record = {
        "model": request.model.name,
        "start": sha256(weights) if weights.is_file() else "",
        "start_maps": [list_learned_maps(weights)],
        **label_checksums(maps),
        "maps": {one.name: sha256(one.file) for one in maps},
        "folds": [{"training": sorted({one.participant for one in maps} - {*request.holdout})}],
        "holdout": sorted(request.holdout),
        "learning_rate": request.training.learning_rate,
        "seed": request.training.seed,
    }
    checkpoint = request.out / _CHECKPOINT
    begun = checkpoint.is_file()
    write_record(request.out, record, begun=begun, checkpoints=[checkpoint] if begun else [])
    if request.model.localizer.network:
        copy_file(source / "localizer.safetensors", request.out / "localizer.safetensors")
    if begun:
        return
    model = read_model_folder(request.model, request.start)
    about: dict[str, str | int | float | list[float]] = {"trained_on": f"{n_training} labelled maps"}
    if model.temperatures:
        about |= {"temperatures": list(model.temperatures), "calibrated_on": "inherited from the starting weights"}
    # Weights trained on a few scans vary more than the starting weights; averaging mirror images reduces that.
    write_model_toml(replace(model, mirrored=True), request.out, about=about)


def _draw(labelled: LabelledMap, model: Model, folder: Path, **segmentations: NDArray[np.uint8]) -> None:
    """Draw the manual labels and segmentations on axial slices of their map."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dseg in {"labels": manual_labels(labelled, model), **segmentations}.items():
        draw_mosaic(
            labelled.chi,
            labelled.chi.with_array(dseg),
            folder / f"{labelled.name}_{name}.png",
            plane="axial",
            structures=model.structures,
            title=f"{labelled.name}: {name}",
        )


def compare(
    labelled: LabelledMap, before: NDArray[np.uint8], after: NDArray[np.uint8], model: Model, *, part: str
) -> pd.DataFrame:
    """Compare manual labels with the segmentations before and after; the columns of `SCORE_COLUMNS`."""
    structures, truth = model.structures, manual_labels(labelled, model)
    first, second = dice(truth, before, structures=structures), dice(truth, after, structures=structures)
    known = first["n_reference"] > 0
    return pd.DataFrame(
        {
            "scan": labelled.name,
            "part": part,
            "abbreviation": first["abbreviation"],
            "n_reference": first["n_reference"].where(known).astype("Int64"),
            "dice_before": first["dice"].where(known),
            "dice_after": second["dice"].where(known),
            "dice_between": dice(before, after, structures=structures)["dice"],
        }
    )


def summarize(table: pd.DataFrame) -> str:
    """Format the mean scores as text, one row per nucleus (left and right together)."""
    table = table.assign(nucleus=table["abbreviation"].str.split("_").str[0])
    columns = ["dice_before", "dice_after", "dice_between"]
    lines = []
    for part, rows in table.groupby("part", sort=True):
        means = rows.groupby("nucleus", sort=False)[columns].mean()
        means.loc["mean"] = means[means["dice_before"].notna()].mean()
        lines.append(f"Dice on {rows['scan'].nunique()} {part} scans:")
        lines.append(f"{'':8}{'before':>8}{'after':>8}{'between':>9}")
        for name, row in means.iterrows():
            cells = [MISSING if np.isnan(value) else f"{value:.3f}" for value in row]
            lines.append(f"{name:8}{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}")
    return "\n".join(lines)
