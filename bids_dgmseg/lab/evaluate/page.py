"""Pages of `dgmseg evaluate` and of the model benchmark, with their plots embedded and as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from bids_dgmseg.models.structures import ALL_STRUCTURES, color_of
from bids_dgmseg.report.figures import (
    DPI,
    INK,
    MIN_SCANS,
    POINTS,
    SOFT,
    TEXT,
    WIDTH_IN,
    draw_agreement,
    jitter,
    label_axes,
    padded_range,
    style_axes,
    to_png,
    with_default_settings,
)
from bids_dgmseg.report.html import QUANTITIES, save_plot, slug, write_page
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

PAGE = "evaluate.html"

_PLOTTED_OVERLAP = {
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "mean_surface_distance_mm": "mean surface\ndistance (mm)",
    "centre_distance_mm": "centre\ndistance (mm)",
}

_OVERLAP_COLUMNS = {
    "dice": ("Dice", 3),
    "jaccard": ("Jaccard", 3),
    "volume_similarity": ("Volume sim.", 3),
    "volume_difference_percent": ("Volume diff. (%)", 1),
    "hausdorff_mm": ("Hausdorff (mm)", 2),
    "hd95_mm": ("HD95 (mm)", 2),
    "mean_surface_distance_mm": ("Mean dist. (mm)", 2),
    "mean_surface_distance_area_mm": ("by area (mm)", 2),
    "centre_distance_mm": ("Centres (mm)", 2),
}
"""Column of overlap.tsv → short heading (the tooltip has the full name) and decimals."""

_SUMMARY_COLUMNS = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 (mm)", 2),
    "mean_surface_distance_mm": ("Mean surface distance (mm)", 2),
    "centre_distance_mm": ("Centre distance (mm)", 2),
    "volume_difference_percent": ("Volume difference (%)", 1),
}
"""Column of the benchmark's summary.tsv → heading and decimals; its standard deviation has the suffix ``_sd``."""

_TESTED = {"dice": "Dice", "hd95_mm": "HD95"}
_COSTS = {"seconds": "seconds per scan", "cpu_seconds": "CPU seconds per scan", "peak_mb": "peak memory (MB)"}

_N_LOWEST = 5  # Dice that are listed
_CURVES_PER_ROW = 3
_TICKS = (1.0, 2.0, 5.0)  # per decade of a logarithmic axis
_MODEL_POINTS: Mapping[str, Any] = {"s": 13, "alpha": 0.75, "linewidths": 0.3, "edgecolors": INK, "zorder": 3}

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#e69f00", "#56b4e9", "#5a6675")
"""Of the models; safe for colour-blind readers (Okabe and Ito 2008)."""

_MARKERS = "osD^vPX*"


def write_evaluation_page(
    out: Path,
    *,
    tables: Mapping[str, pd.DataFrame],
    values: pd.DataFrame,
    facts: Mapping[str, Any],
    age_points: pd.DataFrame | None = None,
) -> Path:
    """Write ``evaluate.html`` and ``figures/*.png``.

    Parameters
    ----------
    out : Path
        Folder of the results.
    tables : mapping of str to DataFrame
        Tables of this run by file name without ``.tsv``.
    values : DataFrame
        ``quantity``, ``scan``, ``abbreviation`` and one column per rater.
    facts : mapping
        Content of ``evaluation.json``.
    age_points : DataFrame, optional
        Values that the age curves are fitted to: ``age``, ``value`` and the columns that identify a curve.

    Returns
    -------
    Path
        The page, which needs no other file, no network and no JavaScript.
    """
    return write_page(
        "evaluation.html.j2",
        out / PAGE,
        facts=facts,
        measures=_OVERLAP_COLUMNS,
        pairs=[
            {**_pair_section(out, tables, values, *pair), "ageing": _age_sections(out, tables, age_points, *pair)}
            for pair in facts["pairs"]
        ],
        raters=tables["raters"].to_dict("records") if "raters" in tables else [],
        methods=tables["methods"].to_dict("records") if "methods" in tables else [],
        descriptions={column: OVERLAP_COLUMNS[column]["Description"] for column in _OVERLAP_COLUMNS},
        quantities=QUANTITIES,
        files=[f"{name}.{extension}" for name in tables for extension in ("tsv", "json")] + ["evaluation.json"],
    )


