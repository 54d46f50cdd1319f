"""Age curves, against scipy and by hand."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.age_curves import EXPONENTIAL, LINEAR, fit_age_curves, fit_curve

ALPHA, BETA, GAMMA = 0.1, 0.05, 0.02


def rise(age: Any, alpha: float, beta: float, gamma: float) -> Any:
    return alpha * (1 - np.exp(-beta * age)) + gamma


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def cohort(rng):
    """Ages and noisy susceptibilities of 80 participants."""
    age = rng.uniform(8, 85, 80)
    return age, rise(age, ALPHA, BETA, GAMMA) + rng.normal(0, 0.008, age.size)


def long(age: Any, chi: Any, abbreviation: str = "GP_L") -> pd.DataFrame:
    ids = [f"sub-{number:03d}" for number in range(len(age))]
    return pd.DataFrame({"participant_id": ids, "abbreviation": abbreviation, "age": age, "mean_ppm": chi})


@pytest.mark.parametrize("truth", [(0.1, 0.05, 0.02), (0.03, 0.2, 0.1), (-0.05, 0.02, 0.0), (120.0, 0.08, 20.0)])
def test_exact_curves_are_recovered(truth):
    age = np.linspace(1, 90, 30)
    fit = fit_curve(age, rise(age, *truth), curve=EXPONENTIAL)
    assert fit.parameters == pytest.approx(truth, rel=1e-5, abs=1e-6)


def test_line_has_student_limits(cohort):
    line = linregress(*cohort)
    estimates = fit_curve(*cohort, curve=LINEAR).estimates()
    width = t.ppf(0.975, 78)
    assert estimates["alpha"] == pytest.approx((line.slope, width * line.stderr))
    assert estimates["gamma"] == pytest.approx((line.intercept, width * line.intercept_stderr))


def test_aicc_and_band_of_a_line_by_hand():
    """Ages 0..6 around 3 with squares of 28; alternating residuals around a line of slope 0.01."""
    age = np.arange(7.0)
    chi = 0.01 * age + 0.01 * np.array([1, -2, 1, 0, 1, -2, 1])  # orthogonal to 1 and age: squares 12e-4
    fit = fit_curve(age, chi, curve=LINEAR)
    assert fit.aicc == pytest.approx(7 * np.log(12e-4 / 7) + 6 + 24 / 3)  # two parameters and the variance
    band: Any = fit.band(np.array([3.0, 7.0])).set_index("age")
    variance, width = 12e-4 / 5, t.ppf(0.975, 5)
    assert band.loc[3, "fit"] == pytest.approx(0.03)
    assert band.loc[3, "high"] - 0.03 == pytest.approx(width * np.sqrt(variance / 7))
    assert 0.07 - band.loc[7, "low"] == pytest.approx(width * np.sqrt(variance * (1 / 7 + 16 / 28)))


def test_simulated_cohorts_recover_the_truth(rng):
    """Forty cohorts of 150: limits contain the truth in about 95 %, medians are unbiased within 10 %."""
    medians, held = [], []
    for _ in range(40):
        age = rng.uniform(5, 85, 150)
        fit = fit_curve(age, rise(age, ALPHA, BETA, GAMMA) + rng.normal(0, 0.01, 150), curve=EXPONENTIAL)
        medians.append(fit.parameters[:2])
        truths = zip((ALPHA, BETA, GAMMA, ALPHA + GAMMA), fit.estimates().values(), strict=True)
        held += [abs(value - truth) <= half for truth, (value, half) in truths]
    assert np.median(medians, axis=0) == pytest.approx((ALPHA, BETA), rel=0.1)
    assert 0.87 <= np.mean(held) <= 1


@pytest.mark.parametrize(
    ("age", "chi", "curve", "message"),
    [
        pytest.param(range(9), range(9), EXPONENTIAL, "9 participants, the exponential curve needs 10", id="few"),
        pytest.param([30] * 6, range(6), LINEAR, "all ages are 30", id="no spread"),
        pytest.param(range(6), [0.5] * 6, LINEAR, "all values are 0.5", id="no variation"),
    ],
)
def test_unsuitable_data_are_rejected(age, chi, curve, message):
    with pytest.raises(ValueError, match=message):
        fit_curve(list(age), list(chi), curve=curve)


def test_best_curve_is_selected_per_nucleus(cohort, rng):
    age, chi = cohort
    line = 0.001 * age + rng.normal(0, 0.004, age.size)
    table = pd.concat([long(age, chi), long(age, line, "DN_L")])
    parameters, curves = fit_age_curves(table)
    result = parameters.set_index(["abbreviation", "curve"])
    best = result[result["best"]].reset_index()
    assert dict(zip(best["abbreviation"], best["curve"], strict=True)) == {"GP_L": "exponential", "DN_L": "linear"}
    assert (result.loc[result["best"], "delta_aicc"] == 0).all()
    exact = fit_curve(age, chi, curve=EXPONENTIAL)
    assert result.loc[("GP_L", "exponential"), "alpha"] == exact.parameters[0]
    assert result.loc[("GP_L", "exponential"), "plateau"] == pytest.approx(exact.parameters[[0, 2]].sum())
    assert set(curves["age"]) == {age.min(), age.max(), *range(int(np.ceil(age.min())), int(age.max()) + 1)}
    assert ((curves["low"] <= curves["fit"]) & (curves["fit"] <= curves["high"])).all()


def test_scans_of_a_participant_are_averaged(cohort):
    table = long(*cohort)
    table.loc[:4, "age"] = np.nan
    table.loc[4:9, "mean_ppm"] = np.nan
    row = fit_age_curves(table)[0].iloc[0]
    assert (row["n"], row["n_scans"], row["n_missing"], row["note"]) == (70, 70, 10, "")
    pairs = np.repeat(table["participant_id"].iloc[:40].to_numpy(), 2)
    twice = fit_age_curves(table.assign(participant_id=pairs))[0].iloc[0]
    assert (twice["n"], twice["n_scans"], twice["n_missing"]) == (35, 70, 10)
    means = table[10:].groupby(pairs[10:])[["age", "mean_ppm"]].mean()
    assert twice["alpha"] == pytest.approx(fit_curve(means["age"], means["mean_ppm"], curve=EXPONENTIAL).parameters[0])


def test_too_few_participants_have_a_note():
    table = long(np.arange(20, 28.0), np.sin(np.arange(8.0)))
    rows: Any = fit_age_curves(table)[0].set_index("curve")
    assert rows.loc["exponential", "note"] == "not fitted: 8 participants, the exponential curve needs 10"
    assert np.isnan(rows.loc["exponential", "alpha"])
    assert rows["best"].tolist() == [False, True]


def test_rate_that_ages_do_not_identify_has_no_limits(rng):
    """A straight line from 50 to 80 years: alpha may be anything, the curve is known to 0.01 ppm."""
    age = rng.uniform(50, 80, 60)
    parameters, curves = fit_age_curves(long(age, 0.05 + 0.001 * age + rng.normal(0, 0.005, 60)))
    row: Any = parameters.set_index("curve").loc["exponential"]
    limits = [f"{name}_{end}" for name in ("alpha", "beta_per_year", "gamma") for end in ("low", "high")]
    assert row[limits].isna().all()
    assert "alpha, beta_per_year, gamma, plateau are not identified: limits too wide; use the values" in row["note"]
    values = curves[(curves["curve"] == "linear") & curves["age"].isin([60, 70])]
    assert (values["low"] < 0.05 + 0.001 * values["age"]).all()
    assert (0.05 + 0.001 * values["age"] < values["high"]).all()
    assert np.isfinite(parameters.loc[parameters["curve"] == "linear", "gamma_low"]).all()


def test_models_are_fitted_separately_and_ages_are_needed(cohort):
    table = pd.concat([long(*cohort).assign(model="manual"), long(cohort[0], cohort[1] + 0.01).assign(model="dgm16")])
    gamma = fit_age_curves(table, by=("model", "abbreviation"), curves=(LINEAR,))[0].set_index("model")["gamma"]
    assert gamma["dgm16"] - gamma["manual"] == pytest.approx(0.01)
    with pytest.raises(InputError, match=r"^group table: no column age \(columns: participant_id"):
        fit_age_curves(table.drop(columns="age"))
