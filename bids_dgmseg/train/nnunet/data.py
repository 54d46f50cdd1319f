"""What a training of nnU-Net is given: its length, and labelled maps as a raw dataset, two files a scan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import box_of_mask
from bids_dgmseg.image.grids import Grid, block_affine, covering_block
from bids_dgmseg.image.volume import Volume

Part = Literal["train", "tune", "test"]

PlanName = Literal["paper", "small"]

SHARES: Mapping[Part, float] = {"train": 0.7, "tune": 0.1, "test": 0.2}
"""As in DentateSeg's study."""


@dataclass(frozen=True)
class NnunetTraining:
    """How long, how large and where; the whole length, all runs together."""

    epochs: int = 5000
    """Of 50 iterations; nnU-Net's own 1000 have 250."""
    minutes: float | None = None
    seed: int = 1
    device: str = "auto"
    workers: int = 1
    """Processes that make samples; 1: the one that learns does."""
    checkpoint_minutes: float = 2.0
    iterations: int = 50
    """Steps an epoch, a fifth of nnU-Net's: a kill loses little."""
    watched: int = 10
    """Batches of other scans after each epoch."""
    plan: PlanName = "paper"
    """Network, patch and voxels: DentateSeg's and nnU-Net's own, or small enough for a package."""


@dataclass(frozen=True)
class Case:
    """One labelled scan of an nnU-Net dataset."""

    name: str
    chi: Volume
    """In ppm, finite."""
    labels: NDArray[np.uint8]
    """On the grid of `chi`: 1, 2, … in the order of the dataset's names."""
    part: Part


def split_by_site(sites: Mapping[str, str], *, seed: int) -> dict[str, Part]:
    """Divide participants into 70 % to learn from, 10 % to watch and 20 % to test, in each site alike.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    seed : int
        Which of a site's participants go where.

    Returns
    -------
    dict
        Participant → part. From three participants on no part is empty.
    """
    random = np.random.default_rng(seed)
    order = [name for _, _, name in sorted((sites[name], random.random(), name) for name in sorted(sites))]
    counts: dict[Part, int] = dict.fromkeys(SHARES, 0)
    parts: dict[str, Part] = {}
    for place, name in enumerate(order, start=1):
        behind = {part: share * place - counts[part] for part, share in SHARES.items()}
        parts[name] = max(behind, key=lambda part: behind[part])
        counts[parts[name]] += 1
    if len(order) >= 3:
        for part in ("tune", "test"):
            if part not in parts.values():
                learned = [name for name in order if parts[name] == "train"]
                parts[learned[-1]] = part
    return parts


def crop_to_cerebellum(case: Case, cerebellum: NDArray[np.bool_], *, margin_mm: float) -> Case:
    """Cut a case to the box that step one hands to step two."""
    box = box_of_mask(case.chi.with_array(cerebellum)).expanded(margin_mm)
    block = covering_block(Grid(case.chi.shape, case.chi.affine), box)
    chi = Volume(case.chi.array[block], block_affine(case.chi.affine, block))
    return Case(case.name, chi, case.labels[block], case.part)


def write_raw(folder: Path, cases: Iterable[Case], names: Sequence[str]) -> dict[Part, list[str]]:
    """Write an nnU-Net raw dataset of the cases to learn from and to watch; those to test are left out.

    Parameters
    ----------
    folder : path
        ``DatasetNNN_NAME``, new.
    cases : iterable of Case
        Written with RAS+ axes.
    names : sequence of str
        Of the labels 1, 2, …

    Returns
    -------
    dict
        Names of the cases of each part.
    """
    written: dict[Part, list[str]] = {part: [] for part in SHARES}
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
    (folder / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return written
