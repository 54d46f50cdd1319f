"""Which slices of a map to show, and how much of each, to judge every nucleus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import center_of_mass

from bids_dgmseg.image.similarity import fit_similarity
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.formatting import say_number

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")

_SHOWN = 0.25  # a nucleus can be judged where its section has this share of its largest section

_TIMES = 3

_TRIES = 20

_MARGIN_MM = 12.0

_REACH_MM = 8.0  # a nucleus's radius and what heads differ by

_APART_MM = 0.999  # rounding of the header left aside, whole mm tell slices apart from here on

_WIDE_MM = (20.0, 45.0, 45.0)  # x, y, z; from the nuclei of the midbrain to the dentate nuclei, and some


@dataclass(frozen=True)
class View:
    """How a plane is laid on the page: axes of an RAS+ array, and what its edges are."""

    axis: int
    """Runs from slice to slice."""
    across: int
    """Runs to the right of the picture."""
    up: int
    left: str
    right: str
    columns: int


VIEWS: dict[Plane, View] = {
    "axial": View(axis=2, across=0, up=1, left="L", right="R", columns=6),
    "coronal": View(axis=1, across=0, up=2, left="L", right="R", columns=6),
    "sagittal": View(axis=0, across=1, up=2, left="P", right="A", columns=5),
}


@dataclass(frozen=True)
class Cut:
    """The slices that a mosaic shows, and the part of each."""

    slices: tuple[int, ...]
    across: slice
    up: slice


def choose_cut(chi: Volume, dseg: Volume, *, view: View, structures: Sequence[Structure]) -> Cut:
    """Choose slices that show every nucleus, more of them where nuclei are small or many.

    Where nuclei were not found, the places are shown too where the others tell that they should be, or the surroundings
    where too few tell it; where none was found, the whole head.

    Parameters
    ----------
    chi, dseg : Volume
        Map and labels on one grid.
    view : View
        The plane.
    structures : sequence of Structure
        The nuclei that were looked for.
    """
    head = np.isfinite(chi.array) & (chi.array != 0)
    if not head.any():
        head = np.ones(chi.shape, bool)
    areas = _areas(dseg.array, view=view, structures=structures)
    shown = areas >= np.maximum(1, _SHOWN * areas.max(axis=1, keepdims=True))
    absent = ~shown.any(axis=1)
    places = _expect_places(dseg, structures, absent, within=head)
    margin_mm = _WIDE_MM if absent.any() and not places else (_MARGIN_MM,) * 3
    nuclei = np.isin(dseg.array, [structure.index for structure in structures])
    for number, place in places.items():
        nuclei[place] = True
        shown[number, place[view.axis]] = True
    along, across, up = (
        _extent(_profile(nuclei, axis), _profile(head, axis), margin=margin_mm[axis] / chi.voxel_size_mm[axis])
        for axis in (view.axis, view.across, view.up)
    )
    if not places:
        shown[absent, along] = True
    return Cut(choose_slices(shown, counts=(3 * view.columns, 4 * view.columns)), across, up)


def say_place(volume: Volume, position: int, *, cut: Cut, view: View) -> str:
    """Say where the middle of a slice lies, with a decimal where the slices lie closer than 1 mm.

    Parameters
    ----------
    volume : Volume
        Its grid is meant.
    position : int
        Number of the slice.
    cut : Cut
        The part of it that is shown.
    view : View
        The plane.
    """
    centre = np.empty(3)
    centre[view.axis] = position
    centre[view.across] = (cut.across.start + cut.across.stop - 1) / 2
    centre[view.up] = (cut.up.start + cut.up.stop - 1) / 2
    place_mm = float((volume.affine[:3, :3] @ centre + volume.affine[:3, 3])[view.axis])
    digits = 0 if abs(volume.affine[view.axis, view.axis]) > _APART_MM else 1
    # Halves go up, so that neighbours have names of their own.
    rounded = math.floor(place_mm * 10**digits + 0.5) / 10**digits
    return f"{'xyz'[view.axis]} = {say_number(rounded, digits)} mm"


def choose_slices(shown: NDArray[np.bool_], *, counts: Sequence[int]) -> tuple[int, ...]:
    """Choose slices evenly over the nuclei, each nucleus weighing the same.

    Parameters
    ----------
    shown : ndarray of bool of shape (C, N)
        Where each of C nuclei can be judged on N slices.
    counts : sequence of int
        Numbers of slices to try, ascending; the first one that shows every nucleus three times
        (or as often as it can be shown) is taken, else the last.

    Examples
    --------
    >>> choose_slices(np.array([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], bool), counts=[5])
    (1, 2, 4, 5, 7)
    """
    there = shown.sum(axis=1)
    candidates = np.flatnonzero(shown.any(axis=0))
    chosen = candidates
    for count in counts:
        if count >= len(candidates):
            return tuple(candidates.tolist())
        weights = 1 / np.maximum(there, 1)
        for _ in range(_TRIES):
            chosen = _spread(weights @ shown, count=count)
            seldom = shown[:, chosen].sum(axis=1) < np.minimum(there, _TIMES)
            if not seldom.any():
                return tuple(chosen.tolist())
            weights[seldom] *= 1.3
    return tuple(chosen.tolist())


def _spread(density: NDArray[np.floating], *, count: int) -> NDArray[np.intp]:
    """Choose places that share a density evenly; those that fall together are made up for in the gaps."""
    cumulative = np.cumsum(density)
    levels = (np.arange(count) + 0.5) / count * cumulative[-1]
    chosen = np.unique(np.searchsorted(cumulative, levels))
    places = np.arange(len(density))
    while len(chosen) < count:
        gap = np.abs(places[:, None] - chosen).min(axis=1)
        chosen = np.sort(np.append(chosen, np.argmax(density * gap)))
    return chosen


def _expect_places(
    dseg: Volume, structures: Sequence[Structure], absent: NDArray[np.bool_], *, within: NDArray[np.bool_]
) -> dict[int, tuple[slice, ...]]:
    """Tell the surroundings of the nuclei that are absent, by their number; outside the head what of it is nearest.

    Typical places are carried to the nuclei that were found; nothing where these lie on a line or in a plane.
    """
    found = [structure for structure, gone in zip(structures, absent, strict=True) if not gone]
    if not absent.any() or len({one.nucleus for one in found}) < 3 or len({one.hemisphere for one in found}) < 2:
        return {}
    indices = center_of_mass(np.ones(dseg.shape, np.uint8), dseg.array, [structure.index for structure in found])
    centres_mm = np.array(indices) @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    carry = fit_similarity(np.array([structure.mni_mm for structure in found]), centres_mm)
    ends = [np.flatnonzero(_profile(within, axis))[[0, -1]] for axis in range(3)]
    reach = _REACH_MM / np.array(dseg.voxel_size_mm)
    places: dict[int, tuple[slice, ...]] = {}
    for number in np.flatnonzero(absent).tolist():
        centre = np.linalg.inv(dseg.affine) @ [*carry(np.array(structures[number].mni_mm)), 1]
        places[number] = tuple(
            slice(int(np.clip(round(at - more), low, high)), int(np.clip(round(at + more), low, high)) + 1)
            for at, more, (low, high) in zip(centre[:3], reach, ends, strict=True)
        )
    return places


def _areas(dseg: NDArray[np.integer], *, view: View, structures: Sequence[Structure]) -> NDArray[np.intp]:
    """Count the voxels of each structure on each slice, (C, N)."""
    rows = np.moveaxis(dseg, view.axis, 0).reshape(dseg.shape[view.axis], -1)
    return np.array([(rows == structure.index).sum(axis=1) for structure in structures], dtype=np.intp)


def _profile(mask: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Tell whether a mask has a voxel at each place along an axis."""
    others = tuple(other for other in range(3) if other != axis)
    return np.asarray(mask.any(axis=others))


def _extent(nuclei: NDArray[np.bool_], head: NDArray[np.bool_], *, margin: float) -> slice:
    """Cover the nuclei and a margin in voxels, within the head; all of the head where there are no nuclei."""
    inner, outer = np.flatnonzero(nuclei), np.flatnonzero(head | nuclei)
    low, high = int(outer[0]), int(outer[-1])
    if len(inner):
        extra = int(np.ceil(margin))
        low, high = max(low, int(inner[0]) - extra), min(high, int(inner[-1]) + extra)
    return slice(low, high + 1)
