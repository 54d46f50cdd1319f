"""From the echoes to a reliable field: ramps of a bipolar readout, unwrapping, unreliable voxels.

In this module, `phase` (E, X, Y, Z) is in rad, `magnitude` (E, X, Y, Z) in any unit, `mask` (X, Y, Z) is the tissue,
and `echo_times_s` are in ascending order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.masks import masked_gaussian
from bids_dgmseg.qsm.field import (
    GYROMAGNETIC_MHZ_PER_T,
    apply_kernel,
    combine_echoes,
    fast_size,
    frequencies_per_mm,
    is_evenly_spaced,
    subtract_mean,
    zero_pad,
)

_OFFSET_SIGMA_MM = 5.0
"""SD of the Gaussian that smooths the phase offset: coil phase varies over centimetres, noise from voxel to voxel."""

_MIN_READOUT_RAD = 0.1
"""Phases of the readout with a smaller range over the tissue are within the noise."""

MAX_RESIDUAL_RAD = 0.3

_MAX_RESIDUAL_OVER_MEDIAN = 5.0
"""In a noisy scan, a fixed limit of 0.3 rad would exclude as many voxels as it keeps."""

_STEEP_RAD = 2.0
"""Difference of neighbours in a single echo from which it may be one of more than half a turn: near air."""

_MIN_FRINGE_MM = 20.0
"""Length of residues (loops of voxels around which the phase does not return to itself) that noise does not reach."""

_SHARED_MM = 4.0
"""Distance of voxels that share no noise, even in interpolated images."""

_MIN_CAVITY_MM3 = 10.0

_DARK = 0.1
"""Fraction of the median signal of tissue: anything darker is air, bone or haemorrhage."""

_FILL_SIGMA_MM = 2.0
"""SD of the Gaussian that interpolates excluded voxels."""

_CUBE, _QUIET = 5, 0.1
"""Of `thermal_noise_sd`: edge of the cubes in voxels, and the fraction of the tissue that counts."""

_CONNECTIVITY = np.ones((3, 3, 3))
"""Voxels that share a face, an edge or a corner are neighbours."""


@dataclass(frozen=True)
class TotalField:
    """The field of all sources, as if phase increased with it; arrays have shape (X, Y, Z)."""

    field_ppm: NDArray[np.float32]
    reliable: NDArray[np.bool_]
    wider: tuple[NDArray[np.float32], NDArray[np.bool_]] | None
    """Both for a mask that is larger by a layer of voxels; None with a single echo."""
    signal_noise: float | None
    """SD of the receiver's noise, in the unit of the magnitude; None with a single echo."""
    readout_rad: float | None
    """Range of the phase of a bipolar readout, see `correct_bipolar_readout`."""
    disagreement_rad: float
    """Smooth phase that no field explains, see `fit_residual_rad`."""
    fringe_mm: float
    """Length of the open ends of fringe lines in a single echo, if more than noise has; else 0."""


def fit_total_field(
    phase: Tensor,
    magnitude: Tensor,
    mask: Tensor,
    combined: NDArray[np.float32],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    voxel_size_mm: Sequence[float],
) -> TotalField:
    """Correct and unwrap the echoes, fit their field and exclude unreliable voxels.

    `combined` is the root of the sum of squares of the magnitudes. ValueError if no voxel is reliable.
    """
    options: dict[str, Any] = {"echo_times_s": echo_times_s, "voxel_size_mm": voxel_size_mm}
    phase, readout_rad = correct_bipolar_readout(phase, magnitude, mask, **options)
    masks, fringe_mm = [mask], 0.0
    if len(echo_times_s) == 1:
        slope = steepest_rad(phase[0], mask)
        certain = mask & (slope < _STEEP_RAD)
        fringe_mm = measure_fringes(phase[0], certain, voxel_size_mm=voxel_size_mm)
        unwrapped = (
            unwrap_laplacian(phase[0], certain, voxel_size_mm=voxel_size_mm)
            if fringe_mm
            else unwrap_by_region_growing(phase[0], magnitude[0], mask)
        )[None]
        field = combine_echoes(unwrapped, magnitude, echo_times_s=echo_times_s, b0_tesla=b0_tesla)
        residual, disagreement_rad = MAX_RESIDUAL_RAD / _STEEP_RAD * slope, 0.0
    else:
        masks.append(torch.from_numpy(ndimage.binary_dilation(mask.numpy())))
        unwrapped = unwrap_echoes(phase, magnitude, mask, beyond=masks[1], **options)
        field = combine_echoes(unwrapped, magnitude, echo_times_s=echo_times_s, b0_tesla=b0_tesla)
        residual, disagreement_rad = fit_residual_rad(
            unwrapped, magnitude, field, b0_tesla=b0_tesla, mask=mask, **options
        )
    (reliable_field, reliable), *larger = (
        exclude_unreliable(field.numpy(), residual.numpy(), combined, within.numpy(), voxel_size_mm=voxel_size_mm)
        for within in masks
    )
    if not reliable.any():
        raise ValueError("the mask contains no reliable voxel")
    noise = thermal_noise_sd(unwrapped, magnitude, torch.from_numpy(reliable), echo_times_s=echo_times_s)
    wider = larger[0] if larger else None
    return TotalField(reliable_field, reliable, wider, noise, readout_rad, disagreement_rad, fringe_mm)


