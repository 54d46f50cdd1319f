"""How well raters or methods agree on a quantity: correlation, intraclass correlation, limits of agreement.

Missing values (NaN) leave their scan out. What the numbers do not allow is NaN: too few scans, no spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95

_ROUNDING = 1e-9
"""By which arithmetic may put an exact bound on the wrong side of its estimate."""

_FEW = 8

_NEGLIGIBLE = 1e-24
"""A sum of squares this small beside that of the values themselves is rounding."""


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    """Two-sided for correlations; of the F test against 0 for intraclass correlations."""


@dataclass(frozen=True)
class BlandAltman:
    """Differences (second minus first) of one quantity measured twice, in its unit."""

    n: int
    bias: Estimate
    """Mean difference."""
    sd: float
    """Standard deviation of the differences (n - 1)."""
    lower: Estimate
    upper: Estimate
    """Limits of agreement."""


@dataclass(frozen=True)
class MeanSquares:
    """Analysis of variance of n targets by k raters, one value each."""

    n: int
    k: int
    targets: float
    """Between targets, n - 1 degrees of freedom (BMS of Shrout and Fleiss)."""
    within: float
    """Within targets, n (k - 1) degrees of freedom (WMS)."""
    raters: float
    """Between raters, k - 1 degrees of freedom (JMS)."""
    error: float
    """Residual, (n - 1) (k - 1) degrees of freedom (EMS)."""


def pearson(first: NDArray[np.floating], second: NDArray[np.floating]) -> Estimate:
    """Correlate linearly; the interval is Fisher's, from four scans on.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan; NaN leaves the scan out.
    """
    x, y = complete_pairs(first, second)
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return Estimate(np.nan)
    r, p = stats.pearsonr(x, y)
    return _fisher(float(r), float(p), len(x), variance=1.0)


def spearman(first: NDArray[np.floating], second: NDArray[np.floating]) -> Estimate:
    """Correlate ranks; the interval is that of Bonett and Wright [1]_, from four scans on.

    p is exact, over all permutations, up to eight scans, else by Student's t.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan; NaN leaves the scan out.

    References
    ----------
    .. [1] Bonett DG, Wright TA. Sample size requirements for estimating Pearson, Kendall and Spearman correlations.
       Psychometrika 65 (2000) 23-28. doi:10.1007/BF02294183
    """
    x, y = complete_pairs(first, second)
    if len(x) < 3 or is_constant(x) or is_constant(y):
        return Estimate(np.nan)
    rho, p = (float(number) for number in stats.spearmanr(x, y))
    if len(x) <= _FEW:
        p = _permuted(stats.rankdata(x), stats.rankdata(y))
    return _fisher(rho, p, len(x), variance=1 + rho**2 / 2)


def _permuted(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Share of the orders of y that correlate with x at least as much."""
    covariances = np.abs((y - y.mean())[_orders(len(y))] @ (x - x.mean()))
    return float(np.mean(covariances >= covariances[0] - 1e-9))  # the first order is the one observed


@cache
def _orders(n: int) -> NDArray[np.intp]:
    return np.array(list(permutations(range(n))))


def _fisher(r: float, p: float, n: int, *, variance: float) -> Estimate:
    r = float(np.clip(r, -1, 1))
    if n < 4 or np.isclose(abs(r), 1, rtol=0, atol=1e-12):
        return Estimate(r, p=p)
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(variance / (n - 3))
    return Estimate(r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half)), p)


def mean_squares(ratings: NDArray[np.floating]) -> MeanSquares:
    """Split the variance of a table of ratings.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        A row a target (scan), a column a rater; rows with NaN are left out.

    Returns
    -------
    MeanSquares
        NaN throughout with fewer than two complete targets or two raters.
    """
    table = complete_rows(ratings)
    n, k = table.shape
    if n < 2 or k < 2:
        return MeanSquares(n, k, np.nan, np.nan, np.nan, np.nan)
    size = float((table**2).sum())
    centred = table - table.mean()
    by_target, by_rater = centred.mean(axis=1, keepdims=True), centred.mean(axis=0, keepdims=True)
    squares = [
        k * (by_target**2).sum(),
        ((centred - by_target) ** 2).sum(),
        n * (by_rater**2).sum(),
        ((centred - by_target - by_rater) ** 2).sum(),
    ]
    freedom = [n - 1, n * (k - 1), k - 1, (n - 1) * (k - 1)]
    exact = [0.0 if square <= _NEGLIGIBLE * size else float(square) for square in squares]
    return MeanSquares(n, k, *(square / df for square, df in zip(exact, freedom, strict=True)))


