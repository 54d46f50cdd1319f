"""Manual corrections of labels: prepare them, find that of each scan, and apply it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bids_dgmseg.bids.current import read_checksums
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, check_outside_raw_data
from bids_dgmseg.bids.derivatives import AUTOMATIC
from bids_dgmseg.bids.entities import ScanName, is_in_standard_space, split_entities, stem_of
from bids_dgmseg.bids.masks_and_maps import find_images, find_label_table, match_one
from bids_dgmseg.bids.output_dataset import VIEWERS, describe_derivative, write_color_tables
from bids_dgmseg.config import Selection
from bids_dgmseg.errors import InputError, as_options, list_some
from bids_dgmseg.io.files import (
    copy_file,
    path_to_url,
    read_optional_json,
    sha256,
    sidecar_path,
    write_json,
    write_text,
)
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.resources import relative_outside

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bids_dgmseg.image.volume import Volume

_RESULTS = "bids_dgmseg"
"""Name of the output folder in the BIDS URIs of a dataset of corrections."""

DRAWN_ON = "DrawnOn"
"""Key in the sidecar of a correction: what it was drawn on."""


class DrawnOn(msgspec.Struct):
    """Map and automatic labels that a correction was drawn on."""

    map: str
    """SHA-256 of the map."""
    nuclei: dict[str, str]
    """Nucleus → SHA-256 of the positions of its automatic voxels; empty if the automatic labels are unknown."""


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
            f"{unused[0].name}: matches no scan, or there is another correction of that scan (`corrections` "
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
    warnings: list[str]
    """Nuclei without any voxel left, and that it is unknown what the correction was drawn on."""


def apply_correction(automatic: Volume, path: Path, model: Model, *, source: Path | None = None) -> EditedLabels:
    """Replace automatic labels by those of a corrected ``_dseg`` with its label table (`find_label_table`).

    Nuclei that equal the automatic labels on which the correction was drawn stay automatic.

    Parameters
    ----------
    automatic : Volume
        Labels of the model.
    path : path
        The correction.
    model : Model
    source : path, optional
        The map, as it is compared with that on which the correction was drawn.

    Raises
    ------
    InputError
        If it was drawn on a different map or grid, a label is not in its table, or is not a nucleus of the model.
    """
    import numpy as np

    warnings, recorded = [], dict[str, str]()
    try:
        drawn_on = msgspec.convert(read_optional_json(sidecar_path(path)).get(DRAWN_ON), DrawnOn)
    except msgspec.ValidationError:
        warnings.append(f"{path.name}: source map not recorded, so it cannot be checked")
    else:
        recorded = drawn_on.nuclei
        if source and sha256(source) != drawn_on.map:
            advice = "remove it, run again with `force`, and prepare a new one (dgmseg corrections init)"
            raise InputError(f"{path.name}: was drawn on a different map from {source.name}; {advice}")
    drawn, listed = _read_correction(path, automatic, model)
    checksums = _hash_nuclei(drawn, model)
    kept = [
        STRUCTURES.named(name).index
        for name in model.labels
        if name not in listed or recorded.get(name) == checksums[name]
    ]
    labels = np.where(np.isin(automatic.array, kept), automatic.array, 0).astype(np.uint8)
    labels = np.where((drawn > 0) & ~np.isin(drawn, kept), drawn, labels)
    dice = {}
    for structure in model.structures:
        before, after = automatic.array == structure.index, labels == structure.index
        if (before != after).any():
            dice[structure.abbreviation] = 2 * int((before & after).sum()) / int(before.sum() + after.sum())
            if not after.any():
                warnings.append(f"{structure.abbreviation} was removed by the correction")
    return EditedLabels(labels, dice, warnings)


def _read_correction(path: Path, automatic: Volume, model: Model) -> tuple[NDArray[np.uint8], Collection[str]]:
    """Return the indices of structures.tsv in a correction, and the nuclei that its label table lists."""
    import numpy as np

    from bids_dgmseg.image.grids import check_grid
    from bids_dgmseg.image.volume import read_labels

    correction, table = read_labels(path), find_label_table(path)
    if not table.source:
        raise InputError(f"{path.name}: no label table beside it (dseg.tsv); add one that names its labels")
    advice = "correct the labels of this scan without resampling them"
    check_grid(path, correction, automatic, other="the labels that it corrects", advice=advice)
    drawn = np.zeros(automatic.shape, np.uint8)
    for number in np.unique(correction.array[correction.array != 0]).tolist():
        name = table.abbreviations.get(number)
        if name not in model.labels:
            what = f"{name} is not a nucleus of {model.name}" if name else f"label {number} is not in the label table"
            raise InputError(f"{path.name}: {what}; choose from {', '.join(model.labels)}")
        drawn[correction.array == number] = STRUCTURES.named(name).index
    return drawn, {*table.abbreviations.values()}


def _hash_nuclei(labels: NDArray[np.integer], model: Model) -> dict[str, str]:
    """Hash the positions of the voxels of each nucleus."""
    import numpy as np

    positions = {row.abbreviation: np.flatnonzero(labels == row.index) for row in model.structures}
    return {name: hashlib.sha256(voxels.astype("<i8").tobytes()).hexdigest() for name, voxels in positions.items()}


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
        about |= {"Sources": [f"bids:{_RESULTS}:{relative.as_posix()}"], **_describe_origin(output_dir, source, model)}
        write_json(about, sidecar_path(path))
    return written, kept


def _describe_origin(output_dir: Path, labels: Path, model: Model) -> dict[str, Any]:
    """Return what the sidecar of a correction says about the map and the automatic labels."""
    from bids_dgmseg.image.volume import read_labels

    chi, outputs = read_checksums(labels.with_name(labels.name.replace("_dseg.nii.gz", "_qc.json")))
    name = labels.relative_to(output_dir)
    # The automatic labels are elsewhere if they were corrected, and unknown if they were edited in place.
    automatic = next(path for path in (output_dir / AUTOMATIC / name, labels) if path.is_file())
    is_edited = automatic == labels and outputs.get(name.as_posix()) != sha256(labels)
    nuclei = {} if is_edited else _hash_nuclei(read_labels(automatic).array, model)
    return {DRAWN_ON: {"map": chi, "nuclei": nuclei}} if chi else {}


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
    """Return the files of a correction by their use: the labels, their label table and sidecar."""
    files = {"correction": path, "sidecar of the correction": sidecar_path(path)}
    with contextlib.suppress(InputError):  # reported by the step that reads the table
        if table := find_label_table(path).source:
            files["label table of the correction"] = table
    return {use: file for use, file in files.items() if file.is_file() or use == "correction"}
