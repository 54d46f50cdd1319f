"""Manual corrections of labels: prepare them, find that of each scan, and apply it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, check_outside_raw_data
from bids_dgmseg.bids.entities import ScanName, is_in_standard_space, split_entities, stem_of
from bids_dgmseg.bids.masks_and_maps import find_images, find_label_table, match_one
from bids_dgmseg.bids.output_dataset import VIEWERS, describe_derivative, write_color_tables
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError, as_options, list_some
from bids_dgmseg.io.files import copy_file, path_to_url, write_json, write_text
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.resources import relative_outside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bids_dgmseg.image.volume import Volume

_RESULTS = "bids_dgmseg"
"""Name of the output folder in the BIDS URIs of a dataset of corrections."""


def find_corrections(
    folder: Path | None, scans: Sequence[ScanName], model: Model, *, selection: Selection | None = None
) -> dict[str, Path]:
    """Find the corrected ``_dseg`` of each scan, by the name of the scan.

    Corrections of other models (``seg-`` with the name of one) are ignored.

    Parameters
    ----------
    folder : path or None
        Dataset with corrections; without one the result is empty.
    scans : sequence of ScanName
        The scans of the run.
    model : Model
    selection : Selection, optional
        How the scans were selected: with all scans, each correction must be the only one of one of them.

    Raises
    ------
    InputError
        If the folder has no dseg, several of one scan, or one that belongs to no scan.
    """
    if folder is None:
        return {}
    segmentations = {
        path: split_entities(stem_of(path)).get("seg") for path in find_images(folder, "dseg", parameter="corrections")
    }
    paths = [path for path, seg in segmentations.items() if seg == model.name or seg not in MODELS]
    matches = {scan.name: match_one(scan, paths, folder=folder, parameter="corrections") for scan in scans}
    chosen = selection or Selection()
    everyone = not (chosen.participants or chosen.sessions or chosen.filter_file or chosen.chi)
    if everyone and (unused := sorted(set(paths).difference(matches.values()))):
        raise InputError(
            f"{unused[0].name}: of no scan in the dataset, or beside another correction of it (`corrections` "
            f"{folder.name}); rename or remove it"
        )
    return {name: path for name, path in matches.items() if path}


@dataclass(frozen=True)
class EditedLabels:
    """Labels of a scan after a manual correction."""

    labels: NDArray[np.uint8]
    """Indices of structures.tsv."""
    dice: dict[str, float]
    """Nuclei that differ from the automatic labels → Dice with them."""
    removed: list[str]
    """Nuclei without any voxel left."""


def apply_correction(automatic: Volume, path: Path, model: Model) -> EditedLabels:
    """Replace automatic labels by those of a corrected ``_dseg`` with its label table (`find_label_table`).

    Raises
    ------
    InputError
        If it is on another grid, a label is not in its table, or is not a nucleus of the model.
    """
    import numpy as np

    from bids_dgmseg.image.grids import describe_grid_mismatch
    from bids_dgmseg.image.volume import read_labels

    correction = read_labels(path)
    if difference := describe_grid_mismatch(automatic, correction):
        raise InputError(
            f"{path.name}: is not on the grid of the labels that it corrects ({difference}); correct the labels of "
            "this scan without resampling them"
        )
    table = find_label_table(path)
    names = {int(number): table.abbreviations.get(int(number), "") for number in np.unique(correction.array) if number}
    if unknown := [str(number) for number, name in names.items() if not name]:
        where = table.source.name if table.source else "the numbers of this program"
        raise InputError(
            f"{path.name}: label {list_some(unknown)} is not in {where}; add it to the label table, or correct the "
            "label"
        )
    if foreign := [name for name in names.values() if name not in model.labels]:
        raise InputError(
            f"{path.name}: {list_some(foreign)} is not a nucleus of {model.name}; choose from {', '.join(model.labels)}"
        )
    labels, dice = np.zeros(automatic.shape, np.uint8), {}
    for number, name in names.items():
        labels[correction.array == number] = STRUCTURES.named(name).index
    for structure in model.structures:
        before, after = automatic.array == structure.index, labels == structure.index
        if (before != after).any():
            dice[structure.abbreviation] = 2 * int((before & after).sum()) / int(before.sum() + after.sum())
    return EditedLabels(labels, dice, [name for name in dice if name not in names.values()])


def prepare_corrections(
    output_dir: Path, folder: Path, model: Model, *, scans: Collection[str] = ()
) -> tuple[list[Path], list[Path]]:
    """Copy labels of an output folder into a dataset in which they can be corrected.

    Parameters
    ----------
    output_dir : path
        Output folder of the app.
    folder : path
        Dataset to write, or to add to; corrections in it are never replaced.
    model : Model
        Whose labels are copied.
    scans : collection of str
        Names such as ``sub-01_ses-1``; empty means all.

    Returns
    -------
    written, kept : list of path
        New label images, and those that existed.

    Raises
    ------
    InputError
        If a scan has no results.
    """
    if folder == output_dir:
        raise InputError(f"{folder}: is the output folder; choose another one for the corrections")
    check_outside_raw_data(folder)
    results = {}
    for source in sorted(output_dir.glob("sub-*/**/anat/*_dseg.nii.gz")):
        entities = split_entities(stem_of(source))
        if entities.pop("seg", None) == model.name and not is_in_standard_space(source.name):
            results[ScanName.of(entities).name] = source
    if not results:
        raise InputError(f"{output_dir}: no results of {model.name}; pass the output folder of bids_dgmseg")
    if missing := [name for name in scans if name not in results]:
        raise InputError(f"{list_some(missing)}: no results of {model.name} in {output_dir.name}; check `scans`")
    _describe_dataset(folder, output_dir)
    written, kept = [], []
    for name, source in results.items():
        if scans and name not in scans:
            continue
        relative = source.relative_to(output_dir)
        path = folder / relative
        if path.exists() or path.with_suffix("").exists():
            kept.append(path)
            continue
        written.append(copy_file(source, path))
        copy_file(source.with_name(f"{stem_of(source)}.tsv"), path.with_name(f"{stem_of(path)}.tsv"))
        about = {"Description": "Manual correction of deep gray nuclei", "Manual": True}
        sources = [f"bids:{_RESULTS}:{relative.as_posix()}"]
        write_json({**about, "Sources": sources}, path.with_name(f"{stem_of(path)}.json"))
    return written, kept


def _describe_dataset(folder: Path, output_dir: Path) -> None:
    """Write the description of a dataset of corrections, unless there is one, and the colors for viewers."""
    write_color_tables(folder)
    if (folder / DATASET_DESCRIPTION).exists():
        return
    outside = relative_outside(output_dir, folder)
    links = {"DatasetLinks": {_RESULTS: path_to_url(outside)}} if outside else {}
    write_json({**describe_derivative("Manual corrections of deep gray nuclei"), **links}, folder / DATASET_DESCRIPTION)
    write_text(f"{VIEWERS}\n{VIEWERS}/**", folder / ".bidsignore")
    if not any(folder.glob("README*")):
        text = "Corrected labels of bids_dgmseg: edit the _dseg.nii.gz files, then run bids_dgmseg with `corrections`."
        write_text(as_options(text), folder / "README")


def correction_files(path: Path) -> dict[str, Path]:
    """Return the files of a correction by their use: the labels and their label table."""
    with contextlib.suppress(InputError):  # reported by the step that reads the table
        if table := find_label_table(path).source:
            return {"correction": path, "label table of the correction": table}
    return {"correction": path}
