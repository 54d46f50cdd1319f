"""Long tables (one row per scan and nucleus): columns, repeated scans, outliers, adjustment for nucleus volume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from scipy.stats import median_abs_deviation

from bids_dgmseg.errors import InputError

Floats = NDArray[np.float64]

N_OUTLIERS = 5
"""Minimum number of values of a site for a median and a spread."""

N_TREND = 10
"""Minimum number of values for an effect of age."""

N_SPLINE = 30
"""Minimum number of values for one that is not a line."""

_ROUNDING = 1e-12

N_CONTROLS = 5
"""Minimum number of participants for a slope."""

_COEFFICIENTS = (
    *("n_controls", "n_controls_missing", "n_participants", "mean_volume_controls", "covariates"),
    *("slope", "slope_low", "slope_high", "intercept", "r", "p", "note"),
)


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


def iter_groups(table: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Iterate over the rows that share their values of `by` (column → value), in the order of the table."""
    require_columns(table, *by)
    for key, rows in table.groupby(list(by), sort=False, dropna=False, observed=True):
        yield dict(zip(by, key, strict=True)), rows


def average_repeated_scans(
    table: pd.DataFrame, *, participant: str, by: Sequence[str], means: Sequence[str], same: Sequence[str]
) -> pd.DataFrame:
    """Average the scans of each participant, so that each counts once.

    Returns one row per participant and group of `by`: the columns `means`, averaged over the scans that have all of
    them (NaN if there is none), the columns `same`, which must not vary within a participant, and ``n_scans`` averaged.
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


def covariate_matrix(covariates: pd.DataFrame) -> Floats:
    """Return centred numbers, and indicators of all categories but the first; NaN where missing."""
    columns: list[Floats] = [np.zeros((len(covariates), 0))]
    for name in covariates.columns:
        column = covariates[name]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            number = column.to_numpy(np.float64, na_value=np.nan)
            columns.append((number - (np.nanmean(number) if np.isfinite(number).any() else 0))[:, None])
        else:
            codes, levels = pd.factorize(column, sort=True)
            columns += [np.where(codes < 0, np.nan, codes == level)[:, None] for level in range(1, len(levels))]
            if len(levels) < 2:  # constant, but a scan without it is excluded
                columns.append(np.where(codes < 0, np.nan, 0.0)[:, None])
    return np.hstack(columns)


def natural_spline(x: Floats, *, df: int = 3) -> Floats:
    """Return a basis of natural cubic splines without the constant, of shape (n, df), NaN where `x` is missing.

    The knots are at `df` + 1 equidistant quantiles of `x`, beyond which there is nothing to extrapolate.
    """
    knots = np.unique(np.nanquantile(x, np.linspace(0, 1, df + 1)))
    if knots.size < 3:
        return x[:, None]
    basis: Floats = CubicSpline(knots, np.eye(knots.size), bc_type="natural")(x)[:, 1:]
    return basis


def robust_z(
    table: pd.DataFrame,
    *,
    value: str = "mean_ppm",
    by: tuple[str, ...] = ("abbreviation",),
    site: str = "site",
    age: str | None = None,
    limit: float = 3.5,
) -> pd.DataFrame:
    r"""Compute robust z-scores of each value within its nucleus and site, for its age where that is known.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; measure and age are numeric, NaN where missing.
    value : str
        Column of the measure.
    by : tuple of str
        Columns that define the groups with their own age effect.
    site : str
        Column of the site; rows without form one site.
    age : str, optional
        Column of the ages in years; by default there is no adjustment.
    limit : float
        Absolute robust z-score above which a value is an outlier.

    Returns
    -------
    DataFrame
        In the order and with the index of `table`: ``n_site`` values in the group, their ``median``, the value
        ``expected`` at that site and age, whether it is ``age_adjusted``, ``robust_z``, ``outlier`` (False without a
        z-score) and ``note``, which states why there is no z-score or why it is not adjusted.

    Raises
    ------
    InputError
        If a column is missing.

    Notes
    -----
    :math:`z = (x - \text{median}) / (1.4826\,\text{MAD})`; the limit of 3.5 is that of [1]_. With ages, :math:`x` are
    the residuals of a robust regression (Huber's M-estimator [2]_) on a natural cubic spline of age, a line below 30
    values, with a constant per site; there must be 10 values with an age, 5 of them at the site.

    References
    ----------
    .. [1] Iglewicz B, Hoaglin DC. How to detect and handle outliers. ASQC Quality Press (1993).
    .. [2] Huber PJ. Robust statistics. Wiley (1981). doi:10.1002/0471725250
    """
    names = [value] if age is None else [value, age]
    plain = table.assign(**{name: numeric_column(table, name) for name in names}).reset_index(drop=True)
    result = _score(plain, value, (*by, site))
    result = result.assign(expected=result["median"], age_adjusted=False)
    if age is not None:
        trend = pd.Series(np.nan, plain.index)
        for _, rows in iter_groups(plain, by):
            trend[rows.index] = _age_trend(rows[value], rows[age], rows[site])
        adjusted = _score(plain.assign(**{value: plain[value] - trend}), value, (*by, site))
        used = adjusted["robust_z"].notna()
        why = np.where(plain[age].isna(), "no age", f"fewer than {N_TREND} ages, {N_OUTLIERS} of them at the site")
        note = result["note"].where(result["robust_z"].isna(), pd.Series("not adjusted for age: " + why, plain.index))
        better = adjusted.assign(
            note="", expected=adjusted["median"] + trend, age_adjusted=True, median=result["median"]
        )
        result = result.assign(note=note).where(~used, better[result.columns])
    columns = ["n_site", "median", "expected", "age_adjusted", "robust_z", "outlier", "note"]
    return result.assign(outlier=result["robust_z"].abs() > limit)[columns].set_axis(table.index)


def _score(plain: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Compute the robust z-scores of the values of each group."""
    n_site, median, z = np.zeros(len(plain), dtype=np.int64), np.full(len(plain), np.nan), np.full(len(plain), np.nan)
    note = np.full(len(plain), "", dtype=object)
    for _, rows in iter_groups(plain, by):
        index, values = rows.index.to_numpy(), rows[value].to_numpy(np.float64)
        known = np.isfinite(values)
        n_site[index] = known.sum()
        note[index[~known]] = "missing"
        if not known.any():
            continue
        median[index] = np.median(values[known])
        spread = median_abs_deviation(values[known], scale="normal")
        if known.sum() < N_OUTLIERS:
            note[index[known]] = f"no z: {known.sum()} values, a site needs {N_OUTLIERS}"
        elif spread == 0:
            note[index[known]] = "no z: half of the values are equal"
        else:
            z[index] = (values - median[index]) / spread
    return pd.DataFrame({"n_site": n_site, "median": median, "robust_z": z, "note": note}, index=plain.index)


def _age_trend(values: pd.Series, ages: pd.Series, sites: pd.Series) -> Floats:
    """Effect of age at each age by robust regression; NaN if it is not known or cannot be estimated."""
    from statsmodels.robust.robust_linear_model import RLM  # slow to import

    known = (np.isfinite(values) & np.isfinite(ages)).to_numpy()
    trend = np.full(len(values), np.nan)
    if known.sum() < N_TREND or np.ptp(ages[known]) == 0:
        return trend
    age = ages[known].to_numpy(np.float64)
    basis = natural_spline(age) if known.sum() >= N_SPLINE else age[:, None]
    y = values[known].to_numpy(np.float64)
    design = np.column_stack([basis, pd.get_dummies(sites[known].fillna("")).to_numpy(np.float64)])
    if median_abs_deviation(y - design @ np.linalg.lstsq(design, y)[0]) > _ROUNDING * np.abs(y).max():
        trend[known] = basis @ RLM(y, design).fit().params[: basis.shape[1]]
    return trend


@dataclass(frozen=True)
class SizeAdjustment:
    """Adjusted values and regression coefficients."""

    values: pd.Series
    """In the order and with the index of the table; NaN without measure, volume or slope."""
    coefficients: pd.DataFrame
    """One row per nucleus."""


def adjust_for_size(
    table: pd.DataFrame,
    *,
    controls: ArrayLike,
    value: str = "mean_ppm",
    volume: str = "volume_mm3",
    by: tuple[str, ...] = ("abbreviation",),
    participant: str | None = None,
    covariates: Sequence[str] = (),
) -> SizeAdjustment:
    r"""Adjust susceptibility for nucleus volume by linear regression in the controls.

    A larger fraction of the voxels of a small nucleus contains surrounding tissue, so that its mean susceptibility
    depends on its size.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; measure and volume are numeric, NaN where missing.
    controls : array_like of bool, shape (rows,)
        Which rows are of healthy controls.
    value, volume : str
        Columns of the measure and of the volume.
    by : tuple of str
        Columns that define separate regressions.
    participant : str, optional
        Column of the participants, whose scans are averaged (at each site, if that is a covariate); by default each
        row is a participant.
    covariates : sequence of str
        Columns on which measure and volume may both depend, such as site, age and sex. One is left out if it does not
        vary, is known for less than half of the controls, leaves fewer than 5 degrees of freedom or cannot be
        separated from those before it; ``note`` states why.

    Returns
    -------
    SizeAdjustment
        Adjusted values in the unit of the measure; per nucleus the ``slope`` (ppm/mm³) with 95 % limits, ``p`` (slope
        0, two-sided), the ``covariates`` used and the other coefficients: ``r`` is the partial correlation, the
        ``intercept`` is at the mean of the covariates. With fewer than 5 controls or without variation in their
        volumes, slope and adjusted values are missing and ``note`` states why.

    Raises
    ------
    InputError
        If there is no control or a column is missing.
    ValueError
        If `controls` is not one boolean per row.

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
    mask = np.asarray(controls)
    if mask.dtype != bool or mask.shape != (len(table),):
        raise ValueError(f"controls is {mask.dtype} of shape {mask.shape}, expected bool of shape ({len(table)},)")
    if not mask.any():
        raise InputError("group table: no scan of a control; check the filter of the controls")
    require_columns(table, *covariates)
    plain = table.assign(**{column: numeric_column(table, column) for column in (value, volume)}, _control=mask)
    plain = plain.reset_index(drop=True)  # the index of the table may repeat
    adjusted = np.full(len(plain), np.nan)
    records = []
    for key, rows in iter_groups(plain, by):
        used = rows[rows["_control"] & np.isfinite(rows[[value, volume]].to_numpy(np.float64)).all(axis=1)]
        fitted = used if participant is None else _average_controls(used, participant, [value, volume], covariates)
        n_participants = len(used) if participant is None else used[participant].nunique()
        record = key | {"n_controls": len(used), "n_controls_missing": int(rows["_control"].sum()) - len(used)}
        record |= {"n_participants": n_participants, "covariates": "", "note": ""}
        if n_participants < N_CONTROLS:
            record["note"] = f"not adjusted: {n_participants} controls, a slope needs {N_CONTROLS}"
        elif np.ptp(fitted[volume]) == 0:
            record["note"] = f"not adjusted: the volumes of all controls are {fitted[volume].iloc[0]:g}"
        else:
            record |= _fit_slope(fitted, value=value, volume=volume, covariates=covariates)
        record["mean_volume_controls"] = fitted[volume].mean()
        if "slope" in record:
            adjusted[rows.index] = rows[value] - record["slope"] * (rows[volume] - record["mean_volume_controls"])
        records.append(record)
    return SizeAdjustment(
        pd.Series(adjusted, index=table.index, name=f"{value}_adjusted"),
        pd.DataFrame(records, columns=[*by, *_COEFFICIENTS]),
    )


def _average_controls(
    rows: pd.DataFrame, participant: str, means: Sequence[str], covariates: Sequence[str]
) -> pd.DataFrame:
    """Average the scans of each participant that share all categories."""
    numbers = [name for name in covariates if pd.api.types.is_numeric_dtype(rows[name])]
    keys = [participant, *(name for name in covariates if name not in numbers)]
    return rows.groupby(keys, sort=False, dropna=False, observed=True)[[*means, *numbers]].mean().reset_index()


def _fit_slope(rows: pd.DataFrame, *, value: str, volume: str, covariates: Sequence[str]) -> dict[str, Any]:
    """Regress the measure on the volume and those covariates that can be used."""
    from statsmodels.regression.linear_model import OLS  # slow to import

    def design(names: list[str]) -> tuple[pd.DataFrame, Floats]:
        known = rows.dropna(subset=names)
        x = covariate_matrix(known[names])
        size = known[volume].to_numpy(np.float64)
        return known, np.column_stack([np.ones(len(x)), size - size.mean(), x - x.mean(axis=0)])

    used: list[str] = []
    reasons = []
    for name in covariates:
        if rows[name].nunique() < 2:
            continue
        known, x = design([*used, name])
        if len(known) < len(rows) / 2:
            reasons.append(f"not adjusted for {name}: {len(known)} of {len(rows)} controls have it")
        elif len(x) < x.shape[1] + N_CONTROLS:
            reasons.append(f"not adjusted for {name}: {len(x)} controls for {x.shape[1]} terms")
        elif np.linalg.matrix_rank(x) < x.shape[1]:
            reasons.append(f"not adjusted for {name}: not separable from {', '.join([*used, volume])}")
        else:
            used.append(name)
    known, x = design(used)
    fit = OLS(known[value].to_numpy(np.float64), x).fit()
    (constant, slope), (low, high), student = fit.params[:2], fit.conf_int(0.05)[1], fit.tvalues[1]
    return {
        "covariates": ", ".join(used),
        "slope": slope,
        "slope_low": low,
        "slope_high": high,
        "intercept": constant - slope * known[volume].mean(),
        "r": np.sign(slope) / np.sqrt(1 + fit.df_resid / student**2) if student else 0.0,
        "p": fit.pvalues[1],
        "note": "; ".join(reasons),
    }
