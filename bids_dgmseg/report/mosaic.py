"""Mosaics of a susceptibility map with the outlines of the nuclei, on slices that show every nucleus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import center_of_mass
from skimage.measure import find_contours

from bids_dgmseg.image.grids import fit_similarity
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import with_default_settings
from bids_dgmseg.report.html import format_number

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")

_MIN_AREA = 0.25
"""A slice shows a nucleus if it has this fraction of the nucleus's largest cross-section."""

_TIMES = 3  # slices on which each nucleus is to be seen
_MAX_ITERATIONS = 20
_MARGIN_MM = 12.0
_WIDE_MARGIN_MM = (20.0, 45.0, 45.0)  # x, y, z: from the midbrain to beyond the dentate nuclei
_SEARCH_MM = 8.0
"""Around the expected centre of a nucleus that was not found: its radius and the variation between heads."""

_WHOLE_MM = 0.999
"""Slice distance from which positions in integer mm differ, apart from the header's rounding."""

WINDOW_PPM = (-0.1, 0.2)
"""Black and white."""

_WIDTH = 1800  # pixels; 1.5 times the width of the page, for high-resolution screens
_HEADER, _LEGEND_LINE, _FOOTER = 54, 34, 64  # pixels
_LEGEND_COLUMNS = 8
_DPI = 150
_DARK, _PALE, _MIDDLE = "#14171c", "#e8eaed", "#9aa3ad"
_FONT = "DejaVu Sans"  # comes with matplotlib, so that figures do not depend on the machine
_LINE_PT = 0.8
_RIM_PT = 0.6  # both sides of a line together; a point is 2 pixels


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


@with_default_settings
def draw_mosaic(
    chi: Volume, dseg: Volume, out: Path, *, plane: Plane, structures: Sequence[Structure], title: str = ""
) -> Path:
    """Draw slices of a chi map with the outlines of the nuclei as a PNG.

    The planes are those of the image, scaled to millimetres without interpolation. The patient's left is on the left
    (neurological convention), in sagittal planes posterior. The same input gives the same bytes.

    Parameters
    ----------
    chi : Volume
        Map in ppm; NaN is drawn black.
    dseg : Volume
        Labels on the grid of `chi`, numbered as in structures.tsv.
    out : Path
        The PNG to write.
    plane : str
        ``axial``, ``coronal`` or ``sagittal``.
    structures : sequence of Structure
        The nuclei of the model, for outlines and legend.
    title : str
        Title above the slices.

    Raises
    ------
    ValueError
        If the labels have another shape than the map, or the plane is unknown.
    """
    if plane not in LAYOUTS:
        raise ValueError(f"plane {plane!r}, expected one of {', '.join(PLANES)}")
    if dseg.shape != chi.shape:
        raise ValueError(f"dseg has shape {dseg.shape}, expected {chi.shape}")
    layout = LAYOUTS[plane]
    mosaic = choose_mosaic(chi, dseg, layout=layout, structures=structures)
    rows, columns, height, width = mosaic.panels
    across_mm, up_mm = chi.voxel_size_mm[layout.across], chi.voxel_size_mm[layout.up]
    pixels_per_mm = _WIDTH / (columns * width * across_mm)
    legend = math.ceil(len({structure.nucleus for structure in structures}) / _LEGEND_COLUMNS) * _LEGEND_LINE
    heights = (_FOOTER + legend, round(rows * height * up_mm * pixels_per_mm), _HEADER)
    figure = Figure(figsize=(_WIDTH / _DPI, sum(heights) / _DPI), dpi=_DPI, facecolor=_DARK)
    canvas = FigureCanvasAgg(figure)
    bottoms = np.cumsum([0, *heights])
    strips = []  # axes over the whole width, from bottom to top; units are pixels from the lower left corner
    for bottom, strip_height in zip(bottoms, heights, strict=False):
        axes = figure.add_axes((0, bottom / bottoms[-1], 1, strip_height / bottoms[-1]))
        axes.set(xlim=(0, _WIDTH), ylim=(0, strip_height))
        axes.set_axis_off()
        strips.append(axes)
    footer, slices, header = strips
    image = _draw_slices(slices, chi, mosaic)
    _draw_outlines(slices, dseg, mosaic, structures=structures)
    title = f"{title} · {plane}" if title else plane.capitalize()
    _draw_texts(header, footer, title, layout=layout, structures=structures, height=heights[0])
    _draw_colour_bar(figure, image, footer_height=heights[0], height=sum(heights))
    canvas.draw()
    # Pillow writes neither date nor version.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, format="PNG")
    return out


