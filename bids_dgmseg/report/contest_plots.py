"""Plots of a comparison of models: their measures nucleus by nucleus, and what a scan costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bids_dgmseg.report.drawing import DPI, INK, TEXT, WIDTH_IN, plain, spread, to_png

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#e69f00", "#56b4e9", "#5a6675")
"""Told apart by colour-blind readers too (Okabe and Ito 2008)."""
_MARKERS = "osD^vPX*"
_STYLE: Mapping[str, Any] = {"s": 13, "alpha": 0.75, "linewidths": 0.3, "edgecolors": INK, "zorder": 3}
_MEASURES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "mean_surface_distance_mm": "mean surface\ndistance (mm)"}
_COSTS = {"seconds": "seconds a scan", "cpu_seconds": "CPU seconds a scan", "peak_mb": "peak memory (MB)"}
_STEPS = (1.0, 2.0, 5.0)
"""Where a decade of a logarithmic axis has its ticks."""


def draw_contest(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw Dice, HD95 and mean surface distance of every scan by nucleus, models side by side, as a PNG.

    Parameters
    ----------
    comparison : DataFrame
        Rows of ``comparison.tsv``.
    models : sequence of str
        In the order of their places.
    """
    nuclei = list(dict.fromkeys(comparison["abbreviation"].dropna()))
    figure = Figure(figsize=(max(WIDTH_IN, 0.16 * len(models) * len(nuclei)), 7.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(_MEASURES), 1, sharex=True)
    for axes, (measure, label) in zip(rows, _MEASURES.items(), strict=True):
        for number, model in enumerate(models):
            _draw_model(axes, comparison[comparison["model"] == model], measure, nuclei, number, len(models))
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.set_ylim(bottom=-0.03 if measure == "dice" else 0, top=1.03 if measure == "dice" else None)
        plain(axes)
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    handles, names = rows[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(models)), fontsize=8, frameon=False)
    return to_png(figure)


def _draw_model(
    axes: Axes, rows: pd.DataFrame, measure: str, nuclei: Sequence[str], number: int, of: int
) -> None:
    """Draw a model's points a little beside those of the others, and their medians."""
    colour, marker, width = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], 0.8 / of
    shift = (number + 0.5) * width - 0.4
    x, y = [], []
    for place, nucleus in enumerate(nuclei):
        values = rows.loc[rows["abbreviation"] == nucleus, measure].dropna().to_numpy(float)
        about = 0.6 * width if len(values) > 1 else 0
        x += (place + shift + about * spread(len(values))).tolist()
        y += values.tolist()
        if len(values):
            axes.plot([place + shift - 0.4 * width, place + shift + 0.4 * width], [np.median(values)] * 2, color=INK,
                      linewidth=1.4, zorder=4)  # fmt: skip
    axes.scatter(x, y, color=colour, marker=marker, label=str(rows["model"].iloc[0]) if len(rows) else "", **_STYLE)


def draw_costs(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw seconds (logarithmic) and memory of every scan, a row a model, as a PNG.

    Parameters
    ----------
    comparison : DataFrame
        Rows of ``comparison.tsv``.
    models : sequence of str
        From the top down.
    """
    spent = comparison.drop_duplicates(["model", "scan"])
    figure = Figure(figsize=(WIDTH_IN, 0.8 + 0.4 * len(models)), dpi=DPI, layout="constrained")
    for axes, (cost, label) in zip(figure.subplots(1, len(_COSTS), sharey=True), _COSTS.items(), strict=True):
        for number, model in enumerate(models):
            values = spent.loc[spent["model"] == model, cost].dropna().to_numpy(float)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.scatter(values, np.full(len(values), number), color=colour, marker=marker, **_STYLE)
        if cost == "peak_mb":
            axes.set_xlim(0, 1.08 * np.nanmax([1.0, *spent[cost]]))
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=_STEPS))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label, color=INK, fontsize=8, **TEXT)
        axes.set_ylim(len(models) - 0.5, -0.5)
        plain(axes)
        axes.grid(axis="x", color="#e8ecf0", linewidth=0.6)
        axes.set_yticks(range(len(models)), models, fontsize=8, **TEXT)
    return to_png(figure)
