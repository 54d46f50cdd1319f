"""The page of a comparison of models: one file that can be mailed, with its plots beside it too."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bids_dgmseg import __version__
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.drawing import DPI, INK, TEXT, WIDTH_IN, plain, spread, to_png
from bids_dgmseg.report.formatting import open_templates, say_number, say_p
from bids_dgmseg.report.page import write_html

_MATRICES = {
    "dice": ("Dice", 3),
    "hd95_mm": ("HD95 (mm)", 2),
    "mean_surface_distance_mm": ("Mean surface distance (mm)", 2),
    "centre_distance_mm": ("Distance of the centres (mm)", 2),
    "volume_difference_percent": ("Volume difference (%)", 1),
}
"""Column of summary.tsv → heading and decimals; its SD stands beside it."""

_TESTED = {"dice": "Dice", "hd95_mm": "HD95"}

_QUANTITIES = {"volume_mm3": ("Volume", "mm³", 1), "mean_ppm": ("Mean susceptibility", "ppm", 4)}


def write_contest_page(
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
        Path of the page of agreement from `out`, to link to.

    Returns
    -------
    Path
        The page. Pictures are inside it; it needs no network and no script.
    """
    environment = open_templates(number=say_number, p=say_p)
    names, comparison = list(tables["models"]["model"]), tables["comparison"]
    pictures = {}
    if comparison["abbreviation"].notna().any():
        pictures["contest"] = _keep(out, draw_contest(comparison, models=names), "contest")
    if comparison["seconds"].notna().any():
        pictures["costs"] = _keep(out, draw_costs(comparison, models=names), "costs")
    html = environment.get_template("contest.html.j2").render(
        facts=facts,
        version=__version__,
        names=names,
        pictures=pictures,
        evaluation=evaluation,
        models=tables["models"].to_dict("records"),
        summary=_by_nucleus(tables["summary"]),
        matrices=_MATRICES,
        quantities=_QUANTITIES,
        tests=_tests(tables["methods"]),
        titles=_TESTED,
        colours={structure.abbreviation: structure.color for structure in STRUCTURES},
        files=[f"{name}.{extension}" for name in ("models", "summary", "comparison") for extension in ("tsv", "json")],
    )
    return write_html(html, out / "compare.html")


def _by_nucleus(summary: pd.DataFrame) -> dict[str, dict[str, Mapping[Any, Any]]]:
    """Nucleus, in the order of structures.tsv, → model → its row of summary.tsv."""
    order = {structure.abbreviation: structure.index for structure in STRUCTURES}
    nuclei: dict[str, dict[str, Mapping[Any, Any]]] = {}
    for row in summary.to_dict("records"):
        nuclei.setdefault(row["abbreviation"], {})[row["model"]] = row
    return dict(sorted(nuclei.items(), key=lambda item: order.get(item[0], len(order) + 1)))


def _tests(methods: pd.DataFrame) -> Sequence[Mapping[Any, Any]]:
    return [] if methods.empty else methods[methods["measure"].isin(_TESTED)].to_dict("records")


def _keep(out: Path, png: bytes, name: str) -> dict[str, str]:
    """Write a plot beside the page and hold it for the page."""
    file = f"figures/{name}.png"
    write_bytes(png, out / file)
    return {"href": file, "data": "data:image/png;base64," + base64.b64encode(png).decode()}


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


def _draw_model(axes: Axes, rows: pd.DataFrame, measure: str, nuclei: Sequence[str], number: int, of: int) -> None:
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
            axes.plot(
                [place + shift - 0.4 * width, place + shift + 0.4 * width],
                [np.median(values)] * 2,
                color=INK,
                linewidth=1.4,
                zorder=4,
            )
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
