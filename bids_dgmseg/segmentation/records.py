"""What the steps of a segmentation take and return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.registration.midplane import Midplane


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How a model is run."""

    weights: Path | None = None
    """Model folder to use instead of the weights in the package."""
    device: str = "cpu"
    """Where the networks run: ``cpu``, ``cuda`` or ``auto``."""
    ensemble: bool = False
    """Average over each map and its mirror image, which dgm16 and dgm24 always do: twice as slow."""
    folds: tuple[int, ...] = ()
    """Folds of the model folder to average; empty: all."""
    own_voxels: bool = True
    """Whether the network's grid follows the voxels of the map if they fit."""


@dataclass(frozen=True)
class Location:
    """Result of the localizer.

    Parameters
    ----------
    box : Box
        Region in which the nuclei are segmented.
    labels : Volume or None
        Head regions, numbered from 1 in the order of ``model.localizer.labels``; None if no network was run.
    plane : Midplane or None
        Plane between the hemispheres; None if it was not searched.
    regions : Volume or None
        Head regions by the network that was run, of this model or another one, by which the plane is found.
    """

    box: Box
    labels: Volume | None = None
    plane: Midplane | None = None
    regions: Volume | None = None


@dataclass(frozen=True)
class SharedSpace:
    """The mid-space of the sessions of a participant, for one of their maps."""

    to_map: NDArray[np.float64]
    """4×4, from the mid-space to the space of the map, RAS+ mm."""
    location: Location
    """Box and midplane in the mid-space, the same for all sessions."""


def to_mid_space(chi: Volume, to_map: NDArray[np.float64]) -> Volume:
    """Return a map with its affine in the mid-space, from which `to_map` leads to its own space."""
    return Volume(chi.array, np.linalg.inv(to_map) @ chi.affine)


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
