"""Tables of the page of a cohort: cells with their text, their order and their links."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.formatting import NO_VALUE, anchor_of, say_number, say_p, say_short
from bids_dgmseg.report.group_data import MEASURES, Cohort, GroupTable

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
    rating: str = ""
    """``green``, ``amber``, ``red`` or empty."""
    title: str = ""


@dataclass(frozen=True)
class Heading:
    """A column."""

    text: str
    meaning: str = ""
    kind: Literal["", "text", "lit"] = ""
    """Numbers, text or ratings."""


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
        Heading(
            columns[column],
            str((table.dictionary.get(column) or {}).get("Description", "")),
            kind="" if pd.api.types.is_numeric_dtype(table.rows[column]) else "text",
        )
        for column in shown
    ]
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
    return PageTable(
        "nuclei-table",
        "Volume and mean susceptibility χ of each nucleus over all scans",
        headings,
        rows,
        len(rows),
        file="group_stats.tsv",
    )


def medians_table(values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str) -> PageTable:
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


N_SCANS = 100
"""Most scans on the page."""

_KEYS = ["scan", "model"]

_NO_SCANS = pd.MultiIndex.from_arrays([[], []], names=_KEYS)

_IF_SEVERAL = ("dataset", "model")

_TITLES = {"dataset": "Dataset", "model": "Model", "site": "Site", "group": "Group"}


def has_ratings(cohort: Cohort) -> bool:
    """Whether any nucleus or scan was given a rating."""
    ratings, overall = _nucleus_ratings(cohort), _scan_ratings(cohort)
    return bool(ratings.notna().any(axis=None)) or bool(overall.notna().any())


def scans_table(cohort: Cohort, output_dir: Path) -> PageTable:
    """Rank the scans by their ratings, nuclei not found, outliers and warnings.

    Parameters
    ----------
    cohort : Cohort
        As `bids_dgmseg.report.group_data.read_cohort` gives it.
    output_dir : Path
        Where the page will lie; scans are linked to pages that exist there.
    """
    scans = _judged(cohort)
    ratings, reasons = _nucleus_ratings(cohort), _wide(cohort, "reasons")
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _TITLES if key in scans and (key not in _IF_SEVERAL or scans[key].nunique() > 1)]
    overall = "rating" if scans["rating"].notna().any() else ""
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="lit")] if overall else []
    headings += [Heading(nucleus, STRUCTURES.named(nucleus).name, kind="lit") for nucleus in nuclei]
    blank = {"missing": "Not found", **({"unfilled": "Fills no voxel"} if scans["unfilled"].notna().any() else {})}
    headings += [Heading(title, kind="text") for title in blank.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    rows = []
    for scan in scans.head(N_SCANS).to_dict("records"):
        row = (scan["scan"], scan["model"])
        cells = [Cell(scan["scan"], href=_link(scan, output_dir)), *(Cell(str(scan[key])) for key in keys)]
        cells += [_rating(scan["rating"], "whole scan", scan["reasons"])] if overall else []
        cells += [
            _rating(
                ratings.at[row, nucleus],
                STRUCTURES.named(nucleus).name,
                reasons.at[row, nucleus] if nucleus in reasons else None,
            )
            for nucleus in nuclei
        ]
        cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in blank]
        rows.append([*cells, to_cell(scan["n_outliers"]), to_cell(scan["n_warnings"])])
    file = "group_qc.tsv" if "group_qc" in cohort.tables else "group_stats.tsv"
    return PageTable("scans-table", "Scans, the worst first", headings, rows, len(scans), file=file)


def _judged(cohort: Cohort) -> pd.DataFrame:
    """Gather what speaks against each scan, the worst first."""
    scans = cohort.scans.set_index(_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings = _nucleus_ratings(cohort).reindex(scans.index)
    blank = cohort.stats[~(cohort.stats["volume_mm3"] > 0)]
    is_unfilled = blank["volume_pv_mm3"] > 0
    absent, unfilled = blank[~is_unfilled], blank[is_unfilled]
    scans["rating"] = _scan_ratings(cohort).reindex(scans.index)
    scans["missing"] = absent.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["unfilled"] = unfilled.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["n_missing"] = absent.groupby(_KEYS).size().reindex(scans.index, fill_value=0)
    scans["n_outliers"] = _count_outliers(cohort).reindex(scans.index)
    for column in ("n_warnings", "page", "reasons"):
        scans[column] = _of_quality(cohort, column).reindex(scans.index)
    level = scans["rating"].map({rating: place for place, rating in enumerate(RATINGS)}).fillna(-1)
    ranks = {
        "level": level,
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "n_missing": scans["n_missing"],
        "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }
    order = pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index
    return scans.loc[order]


def _nucleus_ratings(cohort: Cohort) -> pd.DataFrame:
    """Rating of each nucleus by scan and model, a column a nucleus; no column where nobody gave one."""
    ratings = _wide(cohort, "rating")
    return ratings.where(ratings.isin(RATINGS)).dropna(axis=1, how="all")


def _wide(cohort: Cohort, column: str) -> pd.DataFrame:
    if column not in cohort.stats:
        return pd.DataFrame(index=_NO_SCANS)
    keys = [*_KEYS, "abbreviation"]
    return cohort.stats.drop_duplicates(keys).set_index(keys)[column].unstack("abbreviation")


def _scan_ratings(cohort: Cohort) -> pd.Series:
    ratings = _of_quality(cohort, "rating")
    return ratings.where(ratings.isin(RATINGS))


def _of_quality(cohort: Cohort, column: str) -> pd.Series:
    table = cohort.tables.get("group_qc")
    if table is None or column not in table.rows:
        return pd.Series(index=_NO_SCANS, dtype=object)
    return table.rows.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def _count_outliers(cohort: Cohort) -> pd.Series:
    """Values of each scan that stand out from their site; missing where nobody looked."""
    table = cohort.tables.get("group_outliers")
    if table is None or "outlier" not in table.rows:
        return pd.Series(index=_NO_SCANS, dtype=float)
    is_outlier = table.rows["outlier"].astype(str).str.lower() == "true"
    return is_outlier.groupby([table.rows[key] for key in _KEYS]).sum()


def _rating(rating: Any, where: str, reasons: Any) -> Cell:
    """Show a rating; why it is not green stands in the cell's title."""
    if rating not in RATINGS:
        return Cell(NO_VALUE)
    why = f", {reasons}" if isinstance(reasons, str) and rating != "green" else ""
    return Cell(rating, float(RATINGS.index(rating)), rating=rating, title=f"{where}: {rating}{why}")


def _link(scan: Mapping[Any, Any], output_dir: Path) -> str:
    """Link to the scan on its participant's page, from the folder of this page; empty where there is no page."""
    page = scan["page"] if isinstance(scan["page"], str) else f"{scan['participant_id']}.html"
    return f"{path_to_url(page)}#{anchor_of(scan['name'], scan['seg'])}" if (output_dir / page).is_file() else ""


def links_of(rows: pd.DataFrame, cohort: Cohort, output_dir: Path) -> Sequence[str]:
    """Link each row of a table to its scan's page."""
    pages = _of_quality(cohort, "page")
    records = rows[["scan", "name", "participant_id", "model", "seg"]].to_dict("records")
    return [_link({**row, "page": pages.get((row["scan"], row["model"]))}, output_dir) for row in records]
