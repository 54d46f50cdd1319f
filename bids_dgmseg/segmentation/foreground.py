"""Which part of a map was measured."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box, box_of_mask
from bids_dgmseg.image.masks import is_measured
from bids_dgmseg.image.volume import Volume

WILDEST_PPM = 5.0
"""On either side of 0; bone, calcium and bleedings have less."""

_SPECK = 0.01
"""Of all measured voxels."""


def find_measured(chi: Volume) -> Volume:
    """Mark the voxels of a finite map (ppm) that are not zero, whatever type the file stores zeros in."""
    return chi.with_array(is_measured(chi.array))


def measured_box(chi: Volume) -> Box:
    """Enclose what was measured, but for specks apart from it.

    Raises
    ------
    InputError
        If nothing was.
    """
    measured = find_measured(chi)
    if not measured.array.any():
        raise InputError("the map is 0 everywhere; check how it was made")
    return box_of_mask(measured.with_array(_without_specks(measured.array)))


def tame(chi: Volume) -> Volume:
    """Leave specks out, and clip what no tissue has: networks would feel a single wild voxel far inside the head."""
    measured = find_measured(chi).array
    if (specks := measured & ~_without_specks(measured)).any():
        chi = chi.with_array(np.where(specks, np.float32(0), chi.array))
    low, high = float(chi.array.min()), float(chi.array.max())
    if -WILDEST_PPM <= low and high <= WILDEST_PPM:
        return chi
    return chi.with_array(np.clip(chi.array, -WILDEST_PPM, WILDEST_PPM))


def _without_specks(measured: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Leave out what empty planes of the grid part from nearly all that was measured."""
    kept = measured
    for axis in range(3 if measured.any() else 0):
        counts = kept.sum(axis=tuple({0, 1, 2} - {axis}))
        if counts[np.flatnonzero(counts)[0] : np.flatnonzero(counts)[-1] + 1].all():
            continue
        runs, _ = ndimage.label(counts)
        sizes = np.bincount(runs, counts)
        planes = sizes[runs] > _SPECK * sizes.sum()
        kept = kept & np.expand_dims(planes, tuple({0, 1, 2} - {axis}))
    return kept
