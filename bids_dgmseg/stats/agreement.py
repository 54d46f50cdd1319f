"""Agreement of raters or methods: correlation, ICC, limits of agreement, tests.

Scans with missing values (NaN) are excluded. A statistic or test that the values do not allow (too few scans, no
variance) is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
"""Confidence level of all intervals."""

_ROUNDING = 1e-9
"""Tolerance for an exact bound on the wrong side of its estimate."""

_NEGLIGIBLE = 1e-24
"""A sum of squares this small relative to that of the values themselves is rounding."""


POOLED = "all"
"""Row of ``agreement.tsv`` with the values of all nuclei."""


@dataclass(frozen=True)
class Estimate:
    """An estimate with its confidence interval."""

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    """Two-sided for correlations; F test against 0 for intraclass correlations."""


@dataclass(frozen=True)
class BlandAltman:
    """Bland-Altman statistics of the differences second - first, in their unit."""

    n: int
    bias: Estimate
    """Mean difference."""
    sd: float
    """Standard deviation of the differences (n - 1)."""
    lower: Estimate
    """Lower limit of agreement."""
    upper: Estimate


@dataclass(frozen=True)
class MeanSquares:
    """Mean squares of n targets by k raters, one value each, in the terms of Shrout and Fleiss."""

    n: int
    k: int
    targets: float
    """BMS, between targets: n - 1 degrees of freedom."""
    within: float
    """WMS, within targets: n (k - 1) degrees of freedom."""
    raters: float
    """JMS, between raters: k - 1 degrees of freedom."""
    error: float
    """EMS, residual: (n - 1) (k - 1) degrees of freedom."""


def pearson(first: NDArray[np.floating], second: NDArray[np.floating]) -> Estimate:
    """Compute Pearson's correlation with Fisher's interval (for four scans or more)."""
    x, y = complete_pairs(first, second)
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return Estimate(np.nan)
    r, p = stats.pearsonr(x, y)
    return _fisher(float(r), float(p), len(x), variance=1.0)


def spearman(first: NDArray[np.floating], second: NDArray[np.floating]) -> Estimate:
    """Compute Spearman's rank correlation with the interval of Bonett and Wright [1]_ (for four scans or more).

    p is that of Student's t.

    References
    ----------
    .. [1] Bonett DG, Wright TA. Sample size requirements for estimating Pearson, Kendall and Spearman correlations.
       Psychometrika 65 (2000) 23-28. doi:10.1007/BF02294183
    """
    x, y = complete_pairs(first, second)
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return Estimate(np.nan)
    rho, p = (float(number) for number in stats.spearmanr(x, y))
    return _fisher(rho, p, len(x), variance=1 + rho**2 / 2)


def _fisher(r: float, p: float, n: int, *, variance: float) -> Estimate:
    """Interval by Fisher's z transformation; SciPy has it for Pearson's correlation only."""
    r = float(np.clip(r, -1, 1))
    if n < 4 or np.isclose(abs(r), 1, rtol=0, atol=1e-12):
        return Estimate(r, p=p)
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(variance / (n - 3))
    return Estimate(r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)), p)


def mean_squares(ratings: NDArray[np.floating]) -> MeanSquares:
    """Compute the mean squares of (targets, raters); NaN for fewer than two complete targets or two raters."""
    table = complete_rows(ratings)
    n, k = table.shape
    if n < 2 or k < 2:
        return MeanSquares(n, k, np.nan, np.nan, np.nan, np.nan)
    total = float((table**2).sum())
    centred = table - table.mean()
    by_target, by_rater = centred.mean(axis=1, keepdims=True), centred.mean(axis=0, keepdims=True)
    squares = [
        k * (by_target**2).sum(),
        ((centred - by_target) ** 2).sum(),
        n * (by_rater**2).sum(),
        ((centred - by_target - by_rater) ** 2).sum(),
    ]
    freedom = [n - 1, n * (k - 1), k - 1, (n - 1) * (k - 1)]
    exact = [0.0 if square <= _NEGLIGIBLE * total else float(square) for square in squares]
    return MeanSquares(n, k, *(square / df for square, df in zip(exact, freedom, strict=True)))


def icc(ratings: NDArray[np.floating]) -> dict[str, Estimate]:
    r"""Compute intraclass correlations of single ratings with 95 % confidence intervals.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        One row per target (scan), one column per rater; rows with NaN are excluded.

    Returns
    -------
    dict of str to Estimate
        ``icc11``: one-way random, each scan by other raters; ``icc21``: two-way random, absolute agreement of raters
        drawn from a population; ``icc31``: two-way mixed, consistency of these raters regardless of their offsets. NaN
        for fewer than two scans or no variance.

    Notes
    -----
    From the mean squares between targets B, within targets W, between raters J and of the residual E [1]_:

    .. math::

       \text{ICC}_{1,1} = \frac{B - W}{B + (k - 1) W}, \quad
       \text{ICC}_{2,1} = \frac{B - E}{B + (k - 1) E + k (J - E) / n}, \quad
       \text{ICC}_{3,1} = \frac{B - E}{B + (k - 1) E}.

    The intervals are exact for the first and third; the second is Satterthwaite's approximation [1]_ [2]_, and NaN if
    it misses an estimate below 0. Without any disagreement there is no error variance and no interval.

    References
    ----------
    .. [1] Shrout PE, Fleiss JL. Intraclass correlations: uses in assessing rater reliability. Psychol Bull 86 (1979)
       420-428. doi:10.1037/0033-2909.86.2.420
    .. [2] McGraw KO, Wong SP. Forming inferences about some intraclass correlation coefficients. Psychol Methods 1
       (1996) 30-46. doi:10.1037/1082-989X.1.1.30
    """
    ms = mean_squares(ratings)
    n, k = ms.n, ms.k
    if not ms.targets + ms.within > 0:
        return dict.fromkeys(("icc11", "icc21", "icc31"), Estimate(np.nan))
    absolute = (ms.targets - ms.within) / (ms.targets + (k - 1) * ms.within)
    consistency = Estimate(np.nan)
    if (denominator := ms.targets + (k - 1) * ms.error) > 0:
        interval = _f_interval(ms.targets, ms.error, n - 1, (n - 1) * (k - 1), k)
        consistency = Estimate((ms.targets - ms.error) / denominator, *interval)
    return {
        "icc11": Estimate(absolute, *_f_interval(ms.targets, ms.within, n - 1, n * (k - 1), k)),
        "icc21": _icc21(ms),
        "icc31": consistency,
    }


def _f_interval(above: float, below: float, df_above: int, df_below: int, k: int) -> tuple[float, float, float]:
    """Interval and p of an intraclass correlation that increases with F = above / below."""
    if below == 0:
        return np.nan, np.nan, np.nan
    ratio = above / below
    tail = (1 + CONFIDENCE) / 2
    low = ratio / stats.f.ppf(tail, df_above, df_below)
    high = ratio * stats.f.ppf(tail, df_below, df_above)
    p = float(stats.f.sf(ratio, df_above, df_below))
    return float((low - 1) / (low + k - 1)), float((high - 1) / (high + k - 1)), p


def _icc21(ms: MeanSquares) -> Estimate:
    """Absolute agreement, with Satterthwaite's interval."""
    n, k = ms.n, ms.k
    denominator = ms.targets + (k - 1) * ms.error + k * (ms.raters - ms.error) / n
    if not denominator > 0:
        return Estimate(np.nan)
    rho = (ms.targets - ms.error) / denominator
    if ms.error == 0:
        return Estimate(rho)
    ratio = ms.raters / ms.error
    first, second = k * rho * ratio, n * (1 + (k - 1) * rho) - k * rho
    p = float(stats.f.sf(ms.targets / ms.error, n - 1, (n - 1) * (k - 1)))
    if first == second == 0:  # raters with equal means who rank the targets in opposite orders
        return Estimate(rho, p=p)
    freedom = (k - 1) * (n - 1) * (first + second) ** 2 / ((n - 1) * first**2 + second**2)
    tail = (1 + CONFIDENCE) / 2
    below, above = stats.f.ppf(tail, n - 1, freedom), stats.f.ppf(tail, freedom, n - 1)
    spread = k * ms.raters + (k * n - k - n) * ms.error
    with np.errstate(over="ignore", invalid="ignore"):  # quantiles may be infinite for two scans
        low = n * (ms.targets - below * ms.error) / (below * spread + n * ms.targets)
        high = n * (above * ms.targets - ms.error) / (spread + n * above * ms.targets)
    if low > rho + _ROUNDING or high < rho - _ROUNDING:
        low = high = np.nan
    return Estimate(rho, float(low), float(high), p)


