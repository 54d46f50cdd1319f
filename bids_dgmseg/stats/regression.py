"""Regression in long tables (one row per scan and nucleus): repeated scans, covariates, partial correlation.

The relations are those with clinical variables and with volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.agreement import CONFIDENCE, is_constant

Floats = NDArray[np.float64]

_RANK = 1e-10
"""Smallest singular value of a design, relative to the largest, that counts."""

ALONE = 1 - 1e-9
"""Leverage above which a participant is alone at a site, or otherwise the only one to determine a coefficient."""

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


def split_covariates(table: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which columns are numbers, and which are categories."""
    numbers = [name for name in names if is_number(table[name])]
    return numbers, [name for name in names if name not in numbers]


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


def leverages(design: Floats) -> Floats:
    """Return the share of each row in its own fitted value, from 0 to 1."""
    left = np.linalg.svd(design, full_matrices=False)
    return (left.U[:, left.S > _RANK * left.S.max(initial=0)] ** 2).sum(axis=1)


def robust_contrasts(
    y: Floats, design: Floats, contrasts: Floats, *, weights: Floats | None = None
) -> tuple[Floats, Floats, Floats]:
    r"""Estimate linear combinations of the coefficients of a least-squares fit, with HC3 errors.

    Parameters
    ----------
    y : ndarray of shape (n,)
    design : ndarray of shape (n, p)
        All leverages are below 1.
    contrasts : ndarray of shape (c, p)
        Combinations that the design determines.
    weights : ndarray of shape (n,), optional
        Inverse variances up to a factor; by default equal.

    Returns
    -------
    estimates, errors, df : ndarray of shape (c,)
        Estimates and standard errors, and degrees of freedom of their ratio.

    Notes
    -----
    An estimate is :math:`\sum a_i y_i`; its variance is :math:`\sum a_i^2 e_i^2/(1 - h_i)^2` with residuals :math:`e`
    and leverages :math:`h` (of values and design times the root of the weights). The degrees of freedom are
    Satterthwaite's for variances as in the weights [1]_: with the matrix :math:`B` of residuals and the diagonal matrix
    :math:`D` of :math:`a_i^2/(1 - h_i)^2`, :math:`(\mathrm{tr}\,BD)^2/\mathrm{tr}\,BDBD`. They are few where few
    participants determine the estimate, such as a small group.

    References
    ----------
    .. [1] Imbens GW, Kolesár M. Robust standard errors in small samples: some practical advice. Rev Econ Stat 98 (2016)
       701-712. doi:10.1162/REST_a_00552
    """
    roots = np.ones(len(y)) if weights is None else np.sqrt(weights)
    u, s, v = np.linalg.svd(design * roots[:, None], full_matrices=False)
    u, s, v = u[:, s > _RANK * s[0]], s[s > _RANK * s[0]], v[s > _RANK * s[0]]
    shares = (contrasts @ v.T / s) @ u.T
    values, kept = y * roots, 1 - (u**2).sum(axis=1)
    residuals = values - u @ (u.T @ values)
    squares = (shares / kept) ** 2
    cross = (u.T * squares[:, None]) @ u
    df = (squares @ kept) ** 2 / (squares**2 @ (2 * kept - 1) + (cross**2).sum(axis=(1, 2)))
    return shares @ values, np.sqrt(squares @ residuals**2), df


def interval(name: str, value: float, error: float, df: float) -> dict[str, float]:
    """Return a value with its confidence limits, by the names of their columns, and ``p``."""
    half = float(student.ppf((1 + CONFIDENCE) / 2, df)) * error
    limits = {f"{name}_low": value - half, f"{name}_high": value + half}
    return {name: value, **limits, "p": 2 * float(student.sf(abs(value) / error, df))}


_COLUMNS = "n n_missing n_scans r r_low r_high slope slope_low slope_high t df p note".split()

_VALUES = ("participant_id", "x", "value", "value_adjusted")

_EXACT = 1 - 1e-12
"""Correlations beyond it have no confidence interval."""


