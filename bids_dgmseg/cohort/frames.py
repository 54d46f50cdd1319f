"""What the statistics of a cohort share: columns, numbers, groups of rows, false discovery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]


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