def icc(ratings: NDArray[np.floating]) -> dict[str, Estimate]:
    r"""Intraclass correlations of single ratings, with 95 % confidence intervals.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        A row a target (scan), a column a rater; rows with NaN are left out.

    Returns
    -------
    dict of str to Estimate
        ``icc11``, each scan by other raters (one-way random); ``icc21``, the same raters, taken at random from many,
        absolute agreement (two-way random); ``icc31``, these raters only, consistency whatever their offsets (two-way
        mixed). NaN with fewer than two scans or no variance.

    Notes
    -----
    From the mean squares between targets B, within targets W, between raters J and of the residual E [1]_:

    .. math::

       \text{ICC}_{1,1} = \frac{B - W}{B + (k - 1) W}, \quad
       \text{ICC}_{2,1} = \frac{B - E}{B + (k - 1) E + k (J - E) / n}, \quad
       \text{ICC}_{3,1} = \frac{B - E}{B + (k - 1) E}.

    The intervals are exact for the first and third and Satterthwaite's approximation for the second [1]_ [2]_. An
    estimate below 0 is kept; the approximation may miss it by far then, and no interval is given. Where the raters
    agree to the last digit there is no error to make an interval from.

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
        return {name: Estimate(np.nan) for name in ("icc11", "icc21", "icc31")}
    one = (ms.targets - ms.within) / (ms.targets + (k - 1) * ms.within)
    return {
        "icc11": Estimate(one, *_f_interval(ms.targets, ms.within, n - 1, n * (k - 1), k)),
        "icc21": _icc21(ms),
        "icc31": _icc31(ms),
    }


def _icc31(ms: MeanSquares) -> Estimate:
    denominator = ms.targets + (ms.k - 1) * ms.error
    if not denominator > 0:
        return Estimate(np.nan)
    interval = _f_interval(ms.targets, ms.error, ms.n - 1, (ms.n - 1) * (ms.k - 1), ms.k)
    return Estimate((ms.targets - ms.error) / denominator, *interval)


def _f_interval(above: float, below: float, df_above: int, df_below: int, k: int) -> tuple[float, float, float]:
    """Interval and p of an intraclass correlation that grows with F = above / below."""
    if below == 0:
        return np.nan, np.nan, np.nan
    ratio = above / below
    tail = (1 + CONFIDENCE) / 2
    low = ratio / stats.f.ppf(tail, df_above, df_below)
    high = ratio * stats.f.ppf(tail, df_below, df_above)
    p = float(stats.f.sf(ratio, df_above, df_below))
    return float((low - 1) / (low + k - 1)), float((high - 1) / (high + k - 1)), p


def _icc21(ms: MeanSquares) -> Estimate:
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
    if first == second == 0:  # raters of one mean who rank targets the other way round
        return Estimate(rho, p=p)
    freedom = (k - 1) * (n - 1) * (first + second) ** 2 / ((n - 1) * first**2 + second**2)
    tail = (1 + CONFIDENCE) / 2
    below, above = stats.f.ppf(tail, n - 1, freedom), stats.f.ppf(tail, freedom, n - 1)
    spread = k * ms.raters + (k * n - k - n) * ms.error
    with np.errstate(over="ignore", invalid="ignore"):  # with two scans the quantiles may have no end: no bound
        low = n * (ms.targets - below * ms.error) / (below * spread + n * ms.targets)
        high = n * (above * ms.targets - ms.error) / (spread + n * above * ms.targets)
    if low > rho + _ROUNDING or high < rho - _ROUNDING:
        low = high = np.nan
    return Estimate(rho, float(low), float(high), p)


def bland_altman(first: NDArray[np.floating], second: NDArray[np.floating]) -> BlandAltman:
    r"""Bias and limits of agreement with 95 % confidence intervals.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan; NaN leaves the scan out.

    Returns
    -------
    BlandAltman
        NaN with fewer than two scans; the bias alone with one.

    Notes
    -----
    With the mean :math:`\bar d` and standard deviation :math:`s` of the differences second - first, the limits are
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


def complete_pairs(
    first: NDArray[np.floating], second: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep the scans that both have, as float64.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan.

    Raises
    ------
    ValueError
        If they are not of one length.
    """
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"second has shape {y.shape}, expected {x.shape} with one axis")
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def complete_rows(ratings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Keep the targets that all raters have: rows of (targets, raters) without NaN.

    Raises
    ------
    ValueError
        If `ratings` has not two axes.
    """
    table = np.asarray(ratings, np.float64)
    if table.ndim != 2:
        raise ValueError(f"ratings have shape {table.shape}, expected (targets, raters)")
    return table[np.isfinite(table).all(axis=1)]


def is_constant(values: NDArray[np.float64]) -> bool:
    """Tell whether values differ by rounding alone.

    >>> is_constant(np.array([0.1 + 0.2, 0.3]))
    True
    """
    return bool(((values - values.mean()) ** 2).sum() <= _NEGLIGIBLE * (values**2).sum())


def agree(first: NDArray[np.floating], second: NDArray[np.floating]) -> dict[str, float]:
    """Describe how two raters agree on one quantity.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        Reference and prediction, one value a scan; NaN leaves the scan out.
    """
    x, y = complete_pairs(first, second)
    limits = bland_altman(x, y)
    row = {"n": len(x), "n_missing": len(first) - len(x), "mean_reference": _mean(x), "mean_prediction": _mean(y)}
    row |= _spell("pearson_r", pearson(x, y)) | _spell("spearman_rho", spearman(x, y))
    for name, estimate in icc(np.column_stack([x, y])).items():
        row |= _spell(name, estimate)
    for name, estimate in (("bias", limits.bias), ("loa_lower", limits.lower), ("loa_upper", limits.upper)):
        row |= {key: value for key, value in _spell(name, estimate).items() if not key.endswith("_p")}
    return {**row, "sd_difference": limits.sd}


def _spell(name: str, estimate: Estimate) -> dict[str, float]:
    return {
        name: estimate.value,
        f"{name}_low": estimate.low,
        f"{name}_high": estimate.high,
        f"{name}_p": estimate.p,
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else np.nan
