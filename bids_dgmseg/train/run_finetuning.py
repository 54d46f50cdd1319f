"""Fine-tune a model on the labelled scans of a dataset, and say what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg import __version__
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import copy_file, read_json, sha256, write_json
from bids_dgmseg.io.tables import write_tsv
from bids_dgmseg.models.model_folder import read_model_folder, write_model_toml
from bids_dgmseg.models.registry import Model, weights_folder
from bids_dgmseg.report.mosaic import draw_mosaic
from bids_dgmseg.segmentation.segment import segment_map
from bids_dgmseg.simulate.sample import SEGMENTER_VIEW
from bids_dgmseg.stats.overlap import dice
from bids_dgmseg.train.data import Labelled, read_labelled_maps
from bids_dgmseg.train.finetune import FineTuning, fine_tune
from bids_dgmseg.train.labelled_patches import LabelledMap, LabelledPatches, prepare
from bids_dgmseg.train.simulated import Outcome
from bids_dgmseg.train.status_line import unseen

Say = Callable[[str], None]

Array = NDArray[np.uint8]

SCORE_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "scan": {"Description": "Entities of the map's name"},
    "part": {"Description": "training: the scan was learned from, so the Dice after it flatters; held-out: it was not"},
    "abbreviation": {"Description": "Nucleus and side, such as DN_L; left is the patient's left"},
    "n_reference": {"Description": "Voxels of the given label; n/a where the nucleus is not labelled in the scan"},
    "dice_before": {"Description": "Dice of the given label and the starting weights"},
    "dice_after": {"Description": "Dice of the given label and the fine-tuned weights"},
    "dice_between": {"Description": "Dice of the starting and the fine-tuned weights: what was kept"},
}


@dataclass(frozen=True)
class Request:
    """What to fine-tune on what."""

    model: Model
    dataset: Path
    out: Path
    start: Path | None = None
    """Folder of the starting weights; None for the model's own."""
    training: FineTuning = field(default_factory=FineTuning)
    holdout: tuple[str, ...] = ()
    """Participants that are scored and not learned from, without ``sub-``."""
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()


def run_fine_tuning(request: Request, *, say: Say, show: Say = unseen) -> tuple[Outcome, pd.DataFrame]:
    """Fine-tune, and compare before with after on the labelled scans.

    ``OUT`` gets ``segmenter.safetensors``, ``localizer.safetensors`` (copied), ``model.toml`` with the temperatures of
    the starting weights, the learning curve, a checkpoint, ``training.json``, ``dice.tsv`` with its dictionary, and
    pictures of the labels, those before and those after. `say` gets lines to keep, `show` those that the next one may
    replace.

    Returns
    -------
    Outcome
        Where the training stands.
    DataFrame
        The columns of `SCORE_COLUMNS`, one row a scan and nucleus of the model.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    model, device = request.model, request.training.device
    maps = read_labelled_maps(request.dataset, model, derivatives=request.derivatives, choose=request.choose, say=say)
    learned = [one.map for one in _split(maps, request)]
    _claim(request, maps)
    _describe(request, n_learned=len(learned))
    _say_what(learned, model, say)
    before, locations = {}, {}
    for one in maps:
        found = segment_map(one.map.chi, model, weights=request.start, device=device)
        before[one.map.name], locations[one.map.name] = found.labels, found.location
    prepared = [prepare(one, locations[one.name].box, model, weights=request.start, device=device) for one in learned]
    samples = LabelledPatches(prepared, model, seed=request.training.seed, size_mm=_sample_size_mm(model))
    outcome = fine_tune(model, samples, request.out, request.training, start=request.start, say=say, show=show)
    tables = []
    for one in maps:
        name, part = one.map.name, "held-out" if one.participant in request.holdout else "training"
        after = segment_map(one.map.chi, model, weights=request.out, device=device, location=locations[name]).labels
        tables.append(score(one.map, before[name], after, model, part=part))
        _draw(one.map, model, request.out / "figures", before=before[name], after=after)
    table = pd.concat(tables, ignore_index=True)
    write_tsv(table, request.out / "dice.tsv", float_format="%.4f")
    write_json(SCORE_COLUMNS, request.out / "dice.json")
    return outcome, table


def _sample_size_mm(model: Model) -> tuple[float, float, float]:
    """Show no more at a time than the training on simulated maps does: a whole patch takes twice the time."""
    seen = (size * SEGMENTER_VIEW.spacing_mm for size in SEGMENTER_VIEW.shape)
    x, y, z = (min(sizes) for sizes in zip(model.input.patch_mm, seen, strict=True))
    return x, y, z


def _split(maps: Sequence[Labelled], request: Request) -> list[Labelled]:
    """Take the scans to learn from."""
    there = {one.participant for one in maps}
    if missing := sorted(set(request.holdout) - there):
        raise InputError(f"--holdout {missing[0]}: no labelled scan of it (there are {list_some(there)})")
    kept = [one for one in maps if one.participant not in request.holdout]
    if not kept:
        raise InputError("--holdout: leaves no scan to learn from; hold fewer out")
    return kept


def _claim(request: Request, maps: Sequence[Labelled]) -> None:
    """Write what this training is, or see that the one in the folder is the same; only its length may change."""
    source = request.start or weights_folder(request.model)
    record: dict[str, Any] = {
        "model": request.model.name,
        "start": sha256(source / "segmenter.safetensors") if (source / "segmenter.safetensors").is_file() else "",
        "labels": {one.dseg.name: sha256(one.dseg) for one in maps},
        "holdout": sorted(request.holdout),
        "learning_rate": request.training.learning_rate,
        "seed": request.training.seed,
    }
    path = request.out / "training.json"
    if (request.out / "segmenter_checkpoint.pt").is_file():
        earlier = read_json(path) if path.is_file() else {}
        if differing := [name for name, value in record.items() if earlier.get(name) != value]:
            raise InputError(
                f"{request.out.name}: holds another training (other {', '.join(differing)}); give a new folder for OUT"
            )
    else:
        write_json({**record, "version": __version__}, path)
    if request.model.localizer.network:
        copy_file(source / "localizer.safetensors", request.out / "localizer.safetensors")


def _describe(request: Request, *, n_learned: int) -> None:
    """Write ``model.toml`` with the network and the temperatures of the starting weights, and ask for mirror images.

    A folder that was trained without temperatures goes on without: its network is right as it is.
    """
    if (request.out / "segmenter_checkpoint.pt").is_file():
        return
    model = read_model_folder(request.model, request.start)
    about: dict[str, str | int | float | list[float]] = {"trained_on": f"{n_learned} labelled maps"}
    if model.temperatures:
        about |= {"temperatures": list(model.temperatures), "calibrated_on": "inherited from the starting weights"}
    # What is learned from a few scans wavers more than what the starting weights know: mirror images steady it.
    write_model_toml(replace(model, mirrored=True), request.out, about=about)


def _say_what(learned: Sequence[LabelledMap], model: Model, say: Say) -> None:
    drawn = {channel for one in learned for channel in one.channels}
    names = [name for channel, name in enumerate(model.labels, start=1) if channel in drawn]
    kept = [name for name in model.labels if name not in names]
    say(f"{len(learned)} scans to learn from, labelled {', '.join(names)}")
    if kept:
        say(f"kept as the starting weights see them: {', '.join(kept)}")


def given_labels(labelled: LabelledMap, model: Model) -> Array:
    """Give the user's labels the numbers of structures.tsv."""
    numbers = np.array([0, *(structure.index for structure in model.structures)], np.uint8)
    given: Array = numbers[labelled.labels.array]
    return given


