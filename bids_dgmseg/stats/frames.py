"""What the statistics of a cohort share: columns, numbers, groups of rows, false discovery."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]

_MISSING = ("", "n/a", "na", "nan")

PLAIN_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_CAPPED = re.compile(r"(\d+\.?\d*)\s*\+|(?:>=?|≥)\s*(\d+\.?\d*)")

DICOM_AGE = re.compile(r"(\d{3})([YMWDymwd])")

PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": 365.25 / 7, "days": 365.25}

_PER_YEAR_BY_LETTER = {unit[0].upper(): count for unit, count in PER_YEAR.items()}

_COMMA = re.compile(r"([-+]?\d+),(\d+)")

_SHOWN = 5


def name_some(names: Sequence[str], prefix: str = "") -> str:
    """Name a few of many.

    >>> name_some(["1", "2", "3", "4", "5", "6", "7"], "sub-")
    'sub-1, sub-2, sub-3, sub-4, sub-5 and 2 more'
    """
    shown = ", ".join(prefix + name for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def need_columns(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that lacks a column.

    Raises
    ------
    InputError
        If one is missing; the message lists those there are.
    """
    if missing := [column for column in columns if column not in table.columns]:
        there = ", ".join(map(str, table.columns)) or "none"
        raise InputError(
            f"group table: no column {', '.join(missing)} (columns: {there}); add it to participants.tsv "
            "or name the column that holds it"
        )


def numbers(table: pd.DataFrame, column: str) -> Floats:
    """Values of a numeric column, NaN where missing.

    Raises
    ------
    InputError
        If there is no such column.
    ValueError
        If it holds text.
    """
    need_columns(table, column)
    values = table[column]
    if not pd.api.types.is_numeric_dtype(values) and values.notna().any():
        raise ValueError(f"column {column} holds {values.dtype}, expected numbers")
    return np.asarray(pd.to_numeric(values), dtype=np.float64)


def to_numbers(
    table: pd.DataFrame, column: str, *, participant: str = "participant_id"
) -> tuple[pd.Series, tuple[str, ...]]:
    """Read a column of participants.tsv as numbers, saying what was not plainly one.

    Parameters
    ----------
    table : DataFrame
        One row a scan, or a scan and nucleus.
    column : str
        Numbers, or text as participants.tsv holds it.
    participant : str
        Column of the participants, for the messages.

    Returns
    -------
    values : Series of float
        With the index of `table`. ``89+`` and ``>89`` are 89, ``034Y`` and ``018M`` (DICOM) 34 and 1.5 years, ``30,5``
        is 30.5; anything else that is not a number is missing.
    warnings : tuple of str
        A line for every such value, once a participant, and one for all beyond the fifth; none for ``n/a`` and
        blanks.

    Raises
    ------
    InputError
        If there is no such column.

    Examples
    --------
    >>> ages = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "age": ["30", "89+", "n/a"]})
    >>> values, warnings = to_numbers(ages, "age")
    >>> values.tolist()
    [30.0, 89.0, nan]
    >>> warnings
    ("participants.tsv: age of sub-2 is '89+', taken as 89",)
    """
    need_columns(table, column, participant)
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].astype(np.float64), ()
    texts = table[column].astype(object).where(table[column].notna(), "").astype(str).str.strip()
    known = {text: _to_number(text) for text in texts.unique()}
    values = texts.map(lambda text: known[text][0]).astype(np.float64)
    said = pd.DataFrame({"who": table[participant], "text": texts})[[known[text][1] for text in texts]]
    warnings = []
    odd = said.drop_duplicates()
    for who, text in odd.head(_SHOWN).itertuples(index=False):
        value = known[text][0]
        taken = "not a number; it counts as missing" if np.isnan(value) else f"taken as {value:g}"
        warnings.append(f"participants.tsv: {column} of {who} is {text!r}, {taken}")
    if len(odd) > _SHOWN:
        others = odd["text"].iloc[_SHOWN:]
        lost = sum(bool(np.isnan(known[text][0])) for text in others)
        warnings.append(
            f"participants.tsv: {column} of {len(others)} more is not plainly a number, such as "
            f"{others.iloc[0]!r}; {lost} of them count as missing"
        )
    return values, tuple(warnings)


def _to_number(text: str) -> tuple[float, bool]:
    """Read one value; True with it where the user should hear how it was read."""
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


def each_group(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Rows that share their values of `by`, with these values by column, in the order of the table."""
    need_columns(table, *by)
    for key, rows in table.groupby(list(by), sort=False, dropna=False, observed=True):
        yield dict(zip(by, key, strict=True)), rows


def per_participant(
    table: pd.DataFrame, *, participant: str, by: Sequence[str], means: Sequence[str], same: Sequence[str]
) -> pd.DataFrame:
    """Average repeated scans, so that a participant counts once.

    Parameters
    ----------
    table : DataFrame
        One row a scan and nucleus.
    participant : str
        Column of the participants.
    by : sequence of str
        Columns that tell nuclei (and models) apart.
    means : sequence of str
        Numeric columns to average over those of a participant's scans where `means` are all there; NaN without one.
    same : sequence of str
        Columns that must not change within a participant.

    Returns
    -------
    DataFrame
        One row a participant and group of `by`; ``n_scans`` counts the scans averaged.

    Raises
    ------
    InputError
        If a column is missing, or one of `same` changes within a participant.
    """
    need_columns(table, participant, *by, *means, *same)
    for column in same:
        # a scan without the value contradicts no other scan
        counts = table.groupby(participant)[column].nunique(dropna=True)
        if (counts > 1).any():
            name = counts.index[counts > 1][0]
            shown = ", ".join(map(str, table.loc[table[participant] == name, column].dropna().unique()))
            raise InputError(f"{name}: several values of {column} ({shown}); give a participant one")
    complete = np.isfinite(np.column_stack([numbers(table, column) for column in means])).all(axis=1)
    masked = table.assign(**{column: np.where(complete, numbers(table, column), np.nan) for column in means})
    masked["n_scans"] = complete.astype(int)
    how: dict[str, Any] = dict.fromkeys(means, "mean") | dict.fromkeys(same, "first") | {"n_scans": "sum"}
    grouped = masked.groupby([*by, participant], sort=False, dropna=False, observed=True)
    return grouped.agg(how).reset_index()


def false_discovery(p: ArrayLike) -> Floats:
    """Adjust p-values for their number (Benjamini–Hochberg); missing ones stay missing and do not count.

    Parameters
    ----------
    p : array_like of shape (n,)
        p-values, NaN where there is none.

    Returns
    -------
    ndarray of shape (n,)
        Smallest false discovery rate at which each is called.

    References
    ----------
    .. [1] Benjamini Y, Hochberg Y. Controlling the false discovery rate. J R Stat Soc B 57 (1995) 289-300.
       doi:10.1111/j.2517-6161.1995.tb02031.x

    Examples
    --------
    >>> false_discovery([0.01, 0.04, float("nan"), 0.03]).tolist()
    [0.03, 0.04, nan, 0.04]
    """
    from scipy.stats import false_discovery_control

    values = np.asarray(p, dtype=np.float64)
    there = np.isfinite(values)
    adjusted = np.full(values.shape, np.nan)
    if there.any():
        adjusted[there] = false_discovery_control(values[there], method="bh")
    return adjusted
