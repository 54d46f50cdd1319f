"""Parts of nuclei that lie where the others say that they cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.images.similarity import Similarity, fit_similarity
from bids_dgmseg.structures import Structure

_FEWEST = 6
"""Fewer nuclei do not tell how the head lies and which of them errs."""
_ROUNDS = 20
_TYPICAL_MM = 4.0
"""By which people's nuclei differ from typical places; what is much farther away has no say."""


@dataclass(frozen=True)
class Parts:
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


def find_misplacement(found: Mapping[Structure, Parts]) -> dict[Structure, NDArray[np.float64]]:
    """Measure how far parts lie from where the nuclei, taken together, make each expected.

    The centres of the largest parts are turned, mirrored, scaled and shifted until they meet the typical ones; parts
    far off have no say in this.

    Parameters
    ----------
    found : mapping of Structure to Parts
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
    carry = _fit_robustly(largest_mm, np.array([structure.typical_mm for structure in found]))
    return {
        structure: _lengths(carry(parts.centres_mm)[:, None] - structure.typical_course_mm).min(axis=1)
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
