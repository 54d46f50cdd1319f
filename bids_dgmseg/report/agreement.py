"""The page of `dgmseg evaluate`: one file that can be mailed, with its plots beside it too."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.measure.overlap import OVERLAP_COLUMNS
from bids_dgmseg.report.agreement_plots import draw_agreement, draw_overlap
from bids_dgmseg.report.numbers import say_number, say_p
from bids_dgmseg.report.page import write_atomically, write_html
from bids_dgmseg.report.templating import open_templates
from bids_dgmseg.structures import STRUCTURES

_ENOUGH = 3
_WORST = 5
_MEASURES = {
    "dice": ("Dice", 3), "jaccard": ("Jaccard", 3), "volume_similarity": ("Volume sim.", 3),
    "volume_difference_percent": ("Volume diff. (%)", 1), "hausdorff_mm": ("Hausdorff (mm)", 2),
    "hd95_mm": ("HD95 (mm)", 2), "mean_surface_distance_mm": ("Mean dist. (mm)", 2),
    "mean_surface_distance_area_mm": ("by area (mm)", 2),
    "centre_distance_mm": ("Centres (mm)", 2),
}  # fmt: skip
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
    overlap, summary, agreement = (_of_pair(tables[name], reference, prediction)
                                   for name in ("overlap", "overlap_summary", "agreement"))  # fmt: skip
    worst = overlap.dropna(subset=["dice"]).nsmallest(_WORST, "dice")
    title = f"{prediction} against {reference}"
    plots = []
    if len(overlap):
        plots.append(_keep(out, draw_overlap(overlap, title=title), f"{reference}_{prediction}_overlap",
                           f"Dice, HD95 and mean surface distance by nucleus, {title}",
                           "A point is a scan, the bar the median."))  # fmt: skip
    sections = []
    for quantity, rows in agreement.groupby("quantity", sort=False):
        drawn = rows[rows["n"] >= _ENOUGH]
        plot = None
        name, unit, digits = _QUANTITIES[str(quantity)]
        if len(drawn):
            png = draw_agreement(values[values["quantity"] == quantity], drawn, title=f"{name}, {title}", unit=unit)
            plot = _keep(out, png, f"{reference}_{prediction}_{quantity}",
                         f"Scatter and Bland-Altman plots of {name.lower()} by nucleus, {title}",
                         "Left of each pair: both raters, with the line of equality. Right: the difference (prediction "
                         "minus reference) over the mean, with bias, limits of agreement and their 95 % confidence "
                         "bands.")  # fmt: skip
        sections.append({"name": name, "unit": unit, "digits": digits, "rows": _records(rows), "plot": plot})
    return {
        "title": title, "reference": reference, "prediction": prediction, "anchor": _slug(f"{reference}_{prediction}"),
        "nuclei": _by_nucleus(summary), "n": overlap["scan"].nunique(), "plots": plots, "quantities": sections,
        "worst": _records(worst),
    }  # fmt: skip


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
    write_atomically(png, out / file)
    return _Plot(file, "data:image/png;base64," + base64.b64encode(png).decode(), alt, caption)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "pair"
