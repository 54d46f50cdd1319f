"""From the phase and magnitude of echoes to a susceptibility map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.qsm.background import v_sharp
from bids_dgmseg.qsm.field import combine_echoes, dipole_kernel, enlarge, fast_size
from bids_dgmseg.qsm.invert import total_variation
from bids_dgmseg.qsm.readout import remove_alternation
from bids_dgmseg.qsm.reliable import WORST_RAD, leave_out, misfit_rad
from bids_dgmseg.qsm.tissue import find_tissue
from bids_dgmseg.qsm.unwrap import unwrap_echoes

RADII_MM = (12.0, 8.0, 5.0, 3.0)
"""Of V-SHARP's spheres; nearer to the mask's border than the smallest are no deep nuclei, but artefacts."""

STRENGTH = 2e-4
"""Of the total variation."""

_RIDGE, _ITERATIONS = 0.0005, 30

_TINY_PPM = 1e-6

_MARGIN_MM = 20.0
"""Zeros about the field of view, so that its opposite faces hardly feel one another."""

_DEEP = 0.4
"""Depth below the mask's border, as part of the largest, from which on the sign is judged: residual fields are less."""

_BLUR_MM = 1.5
"""SD of the smoothing of the map whose sign is judged."""

_TAIL = 0.5
"""Percent of the voxels that are extreme on either side: nuclei and veins on one, calcium on the other."""


@dataclass(frozen=True)
class Reconstructed:
    """A susceptibility map and how it came about."""

    chi_ppm: NDArray[np.float32]
    """Shape (X, Y, Z), its mean over the tissue 0; 0 outside."""
    mask: NDArray[np.bool_]
    """Shape (X, Y, Z): tissue without the rim that background removal takes."""
    phase_sign: int
    """1 where phase grows with the field, -1 where it falls."""
    sign_ratio: float
    """How many times farther from the median the positive extreme is than the negative one, in the deep brain."""
    alternation_rad: float | None
    """Range of the ramp that alternated from echo to echo and was removed; 0 if there was none, None if unknown."""


def describe_steps(n_echoes: int) -> dict[str, str]:
    """Tell the steps in words, as they are taken with that many echoes: for the sidecar of a map."""
    several = n_echoes > 1
    return {
        "Unwrapping": "turn between the first two echoes in space, all echoes in time, smooth offset removed"
        if several
        else "in space; the coil's offset is left",
        "FieldFit": f"weighted least squares, voxels where the echoes disagree by more than {WORST_RAD:g} rad left out"
        if several
        else "the echo's phase over its time",
        "BackgroundFieldRemoval": f"V-SHARP, radii {', '.join(f'{radius:g}' for radius in RADII_MM)} mm",
        "DipoleInversion": f"least total variation, strength {STRENGTH:g}, {_ITERATIONS} iterations",
    }


def reconstruct_chi(
    phase: NDArray[np.float32],
    magnitude: NDArray[np.float32],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    mask: NDArray[np.bool_] | None = None,
    phase_sign: int | None = None,
) -> Reconstructed:
    """Reconstruct susceptibility: unwrap, fit the field where echoes agree, remove the background, invert.

    Parameters
    ----------
    phase : ndarray of shape (E, X, Y, Z)
        Wrapped phase in rad; voxels where it is not finite are left out.
    magnitude : ndarray of shape (E, X, Y, Z)
        Signal, in any unit.
    echo_times_s : sequence of E float
        Echo times in s, rising.
    b0_tesla : float
        Strength of the main field.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    b0_direction : sequence of 3 float
        Direction of the main field along the grid's axes.
    mask : ndarray of bool, shape (X, Y, Z), optional
        The brain; by default what `find_tissue` finds in all echoes together.
    phase_sign : {1, -1}, optional
        Whether phase grows or falls with the field; by default what makes the extreme values of the map positive, as
        those of veins and iron are.

    Raises
    ------
    ValueError
        If no voxel of the mask is far enough from its border.

    See Also
    --------
    remove_alternation, unwrap_echoes, combine_echoes, leave_out, v_sharp, total_variation : The steps, with sources.
    """
    seen = np.isfinite(phase).all(axis=0)
    phase, magnitude = np.where(seen, phase, np.float32(0)), np.where(seen, magnitude, np.float32(0))
    if mask is None:
        mask = find_tissue(np.sqrt(np.square(magnitude).sum(axis=0)), voxel_size_mm=voxel_size_mm)
    phases, signal, brain = torch.from_numpy(phase), torch.from_numpy(magnitude), torch.from_numpy(mask & seen)
    phases, ramp_rad = remove_alternation(phases, signal, brain, echo_times_s=echo_times_s)
    unwrapped = unwrap_echoes(phases, signal, brain, echo_times_s=echo_times_s, voxel_size_mm=voxel_size_mm)
    field = combine_echoes(unwrapped, signal, echo_times_s=echo_times_s, b0_tesla=b0_tesla)
    field, brain = _agreed(
        field, unwrapped, signal, brain, echo_times_s=echo_times_s, b0_tesla=b0_tesla, voxel_size_mm=voxel_size_mm
    )
    local, inside = v_sharp(field, brain, voxel_size_mm=voxel_size_mm, radii_mm=RADII_MM)
    if not inside.any():
        raise ValueError("no voxel is far enough from the border of the mask")
    chi = _invert(local, voxel_size_mm, b0_direction)
    chi = torch.where(inside, chi - chi[inside].mean(), 0.0)
    kept = inside.numpy()
    ratio = _tail_ratio(chi.numpy(), kept, voxel_size_mm)
    sign = phase_sign or (1 if ratio >= 1 else -1)
    return Reconstructed(sign * chi.numpy(), kept, sign, ratio if sign > 0 else 1 / ratio, ramp_rad)


