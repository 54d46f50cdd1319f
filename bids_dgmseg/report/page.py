"""One page a participant: pictures, tables and warnings of all its scans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment

from bids_dgmseg import __version__
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.formatting import (
    CHECKS,
    COLUMNS,
    NO_VALUE,
    Column,
    open_templates,
    round_text,
    say,
    say_box,
    say_size,
)
from bids_dgmseg.report.methods import write_methods
from bids_dgmseg.report.mosaic import WINDOW_PPM
from bids_dgmseg.report.results import Result, is_found, is_unfilled, read_results

_MAP = {
    "noise_sd_ppm": ("Noise SD", "ppm"),
    "streaking_index": ("Streaking index", ""),
    "rim_residual_ppm": ("Residual at the rim", "ppm"),
    "box_margin_mm": ("Margin of the box", "mm"),
}
"""Measures of the map in ``_qc.json``: their names and units."""


def write_page(
    output_dir: Path,
    participant: str,
    *,
    model_names: Sequence[str] | None = None,
    problems: Sequence[str] = (),
    earlier: Collection[tuple[str, str]] = (),
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
        Why scans failed, one line each; printed on top.
    earlier : collection of (str, str)
        Scan and model whose results, where there are any, an earlier run left, because the last one failed.

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
    html = (
        _environment()
        .get_template("participant.html.j2")
        .render(
            participant=f"sub-{participant}",
            results=results,
            sessions=sorted({result.session for result in results if result.session}),
            models=sorted({result.model for result in results}),
            problems=problems,
            earlier=earlier,
            methods=write_methods(results),
            window=WINDOW_PPM,
            version=__version__,
        )
    )
    return write_html(html, output_dir / f"sub-{participant}.html")


def _environment() -> Environment:
    environment = open_templates(say=say, round_text=round_text)
    environment.globals.update(
        measurements=COLUMNS,
        checks=CHECKS,
        column_groups=_column_groups,
        nuclei=_nuclei,
        facts=_facts,
        is_found=is_found,
        is_unfilled=is_unfilled,
    )
    return environment


def _column_groups(result: Result, chosen: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Those of the chosen columns that the table of a scan has, under their common headings."""
    columns = [column for column in chosen if result.rows and column.key in result.rows[0]]
    return [(group, list(some)) for group, some in groupby(columns, key=lambda column: column.group)]


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
        "Reconstruction": _say_reconstruction(quality.get("reconstruction") or {}),
        "Map": {name: _say_measure(quality.get(key), unit) for key, (name, unit) in _MAP.items() if key in quality},
        "Reference": _say_reference(quality.get("reference") or {}),
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


def _say_measure(value: Any, unit: str) -> str:
    said = say(value)
    return said if said == NO_VALUE or not unit else f"{said} {unit}"


def _say_reference(reference: Mapping[str, Any]) -> dict[str, str]:
    """Say what referenced values are relative to; empty where none was asked for."""
    if not reference:
        return {}
    return {
        "Region": say(reference.get("region")),
        "From": say(reference.get("source")),
        "Mean": _say_measure(reference.get("mean_ppm"), "ppm"),
        "SD": _say_measure(reference.get("std_ppm"), "ppm"),
        "Voxels": say(reference.get("n_voxels")),
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


def _say_reconstruction(made: Mapping[str, Any]) -> dict[str, str]:
    """Say how a map was made of echoes; empty where it was given."""
    if not made:
        return {}
    times_ms = ", ".join(f"{1000 * float(time_s):g}" for time_s in made.get("EchoTime") or [])
    follows = {1: "grows with the field", -1: "falls with the field"}.get(made.get("PhaseSign", 0), NO_VALUE)
    return {
        "Echo times": f"{times_ms} ms" if times_ms else NO_VALUE,
        "Main field": _say_measure(made.get("MagneticFieldStrength"), "T"),
        "Brain mask": say(made.get("BrainMask")),
        "Phase": f"{follows} (from {say(made.get('PhaseSignFrom'))})",
        "Readout": say(made.get("ReadoutCorrection")),
        "Unwrapping": say(made.get("Unwrapping")),
        "Field": say(made.get("FieldFit")),
        "Background field": say(made.get("BackgroundFieldRemoval")),
        "Inversion": say(made.get("DipoleInversion")),
    }


def write_html(html: str, final: Path) -> Path:
    """Write a page atomically; of a path that is not UTF-8 it shows question marks."""
    return write_bytes(html.encode(errors="replace"), final)
