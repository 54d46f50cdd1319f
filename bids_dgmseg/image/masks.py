"""Masks: valid and missing voxels, field of view, closing, connected components, smoothing within a mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, box_of_mask, resample
from bids_dgmseg.image.volume import Volume

ROUNDING_MM = 1e-6
"""Tolerance of comparisons with distances from affines, which are rounded to float32."""

_SMALL = 0.01
"""Blocks that contain less than this fraction of all valid voxels are ignored."""

_ZERO_PPM = 1e-4
"""A tenth of a ppb: below the noise of any map, above what 16-bit storage makes of zero."""

_SMALLEST_GAP = 3
"""Edge length of the smallest region outside the field of view; inside, single voxels are 0 where a map crosses 0."""

_CHANCE_FACTOR = 2
"""Groups of zeros more than this many times larger than those of the neighbouring values are missing data."""

_LARGEST_SHEET = 100
"""Groups of zeros without a square of 3 x 3 voxels are lines and sheets; larger ones are still missing data.

Maps in which left and right are equal to the last bit contain such groups, since differences cancel there: of at most
36 voxels in the simulated phantom.
"""

_LARGEST_PROBABILITY = 0.05
"""Half of the percolation threshold: from there on groups of equal values may extend throughout the head."""

_ROOT_2PI = 2.5066282746310002

_CUT_SHARE = 0.3
"""Fraction of a mask's largest cross-section on a face of the image from which the field of view cuts the mask."""

_FILL_MM = 2.0
"""Standard deviation of the Gaussian that fills holes: reaches across two thick slices, narrower than a nucleus."""

_SMALLEST_WEIGHT = 1e-3
"""Part of that Gaussian on valid voxels below which rounding errors would be large."""


