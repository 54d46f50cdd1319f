"""What most scans look like: the middle of the ranges that the simulation draws from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

from bids_dgmseg.simulate.artefacts import ArtefactRanges
from bids_dgmseg.simulate.reconstruction import ReconstructionRanges
from bids_dgmseg.simulate.sample import View
from bids_dgmseg.simulate.susceptibility import ValueRanges
from bids_dgmseg.simulate.tissue_details import NOBODY_ILL

Ranges = TypeVar("Ranges", ArtefactRanges, ReconstructionRanges, ValueRanges)

_LOGARITHMIC = {"noise_ppm", "snr", "least_squares", "conjugate_gradients", "total_variation"}
"""Ranges whose middle is that of their logarithms, as they are drawn."""


def ordinary_view(view: View, width: float = 0.0) -> View:
    """See heads as ordinary scans of 3 T show those of people of middle age.

    Parameters
    ----------
    view : View
        Field of view and full ranges. The scan's voxels, slices that are missing, noise outside, the direction of the
        main field and the zero stay as they are, and so do shapes and what is plausible of values at an age.
    width : float
        Part of each range's width that is kept about its middle; 0 for its middle alone.

    Returns
    -------
    View
        Nobody has small or calcified nuclei of a disease or values without law; heads are turned by at most half as
        much.
    """
    shown = view.artefacts
    artefacts = dataclasses.replace(
        narrow(shown, width),
        in_plane_mm=shown.in_plane_mm,
        slice_mm=shown.slice_mm,
        reconstruction=dataclasses.replace(narrow(shown.reconstruction, width), b0_tesla=(3.0,)),
    )
    pitch, roll, yaw = view.head.rotation_deg
    head = dataclasses.replace(view.head, rotation_deg=(pitch / 2, roll / 2, yaw / 2))
    values = dataclasses.replace(
        view.values, age_years=narrow(view.values, width).age_years, mixture=0.0, disease=NOBODY_ILL
    )
    return dataclasses.replace(view, head=head, values=values, artefacts=artefacts)


def in_own_voxels(view: View) -> View:
    """Let the scan's voxels be the view's: none is thick or oblique, and none is interpolated."""
    artefacts = dataclasses.replace(view.artefacts, in_plane_mm=(0.0, 0.0), slice_mm=(0.0, 0.0), oblique_deg=0.0)
    return dataclasses.replace(view, artefacts=artefacts)


def narrow(ranges: Ranges, width: float) -> Ranges:
    """Keep of each range of a dataclass, a pair of numbers, the part `width` of its width about its middle."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(ranges):
        value = getattr(ranges, field.name)
        if isinstance(value, tuple) and len(value) == 2:
            changed[field.name] = _narrow_pair(*value, width, logarithmic=field.name in _LOGARITHMIC)
    return dataclasses.replace(ranges, **changed)


def _narrow_pair(low: float, high: float, width: float, *, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        low, high = _narrow_pair(math.log(low), math.log(high), width, logarithmic=False)
        return math.exp(low), math.exp(high)
    middle, half = (low + high) / 2, width * (high - low) / 2
    return middle - half, middle + half
