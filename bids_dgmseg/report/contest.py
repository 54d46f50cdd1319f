"""The page of a comparison of models: one file that can be mailed, with its plots beside it too."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.report.contest_plots import draw_contest, draw_costs
from bids_dgmseg.report.numbers import say_number, say_p
from bids_dgmseg.report.page import write_atomically, write_html
from bids_dgmseg.report.templating import open_templates
from bids_dgmseg.structures import STRUCTURES

_MATRICES = {
    "dice": ("Dice", 3), "hd95_mm": ("HD95 (mm)", 2), "mean_surface_distance_mm": ("Mean surface distance (mm)", 2),
    "centre_distance_mm": ("Distance of the centres (mm)", 2),
    "volume_difference_percent": ("Volume difference (%)", 1),
}  # fmt: skip
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
        facts=facts, version=__version__, names=names, pictures=pictures, evaluation=evaluation,
        models=tables["models"].to_dict("records"), summary=_by_nucleus(tables["summary"]), matrices=_MATRICES,
        quantities=_QUANTITIES, tests=_tests(tables["methods"]), titles=_TESTED,
        colours={structure.abbreviation: structure.color for structure in STRUCTURES},
        files=[f"{name}.{extension}" for name in ("models", "summary", "comparison") for extension in ("tsv", "json")],
    )  # fmt: skip
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
    write_atomically(png, out / file)
    return {"href": file, "data": "data:image/png;base64," + base64.b64encode(png).decode()}
