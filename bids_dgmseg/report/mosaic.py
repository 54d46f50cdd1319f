"""Mosaics of a map with the outlines of the nuclei, and the slices that show every nucleus."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
from matplotlib.transforms import IdentityTransform, Transform
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from bids_dgmseg.errors import printable
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.further_maps import MeasuredMap
from bids_dgmseg.measurement.nuclei import spell_unit
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import with_default_settings
from bids_dgmseg.report.html import format_number

Plane = Literal["axial", "coronal", "sagittal"]

PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")

_MIN_AREA = 0.25
"""A slice shows a nucleus if it has this fraction of the nucleus's largest cross-section."""

_TIMES = 3  # slices on which each nucleus is to be seen
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
    chosen = choose_slices(shown, count=3 * layout.columns)
    return MosaicSlices(layout, chosen, extents[layout.across], extents[layout.up])


def choose_slices(shown: NDArray[np.bool_], *, count: int) -> tuple[int, ...]:
    """Choose slices evenly over the nuclei, with equal weight per nucleus.

    `shown` (nuclei × slices) tells which slices show which nucleus. There are more than `count` slices if these do not
    show every nucleus three times, or as often as possible.

    >>> choose_slices(np.array([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]], bool), count=5)
    (1, 2, 4, 5, 7)
    """
    candidates = np.flatnonzero(shown.any(axis=0))
    if count >= len(candidates):
        return tuple(candidates.tolist())
    chosen = set(_spread((1 / np.maximum(shown.sum(axis=1), 1)) @ shown, count=count).tolist())
    for row in shown:
        slices = np.flatnonzero(row)
        times = min(_TIMES, len(slices))
        if row[[*chosen]].sum() < times:
            chosen |= set(slices[np.linspace(0, len(slices) - 1, times).round().astype(int)].tolist())
    return tuple(sorted(chosen))


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


_WIDTH = 1800  # pixels; 1.5 times the width of the page, for high-resolution screens
_HEADER, _LEGEND_LINE, _FOOTER = 54, 34, 64  # pixels
_LEGEND_COLUMNS = 8
_DPI = 150
_DARK, _PALE, _MIDDLE = "#14171c", "#e8eaed", "#9aa3ad"
_FONT = "DejaVu Sans"  # comes with matplotlib, so that figures do not depend on the machine
_LINE_PT = 0.8
_RIM_PT = 0.6  # both sides of a line together; a point is 2 pixels


_MARKS = {"#ff4fd8": "pink", "#7dff5a": "green"}
"""Colour of marked regions → its name."""