def correct_bipolar_readout(
    phase: Tensor, magnitude: Tensor, mask: Tensor, *, echo_times_s: Sequence[float], voxel_size_mm: Sequence[float]
) -> tuple[Tensor, float | None]:
    r"""Remove the smooth phase that alternates in sign between echoes acquired with a bipolar readout.

    Returns the phase without it, wrapped, or the input itself if there is none, and the range (2nd to 98th percentile)
    of the phase r over the tissue in rad: 0 if there is none, None if it cannot be determined (fewer than three echoes
    or uneven spacing).

    Notes
    -----
    If the phase of echo j is :math:`\varphi_0 + \omega T_j + (-1)^j r`, offset and field cancel in the second
    difference of three evenly spaced echoes:

    .. math:: \varphi_j - 2 \varphi_{j+1} + \varphi_{j+2} = (-1)^j\, 4 r \pmod{2\pi}.

    The gradient of 4r along each axis is the angle of the mean product of neighbouring voxels, as in [1]_. What differs
    from this ramp is smoothed as a phasor.

    References
    ----------
    .. [1] Li J, et al. Magn Reson Mater Phys 28 (2015) 347-355. doi:10.1007/s10334-014-0470-3
    """
    if not mask.any() or not is_evenly_spaced(echo_times_s):
        return phase, None
    fourfold = torch.zeros(mask.shape, dtype=torch.complex64, device=phase.device)
    for echo in range(len(phase) - 2):
        angle = (-1) ** echo * (phase[echo] - 2 * phase[echo + 1] + phase[echo + 2])
        fourfold += torch.polar(magnitude[echo + 2] * mask, angle)
    ramp = torch.zeros((), device=phase.device)
    for axis, size in enumerate(mask.shape):
        index = torch.arange(size, device=phase.device).view([-1 if other == axis else 1 for other in range(3)])
        before, after = fourfold.narrow(axis, 0, size - 1), fourfold.narrow(axis, 1, size - 1)
        ramp = ramp + (after * before.conj()).sum().angle() * index
    readout = (ramp + _smooth_angle(fourfold.angle() - ramp, fourfold.abs(), voxel_size_mm)) / 4
    low, high = np.percentile(readout[mask].numpy(), (2, 98))
    if high - low < _MIN_READOUT_RAD:
        return phase, 0.0
    signs = torch.tensor([(-1.0) ** echo for echo in range(len(phase))], device=phase.device)
    return wrap(phase - signs.view(-1, 1, 1, 1) * readout), float(high - low)


