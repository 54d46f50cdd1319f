"""Age curves, against scipy and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, norm, t
from statsmodels.formula.api import ols

from bids_dgmseg.stats.age_curves import (
    EXPONENTIAL,
    LINEAR,
    AgeSexNorm,
    centile_curves,
    fit_age_curves,
    fit_curve,
    fit_norms,
    score_scans,
)

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
    parameters, curves, _ = fit_age_curves(table)
    result = parameters.set_index(["abbreviation", "curve"])
    best = result[result["best"]].reset_index()
    assert dict(zip(best["abbreviation"], best["curve"], strict=True)) == {"GP_L": "exponential", "DN_L": "linear"}
    assert (result.loc[result["best"], "delta_aicc"] == 0).all()
    exact = fit_curve(age, chi, curve=EXPONENTIAL)
    row: Any = result.loc[("GP_L", "exponential")]
    names = ["alpha", "beta_per_year", "gamma"]
    assert row[names].tolist() == exact.parameters.tolist()
    for name, truth in zip(names, (ALPHA, BETA, GAMMA), strict=True):
        assert row[f"{name}_low"] < truth < row[f"{name}_high"]
    assert result.loc[("GP_L", "exponential"), "plateau"] == pytest.approx(exact.parameters[[0, 2]].sum())
    assert set(curves["age"]) == {age.min(), age.max(), *range(int(np.ceil(age.min())), int(age.max()) + 1)}
    limits = curves.dropna(subset=["low"])  # a line does not describe GP_L
    assert set(limits["curve"] + limits["abbreviation"]) == {"exponentialGP_L", "exponentialDN_L", "linearDN_L"}
    assert ((limits["low"] <= limits["fit"]) & (limits["fit"] <= limits["high"])).all()


def test_sd_of_a_line_with_sites_is_that_of_the_regression(cohort):
    table = long(*cohort).assign(site=np.arange(80) % 12)
    row = fit_age_curves(table, site="site")[0].set_index("curve").loc["linear"]
    assert row["std"] == pytest.approx(np.sqrt(ols("mean_ppm ~ age + C(site)", table).fit().scale))


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


def test_rate_that_ages_do_not_identify_has_no_limits(rng):
    """A straight line from 50 to 80 years: alpha may be anything, the curve is known to 0.01 ppm."""
    age = rng.uniform(50, 80, 60)
    parameters, curves, _ = fit_age_curves(long(age, 0.05 + 0.001 * age + rng.normal(0, 0.005, 60)))
    row: Any = parameters.set_index("curve").loc["exponential"]
    limits = [f"{name}_{end}" for name in ("alpha", "beta_per_year", "gamma") for end in ("low", "high")]
    assert row[limits].isna().all()
    assert "alpha, beta_per_year, gamma, plateau are not identified: limits too wide (use group" in row["note"]
    values = curves[(curves["curve"] == "linear") & curves["age"].isin([60, 70])]
    assert (values["low"] < 0.05 + 0.001 * values["age"]).all()
    assert (0.05 + 0.001 * values["age"] < values["high"]).all()
    assert np.isfinite(parameters.loc[parameters["curve"] == "linear", "gamma_low"]).all()


BY = ("abbreviation",)


@pytest.fixture
def table():
    """Twenty controls and four patients, one scan each, the value rises with age; one sex."""
    rng = np.random.default_rng(2)
    age = np.concatenate([rng.uniform(40, 80, 20), [50, 60, 70, 90]])
    value = 0.05 + 0.001 * age + rng.normal(0, 0.01, 24)
    ids = [f"sub-{k:02d}" for k in range(24)]
    return pd.DataFrame({"participant_id": ids, "abbreviation": "SN_L", "age": age, "sex": "F", "mean_ppm": value})


CONTROLS = np.arange(24) < 20


def score(table, controls):
    return score_scans(table, fit_norms(table, controls=controls))


def test_centiles_are_prediction_limits(table):
    sexes = table.assign(sex=["F", "M"] * 12)
    for rows, formula in ((table, "mean_ppm ~ age"), (sexes, "mean_ppm ~ age + C(sex)")):
        curves = centile_curves(fit_norms(rows, controls=CONTROLS), by=BY)
        fit = ols(formula, rows[CONTROLS]).fit()
        new = curves[["age", "sex"]]
        for percent, alpha, side in ((5, 0.1, "obs_ci_lower"), (95, 0.1, "obs_ci_upper"), (75, 0.5, "obs_ci_upper")):
            theirs = fit.get_prediction(new).summary_frame(alpha=alpha)[side].to_numpy()
            assert curves[f"p{percent:02d}"].to_numpy() == pytest.approx(theirs)
        assert curves["age"].iloc[0] == table["age"][CONTROLS].min()
        assert set(curves["n_controls"]) == {20}


def test_each_scan_of_a_control_is_scored_without_this_person():
    rng = np.random.default_rng(3)
    people = pd.DataFrame({"sex": ["F"] * 20 + ["M"] * 16, "age": rng.uniform(30, 80, 36)})
    people["participant_id"] = people.index.astype(str)
    scans = pd.concat([people, people.assign(age=people["age"] + 0.5)], ignore_index=True)
    scans["mean_ppm"] = 0.1 + 0.001 * scans["age"] + rng.normal(0, 0.01, len(scans))
    scans["abbreviation"] = "SN_L"
    scores = score(scans, np.ones(len(scans), bool))
    averaged = scans.groupby("participant_id").agg({"mean_ppm": "mean", "age": "mean", "sex": "first"})
    checked = scores.dropna(subset="z").index
    assert len(checked) >= len(scans) - 2  # at the limits of age there is none
    for row in checked[::9]:
        fit = ols("mean_ppm ~ age + I(age ** 2) + sex", averaged.drop(index=scans["participant_id"][row])).fit()
        new = fit.get_prediction(scans.loc[[row]])
        ratio = (scans["mean_ppm"][row] - new.predicted_mean[0]) / new.se_obs[0]
        assert scores["expected"][row] == pytest.approx(new.predicted_mean[0])
        assert scores["z"][row] == pytest.approx(norm.ppf(t.cdf(ratio, fit.df_resid)), abs=1e-6)


def test_few_controls_have_no_norm(table):
    few = np.arange(24) < 9
    assert fit_norms(table, controls=few) == {}
    assert fit_norms(table.assign(mean_ppm=0.1), controls=CONTROLS) == {}
    scores = score(table, few)
    assert scores["z"].isna().all()
    assert set(scores["note"]) == {"no norm: 10 controls with values and ages are needed"}


def test_rare_or_unknown_sex(table):
    rare = table.assign(sex=["F"] * 4 + ["M"] * 20)
    pd.testing.assert_frame_equal(score(rare, CONTROLS), score(table, CONTROLS))
    norms = fit_norms(table.assign(sex=["F", "M"] * 12), controls=CONTROLS)
    patients = table.iloc[20:23].assign(sex=["F", "O", "M"], mean_ppm=[0.1, 0.1, np.nan])
    scores = score_scans(patients, norms)
    assert scores["z"].notna().tolist() == [True, False, False]
    assert scores["note"].tolist() == ["", "no score: the norms are of F and M", "no value or age"]


def test_saved_norms_are_checked():
    norm_of_line = AgeSexNorm(12, 40, 80, 60, 10, (), False, np.zeros(2), np.eye(2), 0.01)
    assert norm_of_line.df == 10
    for changes in ({"coefficients": np.zeros(3)}, {"std": 0.0}, {"n_controls": 2}):
        with pytest.raises(ValueError, match=r"coefficients, expected 2|not usable"):
            AgeSexNorm(**{**norm_of_line.__dict__, **changes})
