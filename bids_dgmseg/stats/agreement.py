"""Agreement of raters or methods: correlation, intraclass correlation, limits of agreement.

Scans with missing values (NaN) are excluded. A statistic that the values do not allow (too few scans, no variance) is
NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
"""Confidence level of all intervals."""

_ROUNDING = 1e-9
"""Tolerance for an exact bound on the wrong side of its estimate."""

_N_EXACT = 8
"""Largest number of scans for p values over all permutations."""

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

    p is exact (over all permutations) up to eight scans, otherwise by Student's t.

    References
    ----------
    .. [1] Bonett DG, Wright TA. Sample size requirements for estimating Pearson, Kendall and Spearman correlations.
       Psychometrika 65 (2000) 23-28. doi:10.1007/BF02294183
    """
    x, y = complete_pairs(first, second)
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return Estimate(np.nan)
    rho, p = (float(number) for number in stats.spearmanr(x, y))
    if len(x) <= _N_EXACT:
        # SciPy's PermutationMethod doubles the smaller tail, which differs from this fraction if there are ties.
        first_ranks, second_ranks = (ranks - ranks.mean() for ranks in (stats.rankdata(x), stats.rankdata(y)))
        covariances = np.abs(second_ranks[_permutations(len(y))] @ first_ranks)
        p = float(np.mean(covariances >= covariances[0] - 1e-9))  # the first permutation is the identity
    return _fisher(rho, p, len(x), variance=1 + rho**2 / 2)


@cache
def _permutations(n: int) -> NDArray[np.intp]:
    return np.array(list(permutations(range(n))))


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
    one = (ms.targets - ms.within) / (ms.targets + (k - 1) * ms.within)
    consistency = Estimate(np.nan)
    if (denominator := ms.targets + (k - 1) * ms.error) > 0:
        interval = _f_interval(ms.targets, ms.error, n - 1, (n - 1) * (k - 1), k)
        consistency = Estimate((ms.targets - ms.error) / denominator, *interval)
    return {
        "icc11": Estimate(one, *_f_interval(ms.targets, ms.within, n - 1, n * (k - 1), k)),
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
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


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
