"""Write BIDS datasets of labelled scans: images with sidecars, true labels and masks in derivatives/truth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

import bids_dgmseg
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import (
    atomic_write,
    is_temporary,
    remove_temporary_files,
    write_json,
    write_text,
    write_tsv,
)
from bids_dgmseg.io.scratch import LOCK, sole_writer
from bids_dgmseg.models.structures import STRUCTURES

_BIDS_VERSION = "1.11.1"

_UNFINISHED = ".unfinished"
"""File in a dataset that is being written: what it is, then one line per complete scan."""

_TRUTH_README = """\
True labels of the scans, on the grid of each scan. dseg.tsv lists the labels; left is the patient's left. Use them as
the reference segmentation, for example with `dgmseg evaluate`.
"""


@dataclass(frozen=True)
class Image:
    """One image file of a scan."""

    suffix: str
    """Part of the file name after subject and session, such as ``echo-1_part-mag_MEGRE``."""
    array: NDArray[Any]
    """Shape (X, Y, Z): float32, or integers to be multiplied by `scale`."""
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    """In addition to the fields common to the scan."""
    scale: float | None = None
    """``scl_slope`` of the file."""


@dataclass(frozen=True)
class LabelledScan:
    """A scan with its true labels; all arrays share the grid of `affine`."""

    participant: str
    """Without ``sub-``."""
    images: Sequence[Image]
    """A chi map, or magnitude and phase of several echoes."""
    dseg: NDArray[np.uint8]
    """Shape (X, Y, Z), labels of structures.tsv."""
    affine: NDArray[np.float64]
    sidecar: Mapping[str, Any]
    """Common to all images."""
    session: str | None = None
    """Without ``ses-``."""
    masks: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Further true masks by the value of ``label-``: shape (X, Y, Z), 1 inside."""

    @property
    def name(self) -> str:
        """Subject and session as in file names."""
        return f"sub-{self.participant}" + (f"_ses-{self.session}" if self.session else "")

    def folder(self, root: Path) -> Path:
        """Return the folder of the scan in a dataset."""
        return root.joinpath(*self.name.split("_"), "anat")


class DatasetWriter:
    """Dataset that is written scan by scan; one that was interrupted is continued.

    As long as it is unfinished, the file `_UNFINISHED` lists the scans that are complete.
    """

    def __init__(self, root: Path, done: Mapping[str, Mapping[str, Any]]) -> None:
        self._root = root
        self.done = {**done}
        """Name of each complete scan → values that were given for it."""

    def add(self, scan: LabelledScan, values: Mapping[str, Any] | None = None) -> None:
        """Write a scan, and record it with values that a continued run needs."""
        _add_scan(self._root, scan)
        self.done[scan.name] = dict(values or {})
        with (self._root / _UNFINISHED).open("a", encoding="utf-8") as file:
            file.write(json.dumps([scan.name, self.done[scan.name]]) + "\n")


@contextlib.contextmanager
def write_dataset(root: Path, *, name: str, readme: str, settings: Mapping[str, Any]) -> Iterator[DatasetWriter]:
    """Write the top-level files of a dataset and of its ``derivatives/truth``, and hand out its writer.

    Parameters
    ----------
    root : path
        New or empty folder, or one in which the same call was interrupted.
    name, readme : str
        Title and text of the dataset.
    settings : mapping
        Everything that the scans depend on.

    Raises
    ------
    InputError
        If `root` contains something else, another process writes into it, or it cannot be written.
    """
    started = json.dumps({"name": name, "version": bids_dgmseg.__version__, **settings}, sort_keys=True)
    marker, done = root / _UNFINISHED, {}
    if root.exists() and not root.is_dir():
        raise InputError(f"{root.name}: exists and is not an empty folder; choose a new one")
    with sole_writer(root):
        if marker.is_file():
            first, *lines = marker.read_text(encoding="utf-8", errors="replace").split("\n")
            if first != started:
                raise InputError(
                    f"{root.name}: an interrupted dataset with other options; repeat the command that began it, or "
                    "delete the folder"
                )
            done = dict(json.loads(line) for line in lines[:-1])  # the last one is empty, or was not written to its end
            for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
                remove_temporary_files(folder, min_age_s=0)
        elif any(path.name != LOCK and not is_temporary(path) for path in root.iterdir()):
            raise InputError(f"{root.name}: exists and is not an empty folder; choose a new one")
        try:
            write_text("\n".join([started, *(json.dumps([*one]) for one in done.items())]), marker)
            _start_dataset(root, name=name, readme=readme)
        except OSError as error:
            raise InputError(f"{root}: cannot be written ({error.strerror}); choose another folder") from error
        yield DatasetWriter(root, done)
        marker.unlink()


def _start_dataset(root: Path, *, name: str, readme: str) -> None:
    common = {
        "BIDSVersion": _BIDS_VERSION,
        "License": "CC0",
        "GeneratedBy": [{"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}],
    }
    raw = {"Name": name, **common, "DatasetType": "raw", "Authors": ["bids_dgmseg"]}
    derivative = {
        "Name": f"{name}: true labels",
        **common,
        "DatasetType": "derivative",
        "Authors": ["bids_dgmseg"],
        "SourceDatasets": [{"URL": "../.."}],
    }
    for folder, description, text in (
        (root, raw, readme),
        (root / "derivatives" / "truth", derivative, _TRUTH_README),
    ):
        write_json(description, folder / "dataset_description.json")
        write_text(text, folder / "README")
    columns = ["index", "name", "abbreviation", "hemisphere", "color", "mapping"]
    table = pd.DataFrame([[getattr(row, column) for column in columns] for row in STRUCTURES], columns=columns)
    write_tsv(table, root / "derivatives" / "truth" / "dseg.tsv")


def _add_scan(root: Path, scan: LabelledScan) -> None:
    """Write the images of a scan with sidecars, its true labels and masks."""
    folder, truth = scan.folder(root), scan.folder(root / "derivatives" / "truth")
    folder.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    for image in scan.images:
        write_json({**scan.sidecar, **image.sidecar}, folder / f"{scan.name}_{image.suffix}.json")
        _write_image(folder / f"{scan.name}_{image.suffix}.nii.gz", image.array, scan.affine, image.scale)
    _write_image(truth / f"{scan.name}_seg-truth_dseg.nii.gz", scan.dseg, scan.affine)
    for label, mask in scan.masks.items():
        _write_image(truth / f"{scan.name}_label-{label}_mask.nii.gz", mask, scan.affine)
        write_json({"Description": f"True {label}", "Type": "ROI"}, truth / f"{scan.name}_label-{label}_mask.json")


def write_participants(
    root: Path, rows: Sequence[Mapping[str, object]], columns: Mapping[str, Mapping[str, object]]
) -> None:
    """Write participants.tsv, one row per participant, and its data dictionary."""
    write_tsv(pd.DataFrame(rows), root / "participants.tsv")
    write_json(columns, root / "participants.json")


def _write_image(path: Path, array: NDArray[Any], affine: NDArray[np.float64], scale: float | None = None) -> None:
    """Write a NIfTI file; its bytes are reproducible, since nibabel omits the time from the gzip header."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    with atomic_write(path) as temporary:
        image.to_filename(temporary)