def _pair_section(
    out: Path, tables: Mapping[str, pd.DataFrame], values: pd.DataFrame, reference: str, prediction: str
) -> dict[str, Any]:
    """Collect what the page shows of one pair of raters."""
    overlap, summary, agreement = (
        table[(table["reference"] == reference) & (table["prediction"] == prediction)]
        for table in (tables["overlap"], tables["overlap_summary"], tables["agreement"])
    )
    title, stem = f"{prediction} against {reference}", f"{reference}_{prediction}"
    nuclei: dict[str, dict[str, Mapping[Any, Any]]] = {}
    for row in summary.to_dict("records"):
        nuclei.setdefault(row["abbreviation"], {})[row["measure"]] = row
    quantities = []
    for quantity, rows in agreement.groupby("quantity", sort=False):
        name, unit, digits = QUANTITIES[str(quantity)]
        name = name.capitalize()
        drawn, plot = rows[rows["n"] >= MIN_SCANS], None
        if len(drawn):
            of_quantity = values[values["quantity"] == quantity]
            png = draw_agreement(of_quantity, drawn, title=f"{name}, {title}", unit=unit)
            plot = save_plot(png, out, slug(f"{stem}_{quantity}"))
        quantities.append({"name": name, "unit": unit, "digits": digits, "rows": rows.to_dict("records"), "plot": plot})
    return {
        "title": title,
        "reference": reference,
        "prediction": prediction,
        "anchor": slug(stem),
        "nuclei": nuclei,
        "n": overlap["scan"].nunique(),
        "plot": save_plot(draw_overlap(overlap, title=title), out, slug(f"{stem}_overlap")) if len(overlap) else None,
        "quantities": quantities,
        "lowest": overlap.dropna(subset=["dice"]).nsmallest(_N_LOWEST, "dice").to_dict("records"),
    }


def _age_sections(
    out: Path, tables: Mapping[str, pd.DataFrame], points: pd.DataFrame | None, reference: str, prediction: str
) -> list[dict[str, Any]]:
    """Collect the figure of both curves and the rows of both parameters, per group of scans."""
    if "ageing" not in tables or points is None:
        return []
    of_pair = [
        table[(table["reference"] == reference) & (table["prediction"] == prediction)]
        for table in (tables["ageing"], tables["ageing_curves"], points)
    ]
    sections = []
    for scans in of_pair[0]["scans"].unique():
        fits, curves, values = (table[table["scans"] == scans] for table in of_pair)
        if curves.empty:
            continue
        png = draw_age_curves(values, curves, reference=reference, prediction=prediction)
        order = {name: place for place, name in enumerate(fits["abbreviation"].unique())}
        rows = fits.sort_values("abbreviation", key=lambda names: names.map(order), kind="stable")
        name = slug(f"{reference}_{prediction}_age_{scans}")
        sections.append({"scans": scans, "plot": save_plot(png, out, name), "rows": rows.to_dict("records")})
    return sections


