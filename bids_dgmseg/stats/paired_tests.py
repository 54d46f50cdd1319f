"""Whether raters or methods differ: paired tests, corrections for many tests, analysis of variance.

Missing values (NaN) leave their scan out. Where the values allow no test (too few, no spread), all is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bids_dgmseg.stats.agreement import complete_pairs, complete_rows, is_constant, mean_squares

_DIGITS = 12
"""Significant digits of a difference that count, so that equal differences of rounded sums tie."""


@dataclass(frozen=True)
class Outcome:
    """Statistic and two-sided p value."""

    statistic: float
    p: float


@dataclass(frozen=True)
class RepeatedAnova:
    """Analysis of variance of the same scans under k raters."""

    f: float
    df: tuple[int, int]
    p: float
    epsilon: float
    """Greenhouse and Geisser's correction of the degrees of freedom, 1 where sphericity holds."""
    p_corrected: float


_NO_TEST = Outcome(np.nan, np.nan)


def paired_t(first: NDArray[np.floating], second: NDArray[np.floating]) -> Outcome:
    """Test the mean of second - first against 0 with Student's t.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan; NaN leaves the scan out.
    """
    difference = _differences(first, second)
    if len(difference) < 2 or is_constant(difference):
        return _NO_TEST
    result = stats.ttest_1samp(difference, 0)
    return Outcome(float(result.statistic), float(result.pvalue))


def wilcoxon(first: NDArray[np.floating], second: NDArray[np.floating]) -> Outcome:
    """Test second - first for symmetry about 0 with Wilcoxon's signed ranks; zeros are left out.

    Parameters
    ----------
    first, second : ndarray of shape (N,)
        One value a scan; NaN leaves the scan out.

    Returns
    -------
    Outcome
        The smaller of the two rank sums. p is exact up to 50 scans without ties, else by the normal approximation
        (by permutation up to 13 scans), as SciPy chooses.
    """
    difference = _differences(first, second)
    difference = difference[difference != 0]
    if len(difference) < 1:
        return _NO_TEST
    result = stats.wilcoxon(difference)
    return Outcome(float(result.statistic), float(result.pvalue))


def _differences(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    x, y = complete_pairs(first, second)
    scale = max(np.abs(x).max(initial=0), np.abs(y).max(initial=0)) or 1.0
    return np.asarray(np.round((y - x) / scale, _DIGITS) * scale, np.float64)


def adjust(p: Sequence[float] | NDArray[np.floating], *, method: Literal["bonferroni", "holm"]) -> NDArray[np.float64]:
    """Correct p values for their number.

    Parameters
    ----------
    p : sequence of float
        NaN, a test that could not be made, stays NaN and does not count.
    method : str
        ``bonferroni`` or ``holm`` (step-down [1]_, never less powerful).

    References
    ----------
    .. [1] Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 6 (1979) 65-70.
       https://www.jstor.org/stable/4615733
    """
    from statsmodels.stats.multitest import multipletests  # slow to import

    given = np.asarray(p, np.float64)
    adjusted = np.full(given.shape, np.nan)
    known = np.isfinite(given)
    if known.any():
        adjusted[known] = multipletests(given[known], method=method)[1]
    return adjusted


def anova(ratings: NDArray[np.floating]) -> Outcome:
    """Test whether the means of raters differ by one-way analysis of variance, raters as independent groups.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        A row a scan, a column a rater; NaN is left out of its column, which may hold one value.
    """
    groups = [group for group in _columns(ratings) if group.size]
    if len(groups) < 2 or all(is_constant(group) for group in groups):
        return _NO_TEST
    result = stats.f_oneway(*groups)
    return Outcome(float(result.statistic), float(result.pvalue))


def tukey(ratings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Compare every two raters after `anova` by Tukey's honestly significant difference.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        A row a scan, a column a rater; NaN is left out of its column.

    Returns
    -------
    ndarray of shape (K, K)
        p values, adjusted for the number of comparisons; with unequal groups those of Tukey and Kramer. NaN for raters
        with fewer than two values.
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
    r"""Test whether the means of raters differ, each scan its own control.

    Parameters
    ----------
    ratings : ndarray of shape (N, K)
        A row a scan, a column a rater; rows with NaN are left out.

    Notes
    -----
    F is the mean square between raters over that of the residual of scans by raters. With the raters' covariance
    matrix, centred in rows and columns, of eigenvalues :math:`\lambda`, the degrees of freedom of the corrected p are
    multiplied by :math:`\epsilon = (\sum \lambda)^2 / ((k - 1) \sum \lambda^2)` [1]_.

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
