"""Outliers: values of single nuclei, and scans whose map differs in scale, zero or voxel size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import median_abs_deviation, theilslopes

from bids_dgmseg.stats.regression import Floats, age_powers, iter_groups, numeric_column, require_columns

LIMIT = 3.5
"""Absolute robust z-score above which a value, or a ratio or shift that is not negligible, is an outlier."""

N_OUTLIERS = 15
"""Minimum number of values of a site for a z-score of single values."""

N_SCANS = 5
"""Minimum number of scans of a site for a median and a spread of common changes, which also must not be small."""

N_TREND = 10
"""Minimum number of values for an effect of age."""

N_NUCLEI = 5
"""Minimum number of nuclei to estimate a common change."""

SMALLEST_RATIO, SMALLEST_SHIFT = 1.25, 0.015
"""Changes below these (ppm) are no outliers, however similar the other scans are."""

_LOWEST_RATIO = 0.01
"""Substitute for ratios that are not positive, whose logarithm does not exist."""

_ROUNDING = 1e-12


def robust_z(
    table: pd.DataFrame,
    *,
    value: str = "mean_ppm",
    by: Sequence[str] = ("abbreviation",),
    age: str | None = None,
    n_min: int = N_OUTLIERS,
) -> pd.DataFrame:
    r"""Compute robust z-scores of each value within its nucleus and site, for its age where that is known.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; measure and age are numeric, NaN where missing; rows without ``site`` form one.
    value : str
        Column of the measure.
    by : sequence of str
        Columns that define the groups with their own age effect.
    age : str, optional
        Column of the ages in years; by default there is no adjustment.
    n_min : int
        Minimum number of values of a site for z-scores; with fewer, too many healthy values are outliers.

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
    the residuals of a robust regression (Huber's M-estimator [2]_) on age, a quadratic from 30 values on, with a
    constant per site; there must be 10 values with an age.

    References
    ----------
    .. [1] Iglewicz B, Hoaglin DC. How to detect and handle outliers. ASQC Quality Press (1993).
    .. [2] Huber PJ. Robust statistics. Wiley (1981). doi:10.1002/0471725250
    """
    names = [value] if age is None else [value, age]
    plain = table.assign(**{name: numeric_column(table, name) for name in names}).reset_index(drop=True)
    result = _score(plain, value, (*by, "site"), n_min)
    result = result.assign(expected=result["median"], age_adjusted=False)
    if age is not None:
        trend = pd.Series(np.nan, plain.index)
        for _, rows in iter_groups(plain, by):
            trend[rows.index] = _age_trend(rows[value], rows[age], rows["site"])
        adjusted = _score(plain.assign(**{value: plain[value] - trend}), value, (*by, "site"), n_min)
        used = trend.notna() & (adjusted["robust_z"].notna() | result["robust_z"].isna())
        why = np.where(plain[age].isna(), "no age", "too few ages")
        note = result["note"].where(result["robust_z"].isna(), pd.Series("not adjusted for age: " + why, plain.index))
        better = adjusted.assign(expected=adjusted["median"] + trend, age_adjusted=True, median=result["median"])
        result = result.assign(note=note).where(~used, better[result.columns])
    columns = ["n_site", "median", "expected", "age_adjusted", "robust_z", "outlier", "note"]
    return result.assign(outlier=result["robust_z"].abs() > LIMIT)[columns].set_axis(table.index)


def _score(plain: pd.DataFrame, value: str, by: Sequence[str], n_min: int) -> pd.DataFrame:
    """Compute the robust z-scores of the values of each group."""
    n_site, median, z = np.zeros(len(plain), dtype=np.int64), np.full(len(plain), np.nan), np.full(len(plain), np.nan)
    note = np.full(len(plain), "", dtype=object)
    for _, rows in iter_groups(plain, by):
        index, values = rows.index.to_numpy(), rows[value].to_numpy(np.float64)
        finite = np.isfinite(values)
        n_site[index] = finite.sum()
        note[index[~finite]] = "missing"
        if not finite.any():
            continue
        median[index] = np.median(values[finite])
        spread = median_abs_deviation(values[finite], scale="normal")
        if finite.sum() < n_min:
            note[index[finite]] = f"no z: {finite.sum()} values, a site needs {n_min}"
        elif spread == 0:
            note[index[finite]] = "no z: half of the values are equal"
        else:
            z[index] = (values - median[index]) / spread
    return pd.DataFrame({"n_site": n_site, "median": median, "robust_z": z, "note": note}, index=plain.index)


def _age_trend(values: pd.Series, ages: pd.Series, sites: pd.Series) -> Floats:
    """Effect of age at each age by robust regression; NaN if it is not known or cannot be estimated."""
    from statsmodels.robust.robust_linear_model import RLM  # slow to import

    finite = (np.isfinite(values) & np.isfinite(ages)).to_numpy()
    trend = np.full(len(values), np.nan)
    if finite.sum() < N_TREND or np.ptp(ages[finite]) == 0:
        return trend
    age = ages[finite].to_numpy(np.float64)
    basis = age_powers((age - age.mean()) / age.std(), n=int(finite.sum()))
    y = values[finite].to_numpy(np.float64)
    design = np.column_stack([basis, pd.get_dummies(sites[finite].fillna("")).to_numpy(np.float64)])
    if median_abs_deviation(y - design @ np.linalg.lstsq(design, y)[0]) > _ROUNDING * np.abs(y).max():
        trend[finite] = basis @ RLM(y, design).fit().params[: basis.shape[1]]
    return trend


def common_change(values: Floats, expected: Floats, *, with_shift: bool) -> tuple[int, float, float]:
    r"""Estimate by which ratio, or by which shift of the zero, the nuclei of a scan differ from what is expected.

    Parameters
    ----------
    values, expected : ndarray of shape (n,)
        Measure of each nucleus, and what is expected of it; NaN where missing.
    with_shift : bool
        Susceptibilities have an arbitrary zero; volumes have none.

    Returns
    -------
    n_nuclei : int
        Nuclei with a value of which more than 0 is expected; others do not count.
    ratio, shift : float
        NaN with fewer than five nuclei; the shift also without `with_shift`.

    Notes
    -----
    The ratio is the median of :math:`x / \text{expected}`, the shift the slope of a line through
    :math:`x / \text{expected}` over :math:`1 / \text{expected}` (Theil and Sen's median of slopes [1]_): people
    differ in proportion to what is expected. A haemorrhage or a missed nucleus changes neither.

    References
    ----------
    .. [1] Sen PK. Estimates of the regression coefficient based on Kendall's tau. J Am Stat Assoc 63 (1968) 1379-1389.
       doi:10.1080/01621459.1968.10480934
    """
    finite = np.isfinite(values) & (expected > 0)
    n_nuclei = int(finite.sum())
    if n_nuclei < N_NUCLEI:
        return n_nuclei, np.nan, np.nan
    ratios, inverses = values[finite] / expected[finite], 1 / expected[finite]
    shift = float(theilslopes(ratios, inverses).slope) if with_shift and np.ptp(inverses) > 0 else np.nan
    return n_nuclei, float(np.median(ratios)), shift


def find_changed_scans(table: pd.DataFrame, *, value: str, by: Sequence[str], with_shift: bool) -> pd.DataFrame:
    """Compare the common change of each scan with those of the other scans of its site.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``scan``, `value`, ``expected`` (see `robust_z`), ``site`` and `by`.
    value : str
        Column of the measure.
    by : sequence of str
        Columns of a scan that are never pooled.
    with_shift : bool
        True if the zero of the measure is arbitrary, see `common_change`.

    Returns
    -------
    DataFrame
        One row per scan, ascending: ``scan``, ``n_nuclei``, ``ratio``, ``shift``, their robust z-scores ``z_ratio`` (of
        the logarithm) and ``z_shift``, ``outlier`` and ``note``.
    """
    require_columns(table, "scan", value, "expected", "site", *by)
    ordered = table.sort_values("scan", kind="stable")
    scans = ordered[["scan", "site", *by]].drop_duplicates("scan").reset_index(drop=True)
    starts = np.flatnonzero(~ordered["scan"].duplicated())[1:]
    values, expected = (np.split(ordered[name].to_numpy(np.float64), starts) for name in (value, "expected"))
    pairs = zip(values, expected, strict=True) if len(scans) else ()  # no rows would be split into one part
    changes = [common_change(*pair, with_shift=with_shift) for pair in pairs]
    scans[["n_nuclei", "ratio", "shift"]] = pd.DataFrame(changes, columns=["n_nuclei", "ratio", "shift"])
    scans["log_ratio"] = np.log(scans["ratio"].clip(lower=_LOWEST_RATIO))
    ratios, shifts = (robust_z(scans, value=name, by=by, n_min=N_SCANS) for name in ("log_ratio", "shift"))
    is_ratio = (ratios["robust_z"].abs() > LIMIT) & (scans["log_ratio"].abs() > np.log(SMALLEST_RATIO))
    is_shift = (shifts["robust_z"].abs() > LIMIT) & (scans["shift"].abs() > SMALLEST_SHIFT)
    note = ratios["note"].where(scans["n_nuclei"] >= N_NUCLEI, f"fewer than {N_NUCLEI} nuclei")
    result = scans.assign(
        z_ratio=ratios["robust_z"], z_shift=shifts["robust_z"], outlier=is_ratio | is_shift, note=note
    )
    return result[["scan", "n_nuclei", "ratio", "shift", "z_ratio", "z_shift", "outlier", "note"]]


def compare_sites(table: pd.DataFrame, *, by: Sequence[str], with_shift: bool) -> pd.DataFrame:
    """Estimate the common change of the medians of each site relative to those of the other sites.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``abbreviation``, ``median`` and ``n_site`` of `robust_z`, ``site`` and `by`.
    by, with_shift
        As in `find_changed_scans`.

    Returns
    -------
    DataFrame
        The columns `by`, ``site``, ``ratio`` and ``shift``, without sites of fewer than five values of a nucleus, and
        without a single site.
    """
    require_columns(table, "abbreviation", "median", "n_site", "site", *by)
    rows = []
    for key, part in iter_groups(table[table["n_site"] >= N_SCANS], by):
        medians = part.groupby(["site", "abbreviation"], observed=True)["median"].first().unstack()
        for name, values in medians.iterrows() if len(medians) > 1 else ():
            others = medians.drop(name).median().to_numpy(np.float64)
            _, ratio, shift = common_change(values.to_numpy(np.float64), others, with_shift=with_shift)
            rows.append({**key, "site": name, "ratio": ratio, "shift": shift})
    return pd.DataFrame(rows, columns=[*by, "site", "ratio", "shift"])
