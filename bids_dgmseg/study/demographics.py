"""Columns with age, sex, group and site; numbers as spelled in participants.tsv, and ages in years."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import list_some
from bids_dgmseg.stats.long_table import require_columns

AGE, SEX, GROUP, SITE = ("age",), ("sex", "gender"), ("group", "diagnosis"), ("site", "site_id")
"""Names that a column may have, in lower case."""

SEXES = {"f": "F", "female": "F", "woman": "F", "w": "F", "m": "M", "male": "M", "man": "M"}

PLAIN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

DICOM_AGE = re.compile(r"(\d{3})([YMWDymwd])")

PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": 365.25 / 7, "days": 365.25}

_PER_YEAR_BY_LETTER = {unit[0].upper(): count for unit, count in PER_YEAR.items()}

_MISSING = ("", "n/a", "na", "nan")

_CAPPED = re.compile(r"(\d+\.?\d*)\s*\+|(?:>=?|≥)\s*(\d+\.?\d*)")

_COMMA = re.compile(r"([-+]?\d+),(\d+)")

_N_SHOWN = 5

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


def parse_numbers(
    table: pd.DataFrame, column: str, *, participant: str = "participant_id"
) -> tuple[pd.Series, tuple[str, ...]]:
    """Parse a column of participants.tsv as numbers, with warnings about unusual spellings.

    Parameters
    ----------
    table : DataFrame
        One row per scan, or per scan and nucleus.
    column : str
        Numbers, or text as in participants.tsv.
    participant : str
        Column of the participants, for the warnings.

    Returns
    -------
    values : Series of float
        With the index of `table`. ``89+`` and ``>89`` are 89, ``034Y`` and ``018M`` (DICOM) 34 and 1.5 years, ``30,5``
        is 30.5; anything else that is not a number is missing.
    warnings : tuple of str
        One per such value and participant up to the fifth, and one for all others; none for ``n/a`` and empty cells.

    Raises
    ------
    InputError
        If there is no such column.

    Examples
    --------
    >>> ages = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "age": ["30", "89+", "n/a"]})
    >>> values, warnings = parse_numbers(ages, "age")
    >>> values.tolist()
    [30.0, 89.0, nan]
    >>> warnings
    ("participants.tsv: age of sub-2 is '89+', taken as 89",)
    """
    require_columns(table, column, participant)
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].astype(np.float64), ()
    texts = table[column].astype(object).where(table[column].notna(), "").astype(str).str.strip()
    parsed = {text: _parse_number(text) for text in texts.unique()}
    values = texts.map(lambda text: parsed[text][0]).astype(np.float64)
    unusual = pd.DataFrame({"who": table[participant], "text": texts})[[parsed[text][1] for text in texts]]
    unusual = unusual.drop_duplicates()
    warnings = []
    for who, text in unusual.head(_N_SHOWN).itertuples(index=False):
        value = parsed[text][0]
        taken = "not a number; it counts as missing" if np.isnan(value) else f"taken as {value:g}"
        warnings.append(f"participants.tsv: {column} of {who} is {text!r}, {taken}")
    if len(unusual) > _N_SHOWN:
        others = unusual["text"].iloc[_N_SHOWN:]
        n_missing = sum(bool(np.isnan(parsed[text][0])) for text in others)
        warnings.append(
            f"participants.tsv: {column} of {len(others)} more is not plainly a number, such as "
            f"{others.iloc[0]!r}; {n_missing} of them count as missing"
        )
    return values, tuple(warnings)


def _parse_number(text: str) -> tuple[float, bool]:
    """Value of a cell, and whether its spelling is unusual."""
    if text.casefold() in _MISSING:
        return np.nan, False
    if plain := PLAIN_NUMBER.fullmatch(text):
        return float(plain[0]), False
    if comma := _COMMA.fullmatch(text):
        return float(f"{comma[1]}.{comma[2]}"), True
    if capped := _CAPPED.fullmatch(text):
        return float(capped[1] or capped[2]), True
    if dicom := DICOM_AGE.fullmatch(text):
        return int(dicom[1]) / _PER_YEAR_BY_LETTER[dicom[2].upper()], True
    return np.nan, True


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