def _draw_slices(axes: Axes, chi: Volume, mosaic: MosaicSlices) -> Any:
    n_rows, n_columns, height, width = mosaic.panels
    rows, columns = n_rows * height, n_columns * width
    values = np.full((rows, columns), np.nan, np.float32)
    for number, position in enumerate(mosaic.slices):
        row, column = mosaic.corner(number)
        values[row : row + height, column : column + width] = mosaic.cut(chi, position)
    grey, norm = colormaps["gray"].with_extremes(bad="black"), Normalize(*WINDOW_PPM)
    extent, masked = (0, columns, rows, 0), np.ma.masked_invalid(values)
    image = axes.imshow(masked, cmap=grey, norm=norm, interpolation="nearest", aspect="auto", extent=extent)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    n_last = len(mosaic.slices) - (n_rows - 1) * n_columns
    corner = (n_last * width, (n_rows - 1) * height)
    axes.add_patch(Rectangle(corner, columns - corner[0], height, color=_DARK, linewidth=0))
    edges = [[(x, 0), (x, rows)] for x in range(width, columns, width)]
    edges += [[(0, y), (columns, y)] for y in range(height, rows, height)]
    axes.add_collection(LineCollection(edges, colors=_DARK, linewidths=1.5), autolim=False)
    for number, position in enumerate(mosaic.slices):
        row, column = mosaic.corner(number)
        pad, middle = 0.025 * width, row + height / 2
        position_text = mosaic.format_position(chi, position)
        _write(axes, column + pad, row + 0.025 * height, position_text, va="top", size=7.5, color=_PALE)
        _write(axes, column + pad, middle, mosaic.layout.left, va="center", size=7.5, color=_PALE)
        right = column + width - pad
        _write(axes, right, middle, mosaic.layout.right, va="center", ha="right", size=7.5, color=_PALE)
    return image


def _draw_outlines(axes: Axes, dseg: Volume, mosaic: MosaicSlices, *, structures: Sequence[Structure]) -> None:
    outlines, colours = [], []
    for number, position in enumerate(mosaic.slices):
        section = np.pad(mosaic.cut(dseg, position), 1)
        for structure in structures:
            for outline in find_contours((section == structure.index).astype(np.float32), 0.5):
                # From voxel centres of the padded section to edges of the mosaic.
                outlines.append((outline - 0.5 + mosaic.corner(number))[:, ::-1])
                colours.append(structure.color)
    lines = LineCollection(outlines, colors=colours, linewidths=_LINE_PT)
    # The dark rim keeps the pale lines of the right side visible on bright nuclei.
    lines.set_path_effects([withStroke(linewidth=_LINE_PT + _RIM_PT, foreground=_DARK)])
    axes.add_collection(lines, autolim=False)


def _draw_texts(
    header: Axes, footer: Axes, title: str, *, layout: PlaneLayout, structures: Sequence[Structure], height: int
) -> None:
    """Write the header, and the legend in the footer: both sides of a nucleus next to each other, each with a line."""
    sides = "L, R: the patient's left and right"
    if layout.axis == 0:
        sides = "from the patient's left to the right · P, A: back and front"
    _write(header, 18, _HEADER / 2, title, va="center", size=9, color=_PALE)
    _write(header, _WIDTH - 18, _HEADER / 2, sides, va="center", ha="right", size=7.5, color=_MIDDLE)
    nuclei = list(dict.fromkeys(structure.nucleus for structure in structures))
    step = 1330 / _LEGEND_COLUMNS
    for number, nucleus in enumerate(nuclei):
        row, column = divmod(number, _LEGEND_COLUMNS)
        x, y = 18 + column * step, height - _FOOTER / 2 - _LEGEND_LINE * (row + 0.5)
        _write(footer, x, y, nucleus, va="center", size=8, color=_PALE)
        for index, structure in enumerate(one for one in structures if one.nucleus == nucleus):
            start = x + 46 + 44 * index
            _write(footer, start, y, structure.hemisphere, va="center", size=6.5, color=_MIDDLE)
            line = LineCollection([[(start + 14, y), (start + 36, y)]], colors=structure.color, linewidths=2.5)
            footer.add_collection(line, autolim=False)


