"""From the labels of the whole head to masks of its regions on the map's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.boxes import box_of_mask
from bids_dgmseg.image.resample import Grid, covering_block, resample
from bids_dgmseg.image.volume import Volume

REGIONS: Mapping[str, tuple[str, ...]] = {
    "brain": ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei"),
    "cerebellum": ("cerebellum", "cerebellar_nuclei"),
    "ventricles": ("ventricles",),
}
"""Region → the localizer's labels that make it, the one that it needs first; the ventricles are the lateral ones."""


def carry_regions(
    labels: Volume, grid: Grid, *, names: Sequence[str], measured: NDArray[np.bool_]
) -> dict[str, NDArray[np.bool_]]:
    """Carry the regions of the whole-head step to the map's grid.

    Parameters
    ----------
    labels : Volume
        Numbers from 1 in the order of `names`, usually on a coarser grid.
    grid : Grid
        The map's own.
    names : sequence of str
        ``localizer.labels`` of the model.
    measured : ndarray of bool, shape of `grid`
        What the map shows: no region reaches beyond.

    Returns
    -------
    dict
        Region → mask of shape `grid`, for the regions of `REGIONS` whose first label the model has.

    Notes
    -----
    Each region is joined to one mask of 0 and 1, interpolated linearly, and cut at one half: the border runs smoothly
    between the coarse voxels, where the nearest label would make steps.
    """
    regions = {}
    for region, parts in REGIONS.items():
        if parts[0] in names:
            numbers = [names.index(part) + 1 for part in parts if part in names]
            regions[region] = _carry(labels.with_array(np.isin(labels.array, numbers)), grid) & measured
    return regions


def _carry(region: Volume, grid: Grid) -> NDArray[np.bool_]:
    carried = np.zeros(grid.shape, bool)
    if not region.array.any():
        return carried
    x, y, z = block = covering_block(grid, box_of_mask(region).grown(max(region.voxel_size_mm)))
    corner = np.eye(4)
    corner[:3, 3] = x.start, y.start, z.start
    shape = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
    share = resample(region.with_array(region.array.astype(np.float32)), Grid(shape, grid.affine @ corner))
    carried[block] = share.array > 0.5
    return carried


def largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the largest connected part of a mask."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept: NDArray[np.bool_] = parts == sizes.argmax()
    return kept
