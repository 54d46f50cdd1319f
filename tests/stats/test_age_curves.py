from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import linregress, t

from bids_dgmseg.stats.age_curves import EXPONENTIAL, LINEAR, LOGARITHMIC, bands, bootstrap, fit_curve

ALPHA, BETA, GAMMA = 0.1, 0.05, 0.02


def rise(age: Any, alpha: float, beta: float, gamma: float) -> Any:
    return alpha * (1 - np.exp(-beta * age)) + gamma


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def cohort(rng):
    """Ages and noisy susceptibilities of 80 scans."""
    age = rng.uniform(8, 85, 80)
    return age, rise(age, ALPHA, BETA, GAMMA) + rng.normal(0, 0.008, age.size)


@pytest.mark.parametrize("truth", [(0.1, 0.05, 0.02), (0.03, 0.2, 0.1), (-0.05, 0.02, 0.0), (120.0, 0.08, 20.0)])
def test_exact_curves_are_recovered(truth):
    age = np.linspace(1, 90, 30)
    fit = fit_curve(age, rise(age, *truth), curve=EXPONENTIAL)
    assert (fit.alpha, fit.beta, fit.gamma) == pytest.approx(truth, rel=1e-5, abs=1e-6)
    assert fit.r2 == pytest.approx(1)


