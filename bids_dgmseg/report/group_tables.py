"""Tables of the group page: nuclei, medians and statistics, with sort keys and tooltips."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd

from bids_dgmseg.errors import list_some
from bids_dgmseg.report.group_data import GroupTable, is_true
from bids_dgmseg.report.html import NO_VALUE, format_number, format_p, format_significant, page_unit
from bids_dgmseg.stats.ageing import NOT_IDENTIFIED

MAX_ROWS = 200  # of a table on the page

_P_VALUE = re.compile(r"(.*_)?[pq](_.*)?")
_DIGITS = {"ppb": 1, "mm³": 1}
_MAX_NAMED = 8  # nuclei that a note is about
_IF_SEVERAL = ("model", "labels", "scans", "reference", "variable")


@dataclass(frozen=True)
class Cell:
    """Text of a cell with the number to sort by (None: by text, ``n/a`` last), link, colour of a rating and tooltip."""

    text: str
    sort: float | None = None
    href: str = ""
    rating: str = ""
    title: str = ""
    flag: bool = False
    """Whether it is marked."""


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
    classes: Sequence[str] = ()
    """Classes of each row, by which the page's filter finds it."""


class _StatisticColumn(NamedTuple):
    """A column of the page: one of the table, or a value with its confidence limits."""

    key: str
    title: str
    """May hold ``{covariates}`` and ``{reference}``, the reference group."""
    limits: str = ""
    """Start of the two columns with the limits."""
    extra_digits: int | None = None
    """Decimals in addition to those of the measure's unit."""
    digits: int | None = None
    """Decimals for any measure; without either, three significant digits."""
    power: int = 1
    """Power of the measure's unit in the values, if they have decimals in addition to those of the unit."""
    spread: str = ""
    """Column with the standard deviation, shown behind ±."""
    second: str = ""
    """Column whose value follows behind a slash."""


