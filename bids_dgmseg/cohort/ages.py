"""Ages of participants.tsv and sessions.tsv in years, whatever they are written in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from bids_dgmseg.cohort.frames import DICOM_AGE, PER_YEAR, name_some, to_numbers

YEARS = "years"
_SPELLED = {
    "year": YEARS, "yr": YEARS, "yrs": YEARS, "y": YEARS, "a": YEARS, "month": "months", "mo": "months",
    "mos": "months", "mon": "months", "week": "weeks", "wk": "weeks", "wks": "weeks", "day": "days", "d": "days",
    **{unit: unit for unit in PER_YEAR},
}  # fmt: skip
_OLDEST = 130


def find_unit(description: Mapping[str, Any], column: str, *, source: str) -> tuple[str, str]:
    """Find the unit of a column of ages by its entry in the data dictionary beside the table.

    Parameters
    ----------
    description : mapping
        The entry, which may be empty; BIDS has ages in years.
    column, source : str
        Name of the column and of the dictionary, for the line.

    Returns
    -------
    unit : str
        A key of `PER_YEAR`.
    line : str
        What to tell the user; empty for years.

    Examples
    --------
    >>> find_unit({"Units": "Months"}, "age", source="participants.json")
    ('months', 'participants.json: age is in months; age_years has it in years')
    """
    text = str(description.get("Units") or "").strip()
    folded = text.casefold()
    if folded in ("", "n/a"):
        return YEARS, ""
    # a letter alone is a unit only where it stands alone
    words = [folded] if folded in _SPELLED else [word for word in re.findall("[a-z]+", folded) if len(word) > 1]
    named = {_SPELLED[word] for word in words if word in _SPELLED}
    if len(named) != 1:
        known = ", ".join(PER_YEAR)
        return YEARS, f"{source}: Units of {column} are {text!r}, none of {known}; taken as years, correct it"
    (unit,) = named
    return unit, "" if unit == YEARS else f"{source}: {column} is in {unit}; age_years has it in years"


def read_ages(people: pd.DataFrame, column: str, units: pd.Series) -> tuple[pd.Series, list[str]]:
    """Read ages in years, and a line for each that is no age.

    Parameters
    ----------
    people : DataFrame
        Text, a row a scan, with ``participant_id``.
    column : str
        The ages.
    units : Series of str
        Key of `PER_YEAR` for each row; a value with a unit of its own, as DICOM writes it (``018M``), keeps that.

    Returns
    -------
    ages : Series of float
        NaN where there is none.
    warnings : list of str
        One line each.
    """
    numbers, warnings = to_numbers(people, column)
    own = people[column].astype(str).str.strip().str.fullmatch(DICOM_AGE.pattern)
    ages = numbers / units.map(PER_YEAR).astype(float).mask(own, 1.0)
    odd = (ages < 0) | (ages > _OLDEST)
    shown = numbers.map("{:g}".format) + units.where(units != YEARS, "").map(lambda unit: f" {unit}" if unit else "")
    lines = [
        f"participants.tsv: {column} of {who} is {age}, no age in years; it counts as missing"
        for who, age in dict.fromkeys(zip(people["participant_id"][odd], shown[odd], strict=True))
    ]
    ages = ages.mask(odd)
    if n_lost := int(people["participant_id"][ages.isna()].nunique()):
        lost = list(dict.fromkeys(people["participant_id"][ages.isna()]))
        lines.append(f"participants.tsv: no age of {name_some(lost)}; {n_lost} of "
                     f"{people['participant_id'].nunique()} are left out where age matters")  # fmt: skip
    return ages, [*warnings, *lines]
