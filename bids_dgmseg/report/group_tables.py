"""Tables of the group page: statistics by their data dictionary, means per nucleus, medians, z-scores."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import pandas as pd

from bids_dgmseg.errors import list_some
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.group_data import GroupData, GroupTable, is_true
from bids_dgmseg.report.html import (
    NO_VALUE,
    QUANTITIES,
    format_number,
    format_p,
    format_significant,
    page_unit,
    quantity,
    slug,
)

STATS_FILE = "group/group_stats.tsv"
MAX_ROWS = 200  # of a table on the page
MAX_SCORED = 100  # scans in the table of z-scores
FLAGGED = 1.96  # absolute z-score that is marked

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
_MAX_NAMED = 8  # nuclei that a note is about
_IF_SEVERAL = ("model", "scans", "reference", "variable")
_FIRST = ("scan", "variable", "abbreviation")
_KEYS = ("measure", "model", "abbreviation", "reference", "group")
_ADJUSTED = "ancova_"

_TEXT = files("bids_dgmseg").joinpath("data", "columns_group.tsv").read_text(encoding="utf-8")
_ROWS = list(csv.DictReader(_TEXT.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
_DESCRIPTIONS = {row["name"]: row["description"] for row in _ROWS}
_TITLES = {row["name"]: row["title"] for row in _ROWS if row["title"]}
"""Columns of the group tables that the page shows → headings."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell with the number to sort by (None: by text, ``n/a`` last), link, colour of a rating and tooltip."""

    text: str
    sort: float | None = None
    href: str = ""
    rating: str = ""
    title: str = ""
    flag: bool = False
    """True if it is marked."""


class Heading(NamedTuple):
    """Heading of a column with its tooltip, and whether the column has numbers, text or ratings."""

    text: str
    description: str = ""
    kind: Literal["", "text", "ratings"] = ""


@dataclass(frozen=True)
class PageTable:
    """The first of the `n_rows` rows of a table; the first cell of a row is its heading."""

    anchor: str
    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    file: str = ""
    note: str = ""
    lines: Sequence[str] = ()
    """Notes on some of the rows, above the table."""


class Statistic(NamedTuple):
    """Section and texts of a group table on the page; its columns are those with a title in the data dictionary."""

    section: str
    caption: str
    """May hold ``{covariates}``."""
    note: str = ""
    split: bool = True
    """True if each measure has its own table."""


STATISTICS = {
    "group_ageing": Statistic(
        "age",
        "Age curves, the best fit per nucleus",
        "exponential: α(1 − e^(−β·age)) + γ; linear: α·age + γ.",
    ),
    "group_differences": Statistic(
        "groups",
        "Differences between groups",
        "Difference: group minus reference group. Standardized: by the standard deviation within groups, adjusted for "
        "small samples (Hedges' g).",
    ),
    "group_differences_adjusted": Statistic(
        "groups",
        "Differences between groups adjusted for {covariates} (ANCOVA)",
        "Means: at the means of the covariates. Partial η²: of all groups.",
    ),
    "group_longitudinal": Statistic(
        "change",
        "Mean change per year",
        "Mean and SD of the participants' slopes, and its difference from that of the reference group. Participants "
        "whose site changes between sessions are counted, but left out.",
    ),
    "group_correlations": Statistic(
        "clinical",
        "Relation to clinical variables at equal {covariates}",
        "Partial correlation and slope of the regression on the variable and the covariates.",
    ),
    "group_raters": Statistic("raters", "Agreement of raters", "Decisions (pass or fail) of both raters.", split=False),
    "group_outliers": Statistic(
        "outliers",
        "Outliers for their site and age",
        "Robust z: distance from the value expected at the site and, where known, age, divided by 1.4826 times the "
        "median absolute deviation.",
        split=False,
    ),
    "group_scan_outliers": Statistic(
        "outliers",
        "Scans that differ in all nuclei",
        "The scale or zero of the map, or the voxel size in its header, may be wrong.",
        split=False,
    ),
}
"""Name of a table → how the page shows it, in the order of the page."""


