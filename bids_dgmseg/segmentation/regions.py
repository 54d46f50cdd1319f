"""Regions of a map: valid voxels, regions of the head, hemispheres."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, covering_block
from bids_dgmseg.image.masks import is_valid, without_small_components
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.registration.midplane import Midplane

_LARGEST_PPM = 5.0
"""Upper limit of |chi|; bone, calcifications and hemorrhages stay below it."""

REGIONS: Mapping[str, tuple[str, ...]] = {
    "brain": ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei"),
    "cerebellum": ("cerebellum", "cerebellar_nuclei"),
    "ventricles": ("ventricles",),
}
"""Region → the localizer's labels that form it, the required one first; ``ventricles`` are the lateral ventricles."""

CEREBELLAR_NUCLEI = frozenset({"DN", "IN"})
"""Nuclei of the localizer's label ``cerebellar_nuclei``."""


def clip_and_remove_small_components(chi: Volume) -> Volume:
    """Set small separate components to 0 and clip the map to ±5 ppm.

    A single voxel of extreme susceptibility changes what a network predicts far inside the head.
    """
    valid = is_valid(chi.array)
    if (small := valid & ~without_small_components(valid)).any():
        chi = chi.with_array(np.where(small, np.float32(0), chi.array))
    low, high = float(chi.array.min()), float(chi.array.max())
    if -_LARGEST_PPM <= low and high <= _LARGEST_PPM:
        return chi
    return chi.with_array(np.clip(chi.array, -_LARGEST_PPM, _LARGEST_PPM))


def resample_regions(
    labels: Volume,
    grid: Grid,
    *,
    names: Sequence[str],
    valid: NDArray[np.bool_],
    regions: Collection[str] = tuple(REGIONS),
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
    regions : collection of str
        Which of `REGIONS`.

    Returns
    -------
    dict
        Region → mask of shape `grid`, for each of `regions` whose first label the model has.

    Notes
    -----
    The mask of each region is interpolated linearly and thresholded at one half: the boundary is smooth between the
    coarse voxels, where nearest-neighbour interpolation would leave steps.
    """
    masks = {}
    for region, parts in REGIONS.items():
        if region not in regions or parts[0] not in names:
            continue
        masks[region] = np.zeros(grid.shape, bool)
        mask = np.isin(labels.array, [names.index(part) + 1 for part in parts if part in names])
        if mask.any():
            box = box_of_mask(labels.with_array(mask)).expanded(max(labels.voxel_size_mm))
            x, y, z = block = covering_block(grid, box)
            shape = (x.stop - x.start, y.stop - y.start, z.stop - z.start)
            fine = Grid(shape, block_affine(grid.affine, block))
            fraction = resample(labels.with_array(mask.astype(np.float32)), fine)
            masks[region][block] = (fraction.array > 0.5) & valid[block]
    return masks


_MIDLINE_MM = 5.0
"""The midplane is found to within about 2 mm, and brains are not exactly symmetric; dentate nuclei lie further out."""


def clear_other_side(
    probabilities: NDArray[np.float32], grid: Grid, model: Model, plane: Midplane
) -> NDArray[np.float32]:
    """Assign to the background what nuclei have more than 5 mm beyond the midplane, on the other side.

    Takes and returns probabilities (1 + labels, X, Y, Z) on a grid, background first. Networks for labels with sides
    may confuse the sides far from the nuclei, in a patch that can be larger than the nucleus itself.
    """
    distance_mm = plane.distance_mm(grid.centres_mm())
    own = {"L": distance_mm < _MIDLINE_MM, "R": distance_mm > -_MIDLINE_MM}
    nuclei = probabilities[1:] * np.stack([own[structure.hemisphere] for structure in model.structures])
    return np.concatenate([1 - nuclei.sum(axis=0, keepdims=True), nuclei])


def split_hemispheres(
    probabilities: NDArray[np.float32], grid: Grid, model: Model, plane: Midplane
) -> NDArray[np.float32]:
    """Split the channels of nuclei without a side at the midplane.

    Takes the channels (1 + classes, X, Y, Z) of a model on a grid, background first; returns (1 + labels, X, Y, Z).
    """
    right = plane.is_right(grid)
    split = np.empty((1 + len(model.labels), *probabilities.shape[1:]), np.float32)
    split[0] = probabilities[0]
    channels = {name: channel for channel, name in enumerate(model.classes, 1)}
    for channel, structure in enumerate(model.structures, 1):
        if structure.abbreviation in channels:
            split[channel] = probabilities[channels[structure.abbreviation]]
        else:
            side = right if structure.hemisphere == "R" else ~right
            split[channel] = probabilities[channels[structure.nucleus]] * side
    return split
