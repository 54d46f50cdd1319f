"""Read multi-echo GRE files and reconstruct their chi map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.phase import read_phase
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.qsm.reconstruct import Reconstruction, reconstruct_chi

PHASE_SIGNS = {"auto": None, "positive": 1, "negative": -1}
"""How the phase follows the field → ``phase_sign`` of `reconstruct_chi`."""


def reconstruct_files(
    magnitude: Sequence[Path],
    phase: Sequence[Path],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    phase_units: Sequence[str] = (),
    mask: Path | None = None,
    phase_sign: str = "auto",
) -> Reconstruction:
    """Read the echoes of a scan, all on one grid, and reconstruct its chi map.

    Parameters
    ----------
    magnitude, phase : sequence of E path
        NIfTI files, one per echo.
    echo_times_s : sequence of E float
        Echo times in s, in ascending order.
    b0_tesla : float
        Field strength in T.
    phase_units : sequence of E str
        ``Units`` of the phase files, see `bids_dgmseg.image.phase.read_phase`; by default judged from the values.
    mask : path, optional
        Brain mask; by default the brain is found in the magnitude.
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases or decreases with the field.

    Returns
    -------
    Reconstruction
        Arrays in RAS+ axes on the grid of the first magnitude.

    Raises
    ------
    InputError
        If a file cannot be read or used, the grids differ, or no tissue is left inside the mask.
    """
    grid, first = Volume.read(magnitude[0]), magnitude[0].name
    units = phase_units or [""] * len(phase)
    phases, magnitudes = (np.empty((len(magnitude), *grid.shape), np.float32) for _ in range(2))
    for echo in range(len(magnitude)):
        stored = read_phase(phase[echo], units=units[echo])
        phases[echo] = _on_grid(stored, grid, phase[echo], first, "export both from the same scan")
        magnitudes[echo] = _read_magnitude(magnitude[echo], grid, first)
    x, y, z = (grid.affine[2, :3] / grid.voxel_size_mm).tolist()
    try:
        return reconstruct_chi(
            phases,
            magnitudes,
            echo_times_s=echo_times_s,
            b0_tesla=b0_tesla,
            voxel_size_mm=grid.voxel_size_mm,
            b0_direction=(x, y, z),  # B0 is z of the world, however the slices are tilted
            mask=None if mask is None else _read_mask(mask, grid, first),
            phase_sign=PHASE_SIGNS[phase_sign],
        )
    except ValueError as error:
        raise InputError(f"{(mask or magnitude[0]).name}: {error}; provide a brain mask that fits the brain") from error


def _read_magnitude(path: Path, grid: Volume, first: str) -> NDArray[np.float32]:
    array = _on_grid(Volume.read(path), grid, path, first, "export both from the same scan")
    check_intact(path)
    values = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
    if values.min() < 0 or values.max() == values.min():
        raise InputError(
            f"{path.name}: values from {values.min():.4g} to {values.max():.4g}, expected a magnitude image "
            "(not negative, not constant); export it again"
        )
    return np.asarray(values, np.float32)


def _read_mask(path: Path, grid: Volume, first: str) -> NDArray[np.bool_]:
    mask = _on_grid(Volume.read(path), grid, path, first, "resample the mask first")
    check_intact(path)
    return np.asarray(mask > 0)


def _on_grid(volume: Volume, grid: Volume, path: Path, first: str, remedy: str) -> NDArray[Any]:
    if difference := describe_grid_mismatch(grid, volume):
        raise InputError(f"{path.name}: does not lie on the grid of {first} ({difference}); {remedy}")
    return volume.array
