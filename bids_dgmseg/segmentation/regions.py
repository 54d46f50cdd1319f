"""Valid voxels of a map and regions of the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box, box_of_mask
from bids_dgmseg.image.grids import Grid, covering_block
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume

LARGEST_PPM = 5.0
"""Upper limit of |chi|; bone, calcifications and hemorrhages stay below it."""

_SMALL = 0.01
"""Components that contain less than this fraction of all valid voxels are ignored."""

REGIONS: Mapping[str, tuple[str, ...]] = {
    "brain": ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei"),
    "cerebellum": ("cerebellum", "cerebellar_nuclei"),
    "ventricles": ("ventricles",),
}
"""Region → the localizer's labels that form it, the required one first; ``ventricles`` are the lateral ventricles."""


def valid_mask(chi: Volume) -> Volume:
    """Return the mask of valid voxels of a finite map (ppm): those that are not 0, whatever the file's data type."""
    return chi.with_array(is_valid(chi.array))


def valid_box(chi: Volume) -> Box:
    """Return the bounding box of the valid voxels, without small separate components.

    Raises
    ------
    InputError
        If no voxel is valid.
    """
    valid = valid_mask(chi)
    if not valid.array.any():
        raise InputError("the map is 0 everywhere; check how it was reconstructed")
    return box_of_mask(valid.with_array(_without_small_components(valid.array)))


def clip_and_remove_small_components(chi: Volume) -> Volume:
    """Set small separate components to 0 and clip the map to ±5 ppm.

    A single voxel of extreme susceptibility changes what a network predicts far inside the head.
    """
    valid = valid_mask(chi).array
    if (small := valid & ~_without_small_components(valid)).any():
        chi = chi.with_array(np.where(small, np.float32(0), chi.array))
    low, high = float(chi.array.min()), float(chi.array.max())
    if -LARGEST_PPM <= low and high <= LARGEST_PPM:
        return chi
    return chi.with_array(np.clip(chi.array, -LARGEST_PPM, LARGEST_PPM))


def _without_small_components(valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Remove voxels that empty planes of the grid separate from nearly all others.

    Planes instead of connected components: the head itself may fall into many components, but no plane through it is
    empty.
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


def resample_regions(
    labels: Volume, grid: Grid, *, names: Sequence[str], valid: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """Resample head regions to the grid of a map.

    Parameters
    ----------
    labels : Volume
        Result of the whole-head network, usually on a coarser grid: numbers from 1 in the order of `names`.
    grid : Grid
        Grid of the map.
    names : sequence of str
        ``localizer.labels`` of the model.
    valid : ndarray of bool, shape of `grid`
        Valid voxels of the map; regions are limited to them.

    Returns
    -------
    dict
        Region → mask of shape `grid`, for each entry of `REGIONS` whose first label the model has.

    Notes
    -----
    The mask of each region is interpolated linearly and thresholded at one half: the boundary is smooth between the
    coarse voxels, where nearest-neighbour interpolation would leave steps.
    """
    regions = {}
    for region, parts in REGIONS.items():
        if parts[0] in names:
            numbers = [names.index(part) + 1 for part in parts if part in names]
            regions[region] = _resample_mask(labels.with_array(np.isin(labels.array, numbers)), grid) & valid
    return regions


def _resample_mask(mask: Volume, grid: Grid) -> NDArray[np.bool_]:
    resampled = np.zeros(grid.shape, bool)
    if not mask.array.any():
        return resampled
    x, y, z = block = covering_block(grid, box_of_mask(mask).expanded(max(mask.voxel_size_mm)))
    corner = np.eye(4)
    corner[:3, 3] = x.start, y.start, z.start
    shape = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
    fraction = resample(mask.with_array(mask.array.astype(np.float32)), Grid(shape, grid.affine @ corner))
    resampled[block] = fraction.array > 0.5
    return resampled
