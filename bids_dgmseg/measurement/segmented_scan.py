"""A map with its segmentation, as the measures take it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.field_of_view import FieldOfView
from bids_dgmseg.models.structures import Structure


@dataclass(frozen=True, kw_only=True)
class SegmentedScan:
    """A chi map and its segmentation."""

    chi: Volume
    """In ppm, NaN where not valid."""
    dseg: Volume
    """Integers of ``structures.tsv``, on the same grid."""
    probseg: NDArray[np.float32]
    """Probabilities (C, x, y, z) in `block`, in the order of `structures`."""
    block: tuple[slice, slice, slice]
    """Part of the map that the probabilities cover; everything else is background."""
    structures: Sequence[Structure]
    labelled: Collection[str]
    """Abbreviations of the nuclei that the network labelled on its own grid."""
    r2star_hz: NDArray[np.floating] | None = None
    """R2* in 1/s on the same grid, if it was measured."""
    edited: Mapping[str, float] | None = None
    """If the labels were edited by hand: nuclei that differ from the automatic labels → Dice with them."""

    session_volumes: Mapping[str, Mapping[str, float]] | None = None
    """If the sessions of the participant were labelled together: volumes of the nuclei in this one, see
    `bids_dgmseg.measurement.volume_change.measure_session_volumes`."""

    exclude: NDArray[np.bool_] | None = None
    """Voxels of the map that are left out of all measures, such as lesions."""

    @cached_property
    def fov(self) -> FieldOfView:
        """Field of view of the map."""
        return FieldOfView.of(is_valid(self.chi.array), voxel_size_mm=self.chi.voxel_size_mm)
