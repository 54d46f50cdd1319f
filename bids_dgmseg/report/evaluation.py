"""Page of `dgmseg evaluate`: one file with its plots embedded, which are also written as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_dgmseg.report.figures import (
    DPI,
    INK,
    LINE,
    SOFT,
    TEXT,
    WIDTH_IN,
    colour_of,
    jitter,
    style_axes,
    to_png,
    with_default_settings,
)
from bids_dgmseg.report.html import QUANTITIES, format_significant, save_plot, slug, write_page
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

PLOTTED_OVERLAP = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "mean_surface_distance_mm": "mean surface\ndistance (mm)"}

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

_MIN_SCANS = 3  # that a Bland-Altman plot needs
_N_LOWEST = 5  # Dice that are listed
_NUCLEI_PER_ROW = 2
_MAX_LABEL = 34  # characters of an axis label
_POINTS: Mapping[str, Any] = {"s": 20, "alpha": 0.8, "linewidths": 0.5, "edgecolors": INK, "zorder": 3}


def write_evaluation_page(
    out: Path, *, tables: Mapping[str, pd.DataFrame], values: pd.DataFrame, facts: Mapping[str, Any]
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

    Returns
    -------
    Path
        The page, which needs no other file, no network and no JavaScript.
    """
    return write_page(
        "evaluation.html.j2",
        out / "evaluate.html",
        facts=facts,
        measures=_OVERLAP_COLUMNS,
        pairs=[_pair_section(out, tables, values, *pair) for pair in facts["pairs"]],
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
        drawn, plot = rows[rows["n"] >= _MIN_SCANS], None
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


@with_default_settings
def draw_overlap(overlap: pd.DataFrame, *, title: str) -> bytes:
    """Draw Dice, HD95 and mean surface distance of every scan by nucleus as a PNG, from rows of ``overlap.tsv``."""
    nuclei = list(dict.fromkeys(overlap["abbreviation"]))
    figure = Figure(figsize=(WIDTH_IN, 6.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(PLOTTED_OVERLAP), 1, sharex=True)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for axes, (measure, label) in zip(rows, PLOTTED_OVERLAP.items(), strict=True):
        for x, nucleus in enumerate(nuclei):
            values = overlap.loc[overlap["abbreviation"] == nucleus, measure].dropna().to_numpy(float)
            width = 0.45 if len(values) > 1 else 0
            axes.scatter(x + width * jitter(len(values)), values, color=colour_of(nucleus), **_POINTS)
            if len(values):
                axes.plot([x - 0.3, x + 0.3], [np.median(values)] * 2, color=INK, linewidth=1.6, zorder=4)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        style_axes(axes)
        if measure == "dice":
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(0, 1.08 * (np.nanmax(overlap[measure]) if overlap[measure].gt(0).any() else 1))
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    return to_png(figure)


@with_default_settings
def draw_agreement(values: pd.DataFrame, agreement: pd.DataFrame, *, title: str, unit: str) -> bytes:
    """Draw scatter and Bland-Altman plots of one quantity by nucleus as a PNG.

    Parameters
    ----------
    values : DataFrame
        One row per scan and nucleus: ``abbreviation``, and one column for each of the two raters.
    agreement : DataFrame
        Rows of ``agreement.tsv`` of this quantity and pair.
    title, unit : str
        Title of the figure, and unit at its axes.
    """
    reference, prediction = agreement[["reference", "prediction"]].iloc[0]
    nuclei = list(agreement["abbreviation"])
    rows = math.ceil(len(nuclei) / _NUCLEI_PER_ROW)
    figure = Figure(figsize=(WIDTH_IN, 2.55 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 2 * _NUCLEI_PER_ROW, squeeze=False).ravel()
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for number, row in enumerate(agreement.to_dict("records")):
        both = values.loc[values["abbreviation"] == row["abbreviation"], [reference, prediction]].dropna()
        x, y = both.to_numpy(float).T
        _draw_scatter(panels[2 * number], x, y, row, unit)
        _draw_differences(panels[2 * number + 1], x, y, row, unit)
    for axes in panels[2 * len(nuclei) :]:
        axes.set_axis_off()
    return to_png(figure)


def _draw_scatter(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter(x, y, color=colour_of(row["abbreviation"]), **_POINTS)
    low, high = _padded_range([*x, *y])
    axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle="--", zorder=1)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal", adjustable="box")
    r, icc = format_significant(row["pearson_r"]), format_significant(row["icc21"])
    title = f"{row['abbreviation']}   r {r}   ICC(2,1) {icc}"
    _finish(axes, title, f"{row['reference']} ({unit})", f"{row['prediction']} ({unit})")


def _draw_differences(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter((x + y) / 2, y - x, color=colour_of(row["abbreviation"]), **_POINTS)
    axes.axhline(0, color=LINE, linewidth=0.8, zorder=1)
    for name, style in (("loa_lower", "--"), ("bias", "-"), ("loa_upper", "--")):
        if not math.isfinite(row[f"{name}_low"]):
            continue
        axes.axhspan(row[f"{name}_low"], row[f"{name}_high"], color=LINE, alpha=0.25, linewidth=0, zorder=0)
        axes.axhline(row[name], color=INK, linewidth=1, linestyle=style, zorder=2)
    bounds = [row[key] for key in ("loa_lower_low", "loa_upper_high") if math.isfinite(row[key])]
    axes.set_ylim(*_padded_range([*(y - x), *bounds, 0.0]))
    limits = f"{format_significant(row['loa_lower'])} to {format_significant(row['loa_upper'])}"
    title = f"bias {format_significant(row['bias'])}   limits {limits}"
    _finish(axes, title, f"mean of both ({unit})", f"difference ({unit})")


def _padded_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, color=INK, fontsize=8.2, loc="left", **TEXT)
    for text, set_label in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        shown = text if len(text) <= _MAX_LABEL else f"…{text[-_MAX_LABEL:]}"
        set_label(shown, fontsize=7.5, color=SOFT, **TEXT)
    style_axes(axes)
