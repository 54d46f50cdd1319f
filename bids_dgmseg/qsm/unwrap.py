"""Take the wraps and the coil's offset out of the phases of several echoes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from skimage.restoration import unwrap_phase
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, enlarge, fast_size, frequencies_per_mm

_OFFSET_WIDTH_MM = 5.0
"""SD of the smoothing of the offset: coils' phases vary over centimetres, noise from voxel to voxel."""


def unwrap_echoes(
    phase: Tensor, magnitude: Tensor, mask: Tensor, *, echo_times_s: Sequence[float], voxel_size_mm: Sequence[float]
) -> Tensor:
    r"""Unwrap the phases of the echoes of one scan, and take the phase at echo time 0 away.

    Parameters
    ----------
    phase : Tensor of shape (E, X, Y, Z)
        Wrapped phase in rad.
    magnitude : Tensor of shape (E, X, Y, Z)
        Signal, in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Where there is tissue.
    echo_times_s : sequence of E float
        Echo times in s, rising.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.

    Returns
    -------
    Tensor of shape (E, X, Y, Z)
        Phase in rad as `combine_echoes` wants it, 0 outside the mask. A constant field may be left in it.

    Notes
    -----
    What turns between the first two echoes, :math:`\theta = \arg(S_2 \bar S_1)`, has no offset and few wraps; it is
    unwrapped in space, in the order of the voxels' reliability [1]_. The offset is
    :math:`\arg S_1 - \theta T_1 / (T_2 - T_1)`, smoothed [2]_. Each echo is then unwrapped in time: but for a constant,
    it lies within half a turn of what the echoes before it, weighted as in `combine_echoes`, let expect. A single
    echo is unwrapped in space and keeps its offset.

    References
    ----------
    .. [1] Abdul-Rahman HS, et al. Appl Opt 46 (2007) 6623-6635. doi:10.1364/AO.46.006623
    .. [2] Eckstein K, et al. Magn Reson Med 79 (2018) 2996-3006. doi:10.1002/mrm.26963
    """
    if len(echo_times_s) == 1:
        return unwrap_in_space(phase[0], mask)[None]
    times = list(echo_times_s)
    turn = unwrap_in_space(wrap(phase[1] - phase[0]), mask) / (times[1] - times[0])
    offset = _smooth_angle(phase[0] - turn * times[0], magnitude[0] * mask, voxel_size_mm)
    unwrapped = torch.zeros_like(phase)
    weighted, weights = torch.zeros_like(turn), torch.zeros_like(turn)
    for echo, time_s in enumerate(times):
        expected = turn * time_s
        rest = phase[echo] - offset - expected
        # Whole turns that the first difference does not tell are the same everywhere, but not whole at uneven times.
        rest = rest - _mean_angle(rest, magnitude[echo] * mask)
        unwrapped[echo] = torch.where(mask, expected + wrap(rest), 0.0)
        weight = magnitude[echo].square() * time_s
        weighted, weights = weighted + weight * unwrapped[echo], weights + weight * time_s
        if echo:  # the first echo alone is noisier than what turns between the first two
            turn = torch.where(weights > 0, weighted / weights, turn)
    return unwrapped


def unwrap_in_space(phase: Tensor, mask: Tensor) -> Tensor:
    """Unwrap one phase (X, Y, Z) within a mask; its median there is within half a turn of 0.

    Notes
    -----
    scikit-image breaks ties by random numbers; their seed is fixed.
    """
    hidden = np.ma.masked_array(phase.cpu().double().numpy(), ~mask.cpu().numpy())
    smooth = torch.from_numpy(np.asarray(np.ma.filled(unwrap_phase(hidden, rng=0), 0.0))).to(phase)
    inside = smooth[mask]
    turns = torch.round(inside.median() / (2 * math.pi)) if len(inside) else 0.0
    return torch.where(mask, smooth - 2 * math.pi * turns, 0.0)


def wrap(angle: Tensor) -> Tensor:
    """Bring angles in rad within half a turn of 0."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def _mean_angle(angle: Tensor, weight: Tensor) -> Tensor:
    """Direction of the weighted sum of unit vectors; weights count by their squares."""
    power = weight.square()
    return torch.atan2((power * angle.sin()).sum(), (power * angle.cos()).sum())


def _smooth_angle(angle: Tensor, weight: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Smooth an angle as the direction of weighted unit vectors; beyond the grid is nothing."""
    steps = zip(angle.shape, voxel_size_mm, strict=True)
    shape = [fast_size(size + math.ceil(4 * _OFFSET_WIDTH_MM / step)) for size, step in steps]
    squared = torch.zeros((), device=angle.device)
    for k in frequencies_per_mm(shape, voxel_size_mm, device=angle.device):
        squared = squared + k**2
    kernel = torch.exp(-2 * (math.pi * _OFFSET_WIDTH_MM) ** 2 * squared)
    x, y = (apply_kernel(enlarge(weight * part, shape), kernel) for part in (angle.cos(), angle.sin()))
    inner = tuple(slice(size) for size in angle.shape)
    return torch.atan2(y[inner], x[inner])
