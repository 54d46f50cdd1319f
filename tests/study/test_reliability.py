"""Reliability of repeated scans, and participants of the next study, against formulas by hand and simulated studies."""

import numpy as np
import pytest
from scipy import stats

from bids_dgmseg.study.reliability import _reliability, detectable_difference, participants_needed, slope_variance


def test_reliability_by_hand():
    """Three participants, 1.0 and 1.2, 2.0 and 2.1, 3.0 and 3.3.

    The differences are 0.2, 0.1 and 0.3: their variance is 0.01, so the residual mean square is 0.005. The squares of
    the differences add up to 0.14, so the mean square within participants is 0.14 / 2 / 3. The means of the
    participants (1.1, 2.05, 3.15) have a variance of 1.0525, so the mean square between them is twice as large.
    """
    row = _reliability(np.array([[1.0, 1.2], [2.0, 2.1], [3.0, 3.3]]))
    between, residual, visits = 2 * 1.0525, 0.005, 3 * 2 * 0.1**2
    assert row["within_sd"] == pytest.approx(0.005**0.5)
    assert row["repeatability"] == pytest.approx(1.96 * 0.1)
    assert row["detectable_change"] == pytest.approx(1.96 * (0.14 / 3) ** 0.5)
    assert row["icc31"] == pytest.approx((between - residual) / (between + residual))
    assert row["icc21"] == pytest.approx((between - residual) / (between + residual + 2 * (visits - residual) / 3))
    # pingouin 0.7.0, intraclass_corr(data, targets, raters, ratings): ICC(A,1) and ICC(C,1)
    assert [row["icc21"], row["icc31"]] == pytest.approx([0.97826087, 0.99526066], abs=1e-8)
    assert [row["icc21_low"], row["icc31_low"]] == pytest.approx([0.15, 0.83], abs=0.005)


def test_participants_needed_as_in_tables():
    """Cohen 1988, table 2.4.1: 64 per group for d = .5, 26 for .8, and 17 for 1."""
    assert [np.ceil(participants_needed(d, 1.0)) for d in (0.5, 0.8, 1.0)] == [64, 26, 17]
    assert detectable_difference(64, 2.0) == pytest.approx(1.0, rel=0.01)


def test_planned_slopes_reach_their_power():
    """Simulated studies of the planned size find the difference in 80 % (within 3 SE of 800 studies)."""
    rng, n_studies, times = np.random.default_rng(3), 800, np.array([0.0, 1.0, 2.0])
    n = int(np.ceil(participants_needed(0.6, slope_variance(1.0) ** 0.5)))
    values = rng.normal(size=(n_studies, 2, n, 3)) + rng.normal(0, 5, (n_studies, 2, n, 1))
    values[:, 1] += 0.6 * times
    slopes = values @ (times - 1) / 2
    p = stats.ttest_ind(slopes[:, 0], slopes[:, 1], axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.042)
