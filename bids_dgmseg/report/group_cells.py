"""Tables of the page of a cohort: cells with their text, their order and their links."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from bids_dgmseg.report.group_read import MEASURES, Cohort, GroupTable
from bids_dgmseg.report.numbers import NO_VALUE, say_number, say_p, say_short

N_ROWS = 200
"""Most rows of a table on the page."""
_DIGITS = {"volume_mm3": 1, "mean_ppm": 4}
_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")


@dataclass(frozen=True)
class Cell:
    """What is read in a cell, and what it is sorted by."""

    text: str
    sort: float | None = None
    """Number to sort by; None: by the text, missing ones last."""
    href: str = ""
    light: str = ""
    """``green``, ``amber``, ``red`` or empty."""
    title: str = ""


@dataclass(frozen=True)
class Heading:
    """A column."""

    text: str
    meaning: str = ""
    kind: Literal["", "text", "lit"] = ""
    """Numbers, text or lights."""


@dataclass(frozen=True)
class PageTable:
    """A table of the page; the first cell of a row is its heading."""

    anchor: str
    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    """Rows there are, of which the first ones are on the page."""
    file: str = ""
    note: str = ""


def make_table(
    table: GroupTable, *, anchor: str, caption: str, columns: Mapping[str, str], limit: int = N_ROWS, note: str = ""
) -> PageTable:
    """Choose columns of a group table for the page.

    Parameters
    ----------
    table : GroupTable
        Rows in the order in which they are to stand.
    anchor, caption, note : str
        Identifier, title above and remark below.
    columns : mapping of str to str
        Column → heading; those that the table lacks, or that are empty, are left out.
    limit : int
        Most rows on the page.
    """
    shown = [column for column in columns if column in table.rows and table.rows[column].notna().any()]
    headings = [
        Heading(columns[column], str((table.dictionary.get(column) or {}).get("Description", "")),
                kind="" if pd.api.types.is_numeric_dtype(table.rows[column]) else "text")
        for column in shown
    ]  # fmt: skip
    records = table.rows[shown].head(limit).to_dict("records")
    rows = [[to_cell(record[column], column=column) for column in shown] for record in records]
    return PageTable(anchor, caption, headings, rows, len(table.rows), file=table.file, note=note)


def to_cell(value: Any, *, column: str = "", digits: int | None = None) -> Cell:
    """Write a value of a table, with so many decimals or three digits.

    >>> to_cell(0.00002, column="q_t").text, to_cell(1234.5).text, to_cell(float("nan")).text
    ('< 0.001', '1234', 'n/a')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell(NO_VALUE)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if isinstance(value, int | float):
        if _P_VALUE.fullmatch(column):
            return Cell(say_p(value), float(value), title=str(value))
        short = say_short(value) if digits is None else say_number(value, digits)
        return Cell(str(value) if isinstance(value, int) else short, float(value), title=str(value))
    return Cell(str(value))


def nuclei_table(cohort: Cohort) -> PageTable:
    """Count, mean and standard deviation of the measures of every nucleus and model."""
    rows, several = [], len(cohort.models) > 1
    for (model, name), group in cohort.stats.groupby(["model", "abbreviation"], sort=False):
        cells = [Cell(str(name)), *([Cell(str(model))] if several else []), to_cell(len(group))]
        for measure in MEASURES:
            values = group[measure].dropna()
            numbers = (values.mean(), values.std(), values.min(), values.median(), values.max())
            cells += [to_cell(len(values)), *(to_cell(float(number), digits=_DIGITS[measure]) for number in numbers)]
        rows.append(cells)
    statistics = ("n", "mean", "SD", "smallest", "median", "largest")
    headings = [Heading(name, kind="text") for name in ("Nucleus", "Model")[: 1 + several]] + [Heading("Scans")]
    for what, unit in (("Volume", "mm³"), ("Mean χ", "ppm")):
        headings += [
            Heading(f"{what}: n" if statistic == "n" else f"{what}: {statistic} ({unit})") for statistic in statistics
        ]
    return PageTable("nuclei-table", "Volume and mean susceptibility χ of each nucleus over all scans", headings, rows,
                     len(rows), file="group_stats.tsv")  # fmt: skip


def medians_table(
    values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str
) -> PageTable:
    """Medians of a measure in each nucleus, a column a site or group."""
    medians = values.groupby(["abbreviation", factor], sort=False)[measure].median().unstack(factor)
    counts = values.dropna(subset=[measure]).groupby(factor)["scan"].nunique()
    names = list(dict.fromkeys(values["abbreviation"]))
    of_name = medians.reindex(index=names, columns=list(levels)).to_numpy(float)
    rows = [
        [Cell(name), *(to_cell(value, digits=_DIGITS[measure]) for value in row)]
        for name, row in zip(names, of_name.tolist(), strict=True)
    ]
    headings = [Heading("Nucleus", kind="text"), *(Heading(f"{level} (n {counts.get(level, 0)})") for level in levels)]
    return PageTable(anchor, f"Medians by {factor}", headings, rows, len(rows))


def linked(table: PageTable, links: Sequence[str]) -> PageTable:
    """Link the heading of each row; empty: no link."""
    rows = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=True)]
    return replace(table, rows=rows)
