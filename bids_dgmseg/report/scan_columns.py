"""Columns of the tables of a participant's page, and what it says about further maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from bids_dgmseg.measurement.columns import describe_sampled
from bids_dgmseg.report.html import format_value

Row = Mapping[str, str]
"""Row of ``_stats.tsv`` as text."""

_TITLES = {"mean": "mean", "median": "median", "std": "SD"}


class MeasureColumn(NamedTuple):
    """A column of a table on the page."""

    key: str
    """Column of ``_stats.tsv``."""
    title: str
    digits: int
    """Decimals shown; the tooltip has the full value."""


def map_columns(present: Row) -> dict[str, list[MeasureColumn]]:
    """Return the measures of further maps in a table, by map and unit.

    >>> map_columns({"mean_ppm": "0.1", "T1map_n_valid": "9", "T1map_mean_s": "1.1"})
    {'T1map (s)': [MeasureColumn(key='T1map_mean_s', title='mean', digits=3)]}
    """
    groups: dict[str, list[MeasureColumn]] = {}
    for column in present:
        entry, match = describe_sampled(column), re.fullmatch(r"(.+)_(mean|median|std)(?:_.*)?", column)
        if entry and match:
            unit = f" ({entry['Units']})" if "Units" in entry else ""
            title = f"{match[1].replace('_', ' ')}{unit}"
            groups.setdefault(title, []).append(MeasureColumn(column, _TITLES[match[2]], 3))
    return groups


def describe_map(about: Mapping[str, Any]) -> str:
    """Describe how a further map was measured, or why it was not."""
    if about.get("problem"):
        return f"not measured: {about['problem']}"
    shift = about.get("shift_mm")
    parts = [
        format_value(about.get("file")),
        str(about.get("unit") or "no unit"),
        "resampled to the grid of the labels" if about.get("resampled") else "same grid",
        "not compared with the outline of the brain" if shift is None else f"brain outlines {shift:.1f} mm apart",
        *(["sign changed: measured as |χ−|"] if about.get("negated") else []),
    ]
    return ", ".join(parts)
