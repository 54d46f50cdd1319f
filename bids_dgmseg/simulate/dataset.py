"""Labelled datasets of simulated maps, or of the echoes that maps are made from, written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import bids_dgmseg
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.bids_writer import Image, LabelledScan, add_scan, start_dataset, write_participants
from bids_dgmseg.simulate.echoes import B0_TESLA, Echoes, draw_echoes
from bids_dgmseg.simulate.sample import (
    WHOLE_HEAD_VIEW,
    View,
    draw_head,
    draw_sample,
    mirror_half,
    nuclei_labels,
    phantom_head,
    template_head,
)
from bids_dgmseg.simulate.susceptibility import TISSUES

_SEEDS_A_DATASET = 100_000

_FIRST_SEED = 10**13
"""Modulo 2**32, which is what torch takes of a seed, beyond those of trainings whose seed is below 131."""

_CEREBELLUM = (1, 2, 3, 4, *(number for number, name in TISSUES.items() if "cerebellar" in name or "fastigial" in name))

_STEPS = 4096
"""Values of an image, as scanners store them; noise in every bit of a file would make it large."""

_README = """\
Simulated susceptibility maps
=============================

Made by bids_dgmseg {version}: {n_scans} heads drawn from {anatomy}, seed {seed}. Each is moved, bent and filled with
susceptibilities as they vary between people, then degraded as acquisition and reconstruction do; some maps lack slices
or have noise outside the brain. The true labels, and masks of the cerebellum, are in derivatives/truth. Left is the
patient's left.
"""

_README_OF_ECHOES = """\
Simulated gradient echoes
=========================

