"""Tables of the group page: cells with text, sort key and link; scans, nuclei and medians."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.group_data import DATASET, GroupData, GroupTable, is_true
from bids_dgmseg.report.html import NO_VALUE, QUANTITIES, format_number, format_p, format_significant, scan_anchor

MAX_ROWS, MAX_SCANS = 200, 100  # rows of a table on the page

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
_KEYS = ["scan", "model"]
_NO_SCANS = pd.MultiIndex.from_arrays([[], []], names=_KEYS)
_TITLES = {DATASET: "Dataset", "model": "Model", "site": "Site", "group": "Group"}


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and what it is sorted by."""

    text: str
    sort: float | None = None
    """Number to sort by; None to sort by text, with ``n/a`` last."""
    href: str = ""
    rating: str = ""
    """``green``, ``amber``, ``red`` or empty."""
    title: str = ""
    """Tooltip."""


@dataclass(frozen=True)
class Heading:
    """Heading of a column."""

    text: str
    description: str = ""
    """Tooltip."""
    kind: Literal["", "text", "ratings"] = ""
    """Numbers, text or ratings."""


@dataclass(frozen=True)
class PageTable:
    """A table of the page; the first cell of a row is its heading."""

    anchor: str
    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    """Rows of the whole table, of which the first ones are on the page."""
    file: str = ""
    note: str = ""


def make_table(table: GroupTable, *, anchor: str, caption: str, columns: Mapping[str, str]) -> PageTable:
    """Make a table of the columns (column → heading) that exist and are not empty."""
    shown = [column for column in columns if column in table.rows and table.rows[column].notna().any()]
    headings = [make_heading(table, column, columns[column]) for column in shown]
    records = table.rows[shown].head(MAX_ROWS).to_dict("records")
    rows = [[make_cell(record[column], column=column) for column in shown] for record in records]
    return PageTable(anchor, caption, headings, rows, len(table.rows), file=table.file)


def make_heading(table: GroupTable, column: str, title: str) -> Heading:
    """Make the heading of a column, with its description in the data dictionary as the tooltip."""
    description = str((table.dictionary.get(column) or {}).get("Description", ""))
    return Heading(title, description, kind="" if pd.api.types.is_numeric_dtype(table.rows[column]) else "text")


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


def nuclei_table(data: GroupData) -> PageTable:
    """Summarize the measures of each nucleus and model over all scans."""
    rows, several = [], len(data.models) > 1
    for (model, name), group in data.stats.groupby(["model", "abbreviation"], sort=False):
        cells = [Cell(str(name)), *([Cell(str(model))] if several else []), make_cell(len(group))]
        for measure, quantity in QUANTITIES.items():
            values = group[measure].dropna()
            numbers = (values.mean(), values.std(), values.min(), values.median(), values.max())
            cells += [make_cell(len(values)), *(make_cell(float(x), digits=quantity.digits) for x in numbers)]
        rows.append(cells)
    headings = [Heading(name, kind="text") for name in ("Nucleus", "Model")[: 1 + several]] + [Heading("Scans")]
    for title, unit in (("Volume", "mm³"), ("Mean χ", "ppm")):
        headings.append(Heading(f"{title}: n"))
        headings += [Heading(f"{title}: {name} ({unit})") for name in ("mean", "SD", "min", "median", "max")]
    caption = "Volume and mean susceptibility χ per nucleus over all scans"
    return PageTable("nuclei-table", caption, headings, rows, len(rows), file="group_stats.tsv")


def medians_table(values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str) -> PageTable:
    """Tabulate the medians of a measure per nucleus, one column per site or group."""
    medians = values.groupby(["abbreviation", factor], sort=False)[measure].median().unstack(factor)
    counts = values.dropna(subset=[measure]).groupby(factor)["scan"].nunique()
    names = list(dict.fromkeys(values["abbreviation"]))
    numbers = medians.reindex(index=names, columns=list(levels)).to_numpy(float)
    rows = [
        [Cell(name), *(make_cell(value, digits=QUANTITIES[measure].digits) for value in row)]
        for name, row in zip(names, numbers.tolist(), strict=True)
    ]
    headings = [Heading("Nucleus", kind="text"), *(Heading(f"{level} (n {counts.get(level, 0)})") for level in levels)]
    return PageTable(anchor, f"Medians by {factor}", headings, rows, len(rows))


