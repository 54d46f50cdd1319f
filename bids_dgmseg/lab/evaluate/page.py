"""Page of `dgmseg evaluate`, with its plots embedded and as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bids_dgmseg.models.structures import color_of
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

_N_LOWEST = 5  # Dice that are listed
_CURVES_PER_ROW = 3


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
        name, unit, digits, _ = QUANTITIES[str(quantity)]
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
        parts = [overlap.loc[overlap["abbreviation"] == name, measure].dropna().to_numpy(float) for name in nuclei]
        lines = {name: {"color": SOFT, "linewidth": 0.8} for name in ("boxprops", "whiskerprops", "capprops")}
        median = {"color": INK, "linewidth": 1.5}
        places = range(len(nuclei))  # each scan is a point, so that there are no fliers
        axes.boxplot(
            parts, positions=places, widths=0.6, showfliers=False, manage_ticks=False, medianprops=median, **lines
        )
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
