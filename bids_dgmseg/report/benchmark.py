"""Page of the model benchmark: one file with its plots embedded, which are also written as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.evaluation import PLOTTED_OVERLAP
from bids_dgmseg.report.figures import DPI, INK, TEXT, WIDTH_IN, jitter, style_axes, to_png, with_default_settings
from bids_dgmseg.report.html import QUANTITIES, save_plot, write_page

_SUMMARY_COLUMNS = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 (mm)", 2),
    "mean_surface_distance_mm": ("Mean surface distance (mm)", 2),
    "centre_distance_mm": ("Centre distance (mm)", 2),
    "volume_difference_percent": ("Volume difference (%)", 1),
}
"""Column of summary.tsv → heading and decimals; its standard deviation has the suffix ``_sd``."""

_TESTED = {"dice": "Dice", "hd95_mm": "HD95"}

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#e69f00", "#56b4e9", "#5a6675")
"""Safe for colour-blind readers (Okabe and Ito 2008)."""

_MARKERS = "osD^vPX*"
_POINTS: Mapping[str, Any] = {"s": 13, "alpha": 0.75, "linewidths": 0.3, "edgecolors": INK, "zorder": 3}
_COSTS = {"seconds": "seconds per scan", "cpu_seconds": "CPU seconds per scan", "peak_mb": "peak memory (MB)"}
_TICKS = (1.0, 2.0, 5.0)  # per decade of a logarithmic axis


def write_benchmark_page(
    out: Path, *, tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any], evaluation: str
) -> Path:
    """Write ``compare.html`` and ``figures/*.png``.

    Parameters
    ----------
    out : Path
        Folder of the results.
    tables : mapping of str to DataFrame
        ``models``, ``summary``, ``comparison`` and ``methods``.
    facts : mapping
        Content of ``compare.json``.
    evaluation : str
        Link from `out` to the evaluation page.

    Returns
    -------
    Path
        The page, which needs no network and no JavaScript.
    """
    names, comparison, methods = list(tables["models"]["model"]), tables["comparison"], tables["methods"]
    has_overlap, has_costs = comparison["abbreviation"].notna().any(), comparison["seconds"].notna().any()
    # nuclei in the order of structures.tsv, each model's row of summary.tsv
    order = {structure.abbreviation: structure.index for structure in STRUCTURES}
    nuclei: dict[str, dict[str, Mapping[Any, Any]]] = {}
    for row in tables["summary"].to_dict("records"):
        nuclei.setdefault(row["abbreviation"], {})[row["model"]] = row
    return write_page(
        "benchmark.html.j2",
        out / "compare.html",
        facts=facts,
        names=names,
        overlap_plot=save_plot(draw_overlap(comparison, models=names), out, "overlap") if has_overlap else None,
        cost_plot=save_plot(draw_costs(comparison, models=names), out, "costs") if has_costs else None,
        evaluation=evaluation,
        models=tables["models"].to_dict("records"),
        summary=dict(sorted(nuclei.items(), key=lambda item: order.get(item[0], len(order) + 1))),
        measures=_SUMMARY_COLUMNS,
        quantities=QUANTITIES,
        tests=[] if methods.empty else methods[methods["measure"].isin(_TESTED)].to_dict("records"),
        titles=_TESTED,
        files=[f"{name}.{extension}" for name in ("models", "summary", "comparison") for extension in ("tsv", "json")]
        + [evaluation],
    )


@with_default_settings
def draw_overlap(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw the overlap of every scan in ``comparison.tsv`` by nucleus as a PNG, models from left to right."""
    nuclei = list(dict.fromkeys(comparison["abbreviation"].dropna()))
    figure = Figure(figsize=(max(WIDTH_IN, 0.16 * len(models) * len(nuclei)), 7.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(PLOTTED_OVERLAP), 1, sharex=True)
    for axes, (measure, label) in zip(rows, PLOTTED_OVERLAP.items(), strict=True):
        for number, model in enumerate(models):
            _draw_model(axes, comparison[comparison["model"] == model], measure, nuclei, number, len(models))
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.set_ylim(bottom=-0.03 if measure == "dice" else 0, top=1.03 if measure == "dice" else None)
        style_axes(axes)
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    handles, names = rows[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(models)), fontsize=8, frameon=False)
    return to_png(figure)


def _draw_model(
    axes: Axes, rows: pd.DataFrame, measure: str, nuclei: Sequence[str], number: int, n_models: int
) -> None:
    """Draw the points and medians of one model, beside those of the other models."""
    colour, marker, width = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], 0.8 / n_models
    shift = (number + 0.5) * width - 0.4
    x, y = [], []
    for position, nucleus in enumerate(nuclei):
        values = rows.loc[rows["abbreviation"] == nucleus, measure].dropna().to_numpy(float)
        spread = 0.6 * width if len(values) > 1 else 0
        x += (position + shift + spread * jitter(len(values))).tolist()
        y += values.tolist()
        if len(values):
            ends = [position + shift - 0.4 * width, position + shift + 0.4 * width]
            axes.plot(ends, [np.median(values)] * 2, color=INK, linewidth=1.4, zorder=4)
    axes.scatter(x, y, color=colour, marker=marker, label=str(rows["model"].iloc[0]) if len(rows) else "", **_POINTS)


@with_default_settings
def draw_costs(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw time (logarithmic) and memory of every scan in ``comparison.tsv`` as a PNG, models from top to bottom."""
    costs = comparison.drop_duplicates(["model", "scan"])
    figure = Figure(figsize=(WIDTH_IN, 0.8 + 0.4 * len(models)), dpi=DPI, layout="constrained")
    for axes, (cost, label) in zip(figure.subplots(1, len(_COSTS), sharey=True), _COSTS.items(), strict=True):
        for number, model in enumerate(models):
            values = costs.loc[costs["model"] == model, cost].dropna().to_numpy(float)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.scatter(values, np.full(len(values), number), color=colour, marker=marker, **_POINTS)
        if cost == "peak_mb":
            axes.set_xlim(0, 1.08 * np.nanmax([1.0, *costs[cost]]))
        else:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=_TICKS))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(label, color=INK, fontsize=8, **TEXT)
        axes.set_ylim(len(models) - 0.5, -0.5)
        style_axes(axes)
        axes.grid(axis="x", color="#e8ecf0", linewidth=0.6)
        axes.set_yticks(range(len(models)), models, fontsize=8, **TEXT)
    return to_png(figure)
