"""One page a participant: pictures, tables and warnings of all its scans."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bids_dgmseg import __version__
from bids_dgmseg.report.figures import WINDOW_PPM
from bids_dgmseg.report.methods import write_methods
from bids_dgmseg.report.numbers import COLUMNS, NO_VALUE, Column, round_text, say, say_box, say_size
from bids_dgmseg.report.results import Result, is_found, read_results
from bids_dgmseg.structures import STRUCTURES


def write_page(
    output_dir: Path, participant: str, *, model_names: Sequence[str] | None = None, problems: Sequence[str] = ()
) -> Path:
    """Write ``sub-X.html`` from the tables and pictures in the output tree.

    Parameters
    ----------
    output_dir : Path
        The derivative dataset; the page goes to its top and links to ``figures/``.
    participant : str
        Without ``sub-``.
    model_names : sequence of str, optional
        Only these models; by default all that the tree holds.
    problems : sequence of str
        What went wrong with scans that have no results, one line each; printed on top.

    Returns
    -------
    Path
        The page. It is written even where there is no result, and then says so.

    Raises
    ------
    InputError
        If a table or picture of the tree is damaged.
    """
    results = read_results(output_dir, participant, model_names=model_names)
    html = _environment().get_template("participant.html.j2").render(
        participant=f"sub-{participant}",
        results=results,
        sessions=sorted({result.session for result in results if result.session}),
        models=sorted({result.model for result in results}),
        problems=problems,
        methods=write_methods(results),
        window=WINDOW_PPM,
        version=__version__,
    )
    return write_atomically(html.encode(), output_dir / f"sub-{participant}.html")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bids_dgmseg.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(say=say, round_text=round_text)
    environment.globals.update(column_groups=_column_groups, nuclei=_nuclei, facts=_facts, is_found=is_found)
    return environment


def _columns(result: Result) -> list[Column]:
    return [column for column in COLUMNS if result.rows and column.key in result.rows[0]]


def _column_groups(result: Result) -> list[tuple[str, list[Column]]]:
    """Columns that the table of a scan has, under their common headings."""
    return [(group, list(columns)) for group, columns in groupby(_columns(result), key=lambda column: column.group)]


def _nuclei(result: Result) -> list[list[tuple[Mapping[str, str], str]]]:
    """Rows of the table with their colours, both sides of a nucleus together."""
    colours = {structure.abbreviation: structure.color for structure in STRUCTURES}
    rows = [(row, colours.get(row["abbreviation"], "#888888")) for row in result.rows]
    return [list(sides) for _, sides in groupby(rows, key=lambda pair: pair[0]["abbreviation"].rpartition("_")[0])]


def _facts(result: Result) -> dict[str, dict[str, str]]:
    """Say what the input was and how it was run: headings, then names and values."""
    quality: Mapping[str, Any] = result.quality
    return {
        "Input": _say_input(quality.get("input") or {}),
        "Run": {
            "Model": result.model,
            "Box of the localizer": say_box(quality.get("box_mm")),
            **{f"Time, {step}": f"{say(seconds)} s" for step, seconds in (quality.get("seconds") or {}).items()},
        },
        "Settings": {
            str(key): "default" if value is None else say(value)
            for key, value in (quality.get("settings") or {}).items()
        },
        "Versions": {str(key): say(value) for key, value in (quality.get("versions") or {}).items()},
    }


def _say_input(given: Mapping[str, Any]) -> dict[str, str]:
    units = say(given.get("units"))
    if given.get("units_from"):
        units += f" (from the {given['units_from']})"
    replaced = given.get("n_replaced")
    return {
        "Map": say(given.get("file")),
        "Units": units,
        "Reference": say(given.get("reference")),
        "Voxel size": say_size(given.get("voxel_size_mm")),
        "Matrix": say_size(given.get("shape"), unit="") if given.get("shape") else NO_VALUE,
        "Stored as": say(given.get("orientation")),
        "Replaced voxels": "none" if replaced == 0 else say(replaced),
    }


def write_atomically(content: bytes, final: Path) -> Path:
    """Write beside the target and rename, so that no half file is ever seen; its folder is made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    return final
