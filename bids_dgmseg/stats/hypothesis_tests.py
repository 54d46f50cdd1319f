"""Tests of differences between raters or methods on the same scans, and correction for multiple testing.

Scans with missing values (NaN) are excluded. A test that the values do not allow (too few, no variance) is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bids_dgmseg.stats.agreement import complete_pairs, complete_rows, is_constant, mean_squares

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
    p_corrected: float


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
    raters' covariance matrix, centred in rows and columns, the degrees of freedom of the corrected p are multiplied
    by :math:`\epsilon = (\sum \lambda)^2 / ((k - 1) \sum \lambda^2)` [1]_. statsmodels has no such correction.

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
    p, corrected = (float(stats.f.sf(f, df[0] * scale, df[1] * scale)) for scale in (1.0, epsilon))
    return RepeatedAnova(f, df, p, epsilon, corrected)


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
    known = np.isfinite(values)
    if known.any() and method == "fdr":
        adjusted[known] = stats.false_discovery_control(values[known], method="bh")
    elif known.any():
        from statsmodels.stats.multitest import multipletests  # slow to import

        adjusted[known] = multipletests(values[known], method=method)[1]
    return adjusted