def make_cell(value: Any, *, column: str = "", digits: int | None = None) -> Cell:
    """Format a value with fixed decimals, or three significant digits.

    >>> make_cell(0.00002, column="q_t").text, make_cell(1234.5).text, make_cell(float("nan")).text
    ('< 0.001', '1234', 'n/a')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell(NO_VALUE)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if not isinstance(value, int | float):
        return Cell(str(value))
    if _P_VALUE.fullmatch(column):
        text = format_p(value)
    elif isinstance(value, int):
        text = str(value)
    else:
        text = format_significant(value) if digits is None else format_number(value, digits)
    return Cell(text, float(value), title=str(value))


def select_rows(table: GroupTable) -> pd.DataFrame:
    """Select what the page shows: the best curves, or the outliers from the largest robust z down."""
    rows = table.rows
    for column in ("best", "outlier"):
        if column in rows:
            rows = rows[is_true(rows[column])]
    if "robust_z" in rows:
        rows = rows.sort_values("robust_z", key=abs, ascending=False, kind="stable")
    return rows


def statistic_tables(name: str, table: GroupTable) -> Iterator[PageTable]:
    """Make the page's tables of a group table, one per measure unless `STATISTICS` says otherwise.

    Adjusted values (``ancova_…``) have tables of their own. Values in the unit of the measure are shown in that of the
    page; columns with limits (``…_low``, ``…_high``) have these in brackets.
    """
    rows, statistic = select_rows(table), STATISTICS[name]
    adjusted = [column for column in rows if str(column).startswith(_ADJUSTED)]
    if name == "group_differences" and len(adjusted):
        bare = {column: str(column).removeprefix(_ADJUSTED) for column in adjusted}
        keys = [column for column in _KEYS if column in rows]
        of_adjusted = rows[[*keys, *adjusted]].rename(columns=bare)
        yield from statistic_tables("group_differences_adjusted", replace(table, rows=of_adjusted))
        rows = rows.drop(columns=adjusted)
    covariates = (
        table.dictionary.get("AncovaCovariates") or table.dictionary.get("CorrelationCovariates") or ["nothing"]
    )
    caption = statistic.caption.format(covariates=", ".join(covariates))
    if "reference" in rows and rows["reference"].nunique() == 1:
        caption += f", relative to {rows['reference'].dropna().iloc[0]}"
    for number, (measure, part) in enumerate(rows.groupby("measure", sort=False) if statistic.split else [("", rows)]):
        hidden = {"measure"} if statistic.split else set()
        hidden |= {key for key in _IF_SEVERAL if key in rows and rows[key].nunique() <= 1}
        shown = [column for column in part if column in _TITLES and column not in hidden and part[column].notna().any()]
        shown = sorted(map(str, shown), key=lambda column: column not in _FIRST)
        if {*shown} <= {*_KEYS} and not ("note" in part and part["note"].notna().any()):
            continue
        is_text = [not pd.api.types.is_numeric_dtype(part[column]) for column in shown]
        records = part.head(MAX_ROWS).to_dict("records")
        yield PageTable(
            f"{name}-{str(measure) or 'table'}",
            f"{caption}: {page_unit(str(measure))[0]}" if measure else caption,
            [
                Heading(_TITLES[column], _DESCRIPTIONS[column], "text" if text else "")
                for column, text in zip(shown, is_text, strict=True)
            ],
            [[_statistic_cell(record, str(column)) for column in shown] for record in records],
            len(part),
            file=table.file,
            note=statistic.note if number == 0 else "",
            lines=list(_list_notes(part)),
        )


def _statistic_cell(record: Mapping[Any, Any], column: str) -> Cell:
    """Format a value of a row, with its limits in brackets."""
    value, description = record[column], _DESCRIPTIONS[column]
    if column == "measure":
        return Cell(page_unit(str(value))[0])
    power = 2 if "unit of the measure squared" in description else int("unit of the measure" in description)
    factor = page_unit(str(record.get("measure")))[2] ** power
    if isinstance(value, float):
        value *= factor
    cell = make_cell(value, column=column)
    stem = next((stem for stem in (column, re.sub("_(per_year|slope)$", "", column)) if f"{stem}_low" in record), "")
    limits = [make_cell(float(record[f"{stem}_{end}"]) * factor) for end in ("low", "high")] if stem else []
    if cell.sort is None or not limits or NO_VALUE in (limits[0].text, limits[1].text):
        return cell
    return replace(cell, text=f"{cell.text} [{limits[0].text}, {limits[1].text}]")


def _list_notes(rows: pd.DataFrame) -> Iterator[str]:
    """Write each note once, with the nuclei that it is about."""
    names = rows["abbreviation"].astype(str) if "abbreviation" in rows else pd.Series("", rows.index)
    if "group" in rows and rows["group"].nunique() > 1:
        names = names + (" (" + rows["group"].astype(str) + ")").where(rows["group"].notna(), "")
    about: dict[str, list[str]] = {}
    for name, text in zip(names, rows["note"] if "note" in rows else (), strict=False):
        for part in str(text).split("; ") if isinstance(text, str) else ():
            about.setdefault(part, []).append(name)
    for part, subjects in about.items():
        who = "All rows" if len(subjects) == len(rows) else list_some(dict.fromkeys(subjects), most=_MAX_NAMED)
        yield f"{who}: {part}."


def nuclei_tables(data: GroupData) -> Iterator[PageTable]:
    """Summarize volume and susceptibility, and each measure of a further map that was analysed, per nucleus."""
    used = pd.concat([data.used, data.bilateral[data.bilateral["excluded"].isna()] if len(data.bilateral) else None])
    several = len(data.models) > 1
    scans = "the scans that are not excluded" if len(data.used) < len(data.stats) else "all scans"
    for measures in (list(QUANTITIES), *([measure] for measure in data.quantities if measure not in QUANTITIES)):
        rows = []
        for (model, name), group in used.groupby(["model", "abbreviation"], sort=False):
            cells = [Cell(str(name)), *([Cell(str(model))] if several else []), make_cell(len(group))]
            for measure in measures:
                values, digits = group[measure].dropna(), quantity(measure).digits
                numbers = (values.mean(), values.std(), values.min(), values.median(), values.max())
                cells += [make_cell(len(values)), *(make_cell(float(x), digits=digits) for x in numbers)]
            rows.append(cells)
        headings = [Heading(name, kind="text") for name in ("Nucleus", "Model")[: 1 + several]] + [Heading("Scans")]
        for name, unit, _ in map(quantity, measures):
            headings.append(Heading(f"{name.capitalize()}: n"))
            headings += [Heading(f"{stat} ({unit})") for stat in ("mean", "SD", "min", "median", "max")]
        what = " and ".join(quantity(measure).name for measure in measures).capitalize()
        anchor = "-".join(["nuclei-table", *(slug(measure) for measure in measures if measure not in QUANTITIES)])
        caption = f"{what} per nucleus over {scans}"
        yield PageTable(anchor, caption, headings, rows, len(rows), file=STATS_FILE)


def medians_table(values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str) -> PageTable:
    """Tabulate the medians of a measure per nucleus over participants, one column per site or group."""
    keys = ["abbreviation", factor]
    people = values.dropna(subset=[measure]).groupby([*keys, "person"], sort=False)[measure].mean()
    medians, counts = (people.groupby(level=keys, sort=False).agg(how).to_dict() for how in ("median", "size"))
    rows = []
    for name in values["abbreviation"].unique():
        cells = [make_cell(medians.get((name, level)), digits=quantity(measure).digits) for level in levels]
        texts = [f"{cell.text} ({counts.get((name, level), 0)})" for cell, level in zip(cells, levels, strict=True)]
        shown = (
            replace(cell, text=text) if cell.sort is not None else cell for cell, text in zip(cells, texts, strict=True)
        )
        rows.append([Cell(name), *shown])
    headings = [Heading("Nucleus", kind="text"), *(Heading(level) for level in levels)]
    return PageTable(anchor, f"Medians by {factor}, and numbers of participants", headings, rows, len(rows))


def score_tables(data: GroupData) -> Iterator[PageTable]:
    """Tabulate the z-scores of each scan, the most unusual first."""
    table = data.tables.get("group_zscores")
    if table is None or table.rows.empty or "z" not in table.rows:
        return
    for (model, measure), rows in table.rows.groupby(["model", "measure"], sort=False):
        base = str(measure).removesuffix("_harmonized")
        if base not in data.quantities or rows["z"].isna().all():
            continue
        wide = rows.pivot_table(index="scan", columns="abbreviation", values="z", sort=False)
        wide = wide[[nucleus.abbreviation for nucleus in ALL_STRUCTURES if nucleus.abbreviation in wide]]
        ranked = wide.loc[wide.abs().max(axis=1).sort_values(ascending=False, kind="stable").index]
        controls = {*rows.loc[is_true(rows["control"]), "scan"]}
        cells = [
            [
                Cell(str(scan)),
                Cell("yes" if scan in controls else "no"),
                *(replace(make_cell(float(z), digits=1), flag=bool(abs(z) > FLAGGED)) for z in record),
            ]
            for scan, record in ranked.head(MAX_SCORED).iterrows()
        ]
        several = f", {model}" if len(data.models) > 1 else ""
        yield PageTable(
            f"zscores-{slug(f'{measure}-{model}')}",
            f"Z-scores relative to controls of the same age and sex: {quantity(base).name}"
            f"{', harmonized' if base != measure else ''}{several}, the most unusual scans first",
            [Heading("Scan", kind="text"), Heading("Control", kind="text"), *(Heading(str(name)) for name in wide)],
            cells,
            len(ranked),
            file=table.file,
            note=f"Bold: beyond ±{FLAGGED}, as 5 % of the controls are. Controls are compared with the other controls; "
            "n/a: no value, age or sex, or an age beyond those of the controls.",
        )
