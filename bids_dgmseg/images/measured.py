"""Which voxels of a map were measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

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
