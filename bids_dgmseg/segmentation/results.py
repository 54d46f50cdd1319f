"""Results of a segmentation: location of the nuclei, probabilities, labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import Structure


@dataclass(frozen=True)
class Location:
    """Result of the localizer.

    Parameters
    ----------
    box : Box
        Region in which the nuclei are segmented.
    labels : Volume or None
        Head regions, numbered from 1 in the order of ``model.localizer.labels``; None if no network was run.
    """

    box: Box
    labels: Volume | None


@dataclass(frozen=True)
class ProbabilityBlock:
    """Probabilities on a block of a map's grid; every voxel outside is background.

    Parameters
    ----------
    probabilities : ndarray of shape (C + 1, x, y, z)
        float32, channel 0 background, then the model's labels; the channels sum to 1.
    slices : tuple of 3 slice
        Position of the block in the map's array.
    seen : tuple of str
        Nuclei with at least one voxel on the network's own grid, before resampling to the map's grid; empty if
        unknown.
    voxel_size_mm : tuple of 3 float
        Voxel size of the map.
    """

    probabilities: NDArray[np.float32]
    slices: tuple[slice, slice, slice]
    seen: tuple[str, ...] = ()
    voxel_size_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def fractions(self) -> NDArray[np.uint8]:
        """Return the probabilities (C, x, y, z) of the nuclei in steps of 1/255, as ``_probseg`` files store them."""
        return np.rint(np.clip(self.probabilities[1:], 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Segmentation:
    """Labels and probabilities of one map.

    Parameters
    ----------
    labels : ndarray of shape (X, Y, Z)
        uint8, indices of structures.tsv on the map's grid; 0 is background.
    block : ProbabilityBlock
        Probabilities inside the box.
    location : Location
        Box and head regions.
    model : Model
        The model that was used.
    """

    labels: NDArray[np.uint8]
    block: ProbabilityBlock
    location: Location
    model: Model

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Nuclei of the model, in the order of ``block.probabilities[1:]``."""
        return self.model.structures
