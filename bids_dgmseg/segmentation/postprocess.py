"""From probabilities to labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.masks import large_components
from bids_dgmseg.image.similarity import Similarity, fit_similarity
from bids_dgmseg.models.registry import Model, Postprocessing
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.segmentation.results import ProbabilityBlock

_TOUCHING = np.ones((3, 3, 3))
"""Components are connected over faces, edges or corners."""


def postprocess(block: ProbabilityBlock, model: Model) -> NDArray[np.uint8]:
    """Label each voxel, then mend each nucleus as the model's ``postprocessing`` says.

    Parameters
    ----------
    block : ProbabilityBlock
        Probabilities, background first.
    model : Model
        Gives the channels' nuclei.

    Returns
    -------
    ndarray of shape (x, y, z)
        Numbers of structures.tsv, 0 for background.
    """
    numbers = np.array([0, *(structure.index for structure in model.structures)], np.uint8)
    dseg: NDArray[np.uint8] = numbers[_choose(block.probabilities, model.postprocessing.threshold)]
    if model.postprocessing.position_sd_mm:
        _drop_misplaced(dseg, model, block.voxel_size_mm)
    for number, place in zip(numbers[1:], _places(dseg, numbers[1:]), strict=True):
        if place is not None:
            part = dseg[place]
            mask = part == number
            mended = _mend(mask, model.postprocessing)
            part[mask & ~mended] = 0
            part[mended & (part == 0)] = number
    return dseg


def label_grid(block: ProbabilityBlock, model: Model, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Label a map's whole grid of that shape: `clean` inside the block, background elsewhere."""
    dseg = np.zeros(shape, np.uint8)
    dseg[block.slices] = postprocess(block, model)
    return dseg


def labelled_nuclei(probabilities: NDArray[np.float32], model: Model) -> tuple[str, ...]:
    """Name the nuclei that some voxel goes to."""
    channels = np.unique(_choose(probabilities, model.postprocessing.threshold))
    return tuple(model.labels[channel - 1] for channel in channels if channel)


def _choose(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.intp]:
    """Take the most probable channel, or with a threshold the most probable nucleus that exceeds it."""
    if not threshold:
        most: NDArray[np.intp] = probabilities.argmax(axis=0)
        return most
    chosen = 1 + probabilities[1:].argmax(axis=0)
    return np.where(probabilities[1:].max(axis=0) > threshold, chosen, 0)


def _places(dseg: NDArray[np.uint8], numbers: NDArray[np.uint8]) -> list[tuple[slice, ...] | None]:
    """Find the block of each label with a voxel about it."""
    found = ndimage.find_objects(dseg, max_label=int(numbers.max(initial=1)))
    return [
        place and tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in place)
        for place in (found[number - 1] for number in numbers)
    ]


def _drop_misplaced(dseg: NDArray[np.uint8], model: Model, voxel_size_mm: tuple[float, float, float]) -> None:
    """Remove parts that are small beside the largest, each counting for less the farther from its place it lies."""
    places, parts, found = {}, {}, {}
    indices = np.array([structure.index for structure in model.structures], np.uint8)
    for structure, place in zip(model.structures, _places(dseg, indices), strict=True):
        if place is not None:
            places[structure] = place
            parts[structure], count = ndimage.label(dseg[place] == structure.index, _TOUCHING)
            centres = ndimage.center_of_mass(parts[structure] > 0, parts[structure], np.arange(1, count + 1))
            centres_mm = (np.array(centres) + [piece.start for piece in place]) * voxel_size_mm
            found[structure] = Components(np.bincount(parts[structure].ravel())[1:], centres_mm)
    for structure, missed_mm in distances_from_typical_positions(found).items():
        nearness = np.exp(-((missed_mm / model.postprocessing.position_sd_mm) ** 2) / 2)
        small = _small(found[structure].sizes * nearness, model.postprocessing.min_component_fraction)
        dseg[places[structure]][np.append(False, small)[parts[structure]]] = 0


def _mend(mask: NDArray[np.bool_], postprocessing: Postprocessing) -> NDArray[np.bool_]:
    if postprocessing.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    mask = large_components(mask, postprocessing.min_component_fraction, over_corners=True)
    return _smoothed(mask) if postprocessing.smooth else mask


def _small(sizes: NDArray[np.number], min_component_fraction: float) -> NDArray[np.bool_]:
    small: NDArray[np.bool_] = sizes < min_component_fraction * sizes.max()
    if min_component_fraction >= 1:
        small = np.arange(len(sizes)) != sizes.argmax()  # one even of two that are as large
    return small


def _smoothed(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Let each voxel and its six neighbours vote; a body too thin for any majority stays as it is."""
    votes = ndimage.convolve(mask.astype(np.uint8), ndimage.generate_binary_structure(3, 1), mode="constant")
    smooth: NDArray[np.bool_] = votes >= 4
    return smooth if smooth.any() else mask


_FEWEST = 6
"""Fewer nuclei do not tell how the head lies and which of them errs."""

_ROUNDS = 20

_TYPICAL_MM = 4.0
"""By which people's nuclei differ from typical places; what is much farther away has no say."""


@dataclass(frozen=True)
class Components:
    """Connected parts that one nucleus was found in.

    Parameters
    ----------
    sizes : ndarray of shape (n,)
        In voxels.
    centres_mm : ndarray of shape (n, 3)
        Along the axes of the map's array, from any origin that all nuclei share.
    """

    sizes: NDArray[np.integer]
    centres_mm: NDArray[np.float64]


def distances_from_typical_positions(found: Mapping[Structure, Components]) -> dict[Structure, NDArray[np.float64]]:
    """Measure how far parts lie from where the nuclei, taken together, make each expected.

    The centres of the largest parts are turned, mirrored, scaled and shifted until they meet the typical ones; parts
    far off have no say in this.

    Parameters
    ----------
    found : mapping of Structure to Components
        Nuclei with one part or more.

    Returns
    -------
    mapping of Structure to ndarray of shape (n,)
        Distances in mm of the MNI152 brain from the nearest place of the nucleus; all 0 where fewer than six nuclei
        were found.
    """
    if len(found) < _FEWEST:
        return {structure: np.zeros(len(parts.sizes)) for structure, parts in found.items()}
    largest_mm = np.array([parts.centres_mm[parts.sizes.argmax()] for parts in found.values()])
    carry = _fit_robustly(largest_mm, np.array([structure.mni_mm for structure in found]))
    return {
        structure: _lengths(carry(parts.centres_mm)[:, None] - structure.mni_course_mm).min(axis=1)
        for structure, parts in found.items()
    }


def _fit_robustly(points: NDArray[np.float64], goals: NDArray[np.float64]) -> Similarity:
    """Fit a similarity: first for the least sum of distances, then for the most pairs within a few millimetres."""
    fitted = fit_similarity(points, goals, mirrored=True)
    for number in range(_ROUNDS):
        missed = _lengths(fitted(points) - goals)
        weights = 1 / np.maximum(missed, 1) if number < _ROUNDS // 2 else (1 + (missed / _TYPICAL_MM) ** 2) ** -2.0
        fitted = fit_similarity(points, goals, weights, mirrored=True)
    return fitted


def _lengths(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.linalg.norm(vectors, axis=-1)
    return lengths
