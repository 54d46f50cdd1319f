"""Regions of a map: valid voxels, regions of the head, hemispheres."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, optimize
from torch.nn import functional

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, block_affine, box_of_mask, covering_block, world_grid
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.records import Midplane

_LARGEST_PPM = 5.0
"""Upper limit of |chi|; bone, calcifications and hemorrhages stay below it."""

_SMALL = 0.01
"""Components that contain less than this fraction of all valid voxels are ignored."""

REGIONS: Mapping[str, tuple[str, ...]] = {
    "brain": ("brain", "cerebellum", "ventricles", "nuclei", "cerebellar_nuclei"),
    "cerebellum": ("cerebellum", "cerebellar_nuclei"),
    "ventricles": ("ventricles",),
}
"""Region → the localizer's labels that form it, the required one first; ``ventricles`` are the lateral ventricles."""

CEREBELLAR_NUCLEI = frozenset({"DN", "IN"})
"""Nuclei of the localizer's label ``cerebellar_nuclei``."""


def valid_box(chi: Volume) -> Box:
    """Return the bounding box of the valid voxels of a finite map (ppm), without small separate components.

    Raises
    ------
    InputError
        If no voxel is valid.
    """
    valid = is_valid(chi.array)
    if not valid.any():
        raise InputError("the map is 0 everywhere; check how it was reconstructed")
    return box_of_mask(chi.with_array(_without_small_components(valid)))


def clip_and_remove_small_components(chi: Volume) -> Volume:
    """Set small separate components to 0 and clip the map to ±5 ppm.

    A single voxel of extreme susceptibility changes what a network predicts far inside the head.
    """
    valid = is_valid(chi.array)
    if (small := valid & ~_without_small_components(valid)).any():
        chi = chi.with_array(np.where(small, np.float32(0), chi.array))
    low, high = float(chi.array.min()), float(chi.array.max())
    if -_LARGEST_PPM <= low and high <= _LARGEST_PPM:
        return chi
    return chi.with_array(np.clip(chi.array, -_LARGEST_PPM, _LARGEST_PPM))


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


MIN_BRAIN_MM3 = 200_000.0
"""A fifth of a small adult brain: less is not a head, even if the field of view is cut."""

_SPACINGS_MM = (6.0, 3.0)

_ANGLES_DEG = (-18.0, -9.0, 0.0, 9.0, 18.0)

_SHIFTS_MM = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)
"""Starting points of the search; they cover the tilts of heads and the asymmetries of masks that occur."""

_CLIPPED_PPM = 0.15
"""Veins and streaks have larger values and are less symmetric than nuclei."""

_MIN_OVERLAP = 0.5
"""Minimum fraction of voxels with a mirror image; planes near the edge of the head would correlate trivially."""


def find_midplane(chi: Volume, regions: Volume | None = None) -> Midplane:
    """Find the plane about which a map is most symmetric.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain; the head is tilted by at most 18 degrees.
    regions : Volume, optional
        Labels of head regions, 0 outside the brain, if they are at least 200 ml. Without them, tissue or noise around
        the brain may mislead.

    Returns
    -------
    Midplane
        Maximizes the correlation of the map and its mirror image over voxels that are valid on both sides, times their
        share, plus the mean Dice of regions and their mirror images.
    """
    mask = is_valid(chi.array)
    box, valid = box_of_mask(chi.with_array(mask)), chi.with_array(mask.astype(np.float32))
    masks = list[Volume]()
    if regions is not None and np.count_nonzero(regions.array) * np.prod(regions.voxel_size_mm) > MIN_BRAIN_MM3:
        box = box_of_mask(regions.with_array(regions.array > 0))
        present = np.unique(regions.array)
        masks = [regions.with_array((regions.array == one).astype(np.float32)) for one in present if one]
    start: NDArray[np.float64] = np.zeros(3)
    for spacing_mm in _SPACINGS_MM:
        grid = world_grid(box, (spacing_mm,) * 3)
        shown, measured, *parts = (resample(one, grid, antialias=True) for one in (chi, valid, *masks))
        if parts:
            inside = np.sum([part.array for part in parts], axis=0)
            measured = measured.with_array(measured.array * inside)
        mirror = _Mirror(shown, measured, [part.array for part in parts])
        if spacing_mm == _SPACINGS_MM[0]:
            starts = [np.array([0, 0, mirror.middle_mm]) + at for at in product(_ANGLES_DEG, _ANGLES_DEG, _SHIFTS_MM)]
            start = min(starts, key=mirror.asymmetry)
        steps = np.vstack([start, start + np.diag([4.0, 4.0, spacing_mm / 2])])
        found = optimize.minimize(
            mirror.asymmetry,
            start,
            method="Nelder-Mead",
            options={"initial_simplex": steps, "xatol": 0.02, "fatol": 1e-5, "maxfev": 200},
        )
        start = found.x
    return Midplane.from_angles(start)


class _Mirror:
    """A map and masks of regions, compared with their mirror images."""

    def __init__(self, chi: Volume, valid: Volume, regions: Sequence[NDArray[np.float32]] = ()) -> None:
        clipped = np.clip(chi.array, -_CLIPPED_PPM, _CLIPPED_PPM)
        inside = valid.array > 0.5
        self._points = Grid(chi.shape, chi.affine).centres_mm()[inside]
        self._values = clipped[inside]
        self._regions = np.array([region[inside] for region in regions])
        self._images = torch.from_numpy(np.stack([valid.array, clipped, *regions]))[None]
        # grid_sample expects coordinates of -1 and 1 at the outermost voxel centres.
        to_index, scale = np.linalg.inv(chi.affine), 2 / np.maximum(np.array(chi.shape) - 1, 1)
        self._matrix, self._start = scale[:, None] * to_index[:3, :3], scale * to_index[:3, 3] - 1
        self.middle_mm = float(self._points[:, 0].mean())

    def asymmetry(self, parameters: NDArray[np.float64]) -> float:
        """Return 0 for a map and regions like their mirror images, up to 2 or more for others."""
        plane = Midplane.from_angles(parameters)
        reflection = np.eye(3) - 2 * np.outer(plane.normal, plane.normal)
        start = self._start + self._matrix @ (2 * plane.offset_mm * plane.normal)
        mirrored = self._points @ (self._matrix @ reflection).T + start
        last_axis_first = torch.from_numpy(mirrored.astype(np.float32)).flip(1)[None, None, None]
        sampled = functional.grid_sample(self._images, last_axis_first, mode="bilinear", align_corners=True)
        valid, image, *regions = sampled[0, :, 0, 0].numpy()
        both = (valid > 0.5) & (np.abs(mirrored) <= 1).all(axis=1)
        share = float(both.mean())
        if share < _MIN_OVERLAP:
            return 3.0
        # With less overlap, planes beside the true one may correlate better by chance.
        asymmetry = 1 - share * float(np.corrcoef(self._values[both], image[both])[0, 1])
        if regions:
            common = 2 * (self._regions * regions).sum(axis=1)
            asymmetry += 1 - float((common / (np.square(self._regions) + np.square(regions)).sum(axis=1)).mean())
        return asymmetry


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
