"""Tables of the group page: scans, nuclei, medians and statistics, with sort keys, tooltips and links."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from bids_dgmseg.io.files import path_to_url
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.measurement.rating import RATINGS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.report.group_data import DATASET, SCAN_KEYS, GroupData, GroupTable, is_true
from bids_dgmseg.report.html import NO_VALUE, QUANTITIES, format_number, format_p, format_significant, scan_anchor
from bids_dgmseg.stats.ageing import NOT_IDENTIFIED

MAX_ROWS, MAX_SCANS = 200, 100  # rows of a table on the page

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
_TITLES = {DATASET: "Dataset", "model": "Model", "site": "Site", "group": "Group"}
_DIGITS = {"ppm": 3, "mm³": 1}
_VARIANTS = {"_harmonized": "harmonized over sites", "_adjusted": "adjusted for size"}
_IF_SEVERAL = ("model", "labels", "scans", "reference")


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

    anchor: str
    caption: str
    headings: Sequence[Heading]
    rows: Sequence[Sequence[Cell]]
    n_rows: int
    file: str = ""
    note: str = ""


class _Column(NamedTuple):
    """A column of the page: one of the table, or a value with its confidence limits."""

    key: str
    title: str
    """May hold ``{covariates}``."""
    limits: str = ""
    """Start of the two columns with the limits."""
    extra_digits: int | None = None
    """Decimals in addition to those of the measure's unit."""
    digits: int | None = None
    """Decimals for any measure; without either, three significant digits."""


@dataclass(frozen=True)
class Statistic:
    """What the page shows of a group table."""

    name: str
    section: str
    caption: str
    columns: Sequence[_Column]
    note: str = ""
    split: bool = True
    """Whether each measure has its own table."""


def _plain(**titles: str) -> list[_Column]:
    """Columns without limits and decimals, by their keys."""
    return [_Column(key, title) for key, title in titles.items()]


