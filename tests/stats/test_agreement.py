import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from bids_dgmseg.stats.agreement import bland_altman, icc, mean_squares, pearson, proportional_bias, spearman

SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
"""Table 2 of Shrout and Fleiss (1979): six targets, four raters."""


def test_icc_agrees_with_shrout_and_fleiss_and_r_psych():
    # Their table 3: BMS 11.24, WMS 6.26, JMS 32.49, EMS 1.02; table 4.
    ms, found = mean_squares(SHROUT_FLEISS), icc(SHROUT_FLEISS)
    assert [ms.targets, ms.within, ms.raters, ms.error] == pytest.approx([11.24, 6.26, 32.49, 1.02], abs=0.005)
    assert [round(estimate.value, 2) for estimate in found.values()] == [0.17, 0.29, 0.71]
    # psych::ICC on the same table: -.13 to .72, .02 to .76, .34 to .95; F = 1.8, 11 and 11.
    bounds = [(round(estimate.low, 2), round(estimate.high, 2)) for estimate in found.values()]
    assert bounds == [(-0.13, 0.72), (0.02, 0.76), (0.34, 0.95)]
    assert [estimate.p for estimate in found.values()] == pytest.approx([0.16, 0.00013, 0.00013], rel=0.05)


def test_icc_of_offsets_and_perfect_agreement():
    # Targets 1, 2, 3; the second rater adds 2: B = 2, W = 2, J = 6, E = 0.
    found = icc(np.array([[1, 3], [2, 4], [3, 5]]))
    assert [found[name].value for name in ("icc11", "icc21", "icc31")] == pytest.approx([0, 1 / 3, 1])
    found = icc(np.array([[0.1, 0.1], [0.7, 0.7], [0.3, 0.3]]))
    assert [estimate.value for estimate in found.values()] == [1, 1, 1]
    assert np.isnan([estimate.low for estimate in found.values()]).all()  # no disagreement, no interval


@pytest.mark.parametrize(
    "ratings",
    [np.ones((4, 2)), np.array([[1.0, 2]]), np.full((3, 2), np.nan), np.ones((4, 1))],
    ids=["no spread", "one scan", "no values", "one rater"],
)
def test_undefined_icc_is_nan(ratings):
    assert np.isnan([estimate.value for estimate in icc(ratings).values()]).all()


def test_incomplete_scans_are_excluded():
    assert icc(np.vstack([SHROUT_FLEISS, [5, np.nan, 3, 3]])) == icc(SHROUT_FLEISS)


def test_icc_intervals_have_nominal_coverage():
    # Targets and errors of variance 1, raters of variance 0.5: ICC(1,1) = ICC(2,1) = 1 / 2.5, ICC(3,1) = 1 / 2.
    rng = np.random.default_rng(1)
    truth = {"icc21": 1 / 2.5, "icc31": 1 / 2}
    held = dict.fromkeys(truth, 0)
    for _ in range(300):
        ratings = rng.normal(size=(20, 1)) + np.sqrt(0.5) * rng.normal(size=(1, 4)) + rng.normal(size=(20, 4))
        found = icc(ratings)
        for name, value in truth.items():
            held[name] += found[name].low <= value <= found[name].high
    # The standard error of a share of 0.95 in 300 is 0.013; Satterthwaite's is an approximation.
    assert held["icc31"] / 300 == pytest.approx(0.95, abs=0.03)
    assert held["icc21"] / 300 == pytest.approx(0.95, abs=0.04)


def test_limits_of_agreement_by_hand():
    # Differences 1, 2, 3: mean 2, SD 1; t = 4.3027 for 2 degrees of freedom.
    found = bland_altman(np.array([5.0, 6, 7]), np.array([6.0, 8, 10]))
    assert (found.n, found.bias.value, found.sd) == (3, 2, 1)
    assert [found.lower.value, found.upper.value] == pytest.approx([0.04, 3.96], abs=1e-4)
    assert found.bias.high - 2 == pytest.approx(4.3027 / np.sqrt(3), abs=1e-4)
    assert found.upper.high - found.upper.value == pytest.approx(4.3027 * np.sqrt(1 / 3 + 1.96**2 / 4), abs=1e-3)
    assert np.isnan(bland_altman(np.array([1.0]), np.array([2.0])).sd)
    assert np.isnan(bland_altman(np.array([]), np.array([])).bias.value)


def test_proportional_bias_by_hand():
    # Means 1, 2, 3 and differences 0, 1, 1: slope 1/2, sum of squared residuals 1/6, so a standard error of
    # sqrt(1/12) with one degree of freedom (t = 12.706); t = sqrt(3), and p = 1 - 2/pi * arctan(sqrt(3)) = 1/3.
    found = proportional_bias(np.array([1.0, 1.5, 2.5]), np.array([1.0, 2.5, 3.5]))
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(12.706 / np.sqrt(12), abs=1e-3)
    assert found.p == pytest.approx(1 / 3)
    assert np.isnan(proportional_bias(np.array([1.0, 2]), np.array([2.0, 3])).value)


def test_limits_agree_with_bland_and_altman():
    # Their blood pressures (1999, section 2): 85 subjects, mean -16.29, SD 19.61 mmHg.
    pattern = stats.zscore(np.random.default_rng(0).normal(size=85), ddof=1)
    found = bland_altman(np.zeros(85), -16.29 + 19.61 * pattern)
    assert [found.lower.value, found.upper.value] == pytest.approx([-54.7, 22.1], abs=0.06)
    # Their intervals, whose standard error has n instead of n - 1: -61.9 to -47.5 and 14.9 to 29.3.
    assert [found.lower.low, found.lower.high] == pytest.approx([-61.9, -47.5], abs=0.15)
    assert [found.upper.low, found.upper.high] == pytest.approx([14.9, 29.3], abs=0.15)


def test_pearson_has_fisher_interval():
    # r = 0.6 by construction in 28 scans: atanh 0.6 = 0.6931, half width 1.96 / 5.
    x, y = stats.zscore(np.random.default_rng(0).normal(size=(2, 28)), axis=1)
    y = stats.zscore(y - x * (x @ y) / 28)
    found = pearson(x, 0.6 * x + 0.8 * y)
    assert found.value == pytest.approx(0.6)
    assert [found.low, found.high] == pytest.approx(np.tanh([0.6931 - 0.392, 0.6931 + 0.392]), abs=1e-4)


def test_spearman_of_few_scans_is_exact():
    # Of the 24 permutations of four, only the observed one and its reverse correlate as much.
    found = spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 4, 9, 16]))
    assert (found.value, found.p) == pytest.approx((1, 2 / 24))


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=4, max_size=12))
@example([(0, -3), (-3, 0), (-3, 0), (-4, 0)])  # Satterthwaite's interval for -0.87 is -0.911 to -0.910
@example([(0, 1), (0, 1), (1, 0), (1, 0)])  # no degrees of freedom
def test_intervals_contain_their_estimates(pairs):
    x, y = np.array(pairs).T
    found = [*icc(np.column_stack([x, y])).values(), bland_altman(x, y).bias, pearson(x, y), spearman(x, y)]
    for estimate in found:
        if np.isfinite(estimate.low):
            assert estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9


@pytest.mark.parametrize("correlate", [pearson, spearman])
def test_constant_has_no_correlation(correlate):
    assert np.isnan(correlate(np.array([1.0, 2, 3]), np.array([0.3, 0.1 + 0.2, 0.3])).value)


def test_other_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"second has shape \(2,\), expected \(3,\) with one axis"):
        bland_altman(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match=r"ratings have shape \(3,\), expected \(targets, raters\)"):
        icc(np.zeros(3))
