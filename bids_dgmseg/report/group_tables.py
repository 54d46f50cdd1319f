"""Tables of the group page: participants, scans to check, statistics."""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from bids_dgmseg.errors import list_some
from bids_dgmseg.io.files import MISSING, path_to_url
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.report.group_data import DATASET, SCAN_KEYS, GroupData, is_true
from bids_dgmseg.report.html import (
    format_number,
    format_p,
    format_significant,
    natural_key,
    quantity,
    scan_anchor,
)
from bids_dgmseg.study.study import ResultTable

STATS_FILE = "group/group_stats.tsv"
MAX_ROWS = 200  # of a table on the page

MAX_SCANS = 100
"""Rows of a table of scans."""

_SCAN_TITLES = {DATASET: "Dataset", "model": "Model", "site": "Site", "group": "Group"}

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
_MAX_NAMED = 8  # nuclei that a note is about
_IF_SEVERAL = ("model", "scans", "reference", "variable")
_FIRST = ("scan", "variable", "abbreviation")
_KEYS = ("measure", "model", "abbreviation", "reference", "group")

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


class Heading(NamedTuple):
    """Heading of a column with its tooltip, and whether the column has numbers, text or ratings."""

    text: str
    description: str = ""
    kind: Literal["", "text", "ratings"] = ""


@dataclass(frozen=True)
class PageTable:
    """The first of the `n_rows` rows of a table; the first cell of a row is its heading."""

    measure: str
    """Column of the measure, empty if it has several."""
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


TEXTS: Mapping[str, Any] = tomllib.loads(files("bids_dgmseg").joinpath("data", "group_page.toml").read_text("utf-8"))
"""Texts of tables, figures and tables for a paper."""

STATISTICS = {name: Statistic(**texts) for name, texts in TEXTS["tables"].items()}
"""Name of a table → how the page shows it, in the order of the page."""