STATISTICS = (
    Statistic(
        "group_ageing",
        "age",
        "Age curves, the best fit per nucleus",
        (
            *_plain(abbreviation="Nucleus", model="Model", labels="Labels", scans="Scans", curve="Curve", n="n"),
            _Column("alpha", "α", "alpha"),
            _Column("beta_per_year", "β (1/year)", "beta_per_year"),
            _Column("gamma", "γ", "gamma"),
            _Column("plateau", "Plateau α + γ", "plateau"),
            _Column("r2", "R²", digits=2),
            _Column("note", "Note"),
        ),
        "exponential: α(1 − e^(−β·age)) + γ; linear: α·age + γ; logarithmic: α·ln(age) + γ. α and γ are in the unit of "
        "the measure, or that unit per year; 95 % confidence limits in brackets.",
    ),
    Statistic(
        "group_site_variance",
        "sites",
        "Between-site variance before and after harmonization",
        (
            *_plain(abbreviation="Nucleus", model="Model", n="n"),
            *_plain(site_variance_before="Before", site_variance_after="After"),
            _Column("reduction", "Reduction", digits=2),
            *_plain(p_site_before="p before", p_site_after="p after"),
        ),
        "Variance of the site means adjusted for covariates, in squared units of the measure; reduction is "
        "1 − after / before.",
    ),
    Statistic(
        "group_differences",
        "groups",
        "Differences between groups",
        (
            *_plain(abbreviation="Nucleus", model="Model", reference="Reference group", group="Group"),
            _Column("difference", "Difference", "difference", extra_digits=0),
            _Column("hedges_g", "Hedges' g", "hedges_g", digits=2),
            *_plain(q_t="q (t)", q_mannwhitney="q (Mann-Whitney)"),
            _Column("ancova_difference", "Adjusted for {covariates}", "ancova_difference", extra_digits=0),
            _Column("ancova_q", "q (ANCOVA)"),
            _Column("mean_reference", "Ref. mean", extra_digits=0),
            _Column("mean_group", "Group mean", extra_digits=0),
            *_plain(n_reference="Ref. n", n_group="Group n", note="Note", ancova_note="Note on ANCOVA"),
        ),
        "Difference is group minus reference group, with 95 % confidence limits in brackets; q is the p value adjusted "
        "for the number of nuclei (false discovery rate).",
    ),
    Statistic(
        "group_longitudinal",
        "change",
        "Mean change per year",
        (
            *_plain(abbreviation="Nucleus", model="Model", group="Group"),
            _Column("change_per_year", "Change per year", "change", 1),
            *_plain(q="q", p="p", n="Participants", n_site_change="Site changes", n_scans="Scans"),
            _Column("years_median", "Median years", digits=1),
            _Column("difference", "Difference from the reference group", "difference", 1),
            *_plain(q_difference="q (difference)", note="Note"),
        ),
        "Mean of the participants' slopes and its difference from that of the reference group, with 95 % confidence "
        "limits in brackets. Participants whose site changes between sessions are counted, but left out.",
    ),
    Statistic(
        "group_outliers",
        "outliers",
        "Outliers for their site and age",
        (
            *_plain(scan="Scan", abbreviation="Nucleus", model="Model", measure="Measure", site="Site"),
            _Column("value", "Value", extra_digits=0),
            _Column("expected", "Expected at site and age", extra_digits=0),
            _Column("median", "Site median", extra_digits=0),
            _Column("robust_z", "Robust z", digits=1),
            _Column("n_site", "Site n"),
        ),
        "Robust z: distance from the value expected at the site and, where known, age, divided by 1.4826 times the "
        "median absolute deviation.",
        split=False,
    ),
)
"""In the order of the page."""


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
    ratings, reasons = data.by_nucleus("rating"), data.by_nucleus("reasons")
    nuclei = [structure for structure in STRUCTURES if structure.abbreviation in ratings]
    keys = [key for key in _TITLES if key in scans and (key not in (DATASET, "model") or scans[key].nunique() > 1)]
    has_overall = scans["rating"].notna().any()
    lists = {"not_found": "Not found"}
    if scans["without_voxel"].notna().any():
        lists["without_voxel"] = "Smaller than a voxel"
    headings = [Heading("Scan", kind="text"), *(Heading(_TITLES[key], kind="text") for key in keys)]
    headings += [Heading("Whole scan", kind="ratings")] if has_overall else []
    headings += [Heading(nucleus.abbreviation, nucleus.name, kind="ratings") for nucleus in nuclei]
    headings += [Heading(title, kind="text") for title in lists.values()]
    headings += [Heading("Outliers"), Heading("Warnings")]
    rows = []
    for scan in scans.head(MAX_SCANS).to_dict("records"):
        row = (scan["scan"], scan["model"])
        cells = [Cell(scan["scan"], href=_link(scan, output_dir)), *(Cell(str(scan[key])) for key in keys)]
        cells += [_rating_cell(scan["rating"], "whole scan", scan["reasons"])] if has_overall else []
        for nucleus in nuclei:
            reason = reasons.at[row, nucleus.abbreviation] if nucleus.abbreviation in reasons else None
            cells.append(_rating_cell(ratings.at[row, nucleus.abbreviation], nucleus.name, reason))
        cells += [Cell(scan[column] if isinstance(scan[column], str) else "none") for column in lists]
        rows.append([*cells, make_cell(scan["n_outliers"]), make_cell(scan["n_warnings"])])
    file = "group_qc.tsv" if "group_qc" in data.tables else "group_stats.tsv"
    return PageTable("scans-table", "Scans, the worst first", headings, rows, len(scans), file=file)


