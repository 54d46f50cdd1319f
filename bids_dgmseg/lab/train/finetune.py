"""Fine-tune the segmenter of dgm16 or dgm24 on the labelled scans of a dataset, and compare it with before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from bids_dgmseg.bids.labelled_scans import (
    LabelledMap,
    describe_leakage,
    label_checksums,
    labelled_structures,
    manual_labels,
)
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.volume import StoredVolume
from bids_dgmseg.io.files import MISSING, arrays_folder, copy_file, sha256, store, write_json, write_tsv
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW
from bids_dgmseg.lab.train.core import Run, StepSchedule, use_all_cores
from bids_dgmseg.lab.train.frame import (
    CHECKPOINT,
    Log,
    Outcome,
    TrainingRequest,
    check_holdout,
    fit,
    list_checksums,
    read_maps,
    write_record,
)
from bids_dgmseg.lab.train.losses import DiceCrossEntropyLoss
from bids_dgmseg.lab.train.patches import LabelledPatches, prepare_map
from bids_dgmseg.models.model_folder import (
    list_training_maps,
    list_training_participants,
    load_weights,
    pick_device,
    read_model_folder,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.models.registry import Model, weights_folder
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.stats.overlap import dice

LEARNING_RATE = 5e-4
"""A quarter of that of the training on simulated maps."""

MINUTES = 10.0
"""Length of a fine-tuning by default."""

_NO_LIMIT = 1_000_000

_FEW_STEPS = 100

CHANGED_DICE = 0.8
"""Dice of the weights before and after below which a nucleus without labels has changed."""

SCORE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scan": {"Description": "Entities of the map's file name"},
    "part": {"Description": "training (Dice after fine-tuning is optimistic) or held-out (not used for training)"},
    "abbreviation": {"Description": "Nucleus and hemisphere, such as DN_L; left is the patient's left"},
    "n_reference": {"Description": "Voxels of the manual label; n/a if the nucleus is not labelled in the scan"},
    "dice_before": {"Description": "Dice of the manual label and the starting weights"},
    "dice_after": {"Description": "Dice of the manual label and the fine-tuned weights"},
    "dice_between": {"Description": "Dice of the starting and the fine-tuned weights"},
}


def finetune(request: TrainingRequest, *, log: Log) -> tuple[Outcome, pd.DataFrame]:
    """Fine-tune, and compare the labelled scans before and after.

    ``OUT`` gets ``segmenter.safetensors``, ``localizer.safetensors`` (copied), ``model.toml`` with the temperatures of
    the starting weights, ``training.json``, ``dice.tsv`` with its dictionary, and ``segmenter`` with the checkpoint and
    the learning curve. Held-out participants are only evaluated.

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
    model, device = request.model, request.device
    with arrays_folder(request.out) as arrays:
        maps = read_maps(request, arrays, log)
        training_maps = check_holdout(maps, request.holdout)
        record = _prepare_folder(request, maps, n_training=len(training_maps))
        start = request.start or weights_folder(model)
        weights = start / "segmenter.safetensors"
        seen, participants = list_training_maps(weights), list_training_participants(weights)
        held_out = [labelled for labelled in maps if labelled.participant in request.holdout]
        leaked = [each.name for each in held_out if each.participant in participants or sha256(each.file) in seen]
        if line := describe_leakage(leaked):
            log.log(line)
        names = [structure.abbreviation for structure in labelled_structures(training_maps, model)]
        log.log(f"{len(training_maps)} training scans, labelled {', '.join(names)}")
        if others := [name for name in model.labels if name not in names]:
            log.log(f"not labelled, trained to stay as the starting weights predict them: {', '.join(others)}")
        before, locations = {}, {}
        for labelled in maps:
            segmented = segment_map(labelled.chi, model, weights=request.start, device=device)
            before[labelled.name] = store(labelled.chi.with_array(segmented.labels), StoredVolume, arrays)
            locations[labelled.name] = segmented.location
        prepared = [
            prepare_map(labelled, locations[labelled.name].box, model, weights=request.start, device=device).stored(
                arrays
            )
            for labelled in training_maps
        ]
        # At most as large as samples of the training on simulated maps: a whole patch takes twice as long.
        seen_mm = (size * SEGMENTER_VIEW.spacing_mm for size in SEGMENTER_VIEW.shape)
        x, y, z = (min(sizes) for sizes in zip(model.input.patch_mm, seen_mm, strict=True))
        samples = LabelledPatches(prepared, model, seed=request.seed, size_mm=(x, y, z))
        outcome = train_segmenter(request, samples, record, log=log)
        tables = []
        for labelled in maps:
            location = locations[labelled.name]
            after = segment_map(labelled.chi, model, weights=request.out, device=device, location=location).labels
            part = "held-out" if labelled.participant in request.holdout else "training"
            tables.append(compare(labelled, before[labelled.name].array, after, model, part=part))
    table = pd.concat(tables, ignore_index=True)
    write_tsv(table, request.out / "dice.tsv", float_format="%.4f")
    write_json(SCORE_COLUMNS, request.out / "dice.json")
    if line := describe_changes(table):
        log.log(f"warning: {line}")
    if unedited := table.loc[table["dice_before"] == 1, "scan"].tolist():
        where = list_some(set(unedited))
        log.log(f"warning: {len(unedited)} labels equal the automatic ones, so their Dice is no evidence: {where}")
    if request.steps is None and outcome.state.step < _FEW_STEPS:
        log.log(f"warning: only {outcome.state.step} steps fitted; give it more `minutes`")
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
    request: TrainingRequest, samples: LabelledPatches, record: Mapping[str, Any], *, log: Log
) -> Outcome:
    """Train the segmenter from the starting weights; resumes the training in ``OUT``.

    The network is trained with the temperatures in its ``model.toml``, so that its labels are right with them.
    """
    model = read_model_folder(request.model, request.out)
    use_all_cores()
    torch.manual_seed(request.seed)
    limit = math.inf if request.minutes is None else request.minutes
    schedule = StepSchedule(
        steps=request.steps or _NO_LIMIT,
        minutes=None if request.steps is not None else limit,
        learning_rate=request.learning_rate or LEARNING_RATE,
        warmup_steps=20,
    )
    network = load_weights(segmenter_network(model), model, "segmenter", request.start).requires_grad_(True)
    run = Run(
        schedule,
        DiceCrossEntropyLoss(),
        request.out / "segmenter" / CHECKPOINT,
        model.classes,
        seed=request.seed,
        device=pick_device(request.device),
        workers=request.workers,
        minutes=limit,
        checkpoint_minutes=request.checkpoint_minutes,
        temperatures=model.temperatures,
    )
    weights = request.out / "segmenter.safetensors"
    return fit(network, samples, run, weights, log=log, record=record)