@pytest.mark.parametrize("decimals", [-1, 9], ids=["repeated ages", "different ages"])
def test_exponential_fit_agrees_with_scipy(cohort, decimals):
    age, chi = np.round(cohort[0], decimals), cohort[1]
    theirs, _ = curve_fit(rise, age, chi, p0=[0.1, 0.03, 0.0])
    fit = fit_curve(age, chi, curve=EXPONENTIAL)
    assert (fit.alpha, fit.beta, fit.gamma) == pytest.approx(tuple(theirs), rel=1e-4)
    assert fit.n == 80
    assert fit.rss == pytest.approx(((chi - rise(age, *theirs)) ** 2).sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_profile_limits_match_independent_refits(cohort, name):
    """Independent refits of the other two parameters; F(1, 77) at 95 % is t(77) at 97.5 %, squared."""
    age, chi = cohort
    fit = fit_curve(age, chi, curve=EXPONENTIAL)
    at = {"alpha": fit.alpha, "beta": fit.beta, "gamma": fit.gamma}
    others = [other for other in at if other != name]
    for end in fit.intervals[name]:

        def model(years: Any, a: float, b: float, end: float = end) -> Any:
            return rise(years, **(dict(zip(others, (a, b), strict=True)) | {name: end}))

        found, _ = curve_fit(model, age, chi, p0=[at[other] for other in others], maxfev=20000)
        rss = ((chi - model(age, *found)) ** 2).sum()
        assert (rss / fit.rss - 1) * 77 == pytest.approx(t.ppf(0.975, 77) ** 2, rel=2e-3)  # grid of 400 rates


@pytest.mark.parametrize(("curve", "basis"), [(LINEAR, lambda age: age), (LOGARITHMIC, np.log)])
def test_linear_curves_have_student_limits(cohort, curve, basis):
    line = linregress(basis(cohort[0]), cohort[1])
    fit = fit_curve(*cohort, curve=curve)
    assert (fit.alpha, fit.gamma) == pytest.approx((line.slope, line.intercept))
    width = t.ppf(0.975, 78)
    for name, value, error in (("alpha", line.slope, line.stderr), ("gamma", line.intercept, line.intercept_stderr)):
        assert fit.intervals[name] == pytest.approx((value - width * error, value + width * error))
    assert np.isnan([fit.beta, *fit.intervals["beta"]]).all()


def test_aicc_and_bands_of_a_line_by_hand():
    """Ages 0..6 around 3 with squares of 28; alternating residuals around a line of slope 0.01."""
    age = np.arange(7.0)
    chi = 0.01 * age + 0.01 * np.array([1, -2, 1, 0, 1, -2, 1])  # orthogonal to 1 and age: squares 12e-4
    fit = fit_curve(age, chi, curve=LINEAR)
    assert fit.aicc == pytest.approx(7 * np.log(12e-4 / 7) + 6 + 24 / 3)  # two parameters and the variance
    band: Any = bands(fit, [3, 7]).set_index("age")
    variance, width = 12e-4 / 5, t.ppf(0.975, 5)
    assert band.loc[3, "fit"] == pytest.approx(0.03)
    assert band.loc[3, "high"] - 0.03 == pytest.approx(width * np.sqrt(variance / 7))
    assert 0.07 - band.loc[7, "low"] == pytest.approx(width * np.sqrt(variance * (1 / 7 + 16 / 28)))
    assert band.loc[7, "prediction_high"] - 0.07 == pytest.approx(width * np.sqrt(variance * (1 + 1 / 7 + 16 / 28)))


def test_bands_contain_curve_and_scans(cohort):
    band = bands(fit_curve(*cohort, curve=EXPONENTIAL), cohort[0])
    assert ((band["low"] <= band["fit"]) & (band["fit"] <= band["high"])).all()
    within = (band["prediction_low"] <= cohort[1]) & (cohort[1] <= band["prediction_high"])
    assert 0.88 <= within.mean() <= 1  # 95 % of 80, within three standard errors


def test_bootstrap_of_a_line_approximates_student_limits(cohort, rng):
    fit = fit_curve(*cohort, curve=LINEAR)
    low, high = bootstrap(fit, *cohort, rng=rng)["alpha"]
    assert (low, high) == pytest.approx(fit.intervals["alpha"], rel=0.3)  # resamples pairs


def test_bootstrap_draws_participants_with_all_scans(cohort, rng):
    """Repeating every scan four times adds no information: only the bootstrap accounts for it."""
    age, chi = (np.repeat(values, 4) for values in cohort)
    fit, once = fit_curve(age, chi, curve=EXPONENTIAL), fit_curve(*cohort, curve=EXPONENTIAL)
    who = np.repeat(np.arange(80), 4)
    one = bootstrap(once, *cohort, rng=np.random.default_rng(1))
    four = bootstrap(fit, age, chi, rng=np.random.default_rng(1), participants=who)
    assert four["alpha"] == pytest.approx(one["alpha"])
    assert np.diff(fit.intervals["alpha"]) < 0.6 * np.diff(once.intervals["alpha"])


def test_simulated_cohorts_recover_the_truth(rng):
    """Forty cohorts of 150: limits contain the truth in about 95 %, medians are unbiased within 10 %."""
    found, held = [], []
    for _ in range(40):
        age = rng.uniform(5, 85, 150)
        fit = fit_curve(age, rise(age, ALPHA, BETA, GAMMA) + rng.normal(0, 0.01, 150), curve=EXPONENTIAL)
        found.append((fit.alpha, fit.beta))
        limits = zip((ALPHA, BETA, GAMMA, ALPHA + GAMMA), fit.intervals.values(), strict=True)
        held += [low <= truth <= high for truth, (low, high) in limits]
    assert np.median(found, axis=0) == pytest.approx((ALPHA, BETA), rel=0.1)
    assert 0.87 <= np.mean(held) <= 1


def test_linear_data_put_rate_at_bound():
    age = np.linspace(20, 80, 30)
    fit = fit_curve(age, 0.001 * age + 0.001 * np.cos(7 * age), curve=EXPONENTIAL)
    assert fit.at_bound
    assert fit.intervals["beta"][0] == 0.001


def test_plateau_leaves_alpha_without_limits():
    """Above 45 years all fast rates give the same curve: 1 - exp(-45) is 1 in floating point."""
    age = np.linspace(45, 80, 20)
    fit = fit_curve(age, 0.1 + 0.01 * np.cos(age**2), curve=EXPONENTIAL)
    assert fit.at_bound
    assert np.isinf(fit.intervals["alpha"]).all()
    band = bands(fit, [60.0])
    assert np.isfinite(band.to_numpy()).all()


def test_bootstrap_tolerates_samples_without_spread():
    """Two of ten participants have all the variance: one sample in nine has none."""
    age = np.array([30.0] * 8 + [60, 70])
    fit = fit_curve(age, np.sin(np.arange(10.0)), curve=LINEAR)
    assert np.isfinite(bootstrap(fit, age, np.sin(np.arange(10.0)), rng=np.random.default_rng(0))["alpha"]).all()


@pytest.mark.parametrize(
    ("age", "chi", "curve", "message"),
    [
        pytest.param(range(9), range(9), EXPONENTIAL, "9 scans, the exponential curve needs 10", id="few"),
        pytest.param(range(6), range(6), LOGARITHMIC, "age 0 has no logarithm", id="logarithm of 0"),
        pytest.param([-1, *range(6)], range(7), LINEAR, "age -1 is below 0", id="negative age"),
        pytest.param([np.nan, *range(6)], range(7), LINEAR, "not finite", id="missing age"),
        pytest.param([30] * 6, range(6), LINEAR, "all ages are 30", id="no spread"),
        pytest.param(range(6), [0.5] * 6, LINEAR, "all values are 0.5", id="no variation"),
        pytest.param(range(6), range(7), LINEAR, r"shapes \(6,\) and \(7,\)", id="lengths"),
    ],
)
def test_unsuitable_data_are_rejected(age, chi, curve, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(list(age), list(chi), curve=curve)
