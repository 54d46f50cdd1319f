"""Plots of the group page, one panel per nucleus: violins, age curves, asymmetry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.figures import (
    DPI,
    INK,
    SOFT,
    TEXT,
    WIDTH_IN,
    colour_of,
    jitter,
    shorten_labels,
    style_axes,
    to_png,
    with_default_settings,
)
from bids_dgmseg.report.html import QUANTITIES

Floats = NDArray[np.float64]

MAX_POINTS = 150
"""Points drawn per half violin, or per side of an age panel."""

MAX_LEVELS = 12
"""Sites or groups side by side."""

_COLUMNS = 2
_HALF_WIDTH = 0.4
_MIN_FOR_DENSITY = 5
_AGE_POINTS: Mapping[str, Any] = {"s": 15, "linewidths": 0.4, "edgecolors": INK, "alpha": 0.75, "zorder": 2}

_LABEL_SHARE = 0.12
"""Share of a panel's height for a label at its top or bottom, with the space around it."""


@dataclass(frozen=True)
class _SideStyle:
    """How one side of a nucleus is drawn in a panel with both."""

    side: str
    marker: str
    line: Literal["-", "--"]
    label: str
    colour: str
    """In the legend, which has no nucleus's own colour."""


_SIDES = (
    _SideStyle("L", "o", "-", "left (the patient's left)", "#808890"),
    _SideStyle("R", "^", "--", "right", "#d5dae0"),
)

_NUCLEI = {structure.nucleus: structure for structure in STRUCTURES if structure.hemisphere == "L"}


@with_default_settings
def draw_violins(values: pd.DataFrame, *, measure: str, levels: Sequence[str], factor: str) -> bytes:
    """Draw the distribution of a measure in each nucleus as a PNG; the left half of a violin is the patient's left.

    `values` has one row per scan and nucleus (``scan``, ``nucleus``, ``side``, the measure and the factor). `levels`
    are the values of the factor from left to right, one violin each.
    """
    nuclei, labels = [name for name in _NUCLEI if (values["nucleus"] == name).any()], shorten_labels(levels)
    figure, panels = _make_panels(len(nuclei), height_in=(2.7 if len(levels) <= 4 else 3.0) + labels.rotated * 0.9)
    for axes, nucleus in zip(panels, nuclei, strict=False):
        rows = values[values["nucleus"] == nucleus]
        counts = []
        for x, level in enumerate(levels):
            in_level = rows[rows[factor] == level]
            counts.append(int(in_level.dropna(subset=[measure])["scan"].nunique()))
            for side in "LR":
                numbers = in_level.loc[in_level["side"] == side, measure].dropna().to_numpy(float)
                colour = colour_of(f"{nucleus}_{side}")
                _draw_half_violin(axes, x, numbers, side=side, colour=colour)
                _draw_points(axes, x + (-0.12 if side == "L" else 0.12), numbers, colour=colour)
        separator = "\n" if len(counts) > 1 and not labels.rotated else ", "
        ticks = [f"{text}{separator}n {count}" for text, count in zip(labels.texts, counts, strict=True)]
        axes.set_xticks(range(len(ticks)), ticks, fontsize=9 if len(ticks) <= 8 else 8, **TEXT)
        if labels.rotated:
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(ticks) - 0.4)
        _finish(axes, nucleus, label=QUANTITIES[measure].label)
    return to_png(figure)


@with_default_settings
def draw_ageing(points: pd.DataFrame, curves: pd.DataFrame, *, measure: str, label: str) -> bytes:
    """Draw a measure over age with the fitted curves and their confidence bands as a PNG.

    `points` has one row per scan and nucleus (``abbreviation``, ``age_years`` and the measure), `curves` the rows of
    ``group_ageing_curves.tsv`` of one curve per nucleus.
    """
    present = set(points["abbreviation"]) | set(curves["abbreviation"])
    nuclei = [nucleus for nucleus in _NUCLEI if not present.isdisjoint({f"{nucleus}_L", f"{nucleus}_R"})]
    figure, panels = _make_panels(len(nuclei), height_in=2.8)
    for axes, nucleus in zip(panels, nuclei, strict=False):
        names = []
        for style in _SIDES:
            name = f"{nucleus}_{style.side}"
            colour, curve = colour_of(name), curves[curves["abbreviation"] == name]
            of_side = points.loc[points["abbreviation"] == name, ["age_years", measure]].dropna()
            ordered = of_side.sort_values("age_years", kind="stable").to_numpy(float)
            age, value = ordered[_select_points(len(ordered))].T
            axes.scatter(age, value, color=colour, marker=style.marker, **_AGE_POINTS)
            axes.fill_between(curve["age"], curve["low"], curve["high"], color=colour, alpha=0.4, linewidth=0, zorder=3)
            axes.plot(curve["age"], curve["fit"], color=INK, linewidth=1.5, linestyle=style.line, zorder=4)
            names += [f"{style.side} {fitted}" for fitted in curve["curve"].unique()]
        axes.set_xlabel("age (years)", fontsize=9, color=SOFT, **TEXT)
        _finish(axes, nucleus, ", ".join(names), label=label)
    handles = [
        Line2D(
            [], [], color=INK, linestyle=one.line, marker=one.marker, ms=5, markerfacecolor=one.colour, label=one.label
        )
        for one in _SIDES
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=9, frameon=False, labelcolor=INK)
    return to_png(figure)


