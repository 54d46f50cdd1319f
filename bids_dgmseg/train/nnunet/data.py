"""Settings of an nnU-Net training, and labelled maps as an nnU-Net raw dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import box_of_mask
from bids_dgmseg.image.grids import Grid, block_affine, covering_block
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import write_json
from bids_dgmseg.train.splits import FRACTIONS, Part

PlanName = Literal["paper", "small"]


@dataclass(frozen=True)
class NnunetTraining:
    """Length, size and machine of a training; lengths are totals over all calls."""

    epochs: int = 5000
    """Of 50 iterations; nnU-Net's own 1000 have 250."""
    minutes: float | None = None
    seed: int = 1
    device: str = "auto"
    workers: int = 1
    """Processes that generate samples; with 1 the training process does."""
    checkpoint_minutes: float = 2.0
    iterations: int = 50
    """Steps per epoch, a fifth of nnU-Net's, so that an interruption loses little."""
    validation_iterations: int = 10
    """Validation batches per epoch."""
    plan: PlanName = "paper"
    """Network, patch and voxels: DentateSeg's and nnU-Net's own, or small enough for a package."""


@dataclass(frozen=True)
class NnunetCase:
    """One labelled scan of an nnU-Net dataset."""

    name: str
    chi: Volume
    """In ppm, finite."""
    labels: NDArray[np.uint8]
    """On the grid of `chi`: 1, 2, … in the order of the dataset's names."""
    part: Part


def crop_to_cerebellum(case: NnunetCase, cerebellum: NDArray[np.bool_], *, margin_mm: float) -> NnunetCase:
    """Crop a case to the box that step one passes to step two."""
    box = box_of_mask(case.chi.with_array(cerebellum)).expanded(margin_mm)
    block = covering_block(Grid(case.chi.shape, case.chi.affine), box)
    chi = Volume(case.chi.array[block], block_affine(case.chi.affine, block))
    return NnunetCase(case.name, chi, case.labels[block], case.part)


def write_raw_dataset(folder: Path, cases: Iterable[NnunetCase], names: Sequence[str]) -> dict[Part, list[str]]:
    """Write an nnU-Net raw dataset of the training and validation cases; test cases are left out.

    Parameters
    ----------
    folder : path
        ``DatasetNNN_NAME``, new.
    cases : iterable of NnunetCase
        Written with RAS+ axes.
    names : sequence of str
        Of the labels 1, 2, …

    Returns
    -------
    dict
        Names of the cases of each part.
    """
    written: dict[Part, list[str]] = {part: [] for part in FRACTIONS}
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for case in cases:
        written[case.part].append(case.name)
        if case.part != "test":
            chi = np.asarray(case.chi.array, np.float32)
            nib.Nifti1Image(chi, case.chi.affine).to_filename(folder / "imagesTr" / f"{case.name}_0000.nii.gz")
            nib.Nifti1Image(case.labels, case.chi.affine).to_filename(folder / "labelsTr" / f"{case.name}.nii.gz")
    content = {
        "channel_names": {"0": "QSM"},
        "labels": {"background": 0, **{name: number for number, name in enumerate(names, start=1)}},
        "numTraining": len(written["train"]) + len(written["tune"]),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        "orientation": "RAS",
    }
    write_json(content, folder / "dataset.json")
    return written
