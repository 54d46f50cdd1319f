"""Access to long tables (one row per scan and nucleus): columns, numbers, groups, repeated scans."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]

PLAIN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

DICOM_AGE = re.compile(r"(\d{3})([YMWDymwd])")

PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": 365.25 / 7, "days": 365.25}

_PER_YEAR_BY_LETTER = {unit[0].upper(): count for unit, count in PER_YEAR.items()}

_MISSING = ("", "n/a", "na", "nan")

_CAPPED = re.compile(r"(\d+\.?\d*)\s*\+|(?:>=?|≥)\s*(\d+\.?\d*)")

_COMMA = re.compile(r"([-+]?\d+),(\d+)")

_N_SHOWN = 5


def list_some(names: Sequence[str], prefix: str = "") -> str:
    """Format a list of names, abbreviated after the fifth.

    >>> list_some(["1", "2", "3", "4", "5", "6", "7"], "sub-")
    'sub-1, sub-2, sub-3, sub-4, sub-5 and 2 more'
    """
    shown = ", ".join(prefix + name for name in names[:_N_SHOWN])
    return shown if len(names) <= _N_SHOWN else f"{shown} and {len(names) - _N_SHOWN} more"


def require_columns(table: pd.DataFrame, *columns: str) -> None:
    """Raise `InputError`, listing the columns of the table, if it lacks one of `columns`."""
    if missing := [column for column in columns if column not in table.columns]:
        present = ", ".join(map(str, table.columns)) or "none"
        raise InputError(
            f"group table: no column {', '.join(missing)} (columns: {present}); add it to participants.tsv "
            "or name the column that holds it"
        )


def numeric_column(table: pd.DataFrame, column: str) -> Floats:
    """Return a numeric column as float64, NaN where missing.

    Raises
    ------
    InputError
        If there is no such column.
    ValueError
        If it contains text.
    """
    require_columns(table, column)
    values = table[column]
    if not pd.api.types.is_numeric_dtype(values) and values.notna().any():
        raise ValueError(f"column {column} holds {values.dtype}, expected numbers")
    return np.asarray(pd.to_numeric(values), dtype=np.float64)


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


def iter_groups(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Iterate over the rows that share their values of `by` (column → value), in the order of the table."""
    require_columns(table, *by)
    for key, rows in table.groupby(list(by), sort=False, dropna=False, observed=True):
        yield dict(zip(by, key, strict=True)), rows


def average_repeated_scans(
    table: pd.DataFrame, *, participant: str, by: Sequence[str], means: Sequence[str], same: Sequence[str]
) -> pd.DataFrame:
    """Average the scans of each participant, so that each counts once.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus.
    participant : str
        Column of the participants.
    by : sequence of str
        Columns that identify nuclei (and models).
    means : sequence of str
        Numeric columns to average over the scans of a participant that have all of them; NaN if there is none.
    same : sequence of str
        Columns that must not vary within a participant.

    Returns
    -------
    DataFrame
        One row per participant and group of `by`; ``n_scans`` counts the scans averaged.

    Raises
    ------
    InputError
        If a column is missing, or one of `same` varies within a participant.
    """
    require_columns(table, participant, *by, *means, *same)
    for column in same:
        counts = table.groupby(participant)[column].nunique(dropna=True)  # missing values contradict no other scan
        if (counts > 1).any():
            name = counts.index[counts > 1][0]
            shown = ", ".join(map(str, table.loc[table[participant] == name, column].dropna().unique()))
            raise InputError(f"{name}: several values of {column} ({shown}); each participant needs one value")
    complete = np.isfinite(np.column_stack([numeric_column(table, column) for column in means])).all(axis=1)
    masked = table.assign(**{column: np.where(complete, numeric_column(table, column), np.nan) for column in means})
    masked["n_scans"] = complete.astype(int)
    how: dict[str, Any] = dict.fromkeys(means, "mean") | dict.fromkeys(same, "first") | {"n_scans": "sum"}
    grouped = masked.groupby([*by, participant], sort=False, dropna=False, observed=True)
    return grouped.agg(how).reset_index()
