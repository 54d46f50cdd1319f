"""Long tables (one row per scan and nucleus): columns, repeated scans, covariates as columns of a design."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]

N_QUADRATIC = 30
"""Minimum number of values for an effect of age that is not a line."""


def require_columns(table: pd.DataFrame, *columns: str) -> None:
    """Raise `InputError`, listing the columns of the table, if it lacks one of `columns`."""
    if missing := [column for column in columns if column not in table.columns]:
        present = ", ".join(map(str, table.columns)) or "none"
        raise InputError(
            f"group table: no column {', '.join(missing)} (columns: {present}); add it to participants.tsv "
            "or name the column that holds it"
        )


def numeric_column(table: pd.DataFrame, column: str) -> Floats:
    """Return a numeric column as float64, NaN where missing; `ValueError` if it contains text."""
    require_columns(table, column)
    values = table[column]
    if not pd.api.types.is_numeric_dtype(values) and values.notna().any():
        raise ValueError(f"column {column} holds {values.dtype}, expected numbers")
    return np.asarray(pd.to_numeric(values), dtype=np.float64)


def is_number(column: pd.Series) -> bool:
    """Return whether a covariate is a number; text and booleans are categories."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def iter_groups(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Iterate over the rows that share their values of `by` (column → value), in the order of the table."""
    require_columns(table, *by)
    for key, rows in table.groupby(list(by), sort=False, dropna=False, observed=True):
        yield dict(zip(by, key, strict=True)), rows


def average_repeated_scans(
    table: pd.DataFrame, *, by: Sequence[str], means: Sequence[str], same: Sequence[str]
) -> pd.DataFrame:
    """Average the scans of each participant, so that each counts once.

    Returns one row per participant and group of `by`: the columns `means`, averaged over the scans that have all of
    them (NaN if there is none), the columns `same`, which must not vary within a participant, and ``n_scans`` averaged.
    """
    require_columns(table, "participant_id", *by, *means, *same)
    for column in same:
        counts = table.groupby("participant_id")[column].nunique(dropna=True)  # missing values contradict no other scan
        if (counts > 1).any():
            name = counts.index[counts > 1][0]
            shown = ", ".join(map(str, table.loc[table["participant_id"] == name, column].dropna().unique()))
            raise InputError(f"{name}: several values of {column} ({shown}); each participant needs one value")
    complete = np.isfinite(np.column_stack([numeric_column(table, column) for column in means])).all(axis=1)
    masked = table.assign(**{column: np.where(complete, numeric_column(table, column), np.nan) for column in means})
    masked["n_scans"] = complete.astype(int)
    how: dict[str, Any] = dict.fromkeys(means, "mean") | dict.fromkeys(same, "first") | {"n_scans": "sum"}
    grouped = masked.groupby([*by, "participant_id"], sort=False, dropna=False, observed=True)
    return grouped.agg(how).reset_index()


@dataclass(frozen=True)
class Covariate:
    """Conversion of a covariate to columns of numbers, as it was in the scans of a fit."""

    name: str
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0
    """Least and largest number in the scans of the fit."""
    levels: tuple[str | bool, ...] | None = None
    """Categories, of which the first has no column; None for numbers."""

    @property
    def n_columns(self) -> int:
        """Return the number of columns."""
        return 1 if self.levels is None else max(len(self.levels) - 1, 1)

    def columns(self, values: pd.Series) -> Floats:
        """Return one row per scan, NaN where the covariate is missing or a category was not in the fit."""
        if self.levels is None:
            return (pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan) - self.mean)[:, None]
        codes = pd.Index(list(self.levels), dtype=object).get_indexer(pd.Index(values.astype(object)))
        if len(self.levels) < 2:  # constant, but a scan without it is excluded
            return np.where(codes < 0, np.nan, 0.0)[:, None]
        return np.column_stack([np.where(codes < 0, np.nan, codes == level) for level in range(1, len(self.levels))])


def fit_covariates(table: pd.DataFrame) -> tuple[Covariate, ...]:
    """Describe covariates: text and booleans are categories, numbers are centred."""
    covariates = []
    for name in map(str, table):
        if is_number(table[name]):
            numbers = table[name].dropna().to_numpy(np.float64)
            numbers = numbers if numbers.size else np.zeros(1)
            covariates.append(Covariate(name, float(numbers.mean()), float(numbers.min()), float(numbers.max())))
        else:
            levels = pd.factorize(table[name], sort=True)[1]
            covariates.append(Covariate(name, levels=tuple(levels.tolist())))
    return tuple(covariates)


def covariate_columns(covariates: Sequence[Covariate], table: pd.DataFrame) -> Floats:
    """Return the columns of all covariates, one row per scan."""
    columns = (covariate.columns(table[covariate.name]) for covariate in covariates)
    return np.hstack([np.zeros((len(table), 0)), *columns])


def covariate_matrix(table: pd.DataFrame) -> Floats:
    """Return centred numbers, and indicators of all categories but the first; NaN where missing."""
    return covariate_columns(fit_covariates(table), table)


def age_powers(age: Floats, *, n: int) -> Floats:
    """Return the columns of an effect of age without the constant: a line, from 30 values (`n`) on a quadratic."""
    return np.column_stack([age, age**2] if n >= N_QUADRATIC else [age])