def _draw_colour_bar(figure: Figure, image: Any, *, footer_height: int, height: int) -> None:
    axes = figure.add_axes((1390 / _WIDTH, (footer_height - 42) / height, 350 / _WIDTH, 18 / height))
    low, high = WINDOW_PPM
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    bar.set_ticks([low, 0, 0.1, high], labels=["−0.1", "0", "0.1", "0.2 ppm"])
    bar.outline.set(edgecolor=_MIDDLE, linewidth=0.5)
    axes.tick_params(labelsize=7, labelcolor=_PALE, labelfontfamily=_FONT, length=2, color=_MIDDLE, pad=2)


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    # "$" in a title does not start a formula.
    axes.text(x, y, text, family=_FONT, parse_math=False, **style)


def choose_mosaic(chi: Volume, dseg: Volume, *, layout: PlaneLayout, structures: Sequence[Structure]) -> MosaicSlices:
    """Choose slices that show every nucleus of a model, more of them if nuclei are small or many.

    For nuclei that were not found, their expected positions relative to the others are shown too, or a wider field of
    view if too few were found; if none was found, the whole head. Map and labels are on one grid.
    """
    head = np.isfinite(chi.array) & (chi.array != 0)
    if not head.any():
        head = np.ones(chi.shape, bool)
    slices = np.moveaxis(dseg.array, layout.axis, 0).reshape(dseg.shape[layout.axis], -1)
    areas = np.array([(slices == structure.index).sum(axis=1) for structure in structures], dtype=np.intp)
    shown = areas >= np.maximum(1, _MIN_AREA * areas.max(axis=1, keepdims=True))
    missing = ~shown.any(axis=1)
    expected = _expected_regions(dseg, structures, missing, head=head)
    margin_mm = _WIDE_MARGIN_MM if missing.any() and not expected else (_MARGIN_MM,) * 3
    nuclei = np.isin(dseg.array, [structure.index for structure in structures])
    for number, region in expected.items():
        nuclei[region] = True
        shown[number, region[layout.axis]] = True
    extents = {}  # of the nuclei with a margin, within the head; without nuclei, of the whole head
    for axis in range(3):
        inner, outer = (np.flatnonzero(_profile(mask, axis)) for mask in (nuclei, head | nuclei))
        low, high = int(outer[0]), int(outer[-1])
        if len(inner):
            extra = int(np.ceil(margin_mm[axis] / chi.voxel_size_mm[axis]))
            low, high = max(low, int(inner[0]) - extra), min(high, int(inner[-1]) + extra)
        extents[axis] = slice(low, high + 1)
    if not expected:
        shown[missing, extents[layout.axis]] = True
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


def _expected_regions(
    dseg: Volume, structures: Sequence[Structure], missing: NDArray[np.bool_], *, head: NDArray[np.bool_]
) -> dict[int, tuple[slice, ...]]:
    """Return the expected surroundings of missing nuclei, by their number, moved into the head if they lie outside.

    Typical positions are mapped to the nuclei that were found; empty if these lie on a line or in a plane.
    """
    found = [structure for structure, is_missing in zip(structures, missing, strict=True) if not is_missing]
    if not missing.any() or len({one.nucleus for one in found}) < 3 or len({one.hemisphere for one in found}) < 2:
        return {}
    indices = center_of_mass(np.ones(dseg.shape, np.uint8), dseg.array, [structure.index for structure in found])
    centres_mm = np.array(indices) @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    to_head = fit_similarity(np.array([structure.mni_mm for structure in found]), centres_mm)
    limits = [np.flatnonzero(_profile(head, axis))[[0, -1]] for axis in range(3)]
    reach = _SEARCH_MM / np.array(dseg.voxel_size_mm)
    regions: dict[int, tuple[slice, ...]] = {}
    for number in np.flatnonzero(missing).tolist():
        centre = np.linalg.inv(dseg.affine) @ [*to_head(np.array(structures[number].mni_mm)), 1]
        regions[number] = tuple(
            slice(int(np.clip(round(at - extra), low, high)), int(np.clip(round(at + extra), low, high)) + 1)
            for at, extra, (low, high) in zip(centre[:3], reach, limits, strict=True)
        )
    return regions


def _profile(mask: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    """Return whether a mask has a voxel at each index along an axis."""
    others = tuple(other for other in range(3) if other != axis)
    return np.asarray(mask.any(axis=others))
