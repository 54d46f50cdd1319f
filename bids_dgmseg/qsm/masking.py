"""Masking: the brain mask from the magnitude, and voxels whose echoes do not fit one field."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from bids_dgmseg.image.masks import large_components, masked_gaussian
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T

_BRIDGE_MM = 3.0
"""Half-width of structures that connect brain and scalp: vessels, nerves, noise in the skull."""

_REGROWTH_MM = 1.0
"""The eroded tissue grows back by this much more than was eroded."""

_OTSU_FRACTION = 0.6
"""Fraction of Otsu's threshold: tissue far from the coils is dark."""

MAX_RESIDUAL_RAD = 0.3

_MAX_RESIDUAL_OVER_MEDIAN = 5.0
"""In a noisy scan, a fixed limit of 0.3 rad would exclude as many voxels as it keeps."""

_MIN_CAVITY_MM3 = 10.0

_DARK = 0.1
"""Fraction of the median signal of tissue: anything darker is air, bone or haemorrhage."""

_FILL_SIGMA_MM = 2.0
"""SD of the Gaussian that interpolates excluded voxels."""

_CONNECTIVITY = np.ones((3, 3, 3))
"""Voxels that share a face, an edge or a corner are neighbours."""


def find_brain(magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Find the largest connected tissue, which in a head is the brain.

    Parameters
    ----------
    magnitude : ndarray of shape (X, Y, Z)
        Signal in any unit, 0 in skull-stripped voxels.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
        One component without holes; empty if no component is thicker than 6 mm; all voxels with signal if these share
        one value.

    Notes
    -----
    Otsu's threshold separates tissue from air; connections narrower than 6 mm are cut.
    """
    finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
    signal = finite[finite > 0]
    if not signal.size or signal.min() == signal.max():
        return np.asarray(finite > 0)
    tissue = finite > _OTSU_FRACTION * float(threshold_otsu(np.minimum(signal, np.percentile(signal, 99))))
    if tissue.all():
        return tissue
    core = large_components(_distance_mm(tissue, voxel_size_mm) > _BRIDGE_MM)
    if not core.any():
        return core
    grown = tissue & (_distance_mm(~core, voxel_size_mm) <= _BRIDGE_MM + _REGROWTH_MM)
    filled = ndimage.binary_fill_holes(large_components(grown))
    return np.asarray(filled, bool)


def _distance_mm(mask: NDArray[np.bool_], voxel_size_mm: Sequence[float]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(mask, sampling=voxel_size_mm)
    return distance


def phase_residual_rad(
    phase: Tensor, magnitude: Tensor, field: Tensor, *, echo_times_s: Sequence[float], b0_tesla: float, mask: Tensor
) -> Tensor:
    r"""Compute the residual of the field fit over the echoes.

    Parameters
    ----------
    phase : Tensor of shape (E, X, Y, Z)
        Unwrapped phase in rad, without offset.
    magnitude : Tensor of shape (E, X, Y, Z)
        Signal in any unit.
    field : Tensor of shape (X, Y, Z)
        Field in ppm of B0, as fitted by `combine_echoes`.
    echo_times_s : sequence of E float
        Echo times in s.
    b0_tesla : float
        Field strength in T.
    mask : Tensor of shape (X, Y, Z), bool
        Tissue; an offset common to all tissue in an echo does not count as a residual.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Root mean square in rad, weighted by the squared signal; 0 without signal.

    Notes
    -----
    .. math:: \sqrt{\frac{\sum_j M_j^2 (\varphi_j - 2\pi\gamma B_0 T_j \hat f - c_j)^2}{\sum_j M_j^2}},

    where :math:`c_j` is the mean of echo j over the tissue, with the same weights.
    """
    squared, weights = torch.zeros_like(field), torch.zeros_like(field)
    for echo, time_s in enumerate(echo_times_s):
        power = magnitude[echo].square()
        rest = phase[echo] - 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * time_s * field
        rest = rest - (power * rest)[mask].sum() / power[mask].sum().clamp(min=1e-30)
        squared, weights = squared + power * rest.square(), weights + power
    return torch.where(weights > 0, squared / weights, 0.0).sqrt()


def exclude_unreliable(
    field: NDArray[np.float32],
    residual_rad: NDArray[np.float32],
    signal: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    voxel_size_mm: Sequence[float],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Remove unreliable voxels from the mask, or interpolate their field where they are enclosed by tissue.

    Parameters
    ----------
    field : ndarray of shape (X, Y, Z)
        Field in any unit.
    residual_rad : ndarray of shape (X, Y, Z)
        Result of `phase_residual_rad`.
    signal : ndarray of shape (X, Y, Z)
        Signal of all echoes combined, in any unit.
    mask : ndarray of bool, shape (X, Y, Z)
        Tissue.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.

    Returns
    -------
    field : ndarray of shape (X, Y, Z)
        Interpolated in unreliable voxels that stay in the mask.
    mask : ndarray of bool, shape (X, Y, Z)
        Without unreliable voxels at its border and without enclosed dark cavities of more than 10 mm³, whose own field
        background removal could not remove. Flowing blood, which is bright, stays.

    Notes
    -----
    A voxel is unreliable if its residual exceeds 0.3 rad and five times the median residual.
    """
    if not mask.any():
        return field, mask
    limit_rad = max(MAX_RESIDUAL_RAD, _MAX_RESIDUAL_OVER_MEDIAN * float(np.median(residual_rad[mask])))
    unreliable = mask & (residual_rad > limit_rad)
    components, count = ndimage.label(unreliable, _CONNECTIVITY)
    if not count:
        return field, mask
    numbers = np.arange(1, count + 1)
    large = np.bincount(components.ravel())[1:] * math.prod(voxel_size_mm) > _MIN_CAVITY_MM3
    dark = ndimage.median(signal[unreliable], components[unreliable], numbers) < _DARK * np.median(signal[mask])
    at_border = np.isin(numbers, components[ndimage.binary_dilation(~mask, _CONNECTIVITY)])
    kept = mask & ~np.append(False, (dark & large) | at_border)[components]
    sums, share = masked_gaussian(field, mask & ~unreliable, [_FILL_SIGMA_MM / step for step in voxel_size_mm])
    interpolated = sums / np.maximum(share, np.finfo(np.float32).tiny)
    return np.where(kept & unreliable & (share > 0), interpolated, field).astype(np.float32), kept
