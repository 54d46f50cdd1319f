"""Which part of a map was measured."""

from __future__ import annotations

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box, box_of_mask
from bids_dgmseg.images.measured import is_measured
from bids_dgmseg.images.volume import Volume


def find_measured(chi: Volume) -> Volume:
    """Mark the voxels of a finite map (ppm) that are not zero, whatever type the file stores zeros in."""
    return chi.with_array(is_measured(chi.array))


def measured_box(chi: Volume) -> Box:
    """Enclose what was measured.

    Raises
    ------
    InputError
        If nothing was.
    """
    measured = find_measured(chi)
    if not measured.array.any():
        raise InputError("the map is 0 everywhere; check how it was made")
    return box_of_mask(measured)