@with_default_settings
def draw_age_curves(points: pd.DataFrame, curves: pd.DataFrame, *, reference: str, prediction: str) -> bytes:
    """Draw susceptibility over age by nucleus, with the curves of reference (dashed) and prediction, as a PNG.

    `points` and `curves` are of one pair and group of scans: ``labels`` (which of the two), ``abbreviation``, ``age``,
    and ``value`` or ``fit``, ``low`` and ``high``.
    """
    nuclei = list(dict.fromkeys(curves["abbreviation"]))
    rows = math.ceil(len(nuclei) / _CURVES_PER_ROW)
    figure = Figure(figsize=(WIDTH_IN, 2.4 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, _CURVES_PER_ROW, squeeze=False).ravel()
    for axes in panels[len(nuclei) :]:
        axes.set_axis_off()
    for name, axes in zip(nuclei, panels, strict=False):
        for labels, colour, style in ((reference, SOFT, "--"), (prediction, color_of(name), "-")):
            of_points, curve = (
                table[(table["abbreviation"] == name) & (table["labels"] == labels)] for table in (points, curves)
            )
            face = "none" if labels == reference else colour
            axes.scatter(of_points["age"], of_points["value"], s=14, facecolors=face, edgecolors=SOFT, linewidths=0.6)
            axes.fill_between(curve["age"], curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
            axes.plot(curve["age"], curve["fit"], color=INK, linestyle=style, linewidth=1.6, zorder=4)
        axes.set_ylim(*padded_range(points.loc[points["abbreviation"] == name, "value"].tolist()))
        label_axes(axes, name, "age (years)", "susceptibility (ppm)")
    handles = [
        Line2D([], [], color=INK, linestyle="--", marker="o", markerfacecolor="none", ms=4, label=reference),
        Line2D([], [], color=INK, linestyle="-", marker="o", ms=4, label=prediction),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return to_png(figure)


@with_default_settings
def draw_overlap(overlap: pd.DataFrame, *, title: str) -> bytes:
    """Draw the measures of overlap of every scan by nucleus as a PNG, from rows of ``overlap.tsv``."""
    nuclei = list(dict.fromkeys(overlap["abbreviation"]))
    figure = Figure(figsize=(WIDTH_IN, 8.4), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(_PLOTTED_OVERLAP), 1, sharex=True)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for axes, (measure, label) in zip(rows, _PLOTTED_OVERLAP.items(), strict=True):
        parts = _draw_boxes(axes, overlap, measure, nuclei=nuclei, width=0.6)
        for x, (nucleus, values) in enumerate(zip(nuclei, parts, strict=True)):
            axes.scatter(x + 0.45 * jitter(len(values)), values, color=color_of(nucleus), **POINTS)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        style_axes(axes)
        if measure == "dice":
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(0, 1.08 * (np.nanmax(overlap[measure]) if overlap[measure].gt(0).any() else 1))
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    return to_png(figure)


def _draw_boxes(
    axes: Axes, rows: pd.DataFrame, measure: str, *, nuclei: Sequence[str], width: float, shift: float = 0.0
) -> list[NDArray[np.float64]]:
    """Draw a box plot of a measure for each nucleus at 0, 1, … plus a shift; return the values of each."""
    values = [rows.loc[rows["abbreviation"] == name, measure].dropna().to_numpy(float) for name in nuclei]
    line, median = {"color": SOFT, "linewidth": 0.8}, {"color": INK, "linewidth": 1.5}
    axes.boxplot(
        values,
        positions=np.arange(len(nuclei)) + shift,
        widths=width,
        showfliers=False,  # each scan is a point
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops=median,
        zorder=2,
    )
    return values


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
    order = {structure.abbreviation: structure.index for structure in ALL_STRUCTURES}
    nuclei: dict[str, dict[str, Mapping[Any, Any]]] = {}
    for row in tables["summary"].to_dict("records"):
        nuclei.setdefault(row["abbreviation"], {})[row["model"]] = row
    return write_page(
        "benchmark.html.j2",
        out / "compare.html",
        facts=facts,
        names=names,
        overlap_plot=save_plot(draw_model_overlap(comparison, models=names), out, "overlap") if has_overlap else None,
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
def draw_model_overlap(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw the overlap of every scan in ``comparison.tsv`` by nucleus as a PNG, models from left to right."""
    nuclei = list(dict.fromkeys(comparison["abbreviation"].dropna()))
    figure = Figure(figsize=(max(WIDTH_IN, 0.16 * len(models) * len(nuclei)), 9.6), dpi=DPI, layout="constrained")
    panels, width = figure.subplots(len(_PLOTTED_OVERLAP), 1, sharex=True), 0.8 / len(models)
    for axes, (measure, label) in zip(panels, _PLOTTED_OVERLAP.items(), strict=True):
        for number, model in enumerate(models):
            rows, shift = comparison[comparison["model"] == model], (number + 0.5) * width - 0.4
            parts = _draw_boxes(axes, rows, measure, nuclei=nuclei, width=0.8 * width, shift=shift)
            x = [place + shift + 0.6 * width * jitter(len(values)) for place, values in enumerate(parts)]
            look = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            axes.scatter(
                np.concatenate(x), np.concatenate(parts), label=model if len(rows) else "", **look, **_MODEL_POINTS
            )
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        axes.set_ylim(bottom=-0.03 if measure == "dice" else 0, top=1.03 if measure == "dice" else None)
        style_axes(axes)
    panels[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(models)), fontsize=8, frameon=False)
    return to_png(figure)


@with_default_settings
def draw_costs(comparison: pd.DataFrame, *, models: Sequence[str]) -> bytes:
    """Draw time (logarithmic) and memory of every scan in ``comparison.tsv`` as a PNG, models from top to bottom."""
    costs = comparison.drop_duplicates(["model", "scan"])
    figure = Figure(figsize=(WIDTH_IN, 0.8 + 0.4 * len(models)), dpi=DPI, layout="constrained")
    for axes, (cost, label) in zip(figure.subplots(1, len(_COSTS), sharey=True), _COSTS.items(), strict=True):
        for number, model in enumerate(models):
            values = costs.loc[costs["model"] == model, cost].dropna().to_numpy(float)
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            axes.scatter(values, np.full(len(values), number), color=colour, marker=marker, **_MODEL_POINTS)
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
