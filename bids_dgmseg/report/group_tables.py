"""Tables of the group page: nuclei, medians and statistics, with sort keys and tooltips."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.report.group_data import GroupData, GroupTable, is_true
from bids_dgmseg.report.html import NO_VALUE, QUANTITIES, format_number, format_p, format_significant
from bids_dgmseg.stats.ageing import NOT_IDENTIFIED

MAX_ROWS = 200  # of a table on the page

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
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
    classes: Sequence[str] = ()
    """Classes of each row, by which the page's filter finds it."""


class _StatisticColumn(NamedTuple):
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
    columns: Sequence[_StatisticColumn]
    note: str = ""
    split: bool = True
    """Whether each measure has its own table."""


def _plain(**titles: str) -> list[_StatisticColumn]:
    """Columns without limits and decimals, by their keys."""
    return [_StatisticColumn(key, title) for key, title in titles.items()]


STATISTICS = (
    Statistic(
        "group_ageing",
        "age",
        "Age curves, the best fit per nucleus",
        (
            *_plain(abbreviation="Nucleus", model="Model", labels="Labels", scans="Scans", curve="Curve", n="n"),
            _StatisticColumn("alpha", "α", "alpha"),
            _StatisticColumn("beta_per_year", "β (1/year)", "beta_per_year"),
            _StatisticColumn("gamma", "γ", "gamma"),
            _StatisticColumn("plateau", "Plateau α + γ", "plateau"),
            _StatisticColumn("r2", "R²", digits=2),
            _StatisticColumn("note", "Note"),
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
            _StatisticColumn("reduction", "Reduction", digits=2),
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
            _StatisticColumn("difference", "Difference", "difference", extra_digits=0),
            _StatisticColumn("hedges_g", "Hedges' g", "hedges_g", digits=2),
            *_plain(q_t="q (t)", q_mannwhitney="q (Mann-Whitney)"),
            _StatisticColumn("ancova_difference", "Adjusted for {covariates}", "ancova_difference", extra_digits=0),
            _StatisticColumn("ancova_q", "q (ANCOVA)"),
            _StatisticColumn("mean_reference", "Ref. mean", extra_digits=0),
            _StatisticColumn("mean_group", "Group mean", extra_digits=0),
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
            _StatisticColumn("change_per_year", "Change per year", "change", 1),
            *_plain(q="q", p="p", n="Participants", n_site_change="Site changes", n_scans="Scans"),
            _StatisticColumn("years_median", "Median years", digits=1),
            _StatisticColumn("difference", "Difference from the reference group", "difference", 1),
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
            _StatisticColumn("value", "Value", extra_digits=0),
            _StatisticColumn("expected", "Expected at site and age", extra_digits=0),
            _StatisticColumn("median", "Site median", extra_digits=0),
            _StatisticColumn("robust_z", "Robust z", digits=1),
            _StatisticColumn("n_site", "Site n"),
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
    """Summarize the measures of each nucleus, last of both sides together, over all scans that enter statistics."""
    rows, several = [], len(data.models) > 1
    bilateral = [data.bilateral[data.bilateral["excluded"].isna()]] if len(data.bilateral) else []
    for (model, name), group in pd.concat([data.used, *bilateral]).groupby(["model", "abbreviation"], sort=False):
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
    scans = "the scans that are not excluded" if len(data.used) < len(data.stats) else "all scans"
    caption = f"Volume and mean susceptibility χ per nucleus over {scans}"
    return PageTable("nuclei-table", caption, headings, rows, len(rows), file="group_stats.tsv")


def medians_table(values: pd.DataFrame, *, anchor: str, measure: str, levels: Sequence[str], factor: str) -> PageTable:
    """Tabulate the medians of a measure per nucleus, one column per site or group."""
    medians = values.groupby(["abbreviation", factor], sort=False)[measure].median().unstack(factor)
    counts = values.dropna(subset=[measure]).groupby(factor)["scan"].nunique()
    names = list(values["abbreviation"].unique())
    numbers = medians.reindex(index=names, columns=list(levels)).to_numpy(float)
    rows = [
        [Cell(name), *(make_cell(value, digits=QUANTITIES[measure].digits) for value in row)]
        for name, row in zip(names, numbers.tolist(), strict=True)
    ]
    headings = [Heading("Nucleus", kind="text"), *(Heading(f"{level} (n {counts.get(level, 0)})") for level in levels)]
    return PageTable(anchor, f"Medians by {factor}", headings, rows, len(rows))


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


def _statistic_cell(record: Mapping[Any, Any], column: _StatisticColumn) -> Cell:
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
