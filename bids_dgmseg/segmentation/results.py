"""What the two steps hand on: a place in the head, and probabilities there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume


@dataclass(frozen=True)
class Location:
    """What the whole-head step found."""

    box: Box
    labels: Volume | None
    """Regions, numbered from 1 in the order of ``localizer.labels``; None where no network looked."""


@dataclass(frozen=True)
class Block:
    """Probabilities on a part of a map's grid; all else is background.

    Parameters
    ----------
    probabilities : ndarray of shape (C + 1, x, y, z)
        float32, channel 0 background, then the model's labels; the channels sum to 1.
    slices : tuple of 3 slice
        Where the part lies in the map's array.
    seen : tuple of str
        Nuclei that had a voxel on the network's own grid, before they were carried to the map's; empty where it is not
        known.
    voxel_size_mm : tuple of 3 float
        Edges of a voxel.
    """

    probabilities: NDArray[np.float32]
    slices: tuple[slice, slice, slice]
    seen: tuple[str, ...] = ()
    voxel_size_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
