"""Statistical tables of the group page: one per measure, with its unit and decimals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.report.group_data import GroupTable, is_true
from bids_dgmseg.report.group_tables import MAX_ROWS, Cell, PageTable, make_cell, make_heading
from bids_dgmseg.report.html import QUANTITIES, format_number, format_significant
from bids_dgmseg.stats.ageing import NOT_IDENTIFIED

_DIGITS = {"ppm": 3, "mm³": 1}
_VARIANTS = {"_harmonized": "harmonized over sites", "_adjusted": "adjusted for size"}
_IF_SEVERAL = ("model", "labels", "scans", "reference")


@dataclass(frozen=True)
class _Column:
    """A column of the page: one of the table, or a value with its confidence limits."""

    key: str
    title: str
    """May hold ``{covariates}``."""
    limits: tuple[str, str] | None = None
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


def _with_limits(key: str, title: str, *, extra_digits: int | None = None, digits: int | None = None) -> _Column:
    return _Column(key, title, (f"{key}_low", f"{key}_high"), extra_digits, digits)


STATISTICS = (
    Statistic(
        "group_ageing",
        "age",
        "Age curves, the best fit per nucleus",
        (
            *_plain(abbreviation="Nucleus", model="Model", labels="Labels", scans="Scans", curve="Curve", n="n"),
            _with_limits("alpha", "α"),
            _with_limits("beta_per_year", "β (1/year)"),
            _with_limits("gamma", "γ"),
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
            _with_limits("difference", "Difference", extra_digits=0),
            _with_limits("hedges_g", "Hedges' g", digits=2),
            *_plain(q_t="q (t)", q_mannwhitney="q (Mann-Whitney)"),
            _with_limits("ancova_difference", "Adjusted for {covariates}", extra_digits=0),
            _Column("ancova_q", "q (ANCOVA)"),
            _Column("mean_reference", "Ref. mean", extra_digits=0),
            _Column("mean_group", "Group mean", extra_digits=0),
            *_plain(n_reference="Ref. n", n_group="Group n", note="Note"),
        ),
        "Difference is group minus reference group, with 95 % confidence limits in brackets; q is the p value adjusted "
        "for the number of nuclei (false discovery rate).",
    ),
    Statistic(
        "group_longitudinal",
        "change",
        "Mean change per year",
        (
            *_plain(abbreviation="Nucleus", model="Model"),
            _Column("change_per_year", "Change per year", ("change_low", "change_high"), 1),
            *_plain(q="q", p="p", n="Participants", n_scans="Scans"),
            _Column("years_median", "Median years", digits=1),
            _Column("note", "Note"),
        ),
        "Mean of the participants' slopes, with 95 % confidence limits in brackets.",
    ),
    Statistic(
        "group_outliers",
        "outliers",
        "Outliers within their site",
        (
            *_plain(scan="Scan", abbreviation="Nucleus", model="Model", measure="Measure", site="Site"),
            _Column("value", "Value", extra_digits=0),
            _Column("median", "Site median", extra_digits=0),
            _Column("robust_z", "Robust z", digits=1),
            _Column("n_site", "Site n"),
        ),
        "Robust z: distance from the site median divided by 1.4826 times the median absolute deviation.",
        split=False,
    ),
)
"""In the order of the page."""


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
    several = {key for key in _IF_SEVERAL if key in rows and rows[key].nunique() > 1}
    columns = [column for column in statistic.columns if column.key not in _IF_SEVERAL or column.key in several]
    references = [*rows["reference"].unique()] if "reference" in rows else []
    caption = f"{statistic.caption}, relative to {references[0]}" if len(references) == 1 else statistic.caption
    if not statistic.split:
        yield _make_table(statistic, table, rows, columns, anchor="table", caption=caption)
        return
    for number, (measure, part) in enumerate(rows.groupby("measure", sort=False)):
        title = f"{caption}: {name_measure(str(measure))}"
        made = _make_table(statistic, table, part, columns, anchor=str(measure), caption=title)
        yield made if number == 0 else replace(made, note=made.note.removeprefix(statistic.note).strip())


def name_measure(measure: str) -> str:
    """Return the name of a measure with its unit.

    >>> name_measure("mean_ppm_harmonized"), name_measure("median_ppm")
    ('mean susceptibility (ppm), harmonized over sites', 'median_ppm (ppm)')
    """
    base, unit, variants = _split_measure(measure)
    name = QUANTITIES[base].label if base in QUANTITIES else f"{base} ({unit})" if unit else base
    return ", ".join([name, *variants])


def _split_measure(measure: str) -> tuple[str, str, list[str]]:
    """Split a measure into the column of stats.tsv, its unit, and how it was changed."""
    variants: list[str] = []
    while ending := next((ending for ending in _VARIANTS if measure.endswith(ending)), ""):
        measure = measure.removesuffix(ending)
        variants.insert(0, _VARIANTS[ending])
    return measure, STATS_COLUMNS.get(measure, {}).get("Units", "").replace("^3", "³"), variants


def _make_table(
    statistic: Statistic,
    table: GroupTable,
    rows: pd.DataFrame,
    columns: Sequence[_Column],
    *,
    anchor: str,
    caption: str,
) -> PageTable:
    """Make one table; notes that all its rows share are moved below it."""
    note = statistic.note
    if "note" in rows and rows["note"].notna().all():
        notes = [str(text).split("; ") for text in rows["note"]]
        shared = [part for part in notes[0] if NOT_IDENTIFIED not in part and all(part in parts for parts in notes)]
        own = ["; ".join(part for part in parts if part not in shared) or None for parts in notes]
        rows = rows.assign(note=pd.Series(own, index=rows.index, dtype=object))
        note += "".join(f" All rows: {part}." for part in shared)
    columns = [column for column in columns if column.key in rows and rows[column.key].notna().any()]
    covariates = " and ".join(", ".join(table.dictionary.get("AncovaCovariates") or ["covariates"]).rsplit(", ", 1))
    headings = [make_heading(table, column.key, column.title.format(covariates=covariates)) for column in columns]
    cells = [[_make_cell(record, column) for column in columns] for record in rows.head(MAX_ROWS).to_dict("records")]
    return PageTable(f"{statistic.name}-{anchor}", caption, headings, cells, len(rows), file=table.file, note=note)


def _make_cell(record: Mapping[Any, Any], column: _Column) -> Cell:
    """Format a value of a row, with its limits in brackets."""
    value = record[column.key]
    if column.key == "measure":
        return Cell(name_measure(str(value)))
    digits, unit_digits = column.digits, _DIGITS.get(_split_measure(str(record["measure"]))[1])
    if column.extra_digits is not None and unit_digits is not None:
        digits = unit_digits + column.extra_digits
    if isinstance(value, int) and (column.limits or digits is not None):
        value = float(value)  # a measure without decimals, not a count
    cell = make_cell(value, column=column.key, digits=digits)
    if column.limits is None or cell.sort is None:
        return cell
    limits = [record.get(key, math.nan) for key in column.limits]
    if all(map(math.isnan, limits)):
        return cell
    if NOT_IDENTIFIED in str(record.get("note")):
        interval = NOT_IDENTIFIED
    else:
        interval = ", ".join(_format_limit(limit, digits) for limit in limits)
    return replace(cell, text=f"{cell.text} [{interval}]", title=f"{value} [{limits[0]}, {limits[1]}]")


def _format_limit(limit: float, digits: int | None) -> str:
    if math.isinf(limit):
        return "∞" if limit > 0 else "−∞"
    return format_significant(limit) if digits is None else format_number(limit, digits)
