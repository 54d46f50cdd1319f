"""Manual corrections of the labels of a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.models.structures import Structure


@dataclass(frozen=True)
class CorrectedLabels:
    """Labels of a scan after a manual correction."""

    labels: NDArray[np.uint8]
    """Indices of structures.tsv."""
    edited: Mapping[str, float]
    """Nuclei that differ from the automatic labels → Dice with them."""


def apply_correction(
    automatic: NDArray[np.integer],
    correction: NDArray[np.integer],
    *,
    numbers: Mapping[int, Structure],
    structures: Sequence[Structure],
) -> CorrectedLabels:
    """Replace automatic labels by those of a manual correction.

    Parameters
    ----------
    automatic, correction : ndarray of shape (X, Y, Z)
        Labels on the same grid: indices of structures.tsv, and those of the correction; 0 is background.
    numbers : mapping of int to Structure
        The nuclei in the correction, by their numbers in it; all others are removed.
    structures : sequence of Structure
        The nuclei of the model.
    """
    labels = np.zeros(automatic.shape, np.uint8)
    for number, structure in numbers.items():
        labels[correction == number] = structure.index
    edited = {}
    for structure in structures:
        before, after = automatic == structure.index, labels == structure.index
        if (before != after).any():
            total = int(before.sum()) + int(after.sum())
            edited[structure.abbreviation] = 2 * int((before & after).sum()) / total
    return CorrectedLabels(labels, edited)
