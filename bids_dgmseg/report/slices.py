"""Slices of the figures: planes, their layout, the positions that show every nucleus, the field of view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.html import format_number

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")

_MIN_AREA = 0.25
"""A slice shows a nucleus if it has this fraction of the nucleus's largest cross-section."""

_TIMES = 3  # slices on which each nucleus is to be seen
_MAX_ITERATIONS = 20
_MARGIN_MM = 12.0
_WIDE_MARGIN_MM = (20.0, 45.0, 45.0)  # x, y, z: from the midbrain to beyond the dentate nuclei
_WHOLE_MM = 0.999
"""Slice distance from which positions in integer mm differ, apart from the header's rounding."""

WINDOW_PPM = (-0.1, 0.2)
"""Black and white."""


@dataclass(frozen=True)
class PlaneLayout:
    """How slices of an RAS+ array are arranged in a mosaic."""

    axis: int
    """Axis across slices."""
    across: int
    """Axis from left to right of the figure."""
    up: int
    left: str
    right: str
    columns: int


LAYOUTS: dict[Plane, PlaneLayout] = {
    "axial": PlaneLayout(axis=2, across=0, up=1, left="L", right="R", columns=6),
    "coronal": PlaneLayout(axis=1, across=0, up=2, left="L", right="R", columns=6),
    "sagittal": PlaneLayout(axis=0, across=1, up=2, left="P", right="A", columns=5),
}


@dataclass(frozen=True)
class MosaicSlices:
    """Slices of a mosaic, and their common field of view; sizes are in voxels of the plane."""

    layout: PlaneLayout
    slices: tuple[int, ...]
    across: slice
    up: slice

    @property
    def panels(self) -> tuple[int, int, int, int]:
        """Return the numbers of rows and columns, and the height and width of a panel."""
        columns = min(self.layout.columns, len(self.slices))
        height, width = self.up.stop - self.up.start, self.across.stop - self.across.start
        return math.ceil(len(self.slices) / columns), columns, height, width

    def corner(self, number: int) -> tuple[int, int]:
        """Return the first row and column of a panel."""
        _, columns, height, width = self.panels
        row, column = divmod(number, columns)
        return row * height, column * width

    def cut(self, volume: Volume, position: int) -> NDArray[Any]:
        """Return the visible part of a slice, its first row at the top."""
        index: list[int | slice] = [0, 0, 0]
        index[self.layout.axis] = position
        index[self.layout.across], index[self.layout.up] = self.across, self.up
        section = volume.array[tuple(index)]
        upright = section.T if self.layout.across < self.layout.up else section
        return np.asarray(upright[::-1])

    def format_position(self, volume: Volume, position: int) -> str:
        """Format the world coordinate of the centre of a slice, with a decimal if slices are closer than 1 mm."""
        axis = self.layout.axis
        centre = np.empty(3)
        centre[axis] = position
        centre[self.layout.across] = (self.across.start + self.across.stop - 1) / 2
        centre[self.layout.up] = (self.up.start + self.up.stop - 1) / 2
        position_mm = float((volume.affine[:3, :3] @ centre + volume.affine[:3, 3])[axis])
        digits = 0 if abs(volume.affine[axis, axis]) > _WHOLE_MM else 1
        # Halves are always rounded up, so that neighbouring slices have different labels.
        rounded = math.floor(position_mm * 10**digits + 0.5) / 10**digits
        return f"{'xyz'[axis]} = {format_number(rounded, digits)} mm"


