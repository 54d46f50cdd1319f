"""BIDS datasets of empty files, which are enough to find scans, and of small images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from bids_dgmseg.bids.dataset import Inputs, open_inputs
from bids_dgmseg.bids.derivatives import Provenance, ScanResults
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.config import Selection
from bids_dgmseg.image.grids import Box, OrientedBox
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.localize import Localization
from bids_dgmseg.segmentation.predict import Location

AFFINE = np.array([[-1.0, 0, 0, 4], [0, 2, 0, -5], [0, 0, 3, -6], [0, 0, 0, 1]])


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that creates a dataset with a name and empty files."""

    def create(name: str, *empty: str, kind: str = "raw") -> Path:
        root = tmp_path / name
        root.mkdir(parents=True)
        description = {"Name": name, "BIDSVersion": "1.11.2", "DatasetType": kind}
        (root / "dataset_description.json").write_text(json.dumps(description))
        for relative in empty:
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return create


@pytest.fixture
def inputs(dataset) -> Inputs:
    """A dataset with sessions, runs and acquisitions, and a derivative with ``desc``."""
    root = dataset(
        "ds",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_Chimap.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-2_Chimap.nii.gz",
    )
    derivative = dataset("qsmxt", "sub-02/anat/sub-02_desc-rts_Chimap.nii", kind="derivative")
    for path in [*root.rglob("*Chimap.nii*"), *derivative.rglob("*Chimap.nii*")]:
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), AFFINE), path)
    return open_inputs(root, Selection(derivatives=(derivative,)))


@pytest.fixture
def scans(inputs) -> list[Scan]:
    return find_scans(inputs)


@pytest.fixture
def filter_file(tmp_path: Path) -> Path:
    return tmp_path / "filter.json"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def results(tmp_path: Path) -> ScanResults:
    """Results of the steps of a scan, with files in a working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    labels = np.random.default_rng(0).integers(0, 17, (4, 5, 6)).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / "dseg.nii.gz")
    probseg = nib.Nifti1Image(np.full((4, 5, 6, 16), 255, np.uint8), AFFINE)
    probseg.header.set_slope_inter(1 / 255, 0)
    nib.save(probseg, folder / "probseg.nii")
    rows = ["\t".join(STATS_COLUMNS), *("\t".join(["n/a"] * len(STATS_COLUMNS)) for _ in STRUCTURES)]
    (folder / "stats.tsv").write_text("\n".join(rows) + "\n")
    (folder / "axial.png").write_bytes(b"\x89PNG")
    return ScanResults(
        chi=folder / "chi.nii",
        dseg=folder / "dseg.nii.gz",
        probseg=folder / "probseg.nii",
        stats=folder / "stats.tsv",
        location=write_location(folder),
        figures={"axial": folder / "axial.png"},
        map_report={"input": {"units": "ppb", "units_from": "sidecar", "reference": "CSF"}},
        segmentation_report={
            "model": "dgm16",
            "labels": list(MODELS["dgm16"].labels),
            "settings": {"mirrored": True},
            "edits": {},
        },
        measures_report={"measures": {"rating": "green"}},
        provenance=Provenance(sources=["bids:raw:sub-01/ses-1/anat/sub-01_ses-1_acq-x_run-1_Chimap.nii.gz"]),
    )


def write_location(folder: Path, **regions: Any) -> Path:
    """Write a box, and masks of regions, on the grid of the labels in a folder."""
    like = folder / "dseg.nii.gz"
    box = Box((-50, -70, -60.5), (50, 30, 40), OrientedBox((-17.5, 0, 2), (80, 80, 80)))
    return Localization(location=Location(box), regions=regions).write(
        folder / "location.nii.gz", Volume.read(like, np.uint8), like=like
    )
