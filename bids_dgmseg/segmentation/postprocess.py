"""Last step: labels from probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.stats import median_abs_deviation

from bids_dgmseg.image.grids import Grid, Similarity, fit_similarity
from bids_dgmseg.image.masks import large_components, open_with_ball
from bids_dgmseg.models.registry import Model, Postprocessing
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.localize import CEREBELLAR_NUCLEI
from bids_dgmseg.segmentation.predict import ProbabilityBlock, choose_channels

_NEIGHBOURS = np.ones((3, 3, 3))
"""Components are connected over faces, edges or corners."""

_MIN_NUCLEI = 6
"""With fewer nuclei, the pose of the head is unknown, and so is which of them is misplaced."""

_ROUNDS = 20

_THIN_MM = 1.5
"""Radius of the ball that does not fit into the thin parts of a nucleus."""

_VEIN_SD = 1.0
"""Thin parts are veins if they are brighter than the rest of the nucleus by so many SD of its values.

With this value the Dice coefficient of the caudate rises on real maps and hardly changes on simulated ones: the tail
of the caudate, as thin as the veins beside it, is not brighter than its head.
"""

_TYPICAL_DISTANCE_MM = 4.0
"""Variation of nuclei around their typical positions; the fit ignores what is much farther away."""


def postprocess(block: ProbabilityBlock, model: Model, chi: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    """Label each voxel, then clean up each nucleus as ``model.postprocessing`` states.

    Parameters
    ----------
    block : ProbabilityBlock
        Probabilities, background first.
    model : Model
        Its labels are the channels.
    chi : ndarray of shape (x, y, z), optional
        The map in the block, ppm; without it, veins are not removed.

    Returns
    -------
    ndarray of shape (x, y, z)
        Indices of structures.tsv, 0 for background.
    """
    numbers = np.array([0, *(structure.index for structure in model.structures)], np.uint8)
    dseg: NDArray[np.uint8] = numbers[choose_channels(block.probabilities, model.postprocessing.threshold)]
    if model.postprocessing.position_sd_mm:
        dseg = _remove_misplaced(dseg, model, block.voxel_size_mm)
    veined = {
        structure.index
        for structure in model.structures
        if structure.abbreviation in model.postprocessing.without_veins
    }
    for number, box in zip(numbers[1:], _find_boxes(dseg, numbers[1:]), strict=True):
        if box is not None:
            part = dseg[box]  # a view: nuclei are cleaned up one after the other, in place
            mask = part == number
            kept = mask
            if chi is not None and number in veined:
                kept = _remove_veins(mask, chi[box], block.voxel_size_mm)
            cleaned = _clean_up(kept, model.postprocessing)
            part[mask & ~cleaned] = 0
            part[cleaned & (part == 0)] = number
    return dseg


def label_grid(block: ProbabilityBlock, model: Model, chi: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Label the whole grid of a map (X, Y, Z) in ppm: `postprocess` inside the block, background elsewhere."""
    dseg = np.zeros(chi.shape, np.uint8)
    dseg[block.slices] = postprocess(block, model, chi[block.slices])
    return dseg


def _find_boxes(dseg: NDArray[np.uint8], numbers: NDArray[np.uint8]) -> list[tuple[slice, ...] | None]:
    """Find the bounding box of each label, with a margin of one voxel."""
    boxes = ndimage.find_objects(dseg, max_label=int(numbers.max(initial=1)))
    return [
        box and tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in box)
        for box in (boxes[number - 1] for number in numbers)
    ]


def _remove_misplaced(
    dseg: NDArray[np.uint8], model: Model, voxel_size_mm: tuple[float, float, float]
) -> NDArray[np.uint8]:
    """Remove components that are small relative to the largest, after weighting sizes by position.

    Without the prior of position, a spurious component far from the nucleus but larger than it would be kept, and the
    nucleus removed.
    """
    boxes, labelled, components = {}, {}, {}
    indices = np.array([structure.index for structure in model.structures], np.uint8)
    for structure, box in zip(model.structures, _find_boxes(dseg, indices), strict=True):
        if box is not None:
            boxes[structure] = box
            labelled[structure], sizes, centres = _label_components(dseg[box] == structure.index)
            components[structure] = Components(sizes, (centres + [part.start for part in box]) * voxel_size_mm)
    cleaned = dseg.copy()
    min_fraction = model.postprocessing.min_component_fraction
    for structure, distances_mm in distances_from_typical_positions(components).items():
        weighted = _weight(components[structure].sizes, distances_mm, model.postprocessing.position_sd_mm)
        small = weighted < min_fraction * weighted.max()
        if min_fraction >= 1:
            small = np.arange(len(weighted)) != weighted.argmax()
        cleaned[boxes[structure]][np.append(False, small)[labelled[structure]]] = 0
    return cleaned