Made by bids_dgmseg {version}: {n_scans} heads drawn from {anatomy}, seed {seed}. Each is moved, bent and filled with
susceptibilities as they vary between people, then put into a skull with a sinus and scanned: magnitude and wrapped
phase of several gradient echoes with noise. Where the field is higher, the phase grows faster from echo to echo. The
true labels, and masks of the cerebellum, are in derivatives/truth. Left is the patient's left.
"""

_COLUMNS = {
    "brain_volume_ml": {"Description": "Volume of the head that the scan shows", "Units": "mL"},
    "n_nuclei": {"Description": "Number of nuclei, left and right apart, of which the scan shows a part"},
    "sample_seed": {"Description": "Seed of the one scan"},
}


def simulate_dataset(
    root: Path, *, n_scans: int, seed: int, template: Path | None = None, spacing_mm: float = 1.0, echoes: bool = False
) -> Iterator[str]:
    """Write a dataset of simulated maps, or of the echoes that maps are made from.

    Parameters
    ----------
    root : path
        New or empty folder.
    n_scans : int
        Number of participants, one scan each; at most 99,999.
    seed : int
        The same seed gives the same dataset on one machine; two seeds below 29,000 share no scan.
    template : path, optional
        Label template; without one the heads have the phantom's anatomy.
    spacing_mm : float
        Isotropic voxel size.
    echoes : bool
        Whether magnitude and phase of several echoes are written in the place of each map.

    Yields
    ------
    str
        The name of each scan once it is written.

    Raises
    ------
    InputError
        If `root` is not new or empty, or `template` is not a label template.
    """
    head = phantom_head() if template is None else template_head(read_template(template))
    anatomy = "the analytic phantom" if template is None else template.name
    readme = (_README_OF_ECHOES if echoes else _README).format(
        version=bids_dgmseg.__version__, n_scans=n_scans, anatomy=anatomy, seed=seed
    )
    start_dataset(root, name=readme.partition("\n")[0], readme=readme)
    view, rows = whole_head_view(spacing_mm), []
    sidecar = {"MagneticFieldStrength": B0_TESLA} if echoes else {"Units": "ppm"}
    for number in range(n_scans):
        sample_seed = _FIRST_SEED + seed * _SEEDS_A_DATASET + number
        chi, labels, images = (_draw_echoes if echoes else _draw_map)(head, view, sample_seed)
        dseg = nuclei_labels(labels).numpy()
        scan = LabelledScan(
            f"{number + 1:0{len(str(n_scans))}d}".zfill(2),
            chi.numpy(),
            dseg,
            scanner_grid(view).affine,
            {**sidecar, "Description": f"Simulated by bids_dgmseg from {anatomy}"},
            masks={"cerebellum": cerebellum_mask(labels.numpy())},
            echoes=images,
        )
        add_scan(root, scan)
        volume_ml = float((labels > 0).sum()) * spacing_mm**3 / 1000
        rows.append(
            {
                "participant_id": scan.name,
                "brain_volume_ml": f"{volume_ml:.1f}",
                "n_nuclei": np.count_nonzero(np.unique(dseg)),
                "sample_seed": sample_seed,
            }
        )
        yield scan.name
    write_participants(root, rows, _COLUMNS)


def _draw_map(head: LabelMap, view: View, seed: int) -> tuple[Tensor, Tensor, list[Image]]:
    """Draw a reconstructed map with its labels; there are no echoes."""
    return *draw_sample([(head, 1.0)], view, seed), []


def _draw_echoes(head: LabelMap, view: View, seed: int) -> tuple[Tensor, Tensor, list[Image]]:
    """Draw a true map with its labels, and its echoes as they are written."""
    generator = torch.Generator().manual_seed(seed)
    chi, labels = mirror_half(*draw_head([(head, 1.0)], view, generator), generator)
    echoes = draw_echoes(chi, labels, voxel_size_mm=(view.spacing_mm,) * 3, generator=generator)
    return echoes.chi, labels, echo_images(echoes)


def echo_images(echoes: Echoes) -> list[Image]:
    """Store echoes as scanners do, in 4096 steps: magnitudes as whole numbers, phases as float32 in rad."""
    images, turn = [], 2 * np.pi / _STEPS
    scale = float(echoes.magnitude.max()) / (_STEPS - 1)
    for number, time_s in enumerate(echoes.echo_times_s, 1):
        magnitude = np.rint(echoes.magnitude[number - 1].numpy() / scale).astype(np.uint16)
        steps = np.rint(echoes.phase[number - 1].numpy() / turn)
        phase = np.where(steps > -_STEPS / 2, steps, _STEPS / 2) * turn  # -pi is pi
        images += [
            Image(f"echo-{number}_part-mag_MEGRE", magnitude, {"EchoTime": time_s, "Units": "arbitrary"}, scale),
            Image(f"echo-{number}_part-phase_MEGRE", phase.astype(np.float32), {"EchoTime": time_s, "Units": "rad"}),
        ]
    return images


def cerebellum_mask(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mark the cerebellum with its nuclei, without the fourth ventricle."""
    return np.isin(labels, _CEREBELLUM).astype(np.uint8)


def whole_head_view(spacing_mm: float) -> View:
    """See the whole head at another voxel size."""
    x, y, z = (round(size * WHOLE_HEAD_VIEW.spacing_mm / spacing_mm) for size in WHOLE_HEAD_VIEW.shape)
    return dataclasses.replace(WHOLE_HEAD_VIEW, shape=(x, y, z), spacing_mm=spacing_mm)


def read_template(path: Path) -> Volume:
    """Read a label template.

    Raises
    ------
    InputError
        If the file cannot be read, or has numbers that no tissue has, or no nucleus.
    """
    labels = Volume.read(path, np.float32)
    known = {0, *(structure.index for structure in STRUCTURES), *TISSUES}
    found = set(np.unique(labels.array).tolist())
    if unknown := sorted(found - known):
        raise InputError(
            f"{path.name}: has the value {unknown[0]:g}, which is no label of a template; make it with "
            "`dgmseg template`"
        )
    if not found & {structure.index for structure in STRUCTURES}:
        raise InputError(f"{path.name}: shows no nucleus (labels 1 to 16); make it with `dgmseg template`")
    return labels.with_array(labels.array.astype(np.uint8))


def scanner_grid(view: View) -> Grid:
    """Place a view in the scanner: its centre is the origin."""
    x, y, z = (size * view.spacing_mm / 2 for size in view.shape)
    return world_grid(Box((-x, -y, -z), (x, y, z)), (view.spacing_mm,) * 3, view.shape)
