"""Figures: settings, colours, axes, PNG and SVG; scatter and Bland-Altman plots of two raters or measurements."""

from __future__ import annotations

import io
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy.polynomial import Polynomial
from numpy.typing import NDArray

from bids_dgmseg.errors import printable
from bids_dgmseg.models.structures import color_of
from bids_dgmseg.report.html import format_significant
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


def to_svg(figure: Figure, *, name: str) -> str:
    """Write a figure as an SVG to stand in a page; the same figure gives the same text.

    Identifiers start with a number made of `name`, as a page has several figures. Text is drawn as outlines, so that no
    name of a user is part of the markup.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    drawing = re.sub(r"<!--.*?-->|<style.*?</style>", "", drawing, flags=re.DOTALL)  # comments are the outlined texts
    # links stay; of numbers, 0.1 points are enough
    shorter = re.compile(r'(href="[^"]*")|\b([1-9]\d*\.\d)\d+|\n *')
    drawing = shorter.sub(lambda match: match[1] or match[2] or " ", drawing)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\1f{zlib.crc32(name.encode()):08x}-", drawing)
    width, height = figure.get_size_inches() * 72
    return f'<svg viewBox="0 0 {width:g} {height:g}">{drawing}'


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