def keep_best_placed(
    probabilities: NDArray[np.float32],
    grid: Grid,
    model: Model,
    plane: Midplane,
    find_places_mm: Callable[[], NDArray[np.float64]],
) -> NDArray[np.float32]:
    """Assign to the background all but one component of each cerebellar nucleus: one large and near its expected place.

    Parameters
    ----------
    probabilities : ndarray of shape (1 + labels, X, Y, Z)
        Background first.
    grid : Grid
        Of the probabilities.
    model : Model
        Its ``postprocessing.region_sd_mm`` is the SD of the distance.
    plane : Midplane
        Divides the places into sides; a nucleus without any keeps its components.
    find_places_mm : callable
        Returns points (N, 3) of the region of the nuclei, both sides, RAS+ mm; called if a nucleus is in pieces.

    Returns
    -------
    ndarray of shape (1 + labels, X, Y, Z)
        A component's size is weighted by a Gaussian of the distance of its centre from the nearest point.
    """
    labels = probabilities.argmax(axis=0)
    pieces = {
        channel: islands
        for channel, structure in enumerate(model.structures, 1)
        if structure.nucleus in CEREBELLAR_NUCLEI and len((islands := _label_components(labels == channel))[1]) > 1
    }
    if not pieces:
        return probabilities
    places_mm, nuclei = find_places_mm(), probabilities[1:].copy()
    right = plane.distance_mm(places_mm) > 0
    for channel, (labelled, sizes, centres) in pieces.items():
        own_mm = places_mm[right == (model.structures[channel - 1].hemisphere == "R")]
        if len(own_mm):
            distances_mm = cdist(apply_affine(grid.affine, centres), own_mm).min(axis=1)
            best = _weight(sizes, distances_mm, model.postprocessing.region_sd_mm).argmax() + 1
            nuclei[channel - 1][(labelled > 0) & (labelled != best)] = 0
    return np.concatenate([1 - nuclei.sum(axis=0, keepdims=True), nuclei])


def _label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.float64]]:
    """Return the components of a mask (X, Y, Z), numbered from 1, their sizes (n,) and centres (n, 3) in voxels."""
    labelled, count = ndimage.label(mask, _NEIGHBOURS)
    centres = np.array(ndimage.center_of_mass(mask, labelled, np.arange(1, count + 1)))
    return labelled, np.bincount(labelled.ravel())[1:], centres


def _weight(sizes: NDArray[np.integer], distances_mm: NDArray[np.float64], sd_mm: float) -> NDArray[np.float64]:
    """Multiply the sizes of components by a Gaussian of their distances from the expected position."""
    return np.exp(-((distances_mm / sd_mm) ** 2) / 2) * sizes


def _remove_veins(
    mask: NDArray[np.bool_], chi: NDArray[np.float32], voxel_size_mm: tuple[float, float, float]
) -> NDArray[np.bool_]:
    """Remove the connected thin parts of a nucleus whose mean in ppm is that of a vein.

    Such strands follow the veins of the ventricular wall. Parts are thin where an opening removes them.
    """
    solid = open_with_ball(mask, _THIN_MM, voxel_size_mm)
    if not solid.any():
        return mask
    limit_ppm = np.median(chi[solid]) + _VEIN_SD * median_abs_deviation(chi[solid], scale="normal")
    parts, count = ndimage.label(mask & ~solid, _NEIGHBOURS)
    means_ppm = ndimage.mean(chi, parts, np.arange(1, count + 1))
    return mask & ~np.append(False, means_ppm > limit_ppm)[parts]


def _clean_up(mask: NDArray[np.bool_], options: Postprocessing) -> NDArray[np.bool_]:
    """Fill holes, remove small components, and apply a majority vote of each voxel and its six neighbours."""
    if options.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    mask = large_components(mask, options.min_component_fraction, over_corners=True)
    if not options.smooth:
        return mask
    votes = ndimage.convolve(mask.astype(np.uint8), ndimage.generate_binary_structure(3, 1), mode="constant")
    smooth: NDArray[np.bool_] = votes >= 4
    return smooth if smooth.any() else mask  # thin masks have no majority anywhere


@dataclass(frozen=True)
class Components:
    """Connected components of one nucleus."""

    sizes: NDArray[np.integer]
    """Number of voxels, (n,)."""
    centres_mm: NDArray[np.float64]
    """Centres (n, 3) along the axes of the map's array, from any origin that is the same for all nuclei."""


def distances_from_typical_positions(nuclei: Mapping[Structure, Components]) -> dict[Structure, NDArray[np.float64]]:
    """Measure how far components are from where the other nuclei make them expected.

    A similarity transform (mirroring allowed, because axes may be flipped) maps the centres of the largest components
    to typical positions in MNI152 space; outliers hardly influence it. The result is the distance (n,) in mm in that
    space from the nearest typical point of the nucleus; all 0 if fewer than six nuclei were found.
    """
    if len(nuclei) < _MIN_NUCLEI:
        return {structure: np.zeros(len(components.sizes)) for structure, components in nuclei.items()}
    largest_mm = np.array([components.centres_mm[components.sizes.argmax()] for components in nuclei.values()])
    to_mni = _fit_robustly(largest_mm, np.array([structure.mni_mm for structure in nuclei]))
    return {
        structure: np.linalg.norm(
            to_mni(components.centres_mm)[:, None] - np.array(structure.mni_course_mm), axis=-1
        ).min(axis=1)
        for structure, components in nuclei.items()
    }


def _fit_robustly(points: NDArray[np.float64], targets: NDArray[np.float64]) -> Similarity:
    """Fit a similarity by iteratively reweighted least squares.

    The first half of the rounds minimizes the sum of distances, which has a single minimum but is still influenced by
    outliers; the second half, with weights that fall to 0, starts close enough to ignore them.
    """
    fitted = fit_similarity(points, targets, mirrored=True)
    for number in range(_ROUNDS):
        distance = np.linalg.norm(fitted(points) - targets, axis=-1)
        if number < _ROUNDS // 2:
            weights = 1 / np.maximum(distance, 1)
        else:
            weights = (1 + (distance / _TYPICAL_DISTANCE_MM) ** 2) ** -2.0
        fitted = fit_similarity(points, targets, weights, mirrored=True)
    return fitted
