"""Labelled datasets of simulated maps: what a model is trained on, written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import bids_dgmseg
from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.resample import Grid, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.simulate.sample import WHOLE_HEAD_VIEW, View, draw_sample, nuclei_labels, phantom_head, template_head
from bids_dgmseg.simulate.susceptibility import TISSUES
from bids_dgmseg.simulate.tree import LabelledScan, add_scan, start_dataset, write_participants
from bids_dgmseg.structures import STRUCTURES

_SEEDS_A_DATASET = 100_000
_FIRST_SEED = 10**13
"""Modulo 2**32, which is what torch takes of a seed, beyond those of trainings whose seed is below 131."""

_CEREBELLUM = (1, 2, 3, 4, *(number for number, name in TISSUES.items() if "cerebellar" in name or "fastigial" in name))

_README = """\
Simulated susceptibility maps
=============================

Made by bids_dgmseg {version}: {n_scans} heads drawn from {anatomy}, seed {seed}. Each is moved, bent and filled with
susceptibilities as they vary between people, then degraded as acquisition and reconstruction do; some maps lack slices
or have noise outside the brain. The true labels, and masks of the cerebellum, are in derivatives/truth. Left is the
patient's left.
"""
_COLUMNS = {
    "brain_volume_ml": {"Description": "Volume of the head that the map shows", "Units": "mL"},
    "n_nuclei": {"Description": "Number of nuclei, left and right apart, of which the map shows a part"},
    "sample_seed": {"Description": "Seed of the one map"},
}


def simulate_dataset(
    root: Path, *, n_scans: int, seed: int, template: Path | None = None, spacing_mm: float = 1.0
) -> Iterator[str]:
    """Write a dataset of simulated maps.

    Parameters
    ----------
    root : path
        New or empty folder.
    n_scans : int
        Number of participants, one map each; at most 99,999.
    seed : int
        The same seed gives the same dataset on one machine; two seeds below 29,000 share no map.
    template : path, optional
        Label template; without one the heads have the phantom's anatomy.
    spacing_mm : float
        Isotropic voxel size.

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
    readme = _README.format(version=bids_dgmseg.__version__, n_scans=n_scans, anatomy=anatomy, seed=seed)
    start_dataset(root, name="Simulated susceptibility maps", readme=readme)
    view, rows = whole_head_view(spacing_mm), []
    sidecar = {"Units": "ppm", "Description": f"Simulated by bids_dgmseg from {anatomy}"}
    for number in range(n_scans):
        sample_seed = _FIRST_SEED + seed * _SEEDS_A_DATASET + number
        chi, labels = draw_sample([(head, 1.0)], view, sample_seed)
        dseg = nuclei_labels(labels).numpy()
        scan = LabelledScan(
            f"{number + 1:0{len(str(n_scans))}d}".zfill(2), chi.numpy(), dseg, scanner_grid(view).affine, sidecar,
            masks={"cerebellum": cerebellum_mask(labels.numpy())},
        )  # fmt: skip
        add_scan(root, scan)
        volume_ml = float((labels > 0).sum()) * spacing_mm**3 / 1000
        rows.append({"participant_id": scan.name, "brain_volume_ml": f"{volume_ml:.1f}",
                     "n_nuclei": np.count_nonzero(np.unique(dseg)), "sample_seed": sample_seed})  # fmt: skip
        yield scan.name
    write_participants(root, rows, _COLUMNS)


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
        raise InputError(f"{path.name}: has the value {unknown[0]:g}, which is no label of a template; make it with "
                         "`dgmseg template`")  # fmt: skip
    if not found & {structure.index for structure in STRUCTURES}:
        raise InputError(f"{path.name}: shows no nucleus (labels 1 to 16); make it with `dgmseg template`")
    return labels.with_array(labels.array.astype(np.uint8))


def scanner_grid(view: View) -> Grid:
    """Place a view in the scanner: its centre is the origin."""
    x, y, z = (size * view.spacing_mm / 2 for size in view.shape)
    return world_grid(Box((-x, -y, -z), (x, y, z)), (view.spacing_mm,) * 3, view.shape)
