"""Mosaics of a susceptibility map with the outlines of the nuclei."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

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
from bids_dgmseg.measurement.columns import spell_unit
from bids_dgmseg.measurement.labelled_maps import MeasuredMap
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import with_default_settings
from bids_dgmseg.report.slices import LAYOUTS, PLANES, WINDOW_PPM, MosaicSlices, Plane, PlaneLayout, choose_mosaic

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
    outlines, colours = [], []
    for number, structure in product(range(len(mosaic.slices)), structures):
        parts = _find_outlines(dseg, mosaic, number, structure.index)
        outlines += parts
        colours += [structure.color] * len(parts)
    lines = LineCollection(outlines, colors=colours, linewidths=_LINE_PT)
    # The dark rim keeps the pale lines of the right side visible on bright nuclei.
    lines.set_path_effects([withStroke(linewidth=_LINE_PT + _RIM_PT, foreground=_DARK)])
    axes.add_collection(lines, autolim=False)


def _draw_automatic(
    axes: Axes, automatic: Volume, dseg: Volume, mosaic: MosaicSlices, *, structures: Sequence[Structure]
) -> None:
    """Draw the outlines of labels before their manual editing, on the slices on which they differ."""
    outlines = []
    for number, position in enumerate(mosaic.slices):
        before, after = (mosaic.cut(volume, position) for volume in (automatic, dseg))
        for index in (structure.index for structure in structures):
            if ((before == index) != (after == index)).any():
                outlines += _find_outlines(automatic, mosaic, number, index)
    lines = LineCollection(outlines, colors="white", linewidths=_LINE_PT, linestyles=(0, (2, 1.5)))
    axes.add_collection(lines, autolim=False)


def _draw_texts(
    figure: Figure,
    title: str,
    *,
    layout: PlaneLayout,
    structures: Sequence[Structure],
    footer_height: int,
    height: int,
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
    texts = [f"{tick:.3g}".replace("-", "−") for tick in ticks]
    bar = figure.colorbar(image, cax=axes, orientation="horizontal")
    bar.set_ticks(ticks, labels=[*texts[:-1], f"{texts[-1]} {unit}".strip()])
    bar.outline.set(edgecolor=_MIDDLE, linewidth=0.5)
    axes.tick_params(labelsize=7, labelcolor=_PALE, labelfontfamily=_FONT, length=2, color=_MIDDLE, pad=2)


def _write(figure: Figure, x: float, y: float, text: str, transform: Transform | None = None, **style: Any) -> None:
    """Write a text of the figure, as each one of axes has a clipping path of its own; by default in pixels."""
    # "$" in a title does not start a formula.
    figure.text(x, y, text, transform=transform or IdentityTransform(), family=_FONT, parse_math=False, **style)
