"""Close masks, and smooth within them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_ROUNDING_MM = 1e-6


def close_with_ball(mask: NDArray[np.bool_], radius_mm: float, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Close a mask with a ball; it goes on beyond the image as it is at its edge.

    Parameters
    ----------
    mask : ndarray of bool, shape (X, Y, Z)
    radius_mm : float
        Of the ball, in mm.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    """
    if not mask.any():
        return mask
    grown = ndimage.distance_transform_edt(~mask, sampling=voxel_size_mm) <= radius_mm + _ROUNDING_MM
    distance = ndimage.distance_transform_edt(np.pad(grown, 1, mode="edge"), sampling=voxel_size_mm)
    closed: NDArray[np.bool_] = distance[1:-1, 1:-1, 1:-1] > radius_mm + _ROUNDING_MM
    return closed


def sum_nearby(
    values: NDArray[np.float32], inside: NDArray[np.bool_], sigma: Sequence[float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smooth values inside a mask by a Gaussian.

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
    sums, share : ndarray of float32, shape (X, Y, Z)
        Weighted sums, and the part of the Gaussian that lies inside; the first over the second are weighted means.
    """
    sums = ndimage.gaussian_filter(np.where(inside, values, 0).astype(np.float32), sigma)
    share = ndimage.gaussian_filter(inside.astype(np.float32), sigma)
    return sums, share


_SMALLEST_GAP = 3
"""Voxels along each edge of the smallest hole that counts as an edge: a map that crosses 0 leaves single voxels."""

_ZERO_PPM = 1e-4
"""A tenth of a ppb: below any map's noise, above what 16 bits make of a zero."""


def is_measured(chi: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Find the voxels of a map (ppm) with a measurement: finite, and not 0 as brain masks leave the rest."""
    measured: NDArray[np.bool_] = np.abs(chi) > _ZERO_PPM  # NaN is not larger; infinity does not occur
    return measured


def find_outside(measured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark what a map does not show: unmeasured voxels that lie in a cube of 3, which may reach beyond the image.

    Parameters
    ----------
    measured : ndarray of bool, shape (X, Y, Z)
        Voxels with a measurement.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
    """
    unmeasured = np.pad(~measured, _SMALLEST_GAP, constant_values=True).view(np.uint8)
    deep = ndimage.minimum_filter(unmeasured, _SMALLEST_GAP, mode="constant", cval=1)
    outside = ndimage.maximum_filter(deep, _SMALLEST_GAP, mode="constant", cval=1)
    marked: NDArray[np.bool_] = outside[(slice(_SMALLEST_GAP, -_SMALLEST_GAP),) * 3].view(np.bool_)
    return marked