def scans_table(data: GroupData, output_dir: Path) -> PageTable:
    """Rank the scans by rating, nuclei not found, outliers and warnings; link them to the pages in `output_dir`."""
    scans = _rank_scans(data)
    ratings, reasons = _nucleus_ratings(data), _one_column_per_nucleus(data, "reasons")
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _TITLES if key in scans and (key not in (DATASET, "model") or scans[key].nunique() > 1)]
    has_overall = scans["rating"].notna().any()
    lists = {"not_found": "Not found"}
    if scans["without_voxel"].notna().any():
        lists["without_voxel"] = "Smaller than a voxel"
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="ratings")] if has_overall else []
    headings += [Heading(nucleus, STRUCTURES.named(nucleus).name, kind="ratings") for nucleus in nuclei]
    headings += [Heading(title, kind="text") for title in lists.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    rows = []
    for scan in scans.head(MAX_SCANS).to_dict("records"):
        row = (scan["scan"], scan["model"])
        cells = [Cell(scan["scan"], href=_link(scan, output_dir)), *(Cell(str(scan[key])) for key in keys)]
        cells += [_rating_cell(scan["rating"], "whole scan", scan["reasons"])] if has_overall else []
        for nucleus in nuclei:
            reason = reasons.at[row, nucleus] if nucleus in reasons else None
            cells.append(_rating_cell(ratings.at[row, nucleus], STRUCTURES.named(nucleus).name, reason))
        cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in lists]
        rows.append([*cells, make_cell(scan["n_outliers"]), make_cell(scan["n_warnings"])])
    file = "group_qc.tsv" if "group_qc" in data.tables else "group_stats.tsv"
    return PageTable("scans-table", "Scans, the worst first", headings, rows, len(scans), file=file)


def _rank_scans(data: GroupData) -> pd.DataFrame:
    """Collect the evidence against each scan, the worst first."""
    scans = data.scans.set_index(_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings = _nucleus_ratings(data).reindex(scans.index)
    empty = data.stats[~(data.stats["volume_mm3"] > 0)]
    is_without_voxel = empty["volume_pv_mm3"] > 0
    not_found, without_voxel = empty[~is_without_voxel], empty[is_without_voxel]
    scans["rating"] = _scan_ratings(data).reindex(scans.index)
    scans["not_found"] = not_found.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["without_voxel"] = without_voxel.groupby(_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    outliers = data.tables.get("group_outliers")
    scans["n_outliers"] = np.nan  # missing if they were not computed
    if outliers is not None and "outlier" in outliers.rows:
        counts = is_true(outliers.rows["outlier"]).groupby([outliers.rows[key] for key in _KEYS]).sum()
        scans["n_outliers"] = counts.reindex(scans.index)
    for column in ("n_warnings", "page", "reasons"):
        scans[column] = _qc_column(data, column).reindex(scans.index)
    ranks = {
        "rating": scans["rating"].map({rating: level for level, rating in enumerate(RATINGS)}).fillna(-1),
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "not_found": not_found.groupby(_KEYS).size().reindex(scans.index, fill_value=0),
        "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }
    order = pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index
    return scans.loc[order]


def has_ratings(data: GroupData) -> bool:
    """Return whether any nucleus or scan has a rating."""
    return bool(_nucleus_ratings(data).notna().any(axis=None)) or bool(_scan_ratings(data).notna().any())


def _nucleus_ratings(data: GroupData) -> pd.DataFrame:
    """Return ratings by scan and model, one column per nucleus; no column if there are none."""
    ratings = _one_column_per_nucleus(data, "rating")
    return ratings.where(ratings.isin(RATINGS)).dropna(axis=1, how="all")


def _one_column_per_nucleus(data: GroupData, column: str) -> pd.DataFrame:
    if column not in data.stats:
        return pd.DataFrame(index=_NO_SCANS)
    keys = [*_KEYS, "abbreviation"]
    return data.stats.drop_duplicates(keys).set_index(keys)[column].unstack("abbreviation")


def _scan_ratings(data: GroupData) -> pd.Series:
    ratings = _qc_column(data, "rating")
    return ratings.where(ratings.isin(RATINGS))


def _qc_column(data: GroupData, column: str) -> pd.Series:
    table = data.tables.get("group_qc")
    if table is None or column not in table.rows:
        return pd.Series(index=_NO_SCANS, dtype=object)
    return table.rows.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def _rating_cell(rating: Any, subject: str, reasons: Any) -> Cell:
    """Show a rating with its reasons in the tooltip."""
    if rating not in RATINGS:
        return Cell(NO_VALUE)
    why = f", {reasons}" if isinstance(reasons, str) and rating != "green" else ""
    return Cell(rating, float(RATINGS.index(rating)), rating=rating, title=f"{subject}: {rating}{why}")


def link_scans(table: PageTable, rows: pd.DataFrame, data: GroupData, output_dir: Path) -> PageTable:
    """Link the first cell of each row to its scan on the page of the participant."""
    pages = _qc_column(data, "page")
    records = rows[["scan", "name", "participant_id", "model", "seg"]].head(len(table.rows)).to_dict("records")
    links = [_link({**row, "page": pages.get((row["scan"], row["model"]))}, output_dir) for row in records]
    linked = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=True)]
    return replace(table, rows=linked)


def _link(scan: Mapping[Any, Any], output_dir: Path) -> str:
    """Return the link to a scan on the page of its participant; empty if there is no page."""
    page = scan["page"] if isinstance(scan["page"], str) else f"{scan['participant_id']}.html"
    return f"{path_to_url(page)}#{scan_anchor(scan['name'], scan['seg'])}" if (output_dir / page).is_file() else ""
