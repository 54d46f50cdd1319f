"""Mosaics of a susceptibility map with the outlines of the nuclei."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.figures import with_default_settings
from bids_dgmseg.report.slices import LAYOUTS, PLANES, MosaicSlices, Plane, PlaneLayout, choose_mosaic, format_position

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
class _Panels:
    """Arrangement of the slices in the mosaic, in voxels of the plane."""

    chosen: MosaicSlices
    layout: PlaneLayout
    columns: int
    width: int
    height: int

    @property
    def rows(self) -> int:
        return math.ceil(len(self.chosen.slices) / self.columns)

    def corner(self, number: int) -> tuple[int, int]:
        """Return the first row and column of a panel."""
        row, column = divmod(number, self.columns)
        return row * self.height, column * self.width

    def cut(self, volume: Volume, position: int) -> NDArray[Any]:
        """Return the visible part of a slice, its first row at the top."""
        index: list[int | slice] = [0, 0, 0]
        index[self.layout.axis] = position
        index[self.layout.across], index[self.layout.up] = self.chosen.across, self.chosen.up
        section = volume.array[tuple(index)]
        upright = section.T if self.layout.across < self.layout.up else section
        return np.asarray(upright[::-1])


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
    chosen = choose_mosaic(chi, dseg, layout=layout, structures=structures)
    panels = _Panels(
        chosen,
        layout,
        columns=min(layout.columns, len(chosen.slices)),
        width=chosen.across.stop - chosen.across.start,
        height=chosen.up.stop - chosen.up.start,
    )
    across_mm, up_mm = chi.voxel_size_mm[layout.across], chi.voxel_size_mm[layout.up]
    pixels_per_mm = _WIDTH / (panels.columns * panels.width * across_mm)
    legend = math.ceil(len({structure.nucleus for structure in structures}) / _LEGEND_COLUMNS) * _LEGEND_LINE
    heights = (_FOOTER + legend, round(panels.rows * panels.height * up_mm * pixels_per_mm), _HEADER)
    figure = Figure(figsize=(_WIDTH / _DPI, sum(heights) / _DPI), dpi=_DPI, facecolor=_DARK)
    canvas = FigureCanvasAgg(figure)
    footer, slices, header = _strips(figure, heights)
    _draw_header(header, plane=plane, title=title, layout=layout)
    image = _draw_slices(slices, chi, panels=panels)
    _draw_outlines(slices, dseg, panels=panels, structures=structures)
    _draw_legend(footer, structures=structures, height=heights[0])
    _draw_colour_bar(figure, image, footer_height=heights[0], height=sum(heights))
    canvas.draw()
    # Pillow writes neither date nor version.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, format="PNG")
    return out


def _strips(figure: Figure, heights: Sequence[int]) -> list[Axes]:
    """Make axes over the whole width, from bottom to top; units are pixels from the lower left corner."""
    bottoms = np.cumsum([0, *heights])
    strips = []
    for bottom, height in zip(bottoms, heights, strict=False):
        axes = figure.add_axes((0, bottom / bottoms[-1], 1, height / bottoms[-1]))
        axes.set(xlim=(0, _WIDTH), ylim=(0, height))
        axes.set_axis_off()
        strips.append(axes)
    return strips


def _draw_slices(axes: Axes, chi: Volume, *, panels: _Panels) -> Any:
    mosaic = np.full((panels.rows * panels.height, panels.columns * panels.width), np.nan, np.float32)
    for number, position in enumerate(panels.chosen.slices):
        row, column = panels.corner(number)
        mosaic[row : row + panels.height, column : column + panels.width] = panels.cut(chi, position)
    rows, columns = mosaic.shape
    grey, norm = colormaps["gray"].with_extremes(bad="black"), Normalize(*WINDOW_PPM)
    extent, masked = (0, columns, rows, 0), np.ma.masked_invalid(mosaic)
    image = axes.imshow(masked, cmap=grey, norm=norm, interpolation="nearest", aspect="auto", extent=extent)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    n_last = len(panels.chosen.slices) - (panels.rows - 1) * panels.columns
    corner = (n_last * panels.width, (panels.rows - 1) * panels.height)
    axes.add_patch(Rectangle(corner, columns - corner[0], panels.height, color=_DARK, linewidth=0))
    edges = [[(x, 0), (x, rows)] for x in range(panels.width, columns, panels.width)]
    edges += [[(0, y), (columns, y)] for y in range(panels.height, rows, panels.height)]
    axes.add_collection(LineCollection(edges, colors=_DARK, linewidths=1.5), autolim=False)
    for number, position in enumerate(panels.chosen.slices):
        row, column = panels.corner(number)
        text = format_position(chi, position, mosaic=panels.chosen, layout=panels.layout)
        pad = 0.025 * panels.width
        middle, right = row + panels.height / 2, column + panels.width
        _write(axes, column + pad, row + 0.025 * panels.height, text, va="top", size=7.5, color=_PALE)
        _write(axes, column + pad, middle, panels.layout.left, va="center", size=7.5, color=_PALE)
        _write(axes, right - pad, middle, panels.layout.right, va="center", ha="right", size=7.5, color=_PALE)
    return image


def _draw_outlines(axes: Axes, dseg: Volume, *, panels: _Panels, structures: Sequence[Structure]) -> None:
    outlines, colours = [], []
    for number, position in enumerate(panels.chosen.slices):
        corner = panels.corner(number)
        section = np.pad(panels.cut(dseg, position), 1)
        for structure in structures:
            for outline in find_contours((section == structure.index).astype(np.float32), 0.5):
                # From voxel centres of the padded section to edges of the mosaic.
                outlines.append((outline - 0.5 + corner)[:, ::-1])
                colours.append(structure.color)
    lines = LineCollection(outlines, colors=colours, linewidths=_LINE_PT)
    # The dark rim keeps the pale lines of the right side visible on bright nuclei.
    lines.set_path_effects([withStroke(linewidth=_LINE_PT + _RIM_PT, foreground=_DARK)])
    axes.add_collection(lines, autolim=False)


def _draw_header(axes: Axes, *, plane: Plane, title: str, layout: PlaneLayout) -> None:
    if layout.axis:
        sides = "L, R: the patient's left and right"
    else:
        sides = "from the patient's left to the right · P, A: back and front"
    middle = _HEADER / 2
    _write(axes, 18, middle, f"{title} · {plane}" if title else plane.capitalize(), va="center", size=9, color=_PALE)
    _write(axes, _WIDTH - 18, middle, sides, va="center", ha="right", size=7.5, color=_MIDDLE)


def _draw_legend(axes: Axes, *, structures: Sequence[Structure], height: int) -> None:
    """Draw one line per structure, both sides of a nucleus next to each other."""
    nuclei = list(dict.fromkeys(structure.nucleus for structure in structures))
    step = 1330 / _LEGEND_COLUMNS
    for number, nucleus in enumerate(nuclei):
        row, column = divmod(number, _LEGEND_COLUMNS)
        x, y = 18 + column * step, height - _FOOTER / 2 - _LEGEND_LINE * (row + 0.5)
        _write(axes, x, y, nucleus, va="center", size=8, color=_PALE)
        sides = [structure for structure in structures if structure.nucleus == nucleus]
        for index, structure in enumerate(sides):
            start = x + 46 + 44 * index
            _write(axes, start, y, structure.hemisphere, va="center", size=6.5, color=_MIDDLE)
            line = LineCollection([[(start + 14, y), (start + 36, y)]], colors=structure.color, linewidths=2.5)
            axes.add_collection(line, autolim=False)


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
