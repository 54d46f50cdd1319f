"""Columns with age, sex, group and site, and the age of each participant in years."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from bids_dgmseg.stats.long_table import DICOM_AGE, PER_YEAR, list_some, parse_numbers

AGE, SEX, GROUP, SITE = ("age",), ("sex", "gender"), ("group", "diagnosis"), ("site", "site_id")
"""Names that a column may have, in lower case."""

SEXES = {"f": "F", "female": "F", "woman": "F", "w": "F", "m": "M", "male": "M", "man": "M"}

_YEARS = "years"

_UNITS = {
    **{unit: unit for unit in PER_YEAR},
    **dict.fromkeys(("year", "yr", "yrs", "y", "a"), _YEARS),
    **dict.fromkeys(("month", "mo", "mos", "mon"), "months"),
    **dict.fromkeys(("week", "wk", "wks"), "weeks"),
    **dict.fromkeys(("day", "d"), "days"),
}

_OLDEST = 130


def find_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first column that has one of some names, in any case."""
    known = {str(column).casefold(): str(column) for column in reversed(list(columns))}
    return next((known[name] for name in names if name in known), None)


def find_age_unit(entry: Mapping[str, Any], column: str, *, source: str) -> tuple[str, str]:
    """Return the unit of a column of ages from its entry in the data dictionary.

    Parameters
    ----------
    entry : mapping
        May be empty; BIDS has ages in years.
    column, source : str
        Name of the column and of the dictionary, for the warning.

    Returns
    -------
    unit : str
        A key of `PER_YEAR`.
    warning : str
        Empty for years.

    Examples
    --------
    >>> find_age_unit({"Units": "Months"}, "age", source="participants.json")
    ('months', 'participants.json: age is in months; age_years has it in years')
    """
    text = str(entry.get("Units") or "").strip()
    folded = text.casefold()
    if folded in ("", "n/a"):
        return _YEARS, ""
    # a single letter is a unit only if nothing else is written
    words = [folded] if folded in _UNITS else [word for word in re.findall("[a-z]+", folded) if len(word) > 1]
    units = {_UNITS[word] for word in words if word in _UNITS}
    if len(units) != 1:
        return _YEARS, f"{source}: unknown Units {text!r} of {column}, assuming years; use one of {', '.join(PER_YEAR)}"
    (unit,) = units
    return unit, "" if unit == _YEARS else f"{source}: {column} is in {unit}; age_years has it in years"


def read_ages(values: pd.DataFrame, column: str, units: pd.Series) -> tuple[pd.Series, list[str]]:
    """Convert ages to years.

    Parameters
    ----------
    values : DataFrame
        Text, one row per scan, with ``participant_id``.
    column : str
        The ages.
    units : Series of str
        Key of `PER_YEAR` for each row. A value that has its own unit, as in DICOM (``018M``), keeps it.

    Returns
    -------
    ages : Series of float
        NaN where missing or impossible.
    warnings : list of str
        One line per value that is not a plain age, and one for all missing ages.
    """
    numbers, warnings = parse_numbers(values, column)
    own_unit = values[column].astype(str).str.strip().str.fullmatch(DICOM_AGE.pattern)
    ages = numbers / units.map(PER_YEAR).astype(float).mask(own_unit, 1.0)
    impossible = (ages < 0) | (ages > _OLDEST)
    shown = numbers.map("{:g}".format) + units.map(lambda unit: "" if unit == _YEARS else f" {unit}")
    participants = values["participant_id"]
    lines = [
        f"participants.tsv: {column} of {participant} is {age}, not an age in years; treated as missing"
        for participant, age in dict.fromkeys(zip(participants[impossible], shown[impossible], strict=True))
    ]
    ages = ages.mask(impossible)
    if missing := list(dict.fromkeys(participants[ages.isna()])):
        lines.append(
            f"participants.tsv: no age of {list_some(missing)}; {len(missing)} of {participants.nunique()} "
            "participants are left out of analyses with age"
        )
    return ages, [*warnings, *lines]
