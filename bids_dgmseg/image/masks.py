"""Binary masks: valid voxels, field of view, closing, connected components, smoothing within a mask."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_ROUNDING_MM = 1e-6

_ZERO_PPM = 1e-4
"""A tenth of a ppb: below the noise of any map, above what 16-bit storage makes of zero."""

_SMALLEST_GAP = 3
"""Edge length of the smallest region outside the field of view; inside, single voxels are 0 where a map crosses 0."""


def is_valid(chi: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the valid voxels of a map in ppm: finite, and not 0 as outside of brain masks."""
    valid: NDArray[np.bool_] = np.abs(chi) > _ZERO_PPM  # false for NaN; maps contain no infinity
    return valid


def outside_field_of_view(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the voxels that a map does not cover: invalid voxels in a cube of 3, which may extend beyond the image."""
    invalid = np.pad(~valid, _SMALLEST_GAP, constant_values=True).view(np.uint8)
    eroded = ndimage.minimum_filter(invalid, _SMALLEST_GAP, mode="constant", cval=1)
    opened = ndimage.maximum_filter(eroded, _SMALLEST_GAP, mode="constant", cval=1)
    outside: NDArray[np.bool_] = opened[(slice(_SMALLEST_GAP, -_SMALLEST_GAP),) * 3].view(np.bool_)
    return outside


def close_with_ball(mask: NDArray[np.bool_], radius_mm: float, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Close a mask (X, Y, Z) with a ball; beyond the image it continues as at the edge."""
    if not mask.any():
        return mask
    dilated = ndimage.distance_transform_edt(~mask, sampling=voxel_size_mm) <= radius_mm + _ROUNDING_MM
    distance = ndimage.distance_transform_edt(np.pad(dilated, 1, mode="edge"), sampling=voxel_size_mm)
    closed: NDArray[np.bool_] = distance[1:-1, 1:-1, 1:-1] > radius_mm + _ROUNDING_MM
    return closed


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
    large: NDArray[np.bool_] = np.append(False, kept)[components]
    return large


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