@with_default_settings
def draw_mosaic(
    chi: Volume,
    dseg: Volume,
    out: Path,
    *,
    plane: Plane,
    structures: Sequence[Structure],
    title: str = "",
    automatic: Volume | None = None,
    marks: Mapping[str, NDArray[np.bool_]] | None = None,
    window: tuple[float, float] = WINDOW_PPM,
    unit: str = "ppm",
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
    automatic : Volume, optional
        Labels before they were edited manually; where they differ, their outlines are drawn dashed and white.
    marks : mapping of str to ndarray of bool, optional
        Name → region on the grid of `chi` whose outline is drawn dotted, on a slice through its centre, too.
    window : tuple of 2 float
        Values that are drawn black and white.
    unit : str
        Unit of the values, for the colour bar.

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
    mosaic = choose_mosaic(chi, dseg, layout=layout, structures=structures, marks=list((marks or {}).values()))
    rows, columns, height, width = mosaic.panels
    across_mm, up_mm = chi.voxel_size_mm[layout.across], chi.voxel_size_mm[layout.up]
    pixels_per_mm = _WIDTH / (columns * width * across_mm)
    legend = math.ceil(len({structure.nucleus for structure in structures}) / _LEGEND_COLUMNS) * _LEGEND_LINE
    footer_height, slices_height = _FOOTER + legend, round(rows * height * up_mm * pixels_per_mm)
    total_height = footer_height + slices_height + _HEADER
    figure = Figure(figsize=(_WIDTH / _DPI, total_height / _DPI), dpi=_DPI, facecolor=_DARK)
    canvas = FigureCanvasAgg(figure)
    slices = figure.add_axes((0, footer_height / total_height, 1, slices_height / total_height))
    slices.set_axis_off()
    image = _draw_slices(figure, slices, chi, mosaic, window=window)
    if automatic is not None:
        _draw_automatic(slices, automatic, dseg, mosaic, structures=structures)
        title += " · edited, dashed: automatic"
    _draw_outlines(slices, dseg, mosaic, structures=structures)
    for (name, mask), colour in zip((marks or {}).items(), _MARKS, strict=False):
        region = chi.with_array(mask.astype(np.uint8))
        marked = [line for number in range(len(mosaic.slices)) for line in _find_outlines(region, mosaic, number, 1)]
        dotted = LineCollection(marked, colors=colour, linewidths=1.2, linestyles=(0, (1, 1)))
        slices.add_collection(dotted, autolim=False)
        title += f" · dotted {_MARKS[colour]}: {name}"
    title = printable(f"{title} · {plane}") if title else plane.capitalize()
    _draw_texts(figure, title, layout=layout, structures=structures, footer_height=footer_height, height=total_height)
    _draw_colour_bar(figure, image, footer_height=footer_height, height=total_height, unit=unit)
    canvas.draw()
    # Pillow writes neither date nor version.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, format="PNG")
    return out


def draw_map(item: MeasuredMap, labels: Volume, path: Path, *, structures: Sequence[Structure]) -> Path:
    """Draw axial slices of a map with the outlines of the labels.

    Gray values are those of chi maps, or from the 1st to the 99th percentile around the labels.
    """
    window = WINDOW_PPM
    if item.unit != "ppm":
        places = np.argwhere(labels.array > 0)
        around = tuple(slice(low, high + 1) for low, high in zip(places.min(axis=0), places.max(axis=0), strict=True))
        values = item.values.array[around]
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, (1, 99)).tolist() if len(values) else (0.0, 1.0)
        window = (low, high if high > low else low + 1.0)
    return draw_mosaic(
        item.values,
        labels,
        path,
        plane="axial",
        structures=structures,
        title=item.path.name,
        window=window,
        unit=spell_unit(item.unit),
    )


def _draw_slices(figure: Figure, axes: Axes, chi: Volume, mosaic: MosaicSlices, *, window: tuple[float, float]) -> Any:
    n_rows, n_columns, height, width = mosaic.panels
    rows, columns = n_rows * height, n_columns * width
    values = np.full((rows, columns), np.nan, np.float32)
    for number, position in enumerate(mosaic.slices):
        row, column = mosaic.corner(number)
        values[row : row + height, column : column + width] = mosaic.cut(chi, position)
    grey, norm = colormaps["gray"].with_extremes(bad="black"), Normalize(*window)
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
        left, right = mosaic.layout.left, mosaic.layout.right
        style: dict[str, Any] = {"transform": axes.transData, "size": 7.5, "color": _PALE}
        _write(figure, column + pad, row + 0.025 * height, position_text, va="top", **style)
        _write(figure, column + pad, middle, left, va="center", **style)
        _write(figure, column + width - pad, middle, right, va="center", ha="right", **style)
    return image


def _find_outlines(volume: Volume, mosaic: MosaicSlices, number: int, index: int) -> list[NDArray[np.float64]]:
    """Return the outlines of a label on a slice, in pixels of the mosaic (x, y)."""
    section = np.pad(mosaic.cut(volume, mosaic.slices[number]), 1) == index
    # from voxel centres of the padded section to edges of the mosaic
    return [
        (outline - 0.5 + mosaic.corner(number))[:, ::-1] for outline in find_contours(section.astype(np.float32), 0.5)
    ]