def _agreed(
    field: Tensor,
    unwrapped: Tensor,
    signal: Tensor,
    brain: Tensor,
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    voxel_size_mm: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Leave out of the field and the brain where the echoes do not agree."""
    misfit = misfit_rad(unwrapped, signal, field, echo_times_s=echo_times_s, b0_tesla=b0_tesla, mask=brain)
    total = signal.square().sum(dim=0).sqrt()
    agreed, kept = leave_out(field.numpy(), misfit.numpy(), total.numpy(), brain.numpy(), voxel_size_mm=voxel_size_mm)
    return torch.from_numpy(agreed), torch.from_numpy(kept)


def estimate_memory_gb(shape: Sequence[int], voxel_size_mm: Sequence[float], *, n_echoes: int) -> float:
    """Estimate the memory that `reconstruct_chi` needs at most, its arguments included.

    Parameters
    ----------
    shape : sequence of 3 int
        Voxels of an echo.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    n_echoes : int
        Number of echoes.

    Notes
    -----
    Five arrays of all echoes, 140 bytes a voxel of the grid that the inversion works on, and what imports take;
    `benchmarks/reconstruction.py --memory` holds it against what processes took.
    """
    padded = math.prod(_padded(shape, voxel_size_mm))
    return (600e6 + 4 * 5 * n_echoes * math.prod(shape) + 140 * padded) / 1e9


def _invert(local: Tensor, voxel_size_mm: Sequence[float], b0_direction: Sequence[float]) -> Tensor:
    shape = _padded(local.shape, voxel_size_mm)
    kernel = dipole_kernel(shape, voxel_size_mm, b0_direction, device=local.device)
    inverted = total_variation(
        enlarge(local, shape),
        kernel,
        strength=STRENGTH,
        voxel_size_mm=voxel_size_mm,
        ridge=_RIDGE,
        iterations=_ITERATIONS,
    )
    x, y, z = local.shape
    return inverted[:x, :y, :z]


def _padded(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[int]:
    sizes = zip(shape, voxel_size_mm, strict=True)
    return [fast_size(size + 2 * math.ceil(_MARGIN_MM / step)) for size, step in sizes]


def _tail_ratio(chi: NDArray[np.float32], mask: NDArray[np.bool_], voxel_size_mm: Sequence[float]) -> float:
    """Compare how far the highest and the lowest values of the deep brain lie from its median."""
    distance_mm = ndimage.distance_transform_edt(mask, sampling=voxel_size_mm)
    deep = distance_mm > _DEEP * distance_mm.max()
    smooth = ndimage.gaussian_filter(chi, [_BLUR_MM / step for step in voxel_size_mm])
    low, middle, high = np.percentile(smooth[deep], (_TAIL, 50, 100 - _TAIL))
    return float(max(high - middle, _TINY_PPM) / max(middle - low, _TINY_PPM))
