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
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import find_contours

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import Structure
from bids_dgmseg.report.slices import PLANES, VIEWS, Cut, Plane, View, choose_cut, say_place

WINDOW_PPM = (-0.1, 0.2)
"""What is drawn black and white."""

_WIDTH = 1800  # pixels; half as many again as the page is wide, for sharp screens

_HEADER, _LEGEND_LINE, _FOOTER = 54, 34, 64

_DPI = 150

_DARK, _PALE, _MIDDLE = "#14171c", "#e8eaed", "#9aa3ad"

_FONT = "DejaVu Sans"  # comes with matplotlib, so that pictures do not depend on the machine

_LEGEND_COLUMNS = 8

_LINE_PT = 0.8

_RIM_PT = 0.6  # of both sides together; a point is 2 pixels


@dataclass(frozen=True)
class _Panels:
    """Where each slice lies in the mosaic, in voxels of the plane."""

    cut: Cut
    columns: int
    width: int
    height: int

    @property
    def rows(self) -> int:
        return math.ceil(len(self.cut.slices) / self.columns)

    def corner(self, number: int) -> tuple[int, int]:
        """First row and first column of a panel."""
        row, column = divmod(number, self.columns)
        return row * self.height, column * self.width


def draw_mosaic(
    chi: Volume, dseg: Volume, out: Path, *, plane: Plane, structures: Sequence[Structure], title: str = ""
) -> Path:
    """Draw slices of a map with the outline of each nucleus as a PNG.

    The planes are those of the image, in millimetres; a voxel is drawn as a block. Left in the
    picture is the patient's left (neurological), in sagittal planes the patient's back. The same input
    gives the same bytes.

    Parameters
    ----------
    chi : Volume
        Map in ppm; NaN (not measured) is drawn black.
    dseg : Volume
        Labels on the grid of `chi`, numbered as in structures.tsv.
    out : Path
        The PNG to write.
    plane : str
        ``axial``, ``coronal`` or ``sagittal``.
    structures : sequence of Structure
        The nuclei that were looked for: outlines and legend.
    title : str
        Printed above the slices.

    Raises
    ------
    ValueError
        If the labels are not on the map's grid or there is no such plane.
    """
    if plane not in VIEWS:
        raise ValueError(f"plane {plane!r}, expected one of {', '.join(PLANES)}")
    if dseg.shape != chi.shape:
        raise ValueError(f"dseg has shape {dseg.shape}, expected {chi.shape}")
    view = VIEWS[plane]
    panels = _lay_out(choose_cut(chi, dseg, view=view, structures=structures), view.columns)
    across_mm, up_mm = chi.voxel_size_mm[view.across], chi.voxel_size_mm[view.up]
    pixels_per_mm = _WIDTH / (panels.columns * panels.width * across_mm)
    legend = math.ceil(len({structure.nucleus for structure in structures}) / _LEGEND_COLUMNS) * _LEGEND_LINE
    heights = (_FOOTER + legend, round(panels.rows * panels.height * up_mm * pixels_per_mm), _HEADER)
    figure = Figure(figsize=(_WIDTH / _DPI, sum(heights) / _DPI), dpi=_DPI, facecolor=_DARK)
    canvas = FigureCanvasAgg(figure)
    footer, picture, header = _strips(figure, heights)
    _draw_header(header, plane=plane, title=title, view=view)
    grey = _draw_slices(picture, chi, panels=panels, view=view)
    _draw_outlines(picture, dseg, panels=panels, view=view, structures=structures)
    _draw_legend(footer, structures=structures, height=heights[0])
    _draw_colour_bar(figure, grey, footer_height=heights[0], height=sum(heights))
    canvas.draw()
    # Written by Pillow, which adds neither date nor version.
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, format="PNG")
    return out


def _lay_out(cut: Cut, columns: int) -> _Panels:
    columns = min(columns, len(cut.slices))
    return _Panels(cut, columns, width=cut.across.stop - cut.across.start, height=cut.up.stop - cut.up.start)


def _strips(figure: Figure, heights: Sequence[int]) -> list[Axes]:
    """Axes over the whole width, from the bottom to the top; units are pixels from the lower left corner."""
    bottoms = np.cumsum([0, *heights])
    strips = []
    for bottom, height in zip(bottoms, heights, strict=False):
        axes = figure.add_axes((0, bottom / bottoms[-1], 1, height / bottoms[-1]))
        axes.set(xlim=(0, _WIDTH), ylim=(0, height))
        axes.set_axis_off()
        strips.append(axes)
    return strips


def _section(volume: Volume, position: int, *, cut: Cut, view: View) -> NDArray[Any]:
    """Cut the part of a slice that is shown, its first row on top."""
    index: list[int | slice] = [0, 0, 0]
    index[view.axis], index[view.across], index[view.up] = position, cut.across, cut.up
    section = volume.array[tuple(index)]
    upright = section.T if view.across < view.up else section
    return np.asarray(upright[::-1])