def _draw_outlines(axes: Axes, dseg: Volume, mosaic: MosaicSlices, *, structures: Sequence[Structure]) -> None:
    for structure in structures:
        numbers = range(len(mosaic.slices))
        outlines = [line for number in numbers for line in _find_outlines(dseg, mosaic, number, structure.index)]
        # The dark rim keeps the pale lines of the right side visible on bright nuclei.
        rim = [withStroke(linewidth=_LINE_PT + _RIM_PT, foreground=_DARK)]
        lines = LineCollection(outlines, colors=structure.color, linewidths=_LINE_PT, path_effects=rim)
        axes.add_collection(lines, autolim=False)


def _draw_automatic(
    axes: Axes, automatic: Volume, dseg: Volume, mosaic: MosaicSlices, *, structures: Sequence[Structure]
) -> None:
    """Draw the outlines of labels before their manual editing, on the slices on which they differ."""
    outlines = []
    for (number, position), structure in product(enumerate(mosaic.slices), structures):
        before, after = (mosaic.cut(volume, position) == structure.index for volume in (automatic, dseg))
        if (before != after).any():
            outlines += _find_outlines(automatic, mosaic, number, structure.index)
    lines = LineCollection(outlines, colors="white", linewidths=_LINE_PT, linestyles=(0, (2, 1.5)))
    axes.add_collection(lines, autolim=False)


def _draw_texts(
    figure: Figure, title: str, *, layout: PlaneLayout, structures: Sequence[Structure], footer_height: int, height: int
) -> None:
    """Write the header, and the legend in the footer: both sides of a nucleus next to each other, each with a line.

    Positions are pixels from the lower left corner; `height` is that of the figure.
    """
    sides = "L, R: the patient's left and right"
    if layout.axis == 0:
        sides = "from the patient's left to the right · P, A: back and front"
    middle = height - _HEADER / 2
    _write(figure, 18, middle, title, va="center", size=9, color=_PALE)
    _write(figure, _WIDTH - 18, middle, sides, va="center", ha="right", size=7.5, color=_MIDDLE)
    nuclei = list(dict.fromkeys(structure.nucleus for structure in structures))
    step = 1330 / _LEGEND_COLUMNS
    for number, nucleus in enumerate(nuclei):
        row, column = divmod(number, _LEGEND_COLUMNS)
        x, y = 18 + column * step, footer_height - _FOOTER / 2 - _LEGEND_LINE * (row + 0.5)
        _write(figure, x, y, nucleus, va="center", size=8, color=_PALE)
        for index, structure in enumerate(side for side in structures if side.nucleus == nucleus):
            start = x + 46 + 44 * index
            _write(figure, start, y, structure.hemisphere, va="center", size=6.5, color=_MIDDLE)
            line = LineCollection([[(start + 14, y), (start + 36, y)]], colors=structure.color, linewidths=2.5)
            line.set_transform(IdentityTransform())
            figure.add_artist(line)


def _draw_colour_bar(figure: Figure, image: Any, *, footer_height: int, height: int, unit: str) -> None:
    axes = figure.add_axes((1390 / _WIDTH, (footer_height - 42) / height, 350 / _WIDTH, 18 / height))
    low, high = image.norm.vmin, image.norm.vmax
    ticks = [low, 0, 0.1, high] if (low, high) == WINDOW_PPM else [low, (low + high) / 2, high]
    factor, unit = (1000, "ppb") if unit == "ppm" else (1, unit)
    texts = [f"{factor * tick:.3g}".replace("-", "−") for tick in ticks]
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    bar.set_ticks(ticks, labels=[*texts[:-1], f"{texts[-1]} {unit}".strip()])
    bar.outline.set(edgecolor=_MIDDLE, linewidth=0.5)
    axes.tick_params(labelsize=7, labelcolor=_PALE, labelfontfamily=_FONT, length=2, color=_MIDDLE, pad=2)


def _write(figure: Figure, x: float, y: float, text: str, transform: Transform | None = None, **style: Any) -> None:
    """Write a text of the figure, as each one of axes has a clipping path of its own; by default in pixels."""
    # "$" in a title does not start a formula.
    figure.text(x, y, text, transform=transform or IdentityTransform(), family=_FONT, parse_math=False, **style)
