"""A BIDS dataset of maps or echoes with their true labels, as files; the same input gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

import bids_dgmseg
from bids_dgmseg.errors import InputError
from bids_dgmseg.models.structures import STRUCTURES

_BIDS_VERSION = "1.10.0"

_TRUTH_README = """\
True labels of the scans, on their own grids. dseg.tsv says which number is which nucleus; left is the patient's
left. Compare another segmentation with these files nucleus by nucleus.
"""


@dataclass(frozen=True)
class Image:
    """One file of a scan."""

    name: str
    """What follows the scan's name, such as ``echo-1_part-mag_MEGRE``."""
    array: NDArray[Any]
    """Shape (X, Y, Z): float32, or whole numbers that `scale` multiplies."""
    sidecar: Mapping[str, Any] = field(default_factory=dict)
    """Beside what the scan's images have in common."""
    scale: float | None = None
    """``scl_slope`` of the file."""


@dataclass(frozen=True)
class LabelledScan:
    """One map, or its echoes, and its truth; all arrays lie in the axes of `affine`, whatever they are."""

    participant: str
    """Without ``sub-``."""
    chi: NDArray[Any]
    """Shape (X, Y, Z): float32, or whole numbers that `scale` multiplies; with `echoes` it is not written."""
    dseg: NDArray[np.uint8]
    """Shape (X, Y, Z), numbers of structures.tsv."""
    affine: NDArray[np.float64]
    sidecar: Mapping[str, Any]
    """Of the map, or what those of the echoes have in common."""
    session: str | None = None
    """Without ``ses-``."""
    scale: float | None = None
    """``scl_slope`` of the map's file."""
    masks: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Further truth, by the value of ``label-``: shape (X, Y, Z), 1 inside."""
    echoes: Sequence[Image] = ()
    """Magnitude and phase that a map is made from, in the place of the map."""

    @property
    def images(self) -> Sequence[Image]:
        """What a scanner and a reconstruction give, without the truth."""
        return self.echoes or [Image("Chimap", self.chi, scale=self.scale)]

    @property
    def name(self) -> str:
        """Entities as in the file name."""
        return "_".join(self._entities)

    @property
    def _entities(self) -> list[str]:
        session = [f"ses-{self.session}"] if self.session else []
        return [f"sub-{self.participant}", *session]

    def folder(self, root: Path) -> Path:
        """Where the scan's files lie in a dataset."""
        return root.joinpath(*self._entities, "anat")


def start_dataset(root: Path, *, name: str, readme: str) -> None:
    """Write what describes a dataset and its ``derivatives/truth``.

    Parameters
    ----------
    root : path
        New or empty folder.
    name : str
        The dataset's title.
    readme : str
        Text of the README.

    Raises
    ------
    InputError
        If `root` exists and is not an empty folder, or cannot be written.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root.name}: exists and is not an empty folder; give a new one")
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / "README").write_text(readme, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{root}: cannot be written ({error.strerror}); choose another folder") from error
    made_by = {"Name": "bids_dgmseg", "Version": bids_dgmseg.__version__}
    common = {"BIDSVersion": _BIDS_VERSION, "License": "CC0", "GeneratedBy": [made_by]}
    write_json(
        root / "dataset_description.json",
        {
            "Name": name,
            **common,
            "DatasetType": "raw",
            "Authors": ["bids_dgmseg"],
        },
    )
    truth = root / "derivatives" / "truth"
    write_json(
        truth / "dataset_description.json",
        {
            "Name": f"{name}: true labels",
            **common,
            "DatasetType": "derivative",
            "Authors": ["bids_dgmseg"],
            "SourceDatasets": [{"URL": "../.."}],
        },
    )
    (truth / "README").write_text(_TRUTH_README, encoding="utf-8")
    columns = ("index", "name", "abbreviation", "hemisphere", "color", "mapping")
    write_tsv(truth / "dseg.tsv", [{column: getattr(row, column) for column in columns} for row in STRUCTURES])


def add_scan(root: Path, scan: LabelledScan) -> None:
    """Write one map or its echoes, with their sidecars, and the truth."""
    folder, truth = scan.folder(root), scan.folder(root / "derivatives" / "truth")
    folder.mkdir(parents=True, exist_ok=True)
    truth.mkdir(parents=True, exist_ok=True)
    for image in scan.images:
        write_json(folder / f"{scan.name}_{image.name}.json", {**scan.sidecar, **image.sidecar})
        _write_image(folder / f"{scan.name}_{image.name}.nii.gz", image.array, scan.affine, image.scale)
    _write_image(truth / f"{scan.name}_seg-truth_dseg.nii.gz", scan.dseg, scan.affine)
    for label, mask in scan.masks.items():
        _write_image(truth / f"{scan.name}_label-{label}_mask.nii.gz", mask, scan.affine)
        write_json(truth / f"{scan.name}_label-{label}_mask.json", {"Description": f"True {label}", "Type": "ROI"})


def write_participants(
    root: Path, rows: Sequence[Mapping[str, object]], columns: Mapping[str, Mapping[str, object]]
) -> None:
    """Write participants.tsv and the dictionary of its columns.

    Parameters
    ----------
    root : path
        The dataset.
    rows : sequence of mapping
        One a participant, ``participant_id`` first.
    columns : mapping
        Column → its entry of participants.json; ``participant_id`` needs none.
    """
    write_tsv(root / "participants.tsv", rows)
    write_json(root / "participants.json", columns)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tsv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows of the same keys as a table."""
    lines = ["\t".join(rows[0]), *("\t".join(str(value) for value in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_image(path: Path, array: NDArray[Any], affine: NDArray[np.float64], scale: float | None = None) -> None:
    """Write a NIfTI file; nibabel leaves the time of writing out of the gzip header."""
    image = nib.Nifti1Image(array, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    image.to_filename(path)