def make_cell(value: Any, *, column: str = "") -> Cell:
    """Format a value with three significant digits, p values with three decimals.

    >>> make_cell(0.00002, column="q_t").text, make_cell(1234.5).text, make_cell(float("nan")).text
    ('< 0.001', '1234', 'n/a')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell(MISSING)
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if not isinstance(value, int | float):
        return Cell(str(value))
    if _P_VALUE.fullmatch(column):
        text = format_p(value)
    elif isinstance(value, int):
        text = str(value)
    else:
        text = format_significant(value)
    return Cell(text, float(value), title=str(value))


def select_rows(table: ResultTable) -> pd.DataFrame:
    """Select what the page shows: the first curves (of controls), or the outliers from the largest robust z down."""
    rows = table.rows
    if "outlier" in rows:
        rows = rows[is_true(rows["outlier"])]
    if "curve" in rows and len(rows):
        rows = rows[rows["scans"] == rows["scans"].iloc[0]]
    if "robust_z" in rows:
        rows = rows.sort_values("robust_z", key=abs, ascending=False, kind="stable")
    return rows


def statistic_tables(name: str, table: ResultTable) -> Iterator[PageTable]:
    """Make the page's tables of a group table, one per measure unless `STATISTICS` says otherwise.

    Values in the unit of the measure are shown in that of the page; columns with limits (``…_low``, ``…_high``) have
    these in brackets.
    """
    rows, statistic = select_rows(table), STATISTICS[name]
    covariates, residuals = table.facts.get("Covariates") or ["nothing"], table.facts.get("Residuals", ())
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
            str(measure),
            f"{name}-{str(measure) or 'table'}",
            f"{caption}: {quantity(str(measure)).label}" if measure else caption,
            [
                Heading(_TITLES[column], _DESCRIPTIONS[column], "text" if text else "")
                for column, text in zip(shown, is_text, strict=True)
            ],
            [[_statistic_cell(record, str(column)) for column in shown] for record in records],
            len(part),
            file=f"group/{table.name}.tsv",
            note=statistic.note if number == 0 else "",
            lines=[*_list_notes(part), *(line + "." for line in residuals if line.startswith(f"{measure!s}: "))],
        )


def _statistic_cell(record: Mapping[Any, Any], column: str) -> Cell:
    """Format a value of a row, with its limits in brackets."""
    value, description = record[column], _DESCRIPTIONS[column]
    if column == "measure":
        return Cell(quantity(str(value)).label)
    power = 2 if "unit of the measure squared" in description else int("unit of the measure" in description)
    factor = quantity(str(record.get("measure"))).factor ** power
    if isinstance(value, float):
        value *= factor
    cell = make_cell(value, column=column)
    error = f"se_{column.removeprefix('mean_')}"
    if column.startswith("mean_") and cell.sort is not None and error in record:
        return replace(cell, text=f"{cell.text} ± {make_cell(float(record[error]) * factor).text}")
    stem = next((stem for stem in (column, re.sub("_(per_year|slope)$", "", column)) if f"{stem}_low" in record), "")
    limits = [make_cell(float(record[f"{stem}_{end}"]) * factor) for end in ("low", "high")] if stem else []
    if cell.sort is None or not limits or MISSING in (limits[0].text, limits[1].text):
        return cell
    return replace(cell, text=f"{cell.text} [{limits[0].text}, {limits[1].text}]")


def _list_notes(rows: pd.DataFrame) -> Iterator[str]:
    """Write each note once, with the nuclei that it is about."""
    names = rows["abbreviation"].astype(str) if "abbreviation" in rows else pd.Series("", rows.index)
    if "group" in rows and rows["group"].nunique() > 1:
        names = names + (" (" + rows["group"].astype(str) + ")").where(rows["group"].notna(), "")
    about: dict[str, list[str]] = {}
    for name, text in zip(names, rows["note"] if "note" in rows else (), strict=False):
        for part in filter(None, str(text).split("; ")) if isinstance(text, str) else ():
            about.setdefault(part, []).append(name)
    for part, subjects in about.items():
        who = "All rows" if len(subjects) == len(rows) else list_some(dict.fromkeys(subjects), most=_MAX_NAMED)
        yield f"{who}: {part}."


Marks = Mapping[tuple[str, str], str]
"""Scan and model → link to its results on the page of the participant; empty if there is none."""


def mark_scans(data: GroupData, output_dir: Path) -> Marks:
    """Return the links to the results of each scan and model."""
    pages, marks = data.by_scan("page"), {}
    for row in data.scans.to_dict("records"):
        key = (row["scan"], row["model"])
        page = pages.get(key)
        page = page if isinstance(page, str) else f"{row['participant_id']}.html"
        has_page = (output_dir / page).is_file()
        marks[key] = f"{path_to_url(page)}#{scan_anchor(row['name'], row['seg'])}" if has_page else ""
    return marks


def count_ratings(data: GroupData, *, n_failed: int) -> str:
    """Count the scans by their rating as a whole; failed scans have no results."""
    counts = data.by_scan("rating").fillna("without a rating").value_counts()
    return ", ".join(
        [*(f"{n} {rating}" for rating, n in counts.items()), *([f"{n_failed} failed"] if n_failed else [])]
    )


def describe_participants(data: GroupData) -> PageTable:
    """Tabulate numbers, age and sex of the participants, by group and site ("Table 1")."""
    scans = data.scans
    scans = scans.assign(is_excluded=pd.MultiIndex.from_frame(scans[SCAN_KEYS]).isin(data.excluded_scans.index))
    levels = {factor: sorted(data.levels(factor), key=natural_key) for factor in ("group", "site")}
    levels = {factor: values for factor, values in levels.items() if values}
    strata: list[dict[str, str]] = [{}]
    for factor, values in levels.items():
        unknown = [MISSING] if (scans[factor] == MISSING).any() else []
        strata += [{factor: level} for level in [*values, *unknown]]
    rows = []
    for stratum in strata[:MAX_ROWS]:
        inside = scans[(scans[[*stratum]] == pd.Series(stratum, dtype=object)).all(axis=1)]
        keys = [Cell(stratum.get(factor, "all").replace(MISSING, "not known")) for factor in levels]
        rows.append([*(keys or [Cell("all")]), *_describe(inside)])
    titles = ("Participants", "Scans", "Age (years), mean ± SD", "Age, range", "Sex", "Excluded scans")
    headings = [Heading(_SCAN_TITLES[factor], kind="text") for factor in levels] or [Heading("", kind="text")]
    note = "Participants and scans that enter the statistics; age at a participant's first scan."
    caption = "Table 1. Participants" + (f" by {' and '.join(levels)}" if levels else "")
    headings += [Heading(title) for title in titles]
    return PageTable("", "participants-table", caption, headings, rows, len(strata), file=STATS_FILE, note=note)


def _describe(scans: pd.DataFrame) -> Iterator[Cell]:
    """Numbers, age and sex of the participants of scans that are not excluded, and the number of excluded ones."""
    used = scans[~scans["is_excluded"]]
    if "age_years" in used:
        used = used.sort_values("age_years", kind="stable")
    # what is missing in a session is that of another one, as in the analyses
    persons = used.groupby([key for key in (DATASET, "participant_id") if key in used], sort=False).first()
    yield make_cell(len(persons))
    yield make_cell(int(used["scan"].nunique()))
    ages = pd.to_numeric(persons.get("age_years", pd.Series(dtype=float)), errors="coerce").dropna()
    if len(ages):
        missing = f" ({n} missing)" if (n := len(persons) - len(ages)) else ""
        spread = f" ± {format_number(ages.std(), 1)}" if len(ages) > 1 else ""
        yield Cell(f"{format_number(ages.mean(), 1)}{spread}{missing}", sort=ages.mean())
        yield Cell(f"{format_number(ages.min(), 1)} to {format_number(ages.max(), 1)}")
    else:
        yield from (Cell(MISSING), Cell(MISSING))
    sexes = persons["sex"].fillna(MISSING).value_counts().sort_index() if "sex" in persons else pd.Series(dtype=int)
    yield Cell(", ".join(f"{sex}: {n}" for sex, n in sexes.items()) or MISSING)
    yield make_cell(int(scans.loc[scans["is_excluded"], "scan"].nunique()))


def list_excluded(data: GroupData, marks: Marks) -> PageTable | None:
    """List the scans, and nuclei of other scans, that enter no statistics, with the reasons; None if there are none."""
    whole = data.excluded_scans.rename("excluded").reset_index().assign(abbreviation="whole scan")
    is_whole = pd.MultiIndex.from_frame(data.stats[SCAN_KEYS]).isin(data.excluded_scans.index)
    nuclei = data.stats[data.stats["excluded"].notna() & data.stats["side"].notna() & ~is_whole]
    rows = pd.concat([whole, nuclei])[[*SCAN_KEYS, "abbreviation", "excluded"]]
    if rows.empty:
        return None
    hidden = [] if len(data.models) > 1 else ["model"]
    caption = f"Excluded from all statistics: {whole['scan'].nunique()} scan(s)"
    caption += f" and {len(nuclei)} nuclei of other scans" if len(nuclei) else ""
    titles = {"scan": "Scan", "model": "Model", "abbreviation": "Excluded", "excluded": "Reason"}
    shown = rows.drop(columns=hidden)
    table = PageTable(
        "",
        "excluded-table",
        caption,
        [Heading(titles[str(column)], kind="text") for column in shown],
        [list(map(Cell, map(str, row))) for row in shown.head(MAX_ROWS).itertuples(index=False)],
        len(rows),
        file=STATS_FILE,
    )
    return link_scans(table, rows, marks)


def scans_table(data: GroupData, marks: Marks) -> PageTable:
    """Rank the scans by rating, nuclei not found, outliers and warnings; link them to their pages."""
    scans = _rank_scans(data)
    ratings, reasons = data.by_nucleus("rating"), data.by_nucleus("reasons")
    nuclei = [structure for structure in ALL_STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _SCAN_TITLES if key in scans and (key not in (DATASET, "model") or scans[key].nunique() > 1)]
    has_overall = scans["rating"].notna().any()
    headings = [Heading("Scan", kind="text"), *(Heading(_SCAN_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="ratings")] if has_overall else []
    headings += [Heading(nucleus.abbreviation, nucleus.name, kind="ratings") for nucleus in nuclei]
    headings += [Heading("Not found", kind="text"), Heading("Outliers"), Heading("Warnings")]
    rows = []
    for key, scan in zip(scans.index, scans.head(MAX_SCANS).to_dict("records"), strict=False):
        cells = [Cell(scan["scan"]), *(Cell(str(scan[column])) for column in keys)]
        cells += [_rating_cell(scan["rating"], "whole scan", scan["reasons"])] if has_overall else []
        for nucleus in nuclei:
            reason = reasons.at[key, nucleus.abbreviation] if nucleus.abbreviation in reasons else None
            cells.append(_rating_cell(ratings.at[key, nucleus.abbreviation], nucleus.name, reason))
        rows.append([*cells, Cell(scan["not_found"]), make_cell(scan["n_outliers"]), make_cell(scan["n_warnings"])])
    table = PageTable(
        "", "scans-table", "Scans, the worst first", headings, rows, len(scans), file="group/group_qc.tsv"
    )
    return link_scans(table, scans, marks)


def _rank_scans(data: GroupData) -> pd.DataFrame:
    """Collect the evidence against each scan, the worst first."""
    scans = data.scans.set_index(SCAN_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings, missing = data.by_nucleus("rating").reindex(scans.index), data.missing.groupby(SCAN_KEYS)["abbreviation"]
    scans["not_found"] = missing.agg(" ".join).reindex(scans.index).fillna("none")
    outliers = data.tables.get("group_outliers")
    scans["n_outliers"] = np.nan  # missing if they were not computed
    if outliers is not None and "outlier" in outliers.rows:
        counts = is_true(outliers.rows["outlier"]).groupby([outliers.rows[key] for key in SCAN_KEYS]).sum()
        scans["n_outliers"] = counts.reindex(scans.index)
    for column in ("rating", "n_warnings", "reasons"):
        scans[column] = data.by_scan(column).reindex(scans.index)
    ranks = {
        "rating": scans["rating"].map({rating: level for level, rating in enumerate(RATINGS)}).fillna(-1),
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "not_found": missing.size().reindex(scans.index).fillna(0),
        "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }
    return scans.loc[pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index]


def _rating_cell(rating: Any, subject: str, reasons: Any) -> Cell:
    """Show a rating with its reasons in the tooltip."""
    if rating not in RATINGS:
        return Cell(MISSING)
    why = f", {reasons}" if isinstance(reasons, str) and rating != "green" else ""
    return Cell(rating, float(RATINGS.index(rating)), rating=rating, title=f"{subject}: {rating}{why}")


def link_scans(table: PageTable, rows: pd.DataFrame, marks: Marks) -> PageTable:
    """Link the first cell of each row to its scan."""
    links = [marks[key] for key in zip(rows["scan"], rows["model"], strict=True)]
    linked = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=False)]
    return replace(table, rows=linked)
