"""BIDS datasets of simulated maps or multi-echo GRE scans, with true labels in derivatives/truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import bids_dgmseg
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.lab.simulate.acquisition import B0_TESLA, Echoes, draw_echoes
from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, TISSUES, LabelMap
from bids_dgmseg.lab.simulate.sample import (
    TYPICAL_WIDTH,
    WHOLE_HEAD_VIEW,
    View,
    draw_head,
    draw_sample,
    mirror_randomly,
    nuclei_labels,
    phantom_head,
    read_training_head,
    typical_view,
    without_resampling,
)
from bids_dgmseg.phantom.demo import Image, LabelledScan, add_scan, start_dataset, write_participants

_SEEDS_PER_DATASET = 100_000

_FIRST_SEED = 10**13
"""Modulo 2**32, to which torch reduces seeds, this lies beyond those of trainings with a seed below 131."""

_CEREBELLUM = (1, 2, 3, 4, *(number for number, name in TISSUES.items() if "cerebellar" in name or "fastigial" in name))

_GREY_LEVELS = 4096
"""As stored by scanners; with noise in every bit, files would compress badly."""

_README = """\
Simulated susceptibility maps
=============================

Simulated by bids_dgmseg {version}: {n_scans} heads based on {anatomy}, seed {seed}. Position, shape and susceptibility
vary as between subjects; artefacts of acquisition and reconstruction are simulated. Some maps have missing slices or
noise outside the brain. True labels and masks of the cerebellum are in derivatives/truth. Left is the patient's left.
"""

_README_OF_ECHOES = """\
Simulated multi-echo GRE scans
==============================