@with_default_settings
def draw_asymmetry(values: pd.DataFrame, *, measures: Sequence[str]) -> bytes:
    """Draw the asymmetry of each nucleus in rows of ``group_asymmetry.tsv`` as a PNG, one panel per measure."""
    nuclei = [name for name in _NUCLEI if (values["nucleus"] == name).any()]
    figure = Figure(figsize=(WIDTH_IN, 3.2 * len(measures)), dpi=DPI, layout="constrained")
    for axes, measure in zip(figure.subplots(len(measures), 1, squeeze=False).ravel(), measures, strict=True):
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        for x, nucleus in enumerate(nuclei):
            chosen = (values["nucleus"] == nucleus) & (values["measure"] == measure)
            numbers = values.loc[chosen, "asymmetry"].dropna().to_numpy(float)
            for side in "LR":
                _draw_half_violin(axes, x, numbers, side=side, colour=colour_of(f"{nucleus}_L"))
            _draw_points(axes, x, numbers, colour=colour_of(f"{nucleus}_L"))
        _finish(axes, label=f"asymmetry of\n{QUANTITIES[measure].name}")
        for y, va, side in ((0.98, "top", "left larger ↑"), (0.02, "bottom", "right larger ↓")):
            axes.annotate(side, (0.004, y), xycoords="axes fraction", va=va, fontsize=9, color=SOFT, **TEXT)
        # Widen the axis so that the zero line does not cross either label.
        low, high = axes.get_ylim()
        room = _LABEL_SHARE * (high - low) / (1 - 2 * _LABEL_SHARE)
        axes.set_ylim(min(low, -room), max(high, room))
        axes.set_xticks(range(len(nuclei)), nuclei, fontsize=9.5, **TEXT)
        axes.set_xlim(-1.4, len(nuclei) - 0.4)  # room for the two labels
    return to_png(figure)


def _make_panels(n: int, *, height_in: float) -> tuple[Figure, Iterator[Axes]]:
    rows = math.ceil(n / _COLUMNS)
    figure = Figure(figsize=(WIDTH_IN, height_in * rows + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes in panels[n:]:
        axes.set_axis_off()
    return figure, iter(panels)


def _draw_half_violin(axes: Axes, x: float, values: Floats, *, side: str, colour: str) -> None:
    """Draw the left (L) or right half of a violin with its median."""
    reach = -_HALF_WIDTH if side == "L" else _HALF_WIDTH
    if len(values) >= _MIN_FOR_DENSITY and np.ptp(values) > 0:
        heights = np.linspace(values.min(), values.max(), 80)
        width = gaussian_kde(values)(heights)
        axes.fill_betweenx(heights, x, x + reach * width / width.max(), color=colour, alpha=0.45, linewidth=0, zorder=2)
    if len(values):
        median = float(np.median(values))
        axes.plot([x, x + 0.75 * reach], [median, median], color=INK, linewidth=1.8, zorder=4, solid_capstyle="butt")


def _draw_points(axes: Axes, x: float, values: Floats, *, colour: str) -> None:
    shown = np.sort(values)[_select_points(len(values))]
    x_shown = x + 0.14 * jitter(len(shown))
    axes.scatter(x_shown, shown, s=9, color=colour, alpha=0.9, linewidths=0.35, edgecolors=INK, zorder=3)


def _select_points(n: int) -> NDArray[np.intp]:
    """Select at most `MAX_POINTS` of n sorted values, evenly over the ranks and with both ends."""
    return np.unique(np.linspace(0, n - 1, min(n, MAX_POINTS)).round().astype(np.intp)) if n else np.arange(0)


def _finish(axes: Axes, *titles: str, label: str) -> None:
    """Label a panel; its titles are a nucleus and what else stands above it."""
    if titles:
        nucleus, *extra = titles
        title = "   ".join([f"{nucleus}  {_NUCLEI[nucleus].name.removeprefix('left ')}", *extra])
        axes.set_title(title, color=INK, fontsize=10, loc="left", **TEXT)
    axes.set_ylabel(label, fontsize=9, color=SOFT, **TEXT)
    style_axes(axes, fontsize=9)
