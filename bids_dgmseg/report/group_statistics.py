"""Tables of statistics on the page of a cohort: one a measure, with its unit and its number of decimals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.report.formatting import say_number, say_short
from bids_dgmseg.report.group_data import GroupTable
from bids_dgmseg.report.group_plots import LABELS
from bids_dgmseg.report.group_tables import N_ROWS, Cell, Heading, PageTable, to_cell

UNTOLD = "not identified"
"""In the note of a curve whose parameters the ages do not tell."""

_DIGITS = {"ppm": 3, "mm³": 1}

_MADE = {"_harmonized": "harmonized over sites", "_adjusted": "adjusted for size"}

_IF_SEVERAL = ("model", "labels", "scans", "reference")


@dataclass(frozen=True)
class _Column:
    """A column of the page, made of one of the table, or of three: a value and its limits."""

    key: str
    title: str
    """May hold ``{covariates}``."""
    limits: tuple[str, str] | None = None
    more: int | None = None
    """Decimals beside those of the measure's unit."""
    digits: int | None = None
    """Decimals of any measure; where neither is given there are three digits, wherever the point is."""


@dataclass(frozen=True)
class Statistic:
    """What the page shows of a table of the group level."""

    name: str
    section: str
    caption: str
    columns: Sequence[_Column]
    note: str = ""
    split: bool = True
    """Whether measures have a table each."""


def _between(key: str, title: str, *, more: int | None = None, digits: int | None = None) -> _Column:
    return _Column(key, title, (f"{key}_low", f"{key}_high"), more, digits)


_NUCLEUS = (_Column("abbreviation", "Nucleus"), _Column("model", "Model"))

STATISTICS = (
    Statistic(
        "group_ageing",
        "age",
        "Curves over age, the best of each nucleus",
        (
            *_NUCLEUS,
            _Column("labels", "Labels"),
            _Column("scans", "Scans"),
            _Column("curve", "Curve"),
            _Column("n", "n"),
            _between("alpha", "α"),
            _between("beta_per_year", "β (1/year)"),
            _between("gamma", "γ"),
            _Column("r2", "R²", digits=2),
            _Column("note", "Note"),
        ),
        "exponential: α(1 − e^(−β·age)) + γ; linear: α·age + γ; logarithmic: α·ln(age) + γ. α and γ are in the unit of "
        "the measure, or per year of it; in brackets limits of 95 %.",
    ),
    Statistic(
        "group_site_variance",
        "sites",
        "Variance between sites before and after harmonization",
        (
            *_NUCLEUS,
            _Column("n", "n"),
            _Column("site_variance_before", "Before"),
            _Column("site_variance_after", "After"),
            _Column("reduction", "Reduction", digits=2),
            _Column("p_site_before", "p before"),
            _Column("p_site_after", "p after"),
        ),
        "Variance of the sites' means at equal covariates, in squares of the measure's unit; reduction is "
        "1 − after / before.",
    ),
    Statistic(
        "group_differences",
        "groups",
        "Differences between groups",
        (
            *_NUCLEUS,
            _Column("reference", "Reference"),
            _Column("group", "Group"),
            _between("difference", "Difference", more=0),
            _between("hedges_g", "Hedges' g", digits=2),
            _Column("q_t", "q (t)"),
            _Column("q_mannwhitney", "q (Mann-Whitney)"),
            _Column(
                "ancova_difference", "At equal {covariates}", ("ancova_difference_low", "ancova_difference_high"), 0
            ),
            _Column("ancova_q", "q (ANCOVA)"),
            _Column("mean_reference", "Mean reference", more=0),
            _Column("mean_group", "Mean group", more=0),
            _Column("n_reference", "n reference"),
            _Column("n_group", "n group"),
            _Column("note", "Note"),
        ),
        "The difference is group minus reference, in brackets limits of 95 %; q is the false discovery rate over the "
        "nuclei.",
    ),
    Statistic(
        "group_longitudinal",
        "change",
        "Change per year over the participants",
        (
            *_NUCLEUS,
            _Column("change_per_year", "Change per year", ("change_low", "change_high"), 1),
            _Column("q", "q"),
            _Column("p", "p"),
            _Column("n", "Participants"),
            _Column("n_scans", "Scans"),
            _Column("years_median", "Years, median", digits=1),
            _Column("note", "Note"),
        ),
        "Mean of the participants' slopes, in brackets limits of 95 %.",
    ),
    Statistic(
        "group_outliers",
        "outliers",
        "Values that stand out from their site",
        (
            _Column("scan", "Scan"),
            *_NUCLEUS,
            _Column("measure", "Measure"),
            _Column("site", "Site"),
            _Column("value", "Value", more=0),
            _Column("median", "Median of the site", more=0),
            _Column("robust_z", "Robust z", digits=1),
            _Column("n_site", "n of the site"),
        ),
        "Robust z: distance from the median of the site in units of 1.4826 times the median absolute deviation.",
        split=False,
    ),
)
"""In the order of the page."""


