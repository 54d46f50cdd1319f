import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multicomp import pairwise_tukeyhsd

from bids_dgmseg.stats.hypothesis_tests import adjust_p_values, anova, paired_t, repeated_anova, tukey, wilcoxon


def test_paired_t_by_hand():
    # Differences 1, 2, 3: t = 2 / (1 / sqrt 3); for 2 degrees of freedom p = 1 - t / sqrt(2 + t^2).
    found = paired_t(np.array([5.0, 6, 7]), np.array([6.0, 8, 10]))
    assert found.statistic == pytest.approx(2 * np.sqrt(3))
    assert found.p == pytest.approx(1 - np.sqrt(12 / 14))


def test_wilcoxon_by_hand():
    # Differences 1, 2, 3, -4: the smaller rank sum is 4; 7 of the 16 sign patterns give 4 or less.
    found = wilcoxon(np.zeros(5), np.array([1.0, 2, 3, -4, 0]))
    assert found.statistic == 4
    assert found.p == pytest.approx(2 * 7 / 16)


def test_differences_equal_up_to_rounding_are_ties():
    # All are 0.1 except for rounding: four ties of one sign, 2 of 16 sign patterns.
    second = np.array([0.1, 0.3, 0.8, 1.1])
    first = np.array([0.0, 0.2, 0.7, 1.0])
    assert len(set(second - first)) > 1
    assert wilcoxon(first, second).p == pytest.approx(2 / 16)
    assert np.isnan(paired_t(first, second).p)


@pytest.mark.parametrize("compare", [paired_t, wilcoxon])
@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0], [np.nan, 2.0]])
def test_undefined_paired_test_is_nan(compare, values):
    assert np.isnan(compare(np.array(values), np.array(values)).p)


def test_adjusted_p_values_by_hand():
    # Holm: 3 * .01, then 2 * .03, then 1 * .04, which must not decrease.
    p = [0.01, np.nan, 0.04, 0.03]
    np.testing.assert_allclose(adjust_p_values(p, method="bonferroni"), [0.03, np.nan, 0.12, 0.09])
    np.testing.assert_allclose(adjust_p_values(p, method="holm"), [0.03, np.nan, 0.06, 0.06])
    np.testing.assert_allclose(adjust_p_values([0.04, np.nan, 0.01], method="fdr"), [0.04, np.nan, 0.02])
    assert np.isnan(adjust_p_values([np.nan], method="holm")).all()


def test_repeated_anova_of_two_is_paired_t():
    ratings = np.array([[1.0, 2], [2, 3], [3, 5]])
    found = repeated_anova(ratings)
    assert found.f == pytest.approx(16)  # differences 1, 1, 2: t = 4
    assert found.df == (1, 2)
    assert (found.p, found.epsilon) == pytest.approx((paired_t(ratings[:, 0], ratings[:, 1]).p, 1))


@given(seed=st.integers(0, 2**32 - 1))
def test_repeated_anova_agrees_with_statsmodels(seed):
    ratings = np.random.default_rng(seed).normal(size=(7, 4))
    long = pd.DataFrame(ratings).rename_axis("scan").reset_index().melt("scan", var_name="rater")
    row = AnovaRM(long, "value", "scan", within=["rater"]).fit().anova_table.iloc[0]
    found = repeated_anova(ratings)
    assert (found.f, found.p) == pytest.approx((row["F Value"], row["Pr > F"]))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 9))
def test_epsilon_agrees_with_orthonormal_contrasts(seed, n):
    # Equivalent definition by orthonormal contrasts.
    ratings = np.random.default_rng(seed).normal(size=(n, 3))
    contrasts = np.array([[1, -1, 0], [1, 1, -2]]).T / np.sqrt([2, 6])
    covariance = np.cov(ratings @ contrasts, rowvar=False)
    expected = np.trace(covariance) ** 2 / (2 * np.trace(covariance @ covariance))
    assert repeated_anova(ratings).epsilon == pytest.approx(expected)


def test_tukey_agrees_with_statsmodels():
    ratings = np.random.default_rng(0).normal((0, 1, 2), size=(8, 3))
    groups = np.repeat([0, 1, 2], 8)
    expected = pairwise_tukeyhsd(ratings.T.ravel(), groups).pvalues
    found = tukey(ratings)
    assert found[np.triu_indices(3, 1)] == pytest.approx(expected, abs=1e-4)  # statsmodels interpolates


def test_anova_by_hand():
    # Means 2, 3, 7 of 3, 3, 1 values lie 8, 1, 27 sevenths from 22 / 7: between (3 * 64 + 3 + 729) / 49 with 2 degrees
    # of freedom, within 4 with 4.
    ratings = np.array([[1.0, 2, 7], [2, 3, np.nan], [3, 4, np.nan]])
    assert anova(ratings).statistic == pytest.approx((3 * 64 + 3 + 729) / 49 / 2)


def test_rater_with_one_value_does_not_affect_tukey():
    ratings = np.random.default_rng(0).normal((0, 1, 2), size=(8, 3))
    alone = np.column_stack([ratings[:, 0], np.where(np.arange(8) == 3, 9.0, np.nan), ratings[:, 1:]])
    found = tukey(alone)
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_array_equal(found[np.ix_([0, 2, 3], [0, 2, 3])], tukey(ratings))


def test_constant_groups_are_not_compared():
    same = np.tile([1.0, 2.0], (4, 1))
    assert np.isnan(anova(same).p)
    assert np.isnan(tukey(same)).all()
    assert np.isnan(repeated_anova(same).p)