def is_valid(chi: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the valid voxels of a map in ppm: finite, and not 0 as outside of brain masks."""
    return np.abs(chi) > _ZERO_PPM  # false for NaN; maps contain no infinity


def faces_that_cut(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether each face of the image cuts a mask (X, Y, Z): shape (3, 2), axes by first and last slice.

    A face does if it contains more than 30 % of the largest cross-section along its axis.
    """
    areas = [mask.sum(axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    return np.array([area[[0, -1]] > _CUT_SHARE * area.max() for area in areas])


def outside_field_of_view(valid: NDArray[np.bool_], block: tuple[slice, ...] | None = None) -> NDArray[np.bool_]:
    """Find the voxels that a map does not cover: invalid voxels in a cube of 3, which may extend beyond the image.

    With `block`, only those of a block of the image.
    """
    if block is not None:
        wide = tuple(slice(max(part.start - _SMALLEST_GAP, 0), part.stop + _SMALLEST_GAP) for part in block)
        inner = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(block, wide, strict=True))
        return outside_field_of_view(valid[wide])[inner]
    invalid = np.pad(~valid, _SMALLEST_GAP, constant_values=True).view(np.uint8)
    eroded = ndimage.minimum_filter(invalid, _SMALLEST_GAP, mode="constant", cval=1)
    opened = ndimage.maximum_filter(eroded, _SMALLEST_GAP, mode="constant", cval=1)
    return opened[(slice(_SMALLEST_GAP, -_SMALLEST_GAP),) * 3].view(np.bool_)


def share_covered(chi: Volume, grid: Grid) -> NDArray[np.float32]:
    """Return the share of each voxel of a grid that a map in ppm covers."""
    inside = ~outside_field_of_view(is_valid(chi.array))
    return resample(chi.with_array(inside.astype(np.float32)), grid, antialias=True).array


def find_missing(chi: NDArray[np.floating], *, zeros: bool = True) -> NDArray[np.bool_]:
    r"""Find the voxels inside the head that were not measured.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Map in ppm.
    zeros : bool
        Whether connected zeros are missing data; if not, only those of empty slices are.

    Returns
    -------
    ndarray of bool
        Voxels that are not finite or 0, and belong to an empty slice (of any axis) between two slices that have a value
        at this place, or, more than two voxels from the background, to a group of such voxels (26-connected) that
        chance does not explain. Zeros connected to the border of the image by passages of three voxels or more are
        background.

    Notes
    -----
    A map stored in steps :math:`s` with noise :math:`\sigma` has values that are 0 by chance, with a probability of
    about :math:`p = s / (\sqrt{2 \pi} \sigma)` per voxel in tissue of 0 ppm. The expected number of groups of
    :math:`k` such voxels among :math:`N` decreases as :math:`N e^{-\zeta k}`, where :math:`\zeta` depends on
    :math:`p` and on the smoothness of the map, and the largest has :math:`K \approx \ln N / \zeta` voxels. Chance
    makes the stored values next to 0, :math:`\pm s`, as frequent as 0, so :math:`K` is measured on them: of groups
    of :math:`2 K` zeros chance yields :math:`N e^{-2 \zeta K} \approx 1 / N`. Zeros are missing in groups of more than
    :math:`2 K`; of more than two in floating-point maps, where no two neighbours are equal and :math:`K = 1`. Of these
    groups only those of more than 100 voxels or with a square of 3 x 3 zeros in a slice of any axis are missing. From
    :math:`p = 0.098` on, equal values are connected throughout the head (percolation on the cubic lattice with 26
    neighbours [1]_), so from 0.05 on only empty slices are found.

    References
    ----------
    .. [1] Kurzawski Ł, Malarz K. Simple cubic random-site percolation thresholds for complex neighbourhoods. Rep Math
       Phys 70 (2012) 163-169. doi:10.1016/S0034-4877(12)60036-6
    """
    finite = np.isfinite(chi)
    size = np.where(finite, np.abs(chi), np.inf)
    lowest = chi.flat[size.argmin()]  # what the storage makes of 0
    empty = ~finite | ((chi == lowest) & (size <= _ZERO_PPM))
    outside = outside_field_of_view(~empty)
    missing: NDArray[np.bool_] = np.logical_or.reduce([_in_empty_slices(empty, outside, axis) for axis in range(3)])
    deep = ~ndimage.maximum_filter(reaching_the_border(outside), 5, mode="constant", cval=True)
    missing |= deep & ~finite
    groups, sizes = _connected_groups(deep & empty)
    if not zeros or sizes.max() <= _CHANCE_FACTOR:
        return missing
    above, below = chi[chi > lowest].min(initial=np.inf), chi[chi < lowest].max(initial=-np.inf)
    values = chi[deep & ~empty]
    sd = float(np.diff(np.percentile(values, (16, 84)))[0] / 2) if len(values) else 0.0
    if not sd > 0:
        return missing
    probability = max(*(np.mean(values == value) for value in (above, below)), (above - below) / 2 / (_ROOT_2PI * sd))
    if probability < _LARGEST_PROBABILITY:
        by_chance = max(1, *(_connected_groups(deep & (chi == value))[1].max() for value in (above, below)))
        solid = sizes > _LARGEST_SHEET
        for plate in ((3, 3, 1), (3, 1, 3), (1, 3, 3)):
            solid[groups[ndimage.binary_opening(deep & empty, np.ones(plate))]] = True
        missing |= (solid & (sizes > _CHANCE_FACTOR * by_chance))[groups]
    return missing


def reaching_the_border(outside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the part of a mask (X, Y, Z) that is connected over faces to the border of the image: the background."""
    components, _ = ndimage.label(np.pad(outside, 1, constant_values=True))
    return (components == components[0, 0, 0])[1:-1, 1:-1, 1:-1]


def _in_empty_slices(empty: NDArray[np.bool_], outside: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Find the voxels of empty slices between two slices that are not empty and inside the head at the same place."""
    slices, beyond = np.moveaxis(empty, axis, 0), np.moveaxis(outside, axis, 0)
    between = np.zeros(slices.shape, bool)
    for low, high in pairwise(np.flatnonzero(~slices.all(axis=(1, 2)))):
        between[low + 1 : high] = ~(beyond[low] | beyond[high])
    return np.moveaxis(between, 0, axis)


def _connected_groups(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Label the 26-connected groups of a mask from 1, and count their voxels; 0 is outside, with a count of 0."""
    groups, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(groups.ravel())
    sizes[0] = 0
    return groups, sizes


def fill_holes(chi: NDArray[np.float32], voxel_size_mm: Sequence[float]) -> NDArray[np.float32]:
    """Fill the holes of a map in ppm with Gaussian means (2 mm) of the valid voxels; NaN elsewhere becomes 0.

    Holes are NaN where `find_missing` finds them, unless they contain a cube of 3 voxels: so much cannot be
    interpolated, and is outside of the field of view.
    """
    finite = np.isfinite(chi)
    filled: NDArray[np.float32] = np.where(finite, chi, np.float32(0))
    if finite.all():
        return filled
    valid = is_valid(chi)
    holes = find_missing(chi, zeros=False) & ~finite & ~outside_field_of_view(valid)
    if holes.any():
        sums, weights = masked_gaussian(filled, valid, [_FILL_MM / edge for edge in voxel_size_mm])
        np.divide(sums, weights, out=filled, where=holes & (weights > _SMALLEST_WEIGHT))
    return filled


def close_with_ball(mask: NDArray[np.bool_], radius_mm: float, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Close a mask (X, Y, Z) with a ball; beyond the image it continues as at the edge."""
    if not mask.any():
        return mask
    dilated = ndimage.distance_transform_edt(~mask, sampling=voxel_size_mm) <= radius_mm + ROUNDING_MM
    distance = ndimage.distance_transform_edt(np.pad(dilated, 1, mode="edge"), sampling=voxel_size_mm)
    return distance[1:-1, 1:-1, 1:-1] > radius_mm + ROUNDING_MM


def open_with_ball(mask: NDArray[np.bool_], radius_mm: float, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Open a mask (X, Y, Z) with a ball; beyond the image there is background.

    Depths are measured to the centres of the voxels outside, so that the core grows back by half a voxel more than the
    radius.
    """
    depth_mm = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=voxel_size_mm)
    core: NDArray[np.bool_] = depth_mm[1:-1, 1:-1, 1:-1] > radius_mm + ROUNDING_MM
    if not core.any():
        return core
    near_mm = radius_mm + min(voxel_size_mm) / 2 + ROUNDING_MM
    return mask & (ndimage.distance_transform_edt(~core, sampling=voxel_size_mm) <= near_mm)


def large_components(
    mask: NDArray[np.bool_], min_fraction: float = 1.0, *, over_corners: bool = False
) -> NDArray[np.bool_]:
    """Remove the small connected components of a mask.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)
    min_fraction : float
        Smallest size of a component, as a fraction of the largest; from 1, only the (first) largest is kept.
    over_corners : bool
        Whether voxels are connected over faces, edges and corners (26 neighbours) or faces only (6).
    """
    components, count = ndimage.label(mask, ndimage.generate_binary_structure(3, 3 if over_corners else 1))
    if count < 2:
        return mask
    sizes = np.bincount(components.ravel())[1:]
    kept = sizes >= min_fraction * sizes.max()
    if min_fraction >= 1:
        kept = np.arange(count) == sizes.argmax()
    return np.append(False, kept)[components]


def masked_gaussian(
    values: NDArray[np.float32], inside: NDArray[np.bool_], sigma: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Filter values inside a mask with a Gaussian.

    Parameters
    ----------
    values : ndarray of shape (X, Y, Z)
        Finite inside the mask.
    inside : ndarray of bool, shape (X, Y, Z)
        The mask.
    sigma : sequence of 3 float
        Standard deviation in voxels.

    Returns
    -------
    sums, weights : ndarray of float32, shape (X, Y, Z)
        Weighted sums, and the part of the Gaussian inside the mask; their quotient is the weighted mean.
    """
    sums = ndimage.gaussian_filter(np.where(inside, values, 0).astype(np.float32), sigma)
    weights = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    return sums, weights


def without_separated_blocks(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove small blocks of voxels that empty planes of the grid separate from the others.

    Not connected components: the head itself may fall into many of them, but no plane through it is empty.
    """
    kept = valid
    for axis in range(3 if valid.any() else 0):
        counts = kept.sum(axis=tuple({0, 1, 2} - {axis}))
        if counts[np.flatnonzero(counts)[0] : np.flatnonzero(counts)[-1] + 1].all():
            continue
        runs, _ = ndimage.label(counts)
        sizes = np.bincount(runs, counts)
        planes = sizes[runs] > _SMALL * sizes.sum()
        kept = kept & np.expand_dims(planes, tuple({0, 1, 2} - {axis}))
    return kept


def valid_box(chi: Volume) -> Box:
    """Return the bounding box of the valid voxels of a finite map (ppm), `without_separated_blocks`.

    Raises
    ------
    InputError
        If no voxel is valid.
    """
    valid = is_valid(chi.array)
    if not valid.any():
        raise InputError("the map is 0 everywhere; check how it was reconstructed")
    return box_of_mask(chi.with_array(without_separated_blocks(valid)))