def choose_mosaic(
    chi: Volume,
    dseg: Volume,
    *,
    layout: PlaneLayout,
    structures: Sequence[Structure],
    marks: Sequence[NDArray[np.bool_]] = (),
) -> MosaicSlices:
    """Choose slices that show every nucleus of a model, more of them if nuclei are small or many.

    Regions in `marks` are shown like nuclei as far as they lie in the common field of view of these.

    For nuclei that were not found, the field of view is wider; if none was found, it is the whole head. Map and labels
    are on one grid.
    """
    head = np.isfinite(chi.array) & (chi.array != 0)
    if not head.any():
        head = np.ones(chi.shape, bool)
    slices = np.moveaxis(dseg.array, layout.axis, 0).reshape(dseg.shape[layout.axis], -1)
    areas = np.array([(slices == structure.index).sum(axis=1) for structure in structures], dtype=np.intp)
    shown = areas >= np.maximum(1, _MIN_AREA * areas.max(axis=1, keepdims=True))
    missing = ~shown.any(axis=1)
    margin_mm = _WIDE_MARGIN_MM if missing.any() else (_MARGIN_MM,) * 3
    nuclei = np.isin(dseg.array, [structure.index for structure in structures])
    extents = {}  # of the nuclei with a margin, within the head; without nuclei, of the whole head
    for axis in range(3):
        inner, outer = (np.flatnonzero(_profile(mask, axis)) for mask in (nuclei, head | nuclei))
        low, high = int(outer[0]), int(outer[-1])
        if len(inner):
            extra = int(np.ceil(margin_mm[axis] / chi.voxel_size_mm[axis]))
            low, high = max(low, int(inner[0]) - extra), min(high, int(inner[-1]) + extra)
        extents[axis] = slice(low, high + 1)
    shown[missing, extents[layout.axis]] = True
    for mask in marks:
        inside = np.moveaxis(mask[tuple(extents[axis] for axis in range(3))], layout.axis, 0)
        mark = np.zeros((1, shown.shape[1]), np.intp)
        mark[0, extents[layout.axis]] = inside.reshape(len(inside), -1).sum(axis=1)
        if mark.any():
            shown = np.vstack([shown, mark >= max(1, _MIN_AREA * mark.max())])
    chosen = choose_slices(shown, counts=(3 * layout.columns, 4 * layout.columns))
    return MosaicSlices(layout, chosen, extents[layout.across], extents[layout.up])


def choose_slices(shown: NDArray[np.bool_], *, counts: Sequence[int]) -> tuple[int, ...]:
    """Choose slices evenly over the nuclei, with equal weight per nucleus.

    `shown` (nuclei × slices) tells which slices show which nucleus. `counts` are the numbers of slices to try,
    ascending: the first that shows every nucleus three times (or as often as possible) is used, else the last.

    >>> choose_slices(np.array([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], bool), counts=[5])
    (1, 2, 4, 5, 7)
    """
    available = shown.sum(axis=1)
    candidates = np.flatnonzero(shown.any(axis=0))
    chosen = candidates
    for count in counts:
        if count >= len(candidates):
            return tuple(candidates.tolist())
        weights = 1 / np.maximum(available, 1)
        for _ in range(_MAX_ITERATIONS):
            chosen = _spread(weights @ shown, count=count)
            rarely_shown = shown[:, chosen].sum(axis=1) < np.minimum(available, _TIMES)
            if not rarely_shown.any():
                return tuple(chosen.tolist())
            weights[rarely_shown] *= 1.3
    return tuple(chosen.tolist())


def _spread(density: NDArray[np.floating], *, count: int) -> NDArray[np.intp]:
    """Choose positions at equal quantiles of a density; duplicates are replaced by positions in the gaps."""
    cumulative = np.cumsum(density)
    levels = (np.arange(count) + 0.5) / count * cumulative[-1]
    chosen = np.unique(np.searchsorted(cumulative, levels))
    positions = np.arange(len(density))
    while len(chosen) < count:
        gap = np.abs(positions[:, None] - chosen).min(axis=1)
        chosen = np.sort(np.append(chosen, np.argmax(density * gap)))
    return chosen


def _profile(mask: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Return whether a mask has a voxel at each index along an axis."""
    others = tuple(other for other in range(3) if other != axis)
    return np.asarray(mask.any(axis=others))