def wrap(angle: Tensor) -> Tensor:
    """Wrap angles in rad to [-pi, pi)."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def unwrap_echoes(
    phase: Tensor,
    magnitude: Tensor,
    mask: Tensor,
    *,
    echo_times_s: Sequence[float],
    voxel_size_mm: Sequence[float],
    beyond: Tensor | None = None,
) -> Tensor:
    r"""Unwrap the phase of several echoes for `combine_echoes` and remove the phase offset at echo time 0.

    It is 0 outside the mask, or outside the larger mask `beyond`, in which phase lies within half a turn of that of the
    nearest voxel of the mask. A constant field may remain in it.

    Notes
    -----
    The phase difference of the first two echoes, :math:`\theta = \arg(S_2 \bar S_1)`, has no offset and few wraps; it
    is unwrapped spatially, by `unwrap_by_region_growing`. The offset is
    :math:`\arg S_1 - \theta T_1 / (T_2 - T_1)`, smoothed [1]_, and so is what remains of it. Each echo is then
    unwrapped temporally: up to a constant, it lies within half a turn of the phase extrapolated from the preceding
    echoes, weighted as in `combine_echoes`.

    References
    ----------
    .. [1] Eckstein K, et al. Magn Reson Med 79 (2018) 2996-3006. doi:10.1002/mrm.26963
    """
    times = list(echo_times_s)
    geometric_mean = magnitude[:2].log().mean(dim=0).exp()
    difference = unwrap_by_region_growing(wrap(phase[1] - phase[0]), geometric_mean, mask)
    if beyond is not None and mask.any():
        nearest = ndimage.distance_transform_edt(~mask.numpy(), return_distances=False, return_indices=True)
        expected = difference[tuple(torch.from_numpy(nearest))]
        difference = torch.where(mask, difference, expected + wrap(phase[1] - phase[0] - expected))
    rate = difference / (times[1] - times[0])  # rad/s
    offset = _smooth_angle(phase[0] - rate * times[0], magnitude[0] * mask, voxel_size_mm)
    unwrapped = torch.zeros_like(phase)
    weighted, weights = torch.zeros_like(rate), torch.zeros_like(rate)
    for echo, time_s in enumerate(times):
        expected = rate * time_s
        rest = phase[echo] - offset - expected
        # Full turns that the first phase difference misses are the same in all voxels, but, for unevenly spaced echoes,
        # they are not full turns in the later ones: remove the mean angle before wrapping.
        power = (magnitude[echo] * mask).square()
        rest = rest - torch.atan2((power * rest.sin()).sum(), (power * rest.cos()).sum())
        unwrapped[echo] = torch.where(mask if beyond is None else beyond, expected + wrap(rest), 0.0)
        weight = magnitude[echo].square() * time_s
        weighted, weights = weighted + weight * unwrapped[echo], weights + weight * time_s
        if echo:  # the first echo alone is noisier than the phase difference of the first two
            rate = torch.where(weights > 0, weighted / weights, rate)
    return unwrapped


def unwrap_by_region_growing(phase: Tensor, magnitude: Tensor, mask: Tensor) -> Tensor:
    r"""Unwrap one phase image (X, Y, Z) within a mask; each connected part has its median within half a turn of 0.

    Notes
    -----
    A region that always grows to the neighbour of highest weight [1]_ follows, from any seed, the maximum spanning tree
    of the graph of voxels that share a face (Prim's algorithm). Along it, each phase lies within half a turn of the
    one before. The weight is the coherence of phase and magnitude of two voxels,

    .. math:: w_{ij} = \left(1 - \frac{|W(\varphi_i - \varphi_j)|}{\pi}\right) \frac{\min(M_i, M_j)}{\max(M_i, M_j)};

    without the second factor, regions grow through the noise of dark cavities. The third of [1]_, coherence of the
    phase over two echoes, gained nothing in the difference of the two.

    References
    ----------
    .. [1] Dymerska B, et al. Phase unwrapping with a rapid opensource minimum spanning tree algorithm (ROMEO). Magn
       Reson Med 85 (2021) 2294-2308. doi:10.1002/mrm.28563
    """
    inside = mask.cpu().numpy()
    values = phase.cpu().double().numpy()[inside]
    n = len(values)
    if not n:
        return torch.zeros_like(phase)
    number = np.full(inside.shape, -1, np.int32)
    number[inside] = np.arange(n)
    ends = []
    for axis in range(3):
        pairs = np.stack([np.moveaxis(number, axis, 0)[start : start + number.shape[axis] - 1] for start in (0, 1)])
        ends.append(pairs[:, (pairs >= 0).all(axis=0)])
    before, after = np.concatenate(ends, axis=1)
    steps = wrap(torch.from_numpy(values[after] - values[before])).abs().numpy()
    signal = magnitude.cpu().double().numpy()[inside]
    darker, brighter = np.sort([signal[before], signal[after]], axis=0)
    weights = (1 - steps / math.pi) * darker / np.maximum(brighter, np.finfo(float).tiny)
    tree = minimum_spanning_tree(coo_array((2 - weights, (before, after)), shape=(n, n))).tocoo()  # 0 means no edge
    n_parts, part = connected_components(tree, directed=False)
    seeds = np.unique(part, return_index=True)[1]
    # Voxel n, which does not exist, joins the parts of the mask to one tree, in which every voxel has a parent.
    joined = np.append(tree.row, np.full(n_parts, n)), np.append(tree.col, seeds)
    tree = coo_array((np.ones(len(joined[0])), joined), shape=(n + 1, n + 1))
    parent = breadth_first_order(tree.tocsr(), n, directed=False)[1].astype(np.intp)
    parent[n] = n
    turns = np.zeros(n + 1)
    turns[:n] = np.round((np.append(values, 0.0)[parent[:n]] - values) / (2 * math.pi))
    turns[seeds] = 0
    while (parent != n).any():  # add the turns of all ancestors: of 1, 2, 4, … generations
        turns, parent = turns + turns[parent], parent[parent]
    unwrapped = values + 2 * math.pi * turns[:n]
    medians = np.asarray(ndimage.median(unwrapped, part, np.arange(n_parts)))
    image = np.zeros(inside.shape)
    image[inside] = unwrapped - 2 * math.pi * np.round(medians / (2 * math.pi))[part]
    return torch.from_numpy(image).to(phase)


def unwrap_laplacian(phase: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float]) -> Tensor:
    r"""Unwrap one phase image (X, Y, Z) within a mask by its Laplacian; its mean in the mask is 0.

    Notes
    -----
    Wraps do not change the Laplacian of the phase as computed from the wrapped image [1]_; here it is the divergence of
    the wrapped differences of neighbours [2]_, in which, unlike in :math:`\cos\varphi\nabla^2\sin\varphi -
    \sin\varphi\nabla^2\cos\varphi`, steep slopes are not too flat. Differences with voxels outside the mask M, where
    phase is noise, are 0. The solution of

    .. math:: \nabla^2 u = \nabla \cdot (M\, W(\nabla\varphi))

    with no flux through the faces of the image differs from the true phase by a function that is harmonic in M: part of
    the background, such as two thirds of a ramp in a ball, is removed.

    References
    ----------
    .. [1] Schofield MA, Zhu Y. Fast phase unwrapping algorithm for interferometric applications. Opt Lett 28 (2003)
       1194-1196. doi:10.1364/OL.28.001194
    .. [2] Ghiglia DC, Romero LA. Robust two-dimensional weighted and unweighted phase unwrapping that uses fast
       transforms and iterative methods. J Opt Soc Am A 11 (1994) 107-117. doi:10.1364/JOSAA.11.000107
    """
    laplacian, response = torch.zeros(phase.shape, dtype=torch.float64), np.zeros((1, 1, 1))
    for axis, (size, step) in enumerate(zip(phase.shape, voxel_size_mm, strict=True)):
        before, after = (phase.narrow(axis, start, size - 1).double() for start in (0, 1))
        inside = mask.narrow(axis, 0, size - 1) & mask.narrow(axis, 1, size - 1)
        slope = torch.where(inside, wrap(after - before), 0.0) / step**2
        laplacian.narrow(axis, 0, size - 1).add_(slope)
        laplacian.narrow(axis, 1, size - 1).sub_(slope)
        cosine = np.cos(np.pi * np.arange(size) / size).reshape([-1 if other == axis else 1 for other in range(3)])
        response = response + (2 * cosine - 2) / step**2
    response[0, 0, 0] = 1.0  # the mean is undetermined
    solved = torch.from_numpy(fft.idctn(fft.dctn(laplacian.numpy()) / response)).to(phase)
    return subtract_mean(solved, mask)


def steepest_rad(phase: Tensor, mask: Tensor) -> Tensor:
    """Compute the largest wrapped difference (X, Y, Z) in rad of a voxel from its neighbours in the mask."""
    steepest = torch.zeros_like(phase)
    for axis, size in enumerate(phase.shape):
        ends = [(slice(None),) * axis + (slice(start, size - 1 + start),) for start in (0, 1)]
        inside = mask[ends[0]] & mask[ends[1]]
        step = torch.where(inside, wrap(phase[ends[1]] - phase[ends[0]]).abs(), 0.0)
        for end in ends:
            steepest[end] = torch.maximum(steepest[end], step)
    return steepest


def measure_fringes(phase: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float]) -> float:
    """Measure the length in mm of the open ends of fringe lines in one wrapped phase image; 0 if noise has as much.

    They pass through the squares of four voxels in the mask around which the wrapped differences do not add up to 0.
    """
    length_mm = 0.0
    for normal, step_mm in enumerate(voxel_size_mm):
        corners, inside = phase.movedim(normal, 0), mask.movedim(normal, 0)
        loop = [(slice(0, -1), slice(0, -1)), (slice(1, None), slice(0, -1))]
        loop += [(slice(1, None), slice(1, None)), (slice(0, -1), slice(1, None))]
        values, known = ([array[:, *corner] for corner in loop] for array in (corners, inside))
        turns = torch.stack([wrap(values[n] - values[n - 1]) for n in range(4)]).sum(dim=0)
        length_mm += step_mm * int(((turns.abs() > math.pi) & torch.stack(known).all(dim=0)).sum())
    return length_mm if length_mm > _MIN_FRINGE_MM else 0.0


def _smooth_angle(angle: Tensor, weight: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Smooth an angle: the argument of weighted phasors after a Gaussian filter, zero beyond the grid.

    What remains is smoothed again, since one filter flattens curved phase.
    """
    steps = zip(angle.shape, voxel_size_mm, strict=True)
    shape = [fast_size(size + math.ceil(4 * _OFFSET_SIGMA_MM / step)) for size, step in steps]
    squared = torch.zeros((), device=angle.device)
    for k in frequencies_per_mm(shape, voxel_size_mm, device=angle.device):
        squared = squared + k**2
    gaussian = torch.exp(-2 * (math.pi * _OFFSET_SIGMA_MM) ** 2 * squared)
    inner, smooth = tuple(slice(size) for size in angle.shape), torch.zeros_like(angle)
    for _ in range(2):
        rest = angle - smooth
        x, y = (apply_kernel(zero_pad(weight * part, shape), gaussian) for part in (rest.cos(), rest.sin()))
        smooth = smooth + torch.atan2(y[inner], x[inner])
    return smooth


def fit_residual_rad(
    phase: Tensor,
    magnitude: Tensor,
    field: Tensor,
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    voxel_size_mm: Sequence[float],
    mask: Tensor,
) -> tuple[Tensor, float]:
    r"""Compute the residual (X, Y, Z) in rad of the field fitted by `combine_echoes` (ppm of B0) to unwrapped phase.

    It is the root mean square over the echoes, weighted by the squared signal; 0 without signal:

    .. math:: \sqrt{\frac{\sum_j M_j^2 r_j^2}{\sum_j M_j^2}}, \qquad
              r_j = \varphi_j - 2\pi\gamma B_0 T_j \hat f - c_j,

    where :math:`c_j` is the mean of echo j over the tissue, with the same weights: an offset common to all tissue in an
    echo does not count.

    The second result is the part of it that is smooth, in rad: the root of the mean product of :math:`r_j` in voxels
    that are 4 mm apart, with the same weights. The noise of two voxels is independent, so it does not count. A few
    hundredths are left of coil phase; more is a phase that differs between echoes.
    """
    squared, weights = torch.zeros_like(field), torch.zeros_like(field)
    products, pairs = 0.0, 1e-30
    for echo, time_s in enumerate(echo_times_s):
        power = magnitude[echo].square()
        rest = phase[echo] - 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * time_s * field
        rest = rest - (power * rest)[mask].sum() / power[mask].sum().clamp(min=1e-30)
        squared, weights = squared + power * rest.square(), weights + power
        amplitude = torch.where(mask, magnitude[echo], 0.0)
        for axis, step_mm in enumerate(voxel_size_mm):
            shift = math.ceil(_SHARED_MM / step_mm)
            before, after = (slice(-shift), slice(shift, None))
            pair = amplitude.movedim(axis, 0)[before] * amplitude.movedim(axis, 0)[after]
            products += float((pair * rest.movedim(axis, 0)[before] * rest.movedim(axis, 0)[after]).sum())
            pairs += float(pair.sum())
    return torch.where(weights > 0, squared / weights, 0.0).sqrt(), math.sqrt(max(products, 0.0) / pairs)


def thermal_noise_sd(phase: Tensor, magnitude: Tensor, mask: Tensor, *, echo_times_s: Sequence[float]) -> float | None:
    r"""Estimate the SD of the receiver's noise, in the unit of the magnitude, from lines fitted to the phase over time.

    Not all deviations from a line through the origin are noise: a smoothed offset leaves a constant in each voxel, and
    where a voxel contains several fields the phase is curved. Lines therefore have an intercept, given three or more
    echoes, and only the quietest tenth of the tissue counts. None with a single echo.

    Notes
    -----
    Well above the noise the phase of echo j has the SD :math:`\sigma / M_j`, so that the weighted sum of squared
    residuals :math:`\sum_j M_j^2 r_j^2` is :math:`\sigma^2` times a :math:`\chi^2` variable with :math:`\nu = E - 2`
    degrees of freedom (one, for two echoes), whatever the signal. Several fields in a voxel only add to it: the phase
    is then :math:`\kappa_1 T - \kappa_3 T^3 / 6 + \dots`, with the cumulants of the field, and :math:`\kappa_3` is not
    0 for unequal parts of two tissues. The estimate is the first decile of the means over cubes of :math:`5^3` voxels
    in the mask (as far as they fit), over that of :math:`\chi^2_{125\nu} / 125`.
    """
    n_echoes, has_intercept = len(echo_times_s), len(echo_times_s) > 2
    if n_echoes == 1:
        return None
    weights, angles = magnitude[:, mask].square(), phase[:, mask]
    total = weights.sum(dim=0).clamp(min=1e-30)
    times = torch.tensor(echo_times_s).view(-1, 1).expand_as(angles)
    if has_intercept:
        times, angles = (part - (weights * part).sum(dim=0) / total for part in (times, angles))
    slope = (weights * times * angles).sum(dim=0) / (weights * times.square()).sum(dim=0).clamp(min=1e-30)
    powers = torch.zeros(mask.shape)
    powers[mask] = (weights * (angles - slope * times).square()).sum(dim=0)

    def average(array: Tensor) -> Tensor:
        padded = functional.pad(array[None, None], [_CUBE // 2] * 6)  # images may have fewer slices than a cube
        return functional.avg_pool3d(padded, _CUBE, 1)[0, 0]

    share = average(mask.to(powers.dtype))
    fullest = float(share[mask].max())
    fits = mask & (share > 0.999 * fullest)
    n_samples = (n_echoes - 1 - has_intercept) * fullest * _CUBE**3
    decile = np.percentile((average(powers) / share)[fits].numpy(), 100 * _QUIET)
    return math.sqrt(decile * fullest * _CUBE**3 / float(chi2.ppf(_QUIET, n_samples)))


def exclude_unreliable(
    field: NDArray[np.float32],
    residual_rad: NDArray[np.float32],
    signal: NDArray[np.float32],
    mask: NDArray[np.bool_],
    *,
    voxel_size_mm: Sequence[float],
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Remove unreliable voxels from the mask, or interpolate their field where they are enclosed by tissue.

    All arrays have shape (X, Y, Z); `signal` combines all echoes. A voxel is unreliable if its residual exceeds 0.3 rad
    and five times the median residual, or if it has no signal. Those at the border leave the mask, and so do enclosed
    dark cavities of more than 10 mm³, whose own field background removal could not remove. Flowing blood, which is
    bright, stays; its field is interpolated.
    """
    if not mask.any():
        return field, mask
    limit_rad = max(MAX_RESIDUAL_RAD, _MAX_RESIDUAL_OVER_MEDIAN * float(np.median(residual_rad[mask])))
    unreliable = mask & ((residual_rad > limit_rad) | (signal == 0))
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