def chosen(table: GroupTable) -> pd.DataFrame:
    """Rows that the page shows of a table: of curves the best, of values the outliers, the largest first."""
    rows = table.rows
    for column in ("best", "outlier"):
        if column in rows:
            rows = rows[rows[column].astype(str).str.lower() == "true"]
    if "robust_z" in rows:
        rows = rows.sort_values("robust_z", key=abs, ascending=False, kind="stable")
    return rows


def statistic_tables(statistic: Statistic, table: GroupTable, rows: pd.DataFrame) -> Iterator[PageTable]:
    """Show rows of a table, those of a measure together.

    Parameters
    ----------
    statistic : Statistic
        One of `STATISTICS`.
    table : GroupTable
        Its dictionary and file are told.
    rows : DataFrame
        As `chosen` gives them.
    """
    several = {key for key in _IF_SEVERAL if key in rows and rows[key].nunique() > 1}
    columns = [column for column in statistic.columns if column.key not in _IF_SEVERAL or column.key in several]
    against = [*rows["reference"].unique()] if "reference" in rows else []
    caption = f"{statistic.caption}, each minus {against[0]}" if len(against) == 1 else statistic.caption
    if not statistic.split:
        yield _show(statistic, table, rows, columns, anchor="table", caption=caption)
        return
    for place, (measure, part) in enumerate(rows.groupby("measure", sort=False)):
        shown = _show(
            statistic, table, part, columns, anchor=str(measure), caption=f"{caption}: {name_measure(str(measure))}"
        )
        yield shown if place == 0 else replace(shown, note=shown.note.removeprefix(statistic.note).strip())


def name_measure(measure: str) -> str:
    """Name a measure with its unit.

    >>> name_measure("mean_ppm_harmonized"), name_measure("median_ppm")
    ('mean susceptibility (ppm), harmonized over sites', 'median_ppm (ppm)')
    """
    base, made = _base(measure)
    unit = _unit(measure)
    return ", ".join([LABELS.get(base) or (f"{base} ({unit})" if unit else base), *made])


def _base(measure: str) -> tuple[str, list[str]]:
    """Column of stats.tsv that a measure was made from, and how."""
    made: list[str] = []
    while ending := next((ending for ending in _MADE if measure.endswith(ending)), ""):
        measure = measure.removesuffix(ending)
        made.insert(0, _MADE[ending])
    return measure, made


def _unit(measure: str) -> str:
    return STATS_COLUMNS.get(_base(measure)[0], {}).get("Units", "").replace("^3", "³")


def _show(
    statistic: Statistic,
    table: GroupTable,
    rows: pd.DataFrame,
    columns: Sequence[_Column],
    *,
    anchor: str,
    caption: str,
) -> PageTable:
    rows, common = _without_common_notes(rows)
    columns = [column for column in columns if column.key in rows and rows[column.key].notna().any()]
    headings = [_heading(column, table, rows) for column in columns]
    cells = [[_cell(record, column) for column in columns] for record in rows.head(N_ROWS).to_dict("records")]
    return PageTable(
        f"{statistic.name}-{anchor}", caption, headings, cells, len(rows), file=table.file, note=statistic.note + common
    )


def _without_common_notes(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Take what the notes of all rows say out of them; it is said once, below the table."""
    if "note" not in rows or rows["note"].isna().any():
        return rows, ""
    notes = [str(note).split("; ") for note in rows["note"]]
    common = [part for part in notes[0] if UNTOLD not in part and all(part in note for note in notes)]
    left = ["; ".join(part for part in note if part not in common) or None for note in notes]
    said = "".join(f" Of all rows: {part}." for part in common)
    return rows.assign(note=pd.Series(left, index=rows.index, dtype=object)), said


def _heading(column: _Column, table: GroupTable, rows: pd.DataFrame) -> Heading:
    covariates = " and ".join(", ".join(table.dictionary.get("AncovaCovariates") or ["covariates"]).rsplit(", ", 1))
    meaning = str((table.dictionary.get(column.key) or {}).get("Description", ""))
    is_number = pd.api.types.is_numeric_dtype(rows[column.key])
    return Heading(column.title.format(covariates=covariates), meaning, kind="" if is_number else "text")


def _cell(record: Mapping[Any, Any], column: _Column) -> Cell:
    value = record[column.key]
    if column.key == "measure":
        return Cell(name_measure(str(value)))
    digits, of_unit = column.digits, _DIGITS.get(_unit(str(record["measure"])))
    if column.more is not None and of_unit is not None:
        digits = of_unit + column.more
    if isinstance(value, int) and (column.limits or digits is not None):
        value = float(value)  # a measure that happens to be whole, no count
    cell = to_cell(value, column=column.key, digits=digits)
    if column.limits is None or cell.sort is None:
        return cell
    limits = [record.get(key, math.nan) for key in column.limits]
    if all(map(math.isnan, limits)):
        return cell
    if UNTOLD in str(record.get("note")):
        within = UNTOLD
    else:
        within = ", ".join(_say_limit(limit, digits) for limit in limits)
    title = f"{value} [{limits[0]}, {limits[1]}]"
    return replace(cell, text=f"{cell.text} [{within}]", title=title)


def _say_limit(value: float, digits: int | None) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return say_short(value) if digits is None else say_number(value, digits)