def _rank_scans(data: GroupData) -> pd.DataFrame:
    """Collect the evidence against each scan, the worst first."""
    scans = data.scans.set_index(SCAN_KEYS, drop=False)
    scans.index.names = [None, None]
    ratings = data.by_nucleus("rating").reindex(scans.index)
    empty = data.stats[~(data.stats["volume_mm3"] > 0)]
    is_without_voxel = empty["volume_pv_mm3"] > 0
    not_found, without_voxel = empty[~is_without_voxel], empty[is_without_voxel]
    scans["not_found"] = not_found.groupby(SCAN_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    scans["without_voxel"] = without_voxel.groupby(SCAN_KEYS)["abbreviation"].agg(" ".join).reindex(scans.index)
    outliers = data.tables.get("group_outliers")
    scans["n_outliers"] = np.nan  # missing if they were not computed
    if outliers is not None and "outlier" in outliers.rows:
        counts = is_true(outliers.rows["outlier"]).groupby([outliers.rows[key] for key in SCAN_KEYS]).sum()
        scans["n_outliers"] = counts.reindex(scans.index)
    for column in ("rating", "n_warnings", "page", "reasons"):
        scans[column] = data.by_scan(column).reindex(scans.index)
    ranks = {
        "rating": scans["rating"].map({rating: level for level, rating in enumerate(RATINGS)}).fillna(-1),
        "red": (ratings == "red").sum(axis=1),
        "amber": (ratings == "amber").sum(axis=1),
        "not_found": not_found.groupby(SCAN_KEYS).size().reindex(scans.index, fill_value=0),
        "outliers": scans["n_outliers"].fillna(0),
        "warnings": pd.to_numeric(scans["n_warnings"]).fillna(0),
    }
    order = pd.DataFrame(ranks).sort_values(list(ranks), ascending=False, kind="stable").index
    return scans.loc[order]


def _rating_cell(rating: Any, subject: str, reasons: Any) -> Cell:
    """Show a rating with its reasons in the tooltip."""
    if rating not in RATINGS:
        return Cell(NO_VALUE)
    why = f", {reasons}" if isinstance(reasons, str) and rating != "green" else ""
    return Cell(rating, float(RATINGS.index(rating)), rating=rating, title=f"{subject}: {rating}{why}")


def link_scans(table: PageTable, rows: pd.DataFrame, data: GroupData, output_dir: Path) -> PageTable:
    """Link the first cell of each row to its scan on the page of the participant."""
    pages = data.by_scan("page")
    records = rows[["scan", "name", "participant_id", "model", "seg"]].head(len(table.rows)).to_dict("records")
    links = [_link({**row, "page": pages.get((row["scan"], row["model"]))}, output_dir) for row in records]
    linked = [[replace(cells[0], href=href), *cells[1:]] for cells, href in zip(table.rows, links, strict=True)]
    return replace(table, rows=linked)


def _link(scan: Mapping[Any, Any], output_dir: Path) -> str:
    """Return the link to a scan on the page of its participant; empty if there is no page."""
    page = scan["page"] if isinstance(scan["page"], str) else f"{scan['participant_id']}.html"
    return f"{path_to_url(page)}#{scan_anchor(scan['name'], scan['seg'])}" if (output_dir / page).is_file() else ""


def select_rows(table: GroupTable) -> pd.DataFrame:
    """Select what the page shows: the best curves, or the outliers from the largest robust z down."""
    rows = table.rows
    for column in ("best", "outlier"):
        if column in rows:
            rows = rows[is_true(rows[column])]
    if "robust_z" in rows:
        rows = rows.sort_values("robust_z", key=abs, ascending=False, kind="stable")
    return rows


def statistic_tables(statistic: Statistic, table: GroupTable) -> Iterator[PageTable]:
    """Make the page's tables of a group table, one per measure unless it says otherwise."""
    rows = select_rows(table)
    references = [*rows["reference"].unique()] if "reference" in rows else []
    caption = f"{statistic.caption}, relative to {references[0]}" if len(references) == 1 else statistic.caption
    covariates = " and ".join(", ".join(table.dictionary.get("AncovaCovariates") or ["covariates"]).rsplit(", ", 1))
    parts = [
        (f"{caption}: {describe_measure(str(measure))[0]}", part)
        for measure, part in rows.groupby("measure", sort=False)
    ]
    hidden = {key for key in _IF_SEVERAL if key not in rows or rows[key].nunique() <= 1}
    for number, (title, part) in enumerate(parts if statistic.split else [(caption, rows)]):
        anchor = part["measure"].iloc[0] if statistic.split else "table"
        part, shared_notes = _take_shared_notes(part)
        note = " ".join([statistic.note, *shared_notes] if number == 0 else shared_notes)
        columns = [
            column
            for column in statistic.columns
            if column.key in part and part[column.key].notna().any() and column.key not in hidden
        ]
        headings = [make_heading(table, column.key, column.title.format(covariates=covariates)) for column in columns]
        records = part.head(MAX_ROWS).to_dict("records")
        cells = [[_statistic_cell(record, column) for column in columns] for record in records]
        yield PageTable(f"{statistic.name}-{anchor}", title, headings, cells, len(part), file=table.file, note=note)


def _take_shared_notes(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Remove notes that all rows share, and return them as sentences."""
    sentences: list[str] = []
    for column in ("note", "ancova_note"):
        if column not in rows or not rows[column].notna().all():
            continue
        notes = [str(text).split("; ") for text in rows[column]]
        shared = [part for part in notes[0] if NOT_IDENTIFIED not in part and all(part in parts for parts in notes)]
        own = ["; ".join(part for part in parts if part not in shared) or None for parts in notes]
        rows = rows.assign(**{column: pd.Series(own, index=rows.index, dtype=object)})
        sentences += [f"All rows: {part}." for part in shared]
    return rows, list(dict.fromkeys(sentences))


def describe_measure(measure: str) -> tuple[str, str]:
    """Return the name of a measure with its unit and how it was changed, and the unit alone.

    >>> describe_measure("mean_ppm_harmonized"), describe_measure("median_ppm")
    (('mean susceptibility (ppm), harmonized over sites', 'ppm'), ('median_ppm (ppm)', 'ppm'))
    """
    variants: list[str] = []
    while ending := next((ending for ending in _VARIANTS if measure.endswith(ending)), ""):
        measure = measure.removesuffix(ending)
        variants.insert(0, _VARIANTS[ending])
    unit = STATS_COLUMNS.get(measure, {}).get("Units", "").replace("^3", "³")
    name = QUANTITIES[measure].label if measure in QUANTITIES else f"{measure} ({unit})" if unit else measure
    return ", ".join([name, *variants]), unit


def _statistic_cell(record: Mapping[Any, Any], column: _Column) -> Cell:
    """Format a value of a row, with its limits in brackets."""
    value = record[column.key]
    if column.key == "measure":
        return Cell(describe_measure(str(value))[0])
    digits, unit_digits = column.digits, _DIGITS.get(describe_measure(str(record["measure"]))[1])
    if column.extra_digits is not None and unit_digits is not None:
        digits = unit_digits + column.extra_digits
    if isinstance(value, int) and (column.limits or digits is not None):
        value = float(value)  # a measure without decimals, not a count
    cell = make_cell(value, column=column.key, digits=digits)
    if not column.limits or cell.sort is None:
        return cell
    limits = [record.get(f"{column.limits}_{end}", math.nan) for end in ("low", "high")]
    is_missing = all(map(math.isnan, limits))
    unidentified = NOT_IDENTIFIED in str(record.get("note")) and (is_missing or column.key != "plateau")
    if is_missing and not unidentified:
        return cell
    texts = [format_significant(limit) if digits is None else format_number(limit, digits) for limit in limits]
    texts = [
        ("∞" if limit > 0 else "−∞") if math.isinf(limit) else text for limit, text in zip(limits, texts, strict=True)
    ]
    interval = NOT_IDENTIFIED if unidentified else ", ".join(texts)
    return replace(cell, text=f"{cell.text} [{interval}]", title=f"{value} [{limits[0]}, {limits[1]}]")