def correlate(
    table: pd.DataFrame,
    *,
    variable: str,
    value: str = "mean_ppm",
    by: Sequence[str] = ("abbreviation",),
    covariates: Sequence[str] = ("age", "sex", "site"),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Relate a measure to another variable at equal covariates, per nucleus.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus. Numbers are averaged over the scans of a participant (``participant_id``).
    variable, value : str
        Columns of the variable and the measure (numbers).
    by : sequence of str
        Columns that define separate regressions.
    covariates : sequence of str
        Text and booleans are categories.

    Returns
    -------
    relations : DataFrame
        One row per nucleus: the partial correlation ``r`` with its limits, the ``slope`` (unit of the measure per unit
        of the variable) with limits and t test.
    values : DataFrame
        One row per nucleus and participant: the variable ``x``, the measure ``value`` and ``value_adjusted``, the
        measure at the means of the covariates.

    Notes
    -----
    The slope is that of the least-squares regression :math:`y \sim x + Z` with HC3 errors (`robust_contrasts`): those
    whose scores vary, such as patients, may also vary more in the measure. :math:`r` is the correlation of the
    residuals of y and x on Z; its limits are those of Fisher's z with standard error :math:`1/\sqrt{n - k - 3}` for
    :math:`k` columns of Z without the intercept [1]_, times the ratio of the HC3 error to that of equal variances.
    Participants alone at their site are left out.

    References
    ----------
    .. [1] Fisher RA. The distribution of the partial correlation coefficient. Metron 3 (1924) 329-332.
    """
    names = (variable, *covariates)
    require_columns(table, *names, value, "participant_id", *by)
    numeric, same = split_covariates(table, names)
    people = average_repeated_scans(table, by=by, means=(value, *numeric), same=same)
    records, parts = [], []
    with_variable = {
        tuple(key.values()): rows.loc[rows[variable].notna(), "participant_id"].nunique()
        for key, rows in iter_groups(table, by)
    }
    for key, rows in iter_groups(people, by):
        complete = rows.dropna(subset=[value, *names])
        design = np.column_stack([np.ones(len(complete)), covariate_matrix(complete[list(names)])])
        is_alone = leverages(design) > ALONE
        complete = complete[~is_alone | is_alone.all()]  # of as many participants as terms, all are
        record, others = _regress(complete, value, variable, covariates)
        if complete.empty and covariates:
            absent = rows.dropna(subset=[value, variable])[list(covariates)].isna().sum()
            record["note"] = f"not tested: no participant with {variable} has {absent.idxmax()}"
        record["n_missing"] = with_variable[tuple(key.values())] - record["n"]
        if others is not None:
            adjusted = complete[value].to_numpy(np.float64) - others
            points = {"x": complete[variable], "value": complete[value], "value_adjusted": adjusted}
            parts.append(pd.DataFrame({"participant_id": complete["participant_id"].astype(object), **points, **key}))
        records.append(key | record)
    columns = [*by, *_VALUES]
    values = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return pd.DataFrame(records, columns=[*by, *_COLUMNS]), values


def _regress(
    rows: pd.DataFrame, value: str, variable: str, covariates: Sequence[str]
) -> tuple[dict[str, Any], Floats | None]:
    """Fit one nucleus; also return the effects of the covariates on each participant, None if it cannot be fitted."""
    x, y = (rows[name].to_numpy(np.float64) for name in (variable, value))
    record: dict[str, Any] = {"n": len(rows), "n_scans": int(rows["n_scans"].sum()), "note": ""}
    if len(rows) < 4 or is_constant(x) or is_constant(y):
        return record | {"note": f"not tested: {len(rows)} participants, or all values are the same"}, None
    others = covariate_matrix(rows[list(covariates)].reset_index(drop=True))
    scale = float(x.std())
    design = np.column_stack([(x - x.mean()) / scale, np.ones(len(x)), others])
    rank, rank_without = (int(np.linalg.matrix_rank(part)) for part in (design, design[:, 1:]))
    if rank == rank_without:
        return record | {"note": f"not tested: {variable} is determined by {' and '.join(covariates)}"}, None
    if (m := len(y) - rank) < 1:
        return record | {"note": f"not tested: {len(y)} participants for {rank} terms"}, None
    inverse = np.linalg.pinv(design)  # columns of covariates may be redundant
    coefficients = inverse @ y
    rss = float(((y - design @ coefficients) ** 2).sum())
    if not rss > 1e-24 * float((y**2).sum()):
        return record | {"note": "not tested: the covariates determine the values"}, None
    (slope,), (error,), (df,) = map(np.ndarray.tolist, robust_contrasts(y, design, np.eye(1, design.shape[1])))
    plain = math.sqrt(rss / m * float(inverse[0] @ inverse[0]))
    r = slope / math.hypot(slope, plain * math.sqrt(m))
    record |= {"r": r, "t": slope / error, "df": df} | interval("slope", slope / scale, error / scale, df)
    if abs(r) < _EXACT and (free := len(y) - (rank_without - 1) - 3) > 0:
        half = error / plain * norm.ppf((1 + CONFIDENCE) / 2) / math.sqrt(free)
        record |= {"r_low": math.tanh(math.atanh(r) - half), "r_high": math.tanh(math.atanh(r) + half)}
    return record, (others - others.mean(axis=0)) @ coefficients[2:]


def adjust_for_volume(
    table: pd.DataFrame,
    *,
    controls: np.ndarray,
    value: str = "mean_ppm",
    by: Sequence[str] = ("abbreviation",),
    covariates: Sequence[str] = (),
) -> tuple[pd.Series, pd.DataFrame]:
    r"""Adjust susceptibility for nucleus volume by the regression of `correlate` in the controls.

    A larger fraction of the voxels of a small nucleus contains surrounding tissue, so that its mean susceptibility
    depends on its size.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus.
    controls : ndarray of bool, shape (rows,)
        Rows of healthy controls.
    value, by, covariates
        As in `correlate`.

    Returns
    -------
    adjusted : Series
        In the unit of the measure and with the index of `table`; NaN without measure, volume or slope.
    coefficients : DataFrame
        One row per nucleus: the relations of `correlate` and ``mean_volume``.

    Notes
    -----
    With the slope :math:`b` of :math:`\chi` on :math:`V` and the covariates, and the mean volume :math:`\bar V`, both
    of the controls,

    .. math:: \chi_{adj} = \chi - b\,(V - \bar V)

    for all scans: our reading of the one sentence in [1]_. Unlike a slope from all scans, this is not confounded by a
    disease that shrinks the nucleus and raises its iron; the covariates do the same for age, sex and site.

    References
    ----------
    .. [1] Biswas S. Automated MRI-based mapping of dentate nucleus using advanced neural networks, on DentateSeg:
       "a linear regression-based adjustment factor derived from healthy controls".
    """
    relations, values = correlate(table[controls], variable="volume_mm3", value=value, by=by, covariates=covariates)
    means = values.groupby(list(by), observed=True, dropna=False)["x"].mean().rename("mean_volume").reset_index()
    relations = relations.merge(means, on=list(by), how="left")
    slopes = table[list(by)].merge(relations, on=list(by), how="left")
    excess = numeric_column(table, "volume_mm3") - slopes["mean_volume"].to_numpy(np.float64)
    adjusted = numeric_column(table, value) - slopes["slope"].to_numpy(np.float64) * excess
    return pd.Series(adjusted, table.index), relations
