"""Find the tissue that several echoes show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

_BRIDGE_MM = 3.0
"""Half of the width of what joins brain and scalp: vessels, nerves, noise in the skull."""

_REGROWN_MM = 1.0
"""How much more is grown back than was taken away, within the tissue."""

_LEVEL = 0.6
"""Part of the threshold between signal and none: tissue far from the coils is dark."""


def find_tissue(magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]) -> NDArray[np.bool_]:
    """Find the largest piece of tissue, which in a head is the brain.

    Parameters
    ----------
    magnitude : ndarray of shape (X, Y, Z)
        Signal, in any unit; 0 where a scan was skull-stripped.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
        In one piece and without holes; empty where no piece is thicker than 6 mm; where all signal has one value,
        wherever there is some.

    Notes
    -----
    Otsu's threshold tells signal from none; what hangs together by less than 6 mm is cut apart.
    """
    seen = np.where(np.isfinite(magnitude), magnitude, 0.0)
    signal = seen[seen > 0]
    if not signal.size or signal.min() == signal.max():
        return np.asarray(seen > 0)
    tissue = seen > _LEVEL * float(threshold_otsu(np.minimum(signal, np.percentile(signal, 99))))
    if tissue.all():
        return tissue
    core = _largest(_distance_mm(tissue, voxel_size_mm) > _BRIDGE_MM)
    if not core.any():
        return core
    grown = tissue & (_distance_mm(~core, voxel_size_mm) <= _BRIDGE_MM + _REGROWN_MM)
    filled = ndimage.binary_fill_holes(_largest(grown))
    return np.asarray(filled, bool)


def _distance_mm(inside: NDArray[np.bool_], voxel_size_mm: Sequence[float]) -> NDArray[np.float64]:
    distance: NDArray[np.float64] = ndimage.distance_transform_edt(inside, sampling=voxel_size_mm)
    return distance


def _largest(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    groups, n_groups = ndimage.label(inside)
    if not n_groups:
        return inside
    return np.asarray(groups == 1 + np.argmax(np.bincount(groups.ravel())[1:]))