@dataclass(frozen=True)
class Statistic:
    """What the page shows of a group table."""

    name: str
    section: str
    caption: str
    columns: Sequence[_StatisticColumn]
    note: str = ""
    main: str = ""
    """Column without whose values and notes there is no table."""
    notes: Sequence[str] = ("note",)
    """Columns with notes, which stand above the table."""
    anchor: str = ""
    """Start of the identifiers of its tables, by default the name."""
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
            _StatisticColumn("alpha", "α", "alpha", power=1),
            _StatisticColumn("beta_per_year", "β (1/year)", "beta_per_year", power=0),
            _StatisticColumn("gamma", "γ", "gamma"),
            _StatisticColumn("plateau", "Plateau α + γ", "plateau"),
            _StatisticColumn("r2", "R²", digits=2, power=0),
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
            _StatisticColumn("site_variance_before", "Before", power=2),
            _StatisticColumn("site_variance_after", "After", power=2),
            _StatisticColumn("reduction", "Reduction", digits=2, power=0),
            *_plain(p_site_before="p before", p_site_after="p after"),
        ),
        "Variance of the site means adjusted for covariates, in squared units of the measure; reduction is "
        "1 − after / before.",
    ),
    Statistic(
        "group_differences",
        "groups",
        "Differences between groups adjusted for {covariates} (ANCOVA)",
        (
            *_plain(abbreviation="Nucleus", model="Model", reference="Reference group", group="Group"),
            _StatisticColumn("ancova_n_reference", "n, {reference} / group", second="ancova_n_group", power=0),
            _StatisticColumn("ancova_mean_reference", "Adjusted mean, {reference}", extra_digits=0),
            _StatisticColumn("ancova_mean_group", "Adjusted mean, group", extra_digits=0),
            _StatisticColumn("ancova_difference", "Adjusted difference", "ancova_difference", extra_digits=0),
            _StatisticColumn("ancova_hedges_g", "Standardized", "ancova_hedges_g", digits=2, power=0),
            *_plain(ancova_p="p", ancova_q="q"),
            _StatisticColumn("ancova_partial_eta2", "Partial η²", digits=2, power=0),
        ),
        "n: participants with all covariates. Adjusted means: at the means of the covariates. Difference: group minus "
        "reference group, in brackets its 95 % confidence limits; standardized by the residual standard deviation, "
        "corrected for small samples. q: p adjusted for the number of nuclei (false discovery rate). Partial η²: of "
        "all groups.",
        main="ancova_difference",
        notes=("ancova_note",),
        anchor="group_differences-adjusted",
    ),
    Statistic(
        "group_differences",
        "groups",
        "Unadjusted differences between groups",
        (
            *_plain(abbreviation="Nucleus", model="Model", reference="Reference group", group="Group"),
            _StatisticColumn("n_reference", "n, {reference} / group", second="n_group", power=0),
            _StatisticColumn("mean_reference", "Mean ± SD, {reference}", extra_digits=0, spread="std_reference"),
            _StatisticColumn("mean_group", "Mean ± SD, group", extra_digits=0, spread="std_group"),
            _StatisticColumn("difference", "Difference", "difference", extra_digits=0),
            _StatisticColumn("hedges_g", "Hedges' g", "hedges_g", digits=2, power=0),
            *_plain(p_t="p (t)", q_t="q (t)", p_mannwhitney="p (U)", q_mannwhitney="q (U)"),
        ),
        "Welch's t test and Mann-Whitney U test, regardless of age, sex and site; otherwise as above.",
        main="difference",
    ),
    Statistic(
        "group_longitudinal",
        "change",
        "Mean change per year",
        (
            *_plain(abbreviation="Nucleus", model="Model", group="Group"),
            *_plain(n="n", n_scans="Scans"),
            _StatisticColumn("years_median", "Median years", digits=1, power=0),
            _StatisticColumn("change_per_year", "Change per year", "change", 1),
            _StatisticColumn("std", "SD", extra_digits=1),
            *_plain(p="p", q="q"),
            _StatisticColumn("difference", "Difference", "difference", 1),
            *_plain(p_difference="p (diff.)", q_difference="q (diff.)", n_site_change="Site changes"),
        ),
        "Mean and SD of the participants' slopes, and its difference from that of the reference group, with 95 % "
        "confidence limits in brackets. Participants whose site changes between sessions are counted, but left out.",
    ),
    Statistic(
        "group_mixed",
        "change",
        "Change per year by mixed models",
        (
            *_plain(abbreviation="Nucleus", model="Model", group="Group", n="n", n_scans="Scans"),
            _StatisticColumn("change_per_year", "Change per year", "change", 1),
            *_plain(p="p", q="q"),
            _StatisticColumn("std_between", "SD between", extra_digits=0),
            _StatisticColumn("std_within", "SD within", extra_digits=0),
            _StatisticColumn("difference", "Difference", "difference", 1),
            *_plain(p_difference="p (diff.)", q_difference="q (diff.)"),
        ),
        "All scans, with a random intercept per participant; n includes participants with one scan. Participants with "
        "more, and further spaced, scans have more weight, unlike above.",
        main="change_per_year",
    ),
    Statistic(
        "group_correlations",
        "clinical",
        "Relation to clinical variables at equal {correlated}",
        (
            *_plain(variable="Variable", abbreviation="Nucleus", model="Model", n="n"),
            _StatisticColumn("r", "Partial r", "r", digits=2, power=0),
            _StatisticColumn("slope", "Slope per unit", "slope"),
            *_plain(p="p", q="q", mixed_n_scans="Scans"),
            _StatisticColumn("mixed_slope", "Slope (mixed)", "mixed"),
            *_plain(mixed_p="p (mixed)", mixed_q="q (mixed)"),
        ),
        "Partial correlation and slope of the regression on the variable and the covariates, with 95 % confidence "
        "limits in brackets; n: participants, whose scans are averaged. q: p adjusted for the number of nuclei (false "
        "discovery rate), per variable and measure. Mixed model: all scans, with a random intercept per participant.",
        main="r",
    ),
    Statistic(
        "group_raters",
        "raters",
        "Agreement of raters",
        (
            *_plain(rater_1="Rater", rater_2="and", nucleus="Nucleus", n="n", n_agree="Equal"),
            _StatisticColumn("agreement", "Agreement", digits=2, power=0),
            _StatisticColumn("kappa", "Cohen's κ", "kappa", digits=2, power=0),
        ),
        "Decisions (pass or fail) of both raters, with 95 % confidence limits in brackets.",
        split=False,
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
    Statistic(
        "group_scan_outliers",
        "outliers",
        "Scans that differ in all nuclei",
        (
            *_plain(scan="Scan", model="Model", measure="Measure", site="Site"),
            _StatisticColumn("ratio", "Ratio to expected", digits=2, power=0),
            _StatisticColumn("shift", "Shift of zero", extra_digits=0),
            _StatisticColumn("z_ratio", "Robust z of ratio", digits=1, power=0),
            _StatisticColumn("z_shift", "Robust z of shift", digits=1, power=0),
        ),
        "The scale or zero of the map, or the voxel size in its header, may be wrong.",
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
    references = [*rows["reference"].fillna("").unique()] if "reference" in rows else []
    is_shared = len(references) == 1 and references[0] != ""
    covariates = " and ".join(", ".join(table.dictionary.get("AncovaCovariates") or ["covariates"]).rsplit(", ", 1))
    correlated = ", ".join(table.dictionary.get("CorrelationCovariates") or ["covariates"])
    words = {
        "correlated": correlated,
        "covariates": covariates,
        "reference": references[0] if is_shared else "reference",
    }
    caption = statistic.caption.format(**words) + (f", relative to {references[0]}" if is_shared else "")
    parts = (
        []
        if not statistic.split
        else [
            (f"{caption}: {page_unit(str(measure))[0]}", part)
            for measure, part in rows.groupby("measure", sort=False)
            if not statistic.main or part.reindex(columns=[statistic.main, *statistic.notes]).notna().any(axis=None)
        ]
    )
    hidden = {key for key in _IF_SEVERAL if key not in rows or rows[key].nunique() <= 1}
    if "scans" in rows and (rows["scans"] != "all").any():  # curves of one group may not be those of the reference
        hidden.discard("scans")
    for number, (title, part) in enumerate(parts if statistic.split else [(caption, rows)]):
        anchor = part["measure"].iloc[0] if statistic.split else "table"
        columns = [
            column
            for column in statistic.columns
            if column.key in part and part[column.key].notna().any() and column.key not in hidden
        ]
        headings = [make_heading(table, column.key, column.title.format(**words)) for column in columns]
        records = part.head(MAX_ROWS).to_dict("records")
        cells = [[_statistic_cell(record, column) for column in columns] for record in records]
        yield PageTable(
            f"{statistic.anchor or statistic.name}-{anchor}",
            title,
            headings,
            cells,
            len(part),
            file=table.file,
            note=statistic.note if number == 0 else "",
            lines=list(_list_notes(part, statistic.notes)),
        )


def _list_notes(rows: pd.DataFrame, columns: Sequence[str]) -> Iterator[str]:
    """Write each note once, with the nuclei that it is about."""
    several = "group" in rows and rows["group"].nunique() > 1
    names = rows["abbreviation"].astype(str) if "abbreviation" in rows else pd.Series("", rows.index)
    if several:
        names = names + (" (" + rows["group"].astype(str) + ")").where(rows["group"].notna(), "")
    about: dict[str, list[str]] = {}
    for column in (column for column in columns if column in rows):
        for name, text in zip(names, rows[column], strict=True):
            for part in str(text).split("; ") if isinstance(text, str) else ():
                about.setdefault(part, []).append(name)
    groups = rows["group"] if several else pd.Series("", rows.index)
    whole = {f" ({group})": set(names[groups == group]) for group in groups.dropna().unique()}
    for part, found in about.items():
        who = "All rows" if len(found) == len(rows) else list_some(dict.fromkeys(found), most=_MAX_NAMED)
        if several and (all_of := [group for group, own in whole.items() if own == set(found)]):
            who = f"All nuclei{all_of[0]}"
        yield f"{who}: {part}."


def _statistic_cell(record: Mapping[Any, Any], column: _StatisticColumn) -> Cell:
    """Format a value of a row, with its limits in brackets."""
    value = record[column.key]
    _, unit, factor = page_unit(str(record.get("measure")))
    if column.key == "measure":
        return Cell(page_unit(str(value))[0])
    digits, unit_digits = column.digits, _DIGITS.get(unit)
    if column.extra_digits is not None and unit_digits is not None:
        digits = unit_digits + column.extra_digits
    is_value = column.extra_digits is not None or column.limits or column.power == 2
    scale = factor**column.power if is_value else 1.0
    if isinstance(value, int | float) and not isinstance(value, bool) and (is_value or digits is not None):
        value = float(value) * scale  # a measure without decimals, not a count
    cell = make_cell(value, column=column.key, digits=digits)
    if column.second and cell.sort is not None:
        return replace(cell, text=f"{cell.text} / {make_cell(record.get(column.second)).text}")
    if column.spread and cell.sort is not None:
        spread = make_cell(float(record.get(column.spread, math.nan)) * scale, digits=digits)
        return replace(cell, text=f"{cell.text} ± {spread.text}", title=f"{value} ± {spread.title}")
    if not column.limits or cell.sort is None:
        return cell
    limits = [float(record.get(f"{column.limits}_{end}", math.nan)) * scale for end in ("low", "high")]
    is_missing = all(map(math.isnan, limits))
    if NOT_IDENTIFIED in str(record.get("note")) and (is_missing or column.key != "plateau"):
        return Cell(NOT_IDENTIFIED)  # the estimate is as arbitrary as its limits
    if is_missing:
        return cell
    texts = [format_significant(limit) if digits is None else format_number(limit, digits) for limit in limits]
    texts = [
        ("∞" if limit > 0 else "−∞") if math.isinf(limit) else text for limit, text in zip(limits, texts, strict=True)
    ]
    return replace(cell, text=f"{cell.text} [{', '.join(texts)}]", title=f"{value} [{limits[0]}, {limits[1]}]")