def _draw_slices(axes: Axes, chi: Volume, *, panels: _Panels, view: View) -> Any:
    mosaic = np.full((panels.rows * panels.height, panels.columns * panels.width), np.nan, np.float32)
    for number, position in enumerate(panels.cut.slices):
        row, column = panels.corner(number)
        mosaic[row : row + panels.height, column : column + panels.width] = _section(
            chi, position, cut=panels.cut, view=view
        )
    rows, columns = mosaic.shape
    low, high = WINDOW_PPM
    grey = axes.imshow(
        np.ma.masked_invalid(mosaic),
        cmap=colormaps["gray"].with_extremes(bad="black"),
        vmin=low,
        vmax=high,
        interpolation="nearest",
        aspect="auto",
        extent=(0, columns, rows, 0),
    )
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    used = len(panels.cut.slices) - (panels.rows - 1) * panels.columns
    corner = (used * panels.width, (panels.rows - 1) * panels.height)
    axes.add_patch(Rectangle(corner, columns - corner[0], panels.height, color=_DARK, linewidth=0))
    edges = [[(x, 0), (x, rows)] for x in range(panels.width, columns, panels.width)]
    edges += [[(0, y), (columns, y)] for y in range(panels.height, rows, panels.height)]
    axes.add_collection(LineCollection(edges, colors=_DARK, linewidths=1.5), autolim=False)
    for number, position in enumerate(panels.cut.slices):
        _write_place(axes, chi, position, corner=panels.corner(number), panels=panels, view=view)
    return grey


def _write_place(
    axes: Axes, chi: Volume, position: int, *, corner: tuple[int, int], panels: _Panels, view: View
) -> None:
    """Say where a slice lies and what its edges are."""
    row, column = corner
    text = say_place(chi, position, cut=panels.cut, view=view)
    pad = 0.025 * panels.width
    middle, right = row + panels.height / 2, column + panels.width
    _write(axes, column + pad, row + 0.025 * panels.height, text, va="top", size=7.5, color=_PALE)
    _write(axes, column + pad, middle, view.left, va="center", size=7.5, color=_PALE)
    _write(axes, right - pad, middle, view.right, va="center", ha="right", size=7.5, color=_PALE)


def _draw_outlines(axes: Axes, dseg: Volume, *, panels: _Panels, view: View, structures: Sequence[Structure]) -> None:
    outlines, colours = [], []
    for number, position in enumerate(panels.cut.slices):
        corner = panels.corner(number)
        section = np.pad(_section(dseg, position, cut=panels.cut, view=view), 1)
        for structure in structures:
            for outline in find_contours((section == structure.index).astype(np.float32), 0.5):
                # From voxel centres of the padded section to edges of the mosaic.
                outlines.append((outline - 0.5 + corner)[:, ::-1])
                colours.append(structure.color)
    lines = LineCollection(outlines, colors=colours, linewidths=_LINE_PT)
    # Without a dark rim the pale lines of the right side are lost on bright nuclei.
    lines.set_path_effects([withStroke(linewidth=_LINE_PT + _RIM_PT, foreground=_DARK)])
    axes.add_collection(lines, autolim=False)


def _draw_header(axes: Axes, *, plane: Plane, title: str, view: View) -> None:
    if view.axis:
        sides = "L, R: the patient's left and right"
    else:
        sides = "from the patient's left to the right · P, A: back and front"
    middle = _HEADER / 2
    _write(axes, 18, middle, f"{title} · {plane}" if title else plane.capitalize(), va="center", size=9, color=_PALE)
    _write(axes, _WIDTH - 18, middle, sides, va="center", ha="right", size=7.5, color=_MIDDLE)


def _draw_legend(axes: Axes, *, structures: Sequence[Structure], height: int) -> None:
    """Draw a line a structure, those of one nucleus side by side."""
    nuclei = list(dict.fromkeys(structure.nucleus for structure in structures))
    step = 1330 / _LEGEND_COLUMNS
    for number, nucleus in enumerate(nuclei):
        line, column = divmod(number, _LEGEND_COLUMNS)
        x, y = 18 + column * step, height - _FOOTER / 2 - _LEGEND_LINE * (line + 0.5)
        _write(axes, x, y, nucleus, va="center", size=8, color=_PALE)
        sides = [structure for structure in structures if structure.nucleus == nucleus]
        for place, structure in enumerate(sides):
            start = x + 46 + 44 * place
            _write(axes, start, y, structure.hemisphere, va="center", size=6.5, color=_MIDDLE)
            axes.add_collection(
                LineCollection([[(start + 14, y), (start + 36, y)]], colors=structure.color, linewidths=2.5),
                autolim=False,
            )


def _draw_colour_bar(figure: Figure, grey: Any, *, footer_height: int, height: int) -> None:
    axes = figure.add_axes((1390 / _WIDTH, (footer_height - 42) / height, 350 / _WIDTH, 18 / height))
    low, high = WINDOW_PPM
    bar = figure.colorbar(grey, cax=axes, orientation="horizontal")
    bar.set_ticks([low, 0, 0.1, high], labels=["−0.1", "0", "0.1", "0.2 ppm"])
    bar.outline.set(edgecolor=_MIDDLE, linewidth=0.5)
    axes.tick_params(labelsize=7, labelcolor=_PALE, labelfontfamily=_FONT, length=2, color=_MIDDLE, pad=2)


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    # A title with "$" is a name, not a formula.
    axes.text(x, y, text, family=_FONT, parse_math=False, **style)
