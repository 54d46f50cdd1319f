"""Figures: settings, colours, axes, PNG; plots of two raters, of groups (boxes), of points with curves."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from bids_dgmseg.errors import printable
from bids_dgmseg.models.structures import color_of
from bids_dgmseg.report.html import SCREEN_DPI, format_significant
from bids_dgmseg.stats.agreement import POOLED

DPI, WIDTH_IN = SCREEN_DPI, 11.0
INK, SOFT, LINE = "#1c2430", "#5a6675", "#b9c2cc"

TEXT: Mapping[str, Any] = {"family": "DejaVu Sans", "parse_math": False}
"""The font comes with matplotlib; "$" in a name does not start a formula."""

with_default_settings = matplotlib.style.context("default")
"""Decorator of every function that draws: figures must not depend on the user's matplotlibrc, nor on other libraries
in the process (nnU-Net's trainer applies a seaborn theme). It covers rendering too, as ticks are created only then."""

_HALF = 10  # characters on both sides of what is left out of a long label


def jitter(n: int) -> NDArray[np.float64]:
    """Compute n offsets from -0.5 to 0.5 that keep points apart, always the same (golden ratio); 0 for one point."""
    return np.zeros(1) if n == 1 else np.arange(n, dtype=np.float64) * 0.6180339887 % 1 - 0.5


def style_axes(axes: Axes, *, fontsize: float = 7.5) -> None:
    """Reduce the frame to two spines and add horizontal grid lines."""
    axes.tick_params(labelsize=fontsize, colors=SOFT, length=2.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(axis="y", color="#e8ecf0", linewidth=0.6)
    axes.set_axisbelow(True)


def to_png(figure: Figure) -> bytes:
    """Render a figure; the same figure gives the same bytes. Characters that the font lacks are drawn as boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def shorten_labels(names: Sequence[str]) -> list[str]:
    """Leave out the middle of long names.

    >>> shorten_labels(["Site A", "Bern imaging centre, Skyra 3T scanner"])
    ['Site A', 'Bern imagi…3T scanner']
    """
    names = [printable(name) for name in names]
    return [name if len(name) <= 2 * _HALF + 2 else f"{name[:_HALF]}…{name[-_HALF:]}" for name in names]


MIN_SCANS = 3
"""Number of scans that a Bland-Altman plot needs."""

POINTS: Mapping[str, Any] = {"s": 20, "alpha": 0.8, "linewidths": 0.5, "edgecolors": INK, "zorder": 3}
"""Markers of single scans."""

_NUCLEI_PER_ROW = 2
_SIGNIFICANT = 0.05
_MAX_LABEL = 34  # characters of an axis label


@with_default_settings
def draw_agreement(values: pd.DataFrame, agreement: pd.DataFrame, *, title: str, unit: str) -> bytes:
    """Draw scatter and Bland-Altman plots of one quantity by nucleus as a PNG.

    `values` has one row per scan and nucleus: ``abbreviation``, and one column for each of the two raters. `agreement`
    has the rows of ``agreement.tsv`` of this quantity and pair; the row of all nuclei shows them in their colours.
    """
    reference, prediction = agreement[["reference", "prediction"]].iloc[0]
    sides = [name for name in values["abbreviation"].unique() if name.endswith(("_L", "_R"))]
    rows = math.ceil(len(agreement) / _NUCLEI_PER_ROW)
    figure = Figure(figsize=(WIDTH_IN, 2.55 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 2 * _NUCLEI_PER_ROW, squeeze=False).ravel()
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for axes in panels[2 * len(agreement) :]:
        axes.set_axis_off()
    for row, axes, difference_axes in zip(agreement.to_dict("records"), panels[::2], panels[1::2], strict=False):
        name = row["abbreviation"]
        shown = values[values["abbreviation"].isin([name] if name != POOLED else sides)]
        shown = shown.dropna(subset=[reference, prediction])
        x, y = shown[[reference, prediction]].to_numpy(float).T
        colour = [color_of(nucleus) for nucleus in shown["abbreviation"]]
        axes.scatter(x, y, color=colour, **POINTS)
        low, high = padded_range([*x, *y])
        axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle="--", zorder=1)
        if len(x) >= MIN_SCANS and np.ptp(x) > 0:
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, Polynomial.fit(x, y, 1)(ends), color=INK, linewidth=1, zorder=2)
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.set_aspect("equal", adjustable="box")
        heading = f"{name} (high, as nuclei differ)" if name == POOLED else name
        scatter_title = (
            f"{heading}\nr {format_significant(row['pearson_r'])}   ICC(2,1) {format_significant(row['icc21'])}"
        )
        label_axes(axes, scatter_title, f"{reference} ({unit})", f"{prediction} ({unit})")
        difference_axes.scatter((x + y) / 2, y - x, color=colour, **POINTS)
        difference_axes.axhline(0, color=LINE, linewidth=0.8, zorder=1)
        for end, style in (("loa_lower", "--"), ("bias", "-"), ("loa_upper", "--")):
            if math.isfinite(row[f"{end}_low"]):
                band = {"color": LINE, "alpha": 0.25, "linewidth": 0, "zorder": 0}
                difference_axes.axhspan(row[f"{end}_low"], row[f"{end}_high"], **band)
                difference_axes.axhline(row[end], color=INK, linewidth=1, linestyle=style, zorder=2)
        slope = row.get("proportional_bias", np.nan)
        if row.get("proportional_bias_p", np.nan) < _SIGNIFICANT:
            ends = np.array([((x + y) / 2).min(), ((x + y) / 2).max()])
            middle = ((x + y) / 2).mean()
            difference_axes.plot(ends, row["bias"] + slope * (ends - middle), color=INK, linewidth=1, zorder=2)
        bounds = [row[key] for key in ("loa_lower_low", "loa_upper_high") if math.isfinite(row[key])]
        difference_axes.set_ylim(*padded_range([*(y - x), *bounds, 0.0]))
        limits = f"{format_significant(row['loa_lower'])} to {format_significant(row['loa_upper'])}"
        proportional = f"   slope {format_significant(slope)}" if math.isfinite(slope) else ""
        difference_title = f"bias {format_significant(row['bias'])}{proportional}\nlimits {limits}"
        label_axes(difference_axes, difference_title, f"mean of both ({unit})", f"difference ({unit})")
    return to_png(figure)


def padded_range(values: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis with a margin around the values."""
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and labels of axes; long labels lose their start."""
    axes.set_title(title, color=INK, fontsize=8.2, loc="left", **TEXT)
    for text, set_label in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        shown = text if len(text) <= _MAX_LABEL else f"…{text[-_MAX_LABEL:]}"
        set_label(shown, fontsize=7.5, color=SOFT, **TEXT)
    style_axes(axes)


Floats = NDArray[np.float64]

MAX_LEVELS = 12
"""Sites or groups side by side."""

GROUP_COLOURS = ("#1f77b4", "#e6842a", "#2a9d5c", "#a34fb5", "#8c6d46", "#d1495b", "#4fb3bf", "#6b7280")
"""Colours of groups in the order of their sizes; those of two groups differ for colour-blind people, too."""

PRINT_DPI = 600
"""Resolution of figures in their size in print."""

_MAX_IN_COLUMN = 6
_SCAN_POINTS: Mapping[str, Any] = {"s": 9, "alpha": 0.9, "linewidths": 0.35, "edgecolors": INK, "zorder": 3}
_LEGEND: Mapping[str, Any] = {"loc": "outside upper left", "fontsize": 9, "frameon": False, "labelcolor": INK}


class Band(NamedTuple):
    """A line with limits."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    colour: str = INK
    width: float = 1.5
    style: str = "-"


class Panel(NamedTuple):
    """Points, lines and bands of one nucleus."""

    name: str
    """Abbreviation."""
    points: pd.DataFrame
    """``x``, ``y``, ``group`` and, to join the points of a person by a line, ``person``."""
    bands: Sequence[Band] = ()
    text: str = ""


class Sample(NamedTuple):
    """Values of a group of participants."""

    values: Floats
    colour: str
    is_filled: bool = True


@with_default_settings
def draw_boxes(panels: Mapping[str, Sequence[Sample]], *, ylabel: str, labels: Sequence[str]) -> tuple[bytes, bytes]:
    """Draw boxes (quartiles; whiskers to 1.5 times their distance) and points for print, as a PNG and a PDF.

    `panels` are the samples of each nucleus, `labels` their names. The figure fills a column of a journal (85 mm), with
    more than six samples a page (180 mm).
    """
    is_wide, n_rows = len(labels) > _MAX_IN_COLUMN, math.ceil(len(panels) / 4)
    size = (180 if is_wide else 85) / 25.4
    figure = Figure(figsize=(size, 0.4 + 1.25 * n_rows), dpi=PRINT_DPI, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0.02)
    grid = figure.subplots(n_rows, min(len(panels), 4), squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, samples) in zip(grid, panels.items(), strict=False):
        for place, sample in enumerate(samples):
            _draw_box(axes, sample, place)
        axes.set_xlim(-0.7, len(samples) - 0.3)
        axes.set_title(name, color=INK, fontsize=7, pad=2, **TEXT)
        style_axes(axes, fontsize=6)
        axes.tick_params(pad=1.5, width=0.5, length=2)
        axes.set_xticks([])
        axes.locator_params(axis="y", nbins=4)
    figure.supylabel(ylabel if n_rows > 1 else ylabel.replace(" ", "\n", 1), fontsize=7, color=INK, **TEXT)
    handles = [
        Patch(facecolor=_face(sample), edgecolor=sample.colour, label=label)
        for sample, label in zip(next(iter(panels.values())), labels, strict=True)
    ]
    if len(labels) > 1:
        look = {**_LEGEND, "fontsize": 6.5, "handlelength": 0.8, "handleheight": 0.8, "columnspacing": 1}
        figure.legend(handles=handles, ncols=4 if is_wide else 2 + len(labels) % 2, **look)
    png, pdf = to_png(figure), io.BytesIO()
    figure.set_layout_engine("none")  # that of the PNG
    FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
    return png, pdf.getvalue()


def _face(sample: Sample) -> Any:
    return (sample.colour, 0.35) if sample.is_filled else "none"


def _draw_box(axes: Axes, sample: Sample, place: int) -> None:
    """Draw the quartiles of a sample over its points."""
    values = sample.values[np.isfinite(sample.values)]
    if not len(values):
        return
    size = float(np.clip(60 / len(values), 0.6, 3))
    x = place + 0.5 * jitter(len(values))
    axes.scatter(x, values, s=size, color=sample.colour, alpha=0.7, linewidths=0, zorder=2)
    line: dict[str, Any] = {"color": INK, "linewidth": 0.6}
    box: dict[str, Any] = {"facecolor": _face(sample), "edgecolor": INK, "linewidth": 0.6}
    parts: dict[str, Any] = {"boxprops": box, "medianprops": line | {"linewidth": 1.1}, "whiskerprops": line}
    axes.boxplot([values], positions=[place], widths=0.62, patch_artist=True, showfliers=False, showcaps=False, **parts)


_COLUMNS = 4


@with_default_settings
def draw_panels(
    panels: Sequence[Panel],
    *,
    xlabel: str,
    ylabel: str,
    groups: Sequence[str] = (),
    joined: bool = False,
    logarithmic: bool = False,
) -> bytes:
    """Draw points with lines and bands as a PNG, in the colours of the groups; left nuclei are the patient's left."""
    figure, grid = _make_panels(len(panels))
    for number, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        points = panel.points.dropna(subset=["x", "y"])
        colours = points["group"].map(lambda group: group_colour(groups, str(group)) if groups else "#4c78a8")
        if joined:
            people = [rows for _, rows in points.groupby("person", sort=False)]
            lines = LineCollection([rows[["x", "y"]].to_numpy(float) for rows in people], linewidths=0.9, alpha=0.6)
            lines.set(color=[colours[rows.index[0]] for rows in people], zorder=2)
            axes.add_collection(lines)
        for band in panel.bands:
            if band.low is not None and band.high is not None:
                axes.fill_between(band.x, band.low, band.high, color=band.colour, alpha=0.18, linewidth=0, zorder=1)
            axes.plot(band.x, band.y, color=band.colour, linewidth=band.width, linestyle=band.style, zorder=4)
        axes.scatter(points["x"], points["y"], color=colours.tolist(), **{**_SCAN_POINTS, "s": 14})
        axes.set_title(f"{panel.name}   {panel.text}".rstrip(), color=INK, fontsize=9.5, loc="left", **TEXT)
        if number % _COLUMNS == 0:
            axes.set_ylabel(ylabel, fontsize=9, color=SOFT, **TEXT)
        if number >= len(panels) - _COLUMNS:
            axes.set_xlabel(xlabel, fontsize=9, color=SOFT, **TEXT)
        style_axes(axes, fontsize=9)
        if logarithmic:
            axes.loglog()
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
    if groups:
        handles = [
            Line2D([], [], linestyle="none", marker="s", ms=6, color=group_colour(groups, group), label=label)
            for group, label in zip(groups, shorten_labels(groups), strict=True)
        ]
        figure.legend(handles=handles, ncols=6, **_LEGEND)
    return to_png(figure)


def group_colour(groups: Sequence[str], group: str) -> str:
    """Return the colour of a group; light grey if it is none of them."""
    return GROUP_COLOURS[list(groups).index(group) % len(GROUP_COLOURS)] if group in groups else "#d5dae0"


def _make_panels(n: int) -> tuple[Figure, Iterator[Axes]]:
    rows = math.ceil(n / _COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, 2.3 * rows + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, iter(panels[:n])