Simulated by bids_dgmseg {version}: {n_scans} heads based on {anatomy}, seed {seed}. Position, shape and susceptibility
vary as between subjects; skull, scalp and a frontal sinus are added. Magnitude and wrapped phase of four gradient
echoes contain noise; phase increases with the field. True labels and masks of the cerebellum are in derivatives/truth.
Left is the patient's left.
"""

_TYPICAL = "They are typical 3 T scans of healthy subjects, neither young nor old, with few artefacts.\n"

_COLUMNS = {
    "brain_volume_ml": {"Description": "Volume of the head inside the field of view", "Units": "mL"},
    "n_nuclei": {"Description": "Number of nuclei at least partly inside the field of view, left and right separately"},
    "sample_seed": {"Description": "Seed of this scan"},
}


def simulate_dataset(
    root: Path,
    *,
    n_scans: int,
    seed: int,
    template: Path | None = None,
    spacing_mm: float = 1.0,
    echoes: bool = False,
    typical: bool = False,
) -> Generator[str, None, None]:
    """Write a dataset of simulated chi maps or multi-echo GRE scans.

    Parameters
    ----------
    root : path
        New or empty folder.
    n_scans : int
        Number of participants with one scan each, at most 99,999.
    seed : int
        The same seed gives the same dataset on the same machine; different seeds below 29,000 share no scan.
    template : path, optional
        Label template; by default the anatomy of the phantom.
    spacing_mm : float
        Isotropic voxel size.
    echoes : bool
        Write magnitude and phase of four echoes instead of chi maps.
    typical : bool
        Typical 3 T scans of healthy subjects, whose voxels are those of the files (`typical_view`,
        `without_resampling`).

    Yields
    ------
    str
        Name of each scan after it has been written.

    Raises
    ------
    InputError
        If `root` contains something else, or `template` is not a label template.
    """
    head = phantom_head() if template is None else read_training_head(template)
    people = 0 if head.warps is None else len(head.warps.displacement_mm)
    anatomy = "the analytic phantom" if template is None else template.name
    if people:
        anatomy += f" and the anatomy of {people} people"
    if head.others:
        anatomy += f" and nuclei of {' and '.join(head.others)}"
    readme = (_README_OF_ECHOES if echoes else _README).format(
        version=bids_dgmseg.__version__, n_scans=n_scans, anatomy=anatomy, seed=seed
    )
    if typical:
        readme += _TYPICAL
    view = whole_head_view(spacing_mm)
    if typical:
        view = without_resampling(typical_view(view, TYPICAL_WIDTH))
    sidecar = {"MagneticFieldStrength": B0_TESLA} if echoes else {"Units": "ppm"}
    start_dataset(root, name=readme.partition("\n")[0], readme=readme)
    rows = []
    for number in range(n_scans):
        participant = f"{number + 1:0{len(str(n_scans))}d}".zfill(2)
        sample_seed = _FIRST_SEED + seed * _SEEDS_PER_DATASET + number
        images, labels = _draw_images(head, view, sample_seed, echoes=echoes)
        dseg = nuclei_labels(labels).numpy()
        scan = LabelledScan(
            participant,
            images,
            dseg,
            scanner_grid(view).affine,
            {**sidecar, "Description": f"Simulated by bids_dgmseg from {anatomy}"},
            masks={"cerebellum": cerebellum_mask(labels.numpy())},
        )
        volume_ml = float((labels > 0).sum()) * spacing_mm**3 / 1000
        rows.append(
            {
                "participant_id": scan.name,
                "brain_volume_ml": f"{volume_ml:.1f}",
                "n_nuclei": int(np.count_nonzero(np.unique(dseg))),
                "sample_seed": sample_seed,
            }
        )
        add_scan(root, scan)
        yield scan.name
    write_participants(root, rows, _COLUMNS)


def _draw_images(head: LabelMap, view: View, seed: int, *, echoes: bool) -> tuple[list[Image], Tensor]:
    """Draw the map of a head, or its echoes, and its labels (X, Y, Z)."""
    if echoes:
        simulated, labels = draw_echo_scan(head, view, seed)
        return echo_images(simulated), labels
    chi, labels, _ = draw_sample([(head, 1.0)], view, seed)
    return [Image("Chimap", chi.numpy())], labels % IN_VEIN


def draw_echo_scan(head: LabelMap, view: View, seed: int) -> tuple[Echoes, Tensor]:
    """Draw the echoes of a head, which hold the true chi map, and its labels (X, Y, Z)."""
    generator = torch.Generator().manual_seed(seed)
    chi, labels = mirror_randomly(*draw_head([(head, 1.0)], view, generator), generator)
    return draw_echoes(chi, labels, voxel_size_mm=(view.spacing_mm,) * 3, generator=generator), labels


def echo_images(echoes: Echoes) -> list[Image]:
    """Quantize echoes to 4096 levels, as scanners do: magnitude as integers, phase as float32 in rad."""
    images, step_rad = [], 2 * np.pi / _GREY_LEVELS
    scale = float(echoes.magnitude.max()) / (_GREY_LEVELS - 1)
    for number, time_s in enumerate(echoes.echo_times_s, 1):
        magnitude = np.rint(echoes.magnitude[number - 1].numpy() / scale).astype(np.uint16)
        steps = np.rint(echoes.phase[number - 1].numpy() / step_rad)
        phase = np.where(steps > -_GREY_LEVELS / 2, steps, _GREY_LEVELS / 2) * step_rad  # -pi is pi
        images += [
            Image(f"echo-{number}_part-mag_MEGRE", magnitude, {"EchoTime": time_s, "Units": "arbitrary"}, scale),
            Image(f"echo-{number}_part-phase_MEGRE", phase.astype(np.float32), {"EchoTime": time_s, "Units": "rad"}),
        ]
    return images


def cerebellum_mask(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mask of the cerebellum with its nuclei, without the fourth ventricle."""
    return np.isin(labels, _CEREBELLUM).astype(np.uint8)


def whole_head_view(spacing_mm: float) -> View:
    """Return the field of view of the whole head at a voxel size."""
    x, y, z = (round(size * WHOLE_HEAD_VIEW.spacing_mm / spacing_mm) for size in WHOLE_HEAD_VIEW.shape)
    return dataclasses.replace(WHOLE_HEAD_VIEW, shape=(x, y, z), spacing_mm=spacing_mm)


def scanner_grid(view: View) -> Grid:
    """Return the grid of a view in scanner coordinates, centred on the origin."""
    x, y, z = (size * view.spacing_mm / 2 for size in view.shape)
    return world_grid(Box((-x, -y, -z), (x, y, z)), (view.spacing_mm,) * 3, view.shape)
