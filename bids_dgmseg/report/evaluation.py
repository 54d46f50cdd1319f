"""The page of `dgmseg evaluate`: one file that can be mailed, with its plots beside it too."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bids_dgmseg import __version__
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.drawing import DPI, INK, LINE, SOFT, TEXT, WIDTH_IN, colour_of, plain, spread, to_png
from bids_dgmseg.report.formatting import open_templates, say_number, say_p, say_short
from bids_dgmseg.report.page import write_html
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

_ENOUGH = 3

_WORST = 5

_MEASURES = {
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
"""Column of overlap.tsv → heading and decimals."""

_QUANTITIES = {"volume_mm3": ("Volume", "mm³", 1), "mean_ppm": ("Mean susceptibility", "ppm", 4)}


@dataclass(frozen=True)
class _Plot:
    href: str
    data: str
    alt: str
    caption: str


def write_evaluation_page(
    out: Path, *, tables: Mapping[str, pd.DataFrame], values: pd.DataFrame, facts: Mapping[str, Any]
) -> Path:
    """Write ``evaluate.html`` and ``figures/*.png``.

    Parameters
    ----------
    out : Path
        Folder of the results.
    tables : mapping of str to DataFrame
        The tables of this run by file name without ``.tsv``.
    values : DataFrame
        ``quantity``, ``scan``, ``abbreviation`` and one column a rater.
    facts : mapping
        Content of ``evaluation.json``.

    Returns
    -------
    Path
        The page. Pictures are inside it; it needs no other file, no network and no script.
    """
    environment = open_templates(number=say_number, p=say_p)
    html = environment.get_template("evaluation.html.j2").render(
        facts=facts,
        version=__version__,
        measures=_MEASURES,
        pairs=[_pair_section(out, tables, values, *pair) for pair in facts["pairs"]],
        raters=_records(tables.get("raters")),
        methods=_records(tables.get("methods")),
        meanings={key: OVERLAP_COLUMNS[key]["Description"] for key in _MEASURES},
        titles={key: title for key, (title, _) in _MEASURES.items()},
        quantities=_QUANTITIES,
        colours={structure.abbreviation: structure.color for structure in STRUCTURES},
        files=[f"{name}.{extension}" for name in tables for extension in ("tsv", "json")] + ["evaluation.json"],
    )
    return write_html(html, out / "evaluate.html")


def _pair_section(
    out: Path, tables: Mapping[str, pd.DataFrame], values: pd.DataFrame, reference: str, prediction: str
) -> dict[str, Any]:
    """Everything that the page says of one pair of raters."""
    overlap, summary, agreement = (
        _of_pair(tables[name], reference, prediction) for name in ("overlap", "overlap_summary", "agreement")
    )
    worst = overlap.dropna(subset=["dice"]).nsmallest(_WORST, "dice")
    title = f"{prediction} against {reference}"
    plots = []
    if len(overlap):
        plots.append(
            _keep(
                out,
                draw_overlap(overlap, title=title),
                f"{reference}_{prediction}_overlap",
                f"Dice, HD95 and mean surface distance by nucleus, {title}",
                "A point is a scan, the bar the median.",
            )
        )
    sections = []
    for quantity, rows in agreement.groupby("quantity", sort=False):
        drawn = rows[rows["n"] >= _ENOUGH]
        plot = None
        name, unit, digits = _QUANTITIES[str(quantity)]
        if len(drawn):
            png = draw_agreement(values[values["quantity"] == quantity], drawn, title=f"{name}, {title}", unit=unit)
            plot = _keep(
                out,
                png,
                f"{reference}_{prediction}_{quantity}",
                f"Scatter and Bland-Altman plots of {name.lower()} by nucleus, {title}",
                "Left of each pair: both raters, with the line of equality. Right: the difference (prediction "
                "minus reference) over the mean, with bias, limits of agreement and their 95 % confidence "
                "bands.",
            )
        sections.append({"name": name, "unit": unit, "digits": digits, "rows": _records(rows), "plot": plot})
    return {
        "title": title,
        "reference": reference,
        "prediction": prediction,
        "anchor": _slug(f"{reference}_{prediction}"),
        "nuclei": _by_nucleus(summary),
        "n": overlap["scan"].nunique(),
        "plots": plots,
        "quantities": sections,
        "worst": _records(worst),
    }


def _of_pair(table: pd.DataFrame, reference: str, prediction: str) -> pd.DataFrame:
    return table[(table["reference"] == reference) & (table["prediction"] == prediction)]


def _by_nucleus(summary: pd.DataFrame) -> dict[str, dict[str, Mapping[Any, Any]]]:
    """Nucleus → measure → its row of overlap_summary.tsv."""
    nuclei: dict[str, dict[str, Mapping[Any, Any]]] = {}
    for row in _records(summary):
        nuclei.setdefault(row["abbreviation"], {})[row["measure"]] = row
    return nuclei


def _records(table: pd.DataFrame | None) -> Sequence[Mapping[Any, Any]]:
    return [] if table is None else table.to_dict("records")


def _keep(out: Path, png: bytes, name: str, alt: str, caption: str) -> _Plot:
    """Write a plot beside the page and hold it for the page."""
    file = f"figures/{_slug(name)}.png"
    write_bytes(png, out / file)
    return _Plot(file, "data:image/png;base64," + base64.b64encode(png).decode(), alt, caption)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "pair"


_NUCLEI_A_ROW = 2

_STYLE: Mapping[str, Any] = {"s": 20, "alpha": 0.8, "linewidths": 0.5, "edgecolors": INK, "zorder": 3}

_PLOTTED_MEASURES = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "mean_surface_distance_mm": "mean surface\ndistance (mm)"}


def draw_overlap(overlap: pd.DataFrame, *, title: str) -> bytes:
    """Draw Dice, HD95 and mean surface distance of every scan, nucleus by nucleus, as a PNG.

    Parameters
    ----------
    overlap : DataFrame
        Rows of ``overlap.tsv`` of one pair of raters.
    title : str
        Printed above.
    """
    nuclei = list(dict.fromkeys(overlap["abbreviation"]))
    figure = Figure(figsize=(WIDTH_IN, 6.6), dpi=DPI, layout="constrained")
    rows = figure.subplots(len(_PLOTTED_MEASURES), 1, sharex=True)
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for axes, (measure, label) in zip(rows, _PLOTTED_MEASURES.items(), strict=True):
        for place, nucleus in enumerate(nuclei):
            values = overlap.loc[overlap["abbreviation"] == nucleus, measure].dropna().to_numpy(float)
            width = 0.45 if len(values) > 1 else 0
            axes.scatter(place + width * spread(len(values)), values, color=colour_of(nucleus), **_STYLE)
            if len(values):
                axes.plot([place - 0.3, place + 0.3], [np.median(values)] * 2, color=INK, linewidth=1.6, zorder=4)
        axes.set_ylabel(label, color=INK, fontsize=8, **TEXT)
        plain(axes)
        if measure == "dice":
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(0, 1.08 * (np.nanmax(overlap[measure]) if overlap[measure].gt(0).any() else 1))
    rows[-1].set_xticks(range(len(nuclei)), nuclei, fontsize=8, **TEXT)
    return to_png(figure)


def draw_agreement(values: pd.DataFrame, agreement: pd.DataFrame, *, title: str, unit: str) -> bytes:
    """Draw scatter and Bland-Altman plots of one quantity, nucleus by nucleus, as a PNG.

    Parameters
    ----------
    values : DataFrame
        ``abbreviation``, and a column for each of the two raters; a row a scan.
    agreement : DataFrame
        Rows of ``agreement.tsv`` of this quantity and pair, whose limits are drawn.
    title, unit : str
        Printed above and at the axes.
    """
    reference, prediction = agreement[["reference", "prediction"]].iloc[0]
    nuclei = list(agreement["abbreviation"])
    rows = math.ceil(len(nuclei) / _NUCLEI_A_ROW)
    figure = Figure(figsize=(WIDTH_IN, 2.55 * rows + 0.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, 2 * _NUCLEI_A_ROW, squeeze=False).ravel()
    figure.suptitle(title, color=INK, fontsize=10, **TEXT)
    for place, row in enumerate(agreement.to_dict("records")):
        both = values.loc[values["abbreviation"] == row["abbreviation"], [reference, prediction]].dropna()
        x, y = both.to_numpy(float).T
        _draw_scatter(panels[2 * place], x, y, row, unit)
        _draw_differences(panels[2 * place + 1], x, y, row, unit)
    for axes in panels[2 * len(nuclei) :]:
        axes.set_axis_off()
    return to_png(figure)


def _draw_scatter(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter(x, y, color=colour_of(row["abbreviation"]), **_STYLE)
    low, high = _range([*x, *y])
    axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle="--", zorder=1)
    axes.set(xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal", adjustable="box")
    axes.set_title(
        f"{row['abbreviation']}   r {say_short(row['pearson_r'])}   ICC(2,1) {say_short(row['icc21'])}",
        color=INK,
        fontsize=8.2,
        loc="left",
        **TEXT,
    )
    _label(axes, f"{row['reference']} ({unit})", f"{row['prediction']} ({unit})")
    plain(axes)


def _draw_differences(axes: Axes, x: np.ndarray, y: np.ndarray, row: Mapping[Any, Any], unit: str) -> None:
    axes.scatter((x + y) / 2, y - x, color=colour_of(row["abbreviation"]), **_STYLE)
    axes.axhline(0, color=LINE, linewidth=0.8, zorder=1)
    for name, style in (("loa_lower", "--"), ("bias", "-"), ("loa_upper", "--")):
        if not math.isfinite(row[f"{name}_low"]):
            continue
        axes.axhspan(row[f"{name}_low"], row[f"{name}_high"], color=LINE, alpha=0.25, linewidth=0, zorder=0)
        axes.axhline(row[name], color=INK, linewidth=1, linestyle=style, zorder=2)
    bounds = [row[key] for key in ("loa_lower_low", "loa_upper_high") if math.isfinite(row[key])]
    axes.set_ylim(*_range([*(y - x), *bounds, 0.0]))
    limits = f"{say_short(row['loa_lower'])} to {say_short(row['loa_upper'])}"
    axes.set_title(f"bias {say_short(row['bias'])}   limits {limits}", color=INK, fontsize=8.2, loc="left", **TEXT)
    _label(axes, f"mean of both ({unit})", f"difference ({unit})")
    plain(axes)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = (min(values), max(values)) if len(values) else (0.0, 1.0)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def _label(axes: Axes, x: str, y: str) -> None:
    shorten = 34
    for text, put in ((x, axes.set_xlabel), (y, axes.set_ylabel)):
        put(text if len(text) <= shorten else f"…{text[-shorten:]}", fontsize=7.5, color=SOFT, **TEXT)
