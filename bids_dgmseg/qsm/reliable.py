"""Where the echoes do not agree on a field."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.image.masks import sum_nearby
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T

WORST_RAD = 0.3

_WORST_OF_TYPICAL = 5.0
"""Of the median misfit: in a noisy scan as many voxels are above 0.3 rad as below."""

_SMALL_MM3 = 10.0

_DARK = 0.1
"""Of the tissue's median signal: less is air, bone or a bleeding."""

_REACH_MM = 2.0
"""SD of the smoothing that fills what is interpolated."""

_TOUCHING = np.ones((3, 3, 3))
"""Voxels are neighbours over faces, edges or corners."""


def misfit_rad(
    phase: Tensor, magnitude: Tensor, field: Tensor, *, echo_times_s: Sequence[float], b0_tesla: float, mask: Tensor
) -> Tensor:
    r"""Measure how far the phases of the echoes lie from the line that their field makes them.

    Parameters
    ----------
    phase : Tensor of shape (E, X, Y, Z)
        Unwrapped phase in rad, without offset.
    magnitude : Tensor of shape (E, X, Y, Z)
        Signal, in any unit.
    field : Tensor of shape (X, Y, Z)
        Field in ppm of the main field, as `combine_echoes` fits it.
    echo_times_s : sequence of E float
        Echo times in s.
    b0_tesla : float
        Strength of the main field.
    mask : Tensor of shape (X, Y, Z), bool
        Where there is tissue; what all of it shares in an echo is no misfit.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Root of the mean square in rad, weighted by the squared signals; 0 where there is none.

    Notes
    -----
    .. math:: \sqrt{\frac{\sum_j M_j^2 (\varphi_j - 2\pi\gamma B_0 T_j \hat f - c_j)^2}{\sum_j M_j^2}},

    where :math:`c_j` is the mean of an echo over the tissue, weighted alike.
    """
    squared, weights = torch.zeros_like(field), torch.zeros_like(field)
    for echo, time_s in enumerate(echo_times_s):
        power = magnitude[echo].square()
        rest = phase[echo] - 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * time_s * field
        rest = rest - (power * rest)[mask].sum() / power[mask].sum().clamp(min=1e-30)
        squared, weights = squared + power * rest.square(), weights + power
    return torch.where(weights > 0, squared / weights, 0.0).sqrt()


def leave_out(
    field: NDArray[np.float32],
    misfit: NDArray[np.float32],
    signal: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    voxel_size_mm: Sequence[float],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Take voxels whose echoes do not agree out of a mask; what tissue encloses gets its neighbours' field instead.

    Parameters
    ----------
    field : ndarray of shape (X, Y, Z)
        Field, in any unit.
    misfit : ndarray of shape (X, Y, Z)
        What `misfit_rad` measures.
    signal : ndarray of shape (X, Y, Z)
        Of all echoes together, in any unit.
    mask : ndarray of bool, shape (X, Y, Z)
        Where there is tissue.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.

    Returns
    -------
    field : ndarray of shape (X, Y, Z)
        With smooth values where it was not measured but is needed.
    mask : ndarray of bool, shape (X, Y, Z)
        Without the voxels at its border that disagree, and without enclosed cavities: dark ones of more than 10 mm³,
        whose own field nothing could take for background. Flowing blood, which is bright, stays in it.

    Notes
    -----
    Voxels disagree from a misfit of 0.3 rad on, or five times the median in scans with more noise.
    """
    if not mask.any():
        return field, mask
    wrong = mask & (misfit > max(WORST_RAD, _WORST_OF_TYPICAL * float(np.median(misfit[mask]))))
    parts, count = ndimage.label(wrong, _TOUCHING)
    if not count:
        return field, mask
    numbers = np.arange(1, count + 1)
    large = np.bincount(parts.ravel())[1:] * math.prod(voxel_size_mm) > _SMALL_MM3
    dark = ndimage.median(signal[wrong], parts[wrong], numbers) < _DARK * np.median(signal[mask])
    at_border = np.isin(numbers, parts[ndimage.binary_dilation(~mask, _TOUCHING)])
    kept = mask & ~np.append(False, (dark & large) | at_border)[parts]
    sums, share = sum_nearby(field, mask & ~wrong, [_REACH_MM / step for step in voxel_size_mm])
    smooth = sums / np.maximum(share, np.finfo(np.float32).tiny)
    return np.where(kept & wrong & (share > 0), smooth, field).astype(np.float32), kept
