"""Regions of a map: valid voxels, regions of the head, sides; the brain in a magnitude image of the whole head."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid, block_affine, box_of_mask, covering_block, shape_to_cover, world_grid
from bids_dgmseg.image.masks import (
    faces_that_cut,
    is_valid,
    large_components,
    outside_field_of_view,
    without_small_components,
)
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import load_weights, segmenter_network
from bids_dgmseg.models.registry import BRAIN_MASK, Model
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.predict import NORMALIZATIONS, forward_batch

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


_BRAIN_ML = (900.0, 1900.0)
"""Plausible volumes: adults have 1,000 to 1,700 ml, sulci and ventricles included."""

_BRIDGE_MM, _REGROWTH_MM = 9.0, 1.5
"""Half-width of bridges from the brain to eyes and neck, which are cut; the core grows back by this much more."""

_ROUNDING_MM = 1e-3
"""Voxel sizes differ by less from those that were set; 9 mm are a whole number of many."""

_SCALP_MM, _TISSUE, _MAX_BARE = 20.0, 0.15, 0.25
"""There is scalp this near the brain; signal of tissue relative to the brain's; largest fraction of the mask's surface
without scalp."""


def find_brain(
    magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float], weights: Path | None = None, device: str = "cpu"
) -> NDArray[np.bool_]:
    """Find the brain in a magnitude with the network ``brain-mask``.

    Parameters
    ----------
    magnitude : ndarray of shape (X, Y, Z)
        Signal in any unit, in RAS+ axes; voxels that are not finite count as 0.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    weights : path, optional
        Folder with ``brain-mask.safetensors``; by default the weights in the package.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.

    Returns
    -------
    ndarray of bool, shape (X, Y, Z)
        Brain with its sulci and ventricles: one component without holes; empty if there is none.

    Notes
    -----
    The network sees the field of view with voxels of 3 mm along the axes of the image. Its probabilities are
    interpolated linearly to the voxels of the image. The mask is where they exceed 0.5, after an opening by 9 mm.
    """
    finite = np.where(np.isfinite(magnitude), magnitude, 0).astype(np.float32)
    volume = Volume(finite, np.diag([*voxel_size_mm, 1.0]))
    shown = BRAIN_MASK.input
    box = box_of_mask(volume.with_array(np.ones(volume.shape, bool)))
    sizes = (np.maximum(covered, least) for covered, least in zip(box.size_mm, shown.patch_mm, strict=True))
    coarse = resample(
        volume, world_grid(box, shown.spacing_mm, shape_to_cover(tuple(sizes), shown.spacing_mm)), antialias=True
    )
    values = NORMALIZATIONS[shown.normalization](coarse.array)[None, None]
    network = load_weights(segmenter_network(BRAIN_MASK), BRAIN_MASK, BRAIN_MASK.name, weights)
    probability = forward_batch(network, values, device)[0].softmax(dim=0)[1].cpu().numpy()
    fine = resample(coarse.with_array(probability), Grid(volume.shape, volume.affine)).array
    found = (fine > 0.5) & ~outside_field_of_view(finite > 0)
    depth_mm = ndimage.distance_transform_edt(found, sampling=voxel_size_mm)
    core = large_components(depth_mm > _BRIDGE_MM + _ROUNDING_MM)
    if not core.any():
        return core
    near = ndimage.distance_transform_edt(~core, sampling=voxel_size_mm) <= _BRIDGE_MM + _REGROWTH_MM
    return np.asarray(ndimage.binary_fill_holes(large_components(found & near)), bool)


def find_mask_problems(
    mask: NDArray[np.bool_], magnitude: NDArray[np.float32], *, voxel_size_mm: Sequence[float]
) -> Iterator[str]:
    """Yield the reasons why a mask is not that of a brain: its volume, and missing scalp around it.

    A mask that a face of the image cuts (a slab) may be small. After skull stripping there need be no scalp. All arrays
    have shape (X, Y, Z).
    """
    volume_ml, (low, high) = float(mask.sum() * math.prod(voxel_size_mm) / 1e3), _BRAIN_ML
    if volume_ml > high or (volume_ml < low and not faces_that_cut(mask).any()):
        what = "scalp or neck included" if volume_ml > high else "parts of the brain missing"
        yield f"its brain mask has {volume_ml:,.0f} ml ({what}?), expected {low:,.0f} to {high:,.0f} ml"
    outside = np.zeros_like(mask)
    if mask.any():
        beyond = ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
        outside = beyond & (magnitude > _TISSUE * np.median(magnitude[mask]))
    if outside.sum() < 0.1 * mask.sum():  # the skull has been stripped
        return
    surface = mask & ~ndimage.binary_erosion(mask, border_value=1)
    scalp_mm = ndimage.distance_transform_edt(~outside, sampling=voxel_size_mm)
    if (bare := float((scalp_mm[surface] > _SCALP_MM).mean())) > _MAX_BARE:
        yield f"{bare:.0%} of the surface of its brain mask lies at the skin, expected at most {_MAX_BARE:.0%}"
