"""Figures: settings, colours, axes, PNG; plots of two raters, of nuclei (violins), of points with curves."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from bids_dgmseg.errors import printable
from bids_dgmseg.models.structures import ALL_STRUCTURES, color_of
from bids_dgmseg.report.html import format_significant, quantity
from bids_dgmseg.stats.agreement import POOLED

DPI, WIDTH_IN = 140, 11.0
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

_MIN_FOR_DENSITY = 5
_MAX_HORIZONTAL = 60  # characters of all labels together that fit side by side below a panel
_SCAN_POINTS: Mapping[str, Any] = {"s": 9, "alpha": 0.9, "linewidths": 0.35, "edgecolors": INK, "zorder": 3}
_LEGEND: Mapping[str, Any] = {"loc": "outside upper left", "fontsize": 9, "frameon": False, "labelcolor": INK}
_NUCLEI = {structure.nucleus: structure for structure in ALL_STRUCTURES if structure.hemisphere == "L"}


_SIDES: Mapping[str, tuple[Literal["low", "high"], float]] = {"L": ("low", -0.12), "R": ("high", 0.12)}
"""Side of a nucleus → half of a violin, and shift of its points."""


class Band(NamedTuple):
    """A line with limits."""

    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    colour: str = INK
    width: float = 1.5


class Panel(NamedTuple):
    """Points, lines and bands of one nucleus."""

    name: str
    """Abbreviation."""
    points: pd.DataFrame
    """``x``, ``y``, ``group`` and, to join the points of a person by a line, ``person``."""
    bands: Sequence[Band] = ()
    text: str = ""


@with_default_settings
def draw_violins(
    values: pd.DataFrame,
    *,
    measure: str,
    levels: Sequence[str],
    factor: str,
    harmonized: pd.DataFrame | None = None,
) -> bytes:
    """Draw the distribution of a measure in each nucleus as a PNG; the left half of a violin is the patient's left.

    `values` has one row per scan and nucleus (``scan``, ``nucleus``, ``side``, the measure, the factor and, if scans
    are repeated, ``person``). `levels` are the values of the factor from left to right, one violin each. `harmonized`
    has the same columns; its panels stand beside those of `values`, with the same axis. Violins and medians are of the
    means of each person's scans.
    """
    nuclei, labels = [name for name in _NUCLEI if (values["nucleus"] == name).any()], shorten_labels(levels)
    is_rotated = sum(map(len, labels)) > _MAX_HORIZONTAL
    versions = {"": values} if harmonized is None else {"raw": values, "harmonized": harmonized}
    shown = quantity(measure)
    versions = {name: rows.assign(**{measure: rows[measure] * shown.factor}) for name, rows in versions.items()}
    versions = {name: rows if "person" in rows else rows.assign(person=rows["scan"]) for name, rows in versions.items()}
    height_in = (2.7 if len(levels) <= 4 else 3.0) + is_rotated * 0.9
    figure, panels = _make_panels(len(nuclei) * len(versions), columns=2, height_in=height_in)
    for nucleus in nuclei:
        rows_of = {version: rows[rows["nucleus"] == nucleus] for version, rows in versions.items()}
        limits = padded_range([value for rows in rows_of.values() for value in rows[measure].dropna()])
        for version, rows in rows_of.items():
            axes = next(panels)
            axes.set_ylim(*limits)
            people = rows.groupby([factor, "side", "person"])[measure].mean().dropna()
            counts: list[list[int]] = [[] for _ in levels]
            for side, (half, shift) in _SIDES.items():
                colour = color_of(f"{nucleus}_{side}")
                for place, level in enumerate(levels):
                    numbers = people.get((level, side), pd.Series(dtype=float)).to_numpy(float)
                    counts[place].append(len(numbers))
                    _draw_half_violin(axes, numbers, place, half=half, colour=colour)
                    scans = rows[(rows[factor] == level) & (rows["side"] == side)].dropna(subset=[measure])
                    x = place + shift + 0.14 * jitter(len(scans))
                    axes.scatter(x, scans[measure].to_numpy(float), color=colour, **_SCAN_POINTS)
            separator = "\n" if len(counts) > 1 and not is_rotated else ", "
            ticks = [
                f"{text}{separator}n {'/'.join(map(str, dict.fromkeys(count)))}"
                for text, count in zip(labels, counts, strict=True)
            ]
            axes.set_xticks(range(len(ticks)), ticks, fontsize=9 if len(ticks) <= 8 else 8, **TEXT)
            if is_rotated:
                for label in axes.get_xticklabels():
                    label.set(rotation=40, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.6, len(ticks) - 0.4)
            title = f"{nucleus}  {_NUCLEI[nucleus].name.removeprefix('left ')}   {version}".rstrip()
            axes.set_title(title, color=INK, fontsize=10, loc="left", **TEXT)
            axes.set_ylabel(shown.label, fontsize=9, color=SOFT, **TEXT)
            style_axes(axes, fontsize=9)
    look: dict[str, Any] = {"marker": "o", "ms": 9, "color": "#808890", "markerfacecoloralt": "white", "ls": "none"}
    halves = [("left", "left half: left (the patient's left)"), ("right", "right half: right")]
    handles = [Line2D([], [], fillstyle=style, label=text, **look) for style, text in halves]  # type: ignore[arg-type]
    figure.legend(handles=handles, ncols=2, **_LEGEND)
    return to_png(figure)


@with_default_settings
def draw_panels(
    panels: Sequence[Panel],
    *,
    xlabel: str,
    ylabel: str,
    groups: Sequence[str] = (),
    joined: bool = False,
) -> bytes:
    """Draw points with lines and bands as a PNG, in the colours of the groups; left nuclei are the patient's left."""
    columns = 4
    figure, grid = _make_panels(len(panels), columns=columns, height_in=2.3)
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
            axes.plot(band.x, band.y, color=band.colour, linewidth=band.width, zorder=4)
        axes.scatter(points["x"], points["y"], color=colours.tolist(), **{**_SCAN_POINTS, "s": 14})
        axes.set_title(f"{panel.name}   {panel.text}".rstrip(), color=INK, fontsize=9.5, loc="left", **TEXT)
        if number % columns == 0:
            axes.set_ylabel(ylabel, fontsize=9, color=SOFT, **TEXT)
        if number >= len(panels) - columns:
            axes.set_xlabel(xlabel, fontsize=9, color=SOFT, **TEXT)
        style_axes(axes, fontsize=9)
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


def _make_panels(n: int, *, columns: int, height_in: float) -> tuple[Figure, Iterator[Axes]]:
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, iter(panels[:n])


def _draw_half_violin(axes: Axes, values: Floats, x: float, *, half: Literal["low", "high"], colour: str) -> None:
    """Draw the density of the values, if they are enough, and their median."""
    if not len(values):
        return
    if len(values) >= _MIN_FOR_DENSITY and np.ptp(values) > 0:
        violin = axes.violinplot([values], [x], side=half, widths=0.8, showextrema=False)
        for body in violin["bodies"]:  # type: ignore[attr-defined]  # a list
            body.set(color=colour, alpha=0.45, linewidth=0, zorder=2)
    end = x - 0.3 if half == "low" else x + 0.3
    axes.plot([x, end], [np.median(values)] * 2, color=INK, linewidth=1.8, solid_capstyle="butt", zorder=4)