def bland_altman(first: NDArray[np.floating], second: NDArray[np.floating]) -> BlandAltman:
    r"""Compute bias and limits of agreement; NaN for fewer than two scans, except the bias of a single scan.

    With mean :math:`\bar d` and standard deviation :math:`s` of the differences second - first, the limits are
    :math:`\bar d \pm 1.96 s`, their standard error :math:`s \sqrt{1/n + 1.96^2 / (2 (n - 1))}`, that of the bias
    :math:`s / \sqrt{n}`; intervals by Student's t with :math:`n - 1` degrees of freedom [1]_.

    References
    ----------
    .. [1] Bland JM, Altman DG. Measuring agreement in method comparison studies. Stat Methods Med Res 8 (1999)
       135-160. doi:10.1177/096228029900800204
    """
    x, y = complete_pairs(first, second)
    difference = y - x
    n = len(difference)
    if n < 2:
        bias = float(difference[0]) if n else np.nan
        return BlandAltman(n, Estimate(bias), np.nan, Estimate(np.nan), Estimate(np.nan))
    bias, sd = float(difference.mean()), float(difference.std(ddof=1))
    t, z = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1), stats.norm.ppf((1 + CONFIDENCE) / 2)
    around_bias, around_limit = t * sd / np.sqrt(n), t * sd * np.sqrt(1 / n + z**2 / (2 * (n - 1)))

    def about(value: float, half: float) -> Estimate:
        return Estimate(float(value), float(value - half), float(value + half))

    return BlandAltman(
        n, about(bias, around_bias), sd, about(bias - z * sd, around_limit), about(bias + z * sd, around_limit)
    )


