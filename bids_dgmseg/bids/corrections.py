"""Manual corrections of segmentations: find those of each scan, and prepare a dataset to write them in."""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import bids_dgmseg
from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, check_outside_raw_data, linked_datasets
from bids_dgmseg.bids.entities import ScanName, is_in_standard_space, output_path, split_entities, stem_of
from bids_dgmseg.bids.label_ids import renumber, write_dseg
from bids_dgmseg.bids.output_dataset import BIDS_VERSION, VIEWERS, label_table, write_color_tables
from bids_dgmseg.bids.segmentations import find_images, name_scan, read_label_table
from bids_dgmseg.config import LabelIds, Selection
from bids_dgmseg.errors import InputError, as_options, list_some
from bids_dgmseg.io.files import (
    copy_file,
    hash_files,
    path_to_url,
    read_json,
    url_to_path,
    write_json,
    write_text,
)
from bids_dgmseg.models.registry import MODELS, Model
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES, Structure
from bids_dgmseg.resources import relative_outside

_SEGMENTATION = ("seg", "atlas", "label", "scale")

_RESULTS = "bids_dgmseg"
"""Name of the output folder in the BIDS URIs of a dataset of corrections."""

AUTOMATIC = Path("derivatives", "automatic")
"""Dataset in the output with the automatic labels of scans that a person has corrected."""


def find_corrections(
    folder: Path | None, scans: Sequence[ScanName], model: Model, *, selection: Selection | None = None
) -> dict[str, Path]:
    """Find the corrected ``_dseg`` of each scan, by the name of the scan.

    A correction has the entities of its scan; it may have a ``seg`` and, if the scan has none, a ``desc``. Corrections
    of other models (``seg-`` with the name of one) are ignored.

    Parameters
    ----------
    folder : path or None
        Dataset with corrections; without one the result is empty.
    scans : sequence of ScanName
        The scans of the run.
    model : Model
    selection : Selection, optional
        How the scans were selected; corrections of others are ignored.

    Raises
    ------
    InputError
        If the folder has no dseg, several of one scan, or one that belongs to no scan.
    """
    if folder is None:
        return {}
    names = {name_scan(Path(f"{scan.name}_Chimap.nii.gz"), ignored=()): scan.name for scan in scans}
    found: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(folder, "dseg", parameter="corrections"):
        seg = split_entities(stem_of(path)).get("seg")
        if seg in MODELS and seg != model.name:
            continue
        keys = (name_scan(path, ignored=ignored) for ignored in (_SEGMENTATION, (*_SEGMENTATION, "desc")))
        scan = next((names[key] for key in keys if key in names), None)
        if scan is not None:
            found[scan].append(path)
        elif _is_selected(path, selection or Selection()):
            raise InputError(
                f"{path.name}: no such scan in the dataset (`corrections` {folder.name}); rename or remove it"
            )
    for scan, paths in found.items():
        if len(paths) > 1:
            several = list_some(path.name for path in paths)
            raise InputError(f"{several}: several corrections of {scan}; keep one of them in {folder.name}")
    return {scan: path for scan, (path,) in found.items()}


def _is_selected(path: Path, selection: Selection) -> bool:
    """Return whether a scan of this name would be processed if it existed."""
    entities = split_entities(stem_of(path))
    return (
        not (selection.filter_file or selection.chi)
        and (not selection.participants or entities.get("sub") in selection.participants)
        and (not selection.sessions or entities.get("ses") in selection.sessions)
    )


def read_correction_table(path: Path, model: Model, present: Collection[int]) -> dict[int, Structure]:
    """Return the nuclei that a correction covers, by their numbers in it.

    These are the nuclei in its own label table (the file of the same name, ``.tsv``). Without one, these are the nuclei
    that it contains, with the numbers of the dataset's table or, if there is none, of structures.tsv.

    Raises
    ------
    InputError
        If the table cannot be read, a label is not in it, or a nucleus is not one of the model.
    """
    table = read_label_table(path)
    if unknown := sorted(set(present) - set(table.abbreviations)):
        where = table.source.name if table.source else "the numbers of this program"
        raise InputError(
            f"{path.name}: label {list_some(map(str, unknown))} is not in {where}; add it to the label table, or "
            "correct the label"
        )
    is_own = table.source == path.with_name(f"{stem_of(path)}.tsv")
    covered = {number: name for number, name in table.abbreviations.items() if is_own or number in present}
    if foreign := [name for name in covered.values() if name not in model.labels]:
        raise InputError(
            f"{path.name}: {list_some(foreign)} is not a nucleus of {model.name}; choose from {', '.join(model.labels)}"
        )
    return {number: STRUCTURES.named(name) for number, name in covered.items()}