def _draw(labelled: LabelledMap, model: Model, folder: Path, **segmentations: Array) -> None:
    """Draw the given labels and others over axial slices of their map."""
    folder.mkdir(parents=True, exist_ok=True)
    for what, dseg in {"labels": given_labels(labelled, model), **segmentations}.items():
        draw_mosaic(
            labelled.chi,
            labelled.chi.with_array(dseg),
            folder / f"{labelled.name}_{what}.png",
            plane="axial",
            structures=model.structures,
            title=f"{labelled.name}: {what}",
        )


def score(labelled: LabelledMap, before: Array, after: Array, model: Model, *, part: str) -> pd.DataFrame:
    """Compare a scan's labels with those before and after; the columns of `SCORE_COLUMNS`."""
    structures, truth = model.structures, given_labels(labelled, model)
    first, second = dice(truth, before, structures=structures), dice(truth, after, structures=structures)
    drawn = first["n_reference"] > 0
    return pd.DataFrame(
        {
            "scan": labelled.name,
            "part": part,
            "abbreviation": first["abbreviation"],
            "n_reference": first["n_reference"].where(drawn).astype("Int64"),
            "dice_before": first["dice"].where(drawn),
            "dice_after": second["dice"].where(drawn),
            "dice_between": dice(before, after, structures=structures)["dice"],
        }
    )


def summarize(table: pd.DataFrame) -> str:
    """Lay the means of a table of scores out as text, a row a nucleus (left and right together)."""
    table = table.assign(nucleus=table["abbreviation"].str.split("_").str[0])
    columns = ["dice_before", "dice_after", "dice_between"]
    lines = []
    for part, rows in table.groupby("part", sort=True):
        means = rows.groupby("nucleus", sort=False)[columns].mean()
        labelled = means[means["dice_before"].notna()]
        means.loc["mean"] = labelled.mean()
        warning = ", which were learned from" if part == "training" else ", not learned from"
        lines.append(f"Dice on {rows['scan'].nunique()} {part} scans{warning}:")
        lines.append(f"{'':8}{'before':>8}{'after':>8}{'between':>9}")
        for name, row in means.iterrows():
            cells = ["n/a" if np.isnan(value) else f"{value:.3f}" for value in row]
            lines.append(f"{name:8}{cells[0]:>8}{cells[1]:>8}{cells[2]:>9}")
    return "\n".join(lines)