def proportional_bias(first: NDArray[np.floating], second: NDArray[np.floating]) -> Estimate:
    """Compute the slope of the differences second - first over the means of both; NaN without variation [1]_.

    0.1 means that a difference grows by a tenth of the value. The interval and p value are those of the least-squares
    line (Student's t with n - 2 degrees of freedom).

    References
    ----------
    .. [1] Bland JM, Altman DG. Measuring agreement in method comparison studies. Stat Methods Med Res 8 (1999)
       135-160, section 3.2. doi:10.1177/096228029900800204
    """
    x, y = complete_pairs(first, second)
    mean, difference = (x + y) / 2, y - x
    if len(x) < 3 or np.ptp(mean) == 0:
        return Estimate(np.nan)
    line = stats.linregress(mean, difference)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 2) * line.stderr
    return Estimate(float(line.slope), float(line.slope - half), float(line.slope + half), float(line.pvalue))


def complete_pairs(
    first: NDArray[np.floating], second: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the pairs without missing values, as float64; `ValueError` if the lengths differ."""
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"second has shape {y.shape}, expected {x.shape} with one axis")
    complete = np.isfinite(x) & np.isfinite(y)
    return x[complete], y[complete]


def complete_rows(ratings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the rows of (targets, raters) without missing values; `ValueError` unless there are two axes."""
    table = np.asarray(ratings, np.float64)
    if table.ndim != 2:
        raise ValueError(f"ratings have shape {table.shape}, expected (targets, raters)")
    return table[np.isfinite(table).all(axis=1)]


def is_constant(values: NDArray[np.float64]) -> bool:
    """Return whether values differ by no more than rounding.

    >>> is_constant(np.array([0.1 + 0.2, 0.3]))
    True
    """
    return bool(((values - values.mean()) ** 2).sum() <= _NEGLIGIBLE * (values**2).sum())


def agree(first: NDArray[np.floating], second: NDArray[np.floating]) -> dict[str, float]:
    """Compute all statistics of agreement of two raters on one quantity: name → value.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        Reference and prediction, one value per scan, NaN if missing.
    """
    x, y = complete_pairs(first, second)
    limits = bland_altman(x, y)
    row: dict[str, float] = {"n": len(x), "n_missing": len(first) - len(x)}
    row |= {"mean_reference": mean_or_nan(x), "mean_prediction": mean_or_nan(y)}
    row |= {"sd_reference": sd_or_nan(x), "sd_prediction": sd_or_nan(y)}
    row |= estimate_columns("pearson_r", pearson(x, y)) | estimate_columns("spearman_rho", spearman(x, y))
    for name, estimate in icc(np.column_stack([x, y])).items():
        row |= estimate_columns(name, estimate)
    for name, estimate in (("bias", limits.bias), ("loa_lower", limits.lower), ("loa_upper", limits.upper)):
        row |= {key: value for key, value in estimate_columns(name, estimate).items() if not key.endswith("_p")}
    row |= estimate_columns("proportional_bias", proportional_bias(x, y))
    return {**row, "sd_difference": limits.sd}


def estimate_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """Return an estimate as columns `name`, ``_low``, ``_high`` and ``_p``."""
    low, high, p = (f"{name}_{end}" for end in ("low", "high", "p"))
    return {name: estimate.value, low: estimate.low, high: estimate.high, p: estimate.p}


def mean_or_nan(values: NDArray[np.float64]) -> float:
    """Return the mean, NaN without values."""
    return float(values.mean()) if len(values) else np.nan


def sd_or_nan(values: NDArray[np.float64]) -> float:
    """Return the standard deviation (n - 1), NaN for fewer than two values."""
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


_DIGITS = 12
"""Significant digits of differences, so that equal differences of rounded values are ties."""


@dataclass(frozen=True)
class TestResult:
    """Statistic and two-sided p value."""

    __test__ = False  # not a test for pytest

    statistic: float
    p: float


@dataclass(frozen=True)
class RepeatedAnova:
    """Repeated-measures analysis of variance of the same scans by k raters."""

    f: float
    df: tuple[int, int]
    p: float
    epsilon: float
    """Correction of the degrees of freedom by Greenhouse and Geisser, 1 under sphericity."""
    p_greenhouse_geisser: float


_NO_TEST = TestResult(np.nan, np.nan)


def paired_t(first: NDArray[np.floating], second: NDArray[np.floating]) -> TestResult:
    """Test the mean of second - first (one value per scan, NaN if missing) against 0 by Student's t test."""
    difference = _differences(first, second)
    if len(difference) < 2 or is_constant(difference):
        return _NO_TEST
    result = stats.ttest_1samp(difference, 0)
    return TestResult(float(result.statistic), float(result.pvalue))


def wilcoxon(first: NDArray[np.floating], second: NDArray[np.floating]) -> TestResult:
    """Test second - first for symmetry about 0 by Wilcoxon's signed-rank test, without zero differences.

    The statistic is the smaller of the two rank sums. p is exact up to 50 scans without ties, otherwise by the normal
    approximation (by permutation up to 13 scans), as chosen by SciPy.
    """
    difference = _differences(first, second)
    difference = difference[difference != 0]
    if len(difference) < 1:
        return _NO_TEST
    result = stats.wilcoxon(difference)
    return TestResult(float(result.statistic), float(result.pvalue))


def _differences(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    x, y = complete_pairs(first, second)
    scale = max(np.abs(x).max(initial=0), np.abs(y).max(initial=0)) or 1.0
    return np.asarray(np.round((y - x) / scale, _DIGITS) * scale, np.float64)


def anova(ratings: NDArray[np.floating]) -> TestResult:
    """Test whether the means of raters differ by one-way analysis of variance, with raters as independent groups.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        One row per scan, one column per rater, NaN if missing; a column may have a single value.
    """
    groups = [group for group in _columns(ratings) if group.size]
    if len(groups) < 2 or all(is_constant(group) for group in groups):
        return _NO_TEST
    result = stats.f_oneway(*groups)
    return TestResult(float(result.statistic), float(result.pvalue))


def tukey(ratings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compare all pairs of raters after `anova` by Tukey's honestly significant difference.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        One row per scan, one column per rater, NaN if missing.

    Returns
    -------
    ndarray of shape (K, K)
        p values, adjusted for the number of comparisons; Tukey-Kramer for unequal groups. NaN for raters with fewer
        than two values.
    """
    groups = _columns(ratings)
    p = np.full((len(groups), len(groups)), np.nan)
    kept = [rater for rater, group in enumerate(groups) if group.size > 1]
    if len(kept) > 1 and not all(is_constant(groups[rater]) for rater in kept):
        p[np.ix_(kept, kept)] = stats.tukey_hsd(*(groups[rater] for rater in kept)).pvalue
    return p


def _columns(ratings: NDArray[np.floating]) -> list[NDArray[np.float64]]:
    """Columns without their missing values."""
    columns = [np.asarray(column, np.float64) for column in np.transpose(ratings)]
    return [column[np.isfinite(column)] for column in columns]


def repeated_anova(ratings: NDArray[np.floating]) -> RepeatedAnova:
    r"""Test whether the means of raters differ by repeated-measures analysis of variance.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        One row per scan, one column per rater; rows with NaN are excluded.

    Notes
    -----
    F is the mean square between raters divided by that of the residual. With the eigenvalues :math:`\lambda` of the
    raters' covariance matrix, centred in rows and columns, the degrees of freedom of the last p are multiplied
    by :math:`\epsilon = (\sum \lambda)^2 / ((k - 1) \sum \lambda^2)` [1]_. statsmodels does not have it.

    References
    ----------
    .. [1] Greenhouse SW, Geisser S. On methods in the analysis of profile data. Psychometrika 24 (1959) 95-112.
       doi:10.1007/BF02289823
    """
    ms = mean_squares(ratings)
    df = (ms.k - 1, (ms.n - 1) * (ms.k - 1))
    if not ms.error > 0:
        return RepeatedAnova(np.nan, df, np.nan, np.nan, np.nan)
    f = ms.raters / ms.error
    covariance = np.cov(complete_rows(ratings), rowvar=False)
    centred = covariance - covariance.mean(axis=0) - covariance.mean(axis=1, keepdims=True) + covariance.mean()
    epsilon = float(np.trace(centred) ** 2 / ((ms.k - 1) * (centred**2).sum()))
    p, p_greenhouse_geisser = (float(stats.f.sf(f, df[0] * scale, df[1] * scale)) for scale in (1.0, epsilon))
    return RepeatedAnova(f, df, p, epsilon, p_greenhouse_geisser)


def adjust_p_values(p: ArrayLike, *, method: Literal["bonferroni", "holm", "fdr"]) -> NDArray[np.float64]:
    """Adjust p values for multiple testing.

    Parameters
    ----------
    p : array_like of shape (n,)
        NaN if there was no test; these remain NaN and do not count.
    method : str
        ``bonferroni``, ``holm`` (step-down [1]_, uniformly more powerful) or ``fdr`` (false discovery rate by
        Benjamini and Hochberg [2]_).

    References
    ----------
    .. [1] Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 6 (1979) 65-70.
       https://www.jstor.org/stable/4615733
    .. [2] Benjamini Y, Hochberg Y. Controlling the false discovery rate. J R Stat Soc B 57 (1995) 289-300.
       doi:10.1111/j.2517-6161.1995.tb02031.x

    Examples
    --------
    >>> adjust_p_values([0.01, 0.04, float("nan"), 0.03], method="fdr").tolist()
    [0.03, 0.04, nan, 0.04]
    """
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.isfinite(values)
    if tested.any() and method == "fdr":
        adjusted[tested] = stats.false_discovery_control(values[tested], method="bh")
    elif tested.any():
        from statsmodels.stats.multitest import multipletests  # slow to import

        adjusted[tested] = multipletests(values[tested], method=method)[1]
    return adjusted