def prepare_corrections(
    output_dir: Path, folder: Path, model: Model, *, scans: Collection[str] = (), nuclei: Collection[str] = ()
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
    nuclei : collection of str
        Nuclei to correct, such as ``CN`` or ``CN_L``; empty means all of the model. Only these are copied.

    Returns
    -------
    written, kept : list of path
        New label images, and those that existed.

    Raises
    ------
    InputError
        If a scan has no results or a nucleus is not one of the model.
    """
    if folder == output_dir:
        raise InputError(f"{folder}: is the output folder; choose another one for the corrections")
    check_outside_raw_data(folder)
    chosen = [one for one in model.structures if not nuclei or {one.abbreviation, one.nucleus} & set(nuclei)]
    known = {name for one in model.structures for name in (one.abbreviation, one.nucleus)}
    if unknown := [name for name in nuclei if name not in known]:
        raise InputError(f"{unknown[0]}: not a nucleus of {model.name}; choose from {', '.join(model.labels)}")
    found = {}
    for sidecar in sorted(output_dir.glob("sub-*/**/anat/*_dseg.json")):
        entities = split_entities(sidecar.name.partition(".")[0])
        if entities.pop("seg", None) == model.name and not is_in_standard_space(sidecar.name):
            scan = ScanName.of(entities)
            found[scan.name] = (scan, sidecar)
    if not found:
        raise InputError(f"{output_dir}: no results of {model.name}; pass the output folder of bids_dgmseg")
    if missing := [name for name in scans if name not in found]:
        raise InputError(f"{list_some(missing)}: no results of {model.name} in {output_dir.name}; check `scans`")
    _describe_dataset(folder, output_dir)
    written: list[Path] = []
    kept: list[Path] = []
    for name, (scan, sidecar) in found.items():
        if scans and name not in scans:
            continue
        path = output_path(folder, scan, "dseg", ".nii.gz", seg=model.name)
        if path.exists() or path.with_name(path.name.removesuffix(".gz")).exists():
            kept.append(path)
            continue
        source = sidecar.with_name(path.name)
        about = read_json(sidecar)
        _copy_labels(source, path, chosen if len(chosen) < len(model.structures) else ())
        write_text(label_table(_numbered(chosen, source)), path.with_name(f"{stem_of(path)}.tsv"))
        about = {key: _name_dataset(about[key]) for key in ("Sources", "SpatialReference") if key in about}
        text = "Manual correction of deep gray nuclei; the nuclei in the label table replace the automatic ones"
        write_json({"Description": text, "Manual": True, **about}, path.with_name(f"{stem_of(path)}.json"))
        written.append(path)
    return written, kept


def _copy_labels(source: Path, path: Path, chosen: Sequence[Structure]) -> None:
    """Copy a label image, or some of its labels."""
    if not chosen:
        copy_file(source, path)
        return
    import numpy as np

    from bids_dgmseg.image.volume import read_labels
    from bids_dgmseg.io.nifti import write_like

    labels = read_labels(source).array  # in RAS+, as write_like expects
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = [one.index for one in _numbered(chosen, source)]
    dtype = np.uint8 if max(numbers) < 256 else np.int16
    write_like(np.where(np.isin(labels, numbers), labels, 0).astype(dtype), source, path)


def _numbered(structures: Sequence[Structure], dseg: Path) -> list[Structure]:
    """Return nuclei with the numbers that they have in a label image."""
    numbers = {name: number for number, name in read_label_table(dseg).abbreviations.items()}
    return [replace(one, index=numbers.get(one.abbreviation, one.index)) for one in structures]


def _describe_dataset(folder: Path, output_dir: Path) -> None:
    """Write the description of a dataset of corrections, unless there is one, and the colors for viewers."""
    write_color_tables(folder, _numbered(ALL_STRUCTURES, output_dir / "dseg.nii.gz"))  # those of its dseg.tsv
    if (folder / DATASET_DESCRIPTION).exists():
        return
    outside = relative_outside(output_dir, folder)
    moved = {name: _move_link(url, output_dir, folder) for name, url in linked_datasets(output_dir).items()}
    links = {name: url for name, url in moved.items() if url} | ({_RESULTS: path_to_url(outside)} if outside else {})
    write_json(
        {
            "Name": "Manual corrections of deep gray nuclei",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}, {"Name": "Manual"}],
            **({"SourceDatasets": [{"URL": path_to_url(outside)}]} if outside else {}),
            **({"DatasetLinks": links} if links else {}),
        },
        folder / DATASET_DESCRIPTION,
    )
    write_text(f"{VIEWERS}\n{VIEWERS}/**", folder / ".bidsignore")
    if not any(folder.glob("README*")):
        text = "Corrected labels of bids_dgmseg: edit the _dseg.nii.gz files, then run bids_dgmseg with `corrections`."
        write_text(as_options(text), folder / "README")


def _name_dataset(uris: Any) -> Any:
    """Return BIDS URIs of an output folder for use in another dataset, which links to it as `_RESULTS`."""
    if isinstance(uris, list):
        return [_name_dataset(uri) for uri in uris]
    return re.sub("^bids::", f"bids:{_RESULTS}:", uris) if isinstance(uris, str) else uris


def _move_link(url: str, start: Path, folder: Path) -> str | None:
    """Return a URL that is relative to one folder relative to another; None if that is unknown."""
    parts = urlsplit(url)
    if parts.scheme or parts.path.startswith("/"):
        return url
    path = relative_outside(Path(os.path.normpath(url_to_path(parts.path, start))), folder)
    return path_to_url(path) if path else None


def hash_correction(path: Path) -> str:
    """Hash the labels of a correction and its label table."""
    with contextlib.suppress(InputError):  # reported by the step that reads the table
        if table := read_label_table(path).source:
            return hash_files([path, table])
    return hash_files([path])


def write_automatic(output_dir: Path, scan: ScanName, model: Model, dseg: Path, label_ids: LabelIds) -> list[Path]:
    """Write the automatic labels of a corrected scan into the dataset `AUTOMATIC`."""
    root = output_dir / AUTOMATIC
    about = {
        "Name": "Automatic labels of scans with manual corrections",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}],
        "SourceDatasets": [{"URL": "../.."}],
    }
    write_json(about, root / DATASET_DESCRIPTION)
    path, table = (output_path(root, scan, "dseg", extension, seg=model.name) for extension in (".nii.gz", ".tsv"))
    return [
        write_dseg(dseg, path, label_ids),
        write_text(label_table(renumber(model.structures, label_ids)), table),
    ]