def _prepare_folder(request: TrainingRequest, maps: Sequence[LabelledMap], *, n_training: int) -> dict[str, Any]:
    """Write ``training.json``, the localizer and ``model.toml``, or check that the training in the folder is the same.

    The temperatures are those of the starting weights.
    """
    source = request.start or weights_folder(request.model)
    weights = source / "segmenter.safetensors"
    if request.model.localizer.network and not (source / "localizer.safetensors").is_file():
        raise InputError(f"{source}: has no localizer.safetensors; copy that of other weights of {request.model.name}")
    record = {
        "start": sha256(weights) if weights.is_file() else "",
        "start_maps": [list_training_maps(weights)],
        **label_checksums(maps),
        "maps": list_checksums(maps),
        "folds": [{"training": sorted({labelled.participant for labelled in maps} - {*request.holdout})}],
        "holdout": sorted(request.holdout),
        "learning_rate": request.learning_rate or LEARNING_RATE,
    }
    content = write_record(request, record)
    if request.model.localizer.network:
        copy_file(source / "localizer.safetensors", request.out / "localizer.safetensors")
    model = read_model_folder(request.model, request.start)
    about: dict[str, str | int | float | list[float]] = {"trained_on": f"{n_training} labelled maps"}
    if model.temperatures:
        about |= {"temperatures": list(model.temperatures), "calibrated_on": "inherited from the starting weights"}
    # Weights trained on a few scans vary more than the starting weights; averaging mirror images reduces that.
    write_model_toml(replace(model, mirrored=True), request.out, about=about)
    return content


def compare(
    labelled: LabelledMap, before: NDArray[np.uint8], after: NDArray[np.uint8], model: Model, *, part: str
) -> pd.DataFrame:
    """Compare manual labels with the segmentations before and after; the columns of `SCORE_COLUMNS`."""
    structures, truth = model.structures, manual_labels(labelled, model)
    first, second = dice(truth, before, structures=structures), dice(truth, after, structures=structures)
    there = first["n_reference"] > 0
    return pd.DataFrame(
        {
            "scan": labelled.name,
            "part": part,
            "abbreviation": first["abbreviation"],
            "n_reference": first["n_reference"].where(there).astype("Int64"),
            "dice_before": first["dice"].where(there),
            "dice_after": second["dice"].where(there),
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
        means.columns = means.columns.str.removeprefix("dice_")
        lines.append(means.to_string(index_names=False, float_format="{:.3f}".format, na_rep=MISSING))
    return "\n".join(lines)
