"""Access to long tables (one row per scan and nucleus): columns, groups, repeated scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]


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
