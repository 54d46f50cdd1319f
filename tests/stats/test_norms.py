"""Centiles by age and z-scores, against the predictions of statsmodels."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t
from statsmodels.formula.api import ols

from bids_dgmseg.stats.norms import AgeSexNorm, centile_curves, fit_norms, score_scans

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
    return score_scans(table, fit_norms(table, controls=controls), controls=controls)


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


def test_two_ages_have_a_line_between_them():
    """0.1 at 25, 0.14 at 65 years, each ± 0.01, so that 45 years are half-way; no quadratic is determined."""
    age = np.repeat([25.0, 65.0], 20)
    value = np.where(age < 30, 0.1, 0.14) + np.tile([-0.01, 0.01], 20)
    ids = [f"sub-{k:02d}" for k in range(41)]
    rows = {"participant_id": ids, "abbreviation": "SN_L", "age": [*age, 45.0], "sex": "F", "mean_ppm": [*value, 0.12]}
    scores = score(pd.DataFrame(rows), np.arange(41) < 40)
    assert scores["expected"].iloc[40] == pytest.approx(0.12)


def test_new_people_are_scored_by_the_prediction(table):
    scores = score(table, CONTROLS)
    fit = ols("mean_ppm ~ age", table[CONTROLS]).fit()
    patients = table.iloc[20:23]
    frame = fit.get_prediction(patients).summary_frame(alpha=0.05)
    half = (frame["obs_ci_upper"] - frame["mean"]) / t.ppf(0.975, 18)
    centile = t.cdf((patients["mean_ppm"] - frame["mean"]) / half, 18)
    assert scores["centile"].iloc[20:23].to_numpy() == pytest.approx(100 * centile)
    assert scores["z"].iloc[20:23].to_numpy() == pytest.approx(norm.ppf(centile))
    last = scores.iloc[23]
    assert last[["expected", "z", "centile"]].isna().all()
    low, high = table["age"][CONTROLS].agg(["min", "max"])
    assert last["note"] == f"no score: age beyond those of the controls ({low:.0f} to {high:.0f})"


def test_controls_are_compared_with_the_others(table):
    """The prediction from the others is the externally studentized residual, with one degree of freedom less."""
    sexes = table.assign(sex=["F", "M"] * 12)
    for rows, formula, free in ((table, "mean_ppm ~ age", 17), (sexes, "mean_ppm ~ age + C(sex)", 16)):
        residuals = ols(formula, rows[CONTROLS]).fit().get_influence().resid_studentized_external
        assert score(rows, CONTROLS)["z"].iloc[:20].to_numpy() == pytest.approx(norm.ppf(t.cdf(residuals, free)))


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
    for row in checked:
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


def test_repeated_scans_of_a_control_count_once(table):
    again = pd.concat([table, table.iloc[[0]].assign(mean_ppm=9.0)], ignore_index=True)
    mean = table.copy()
    mean.loc[0, "mean_ppm"] = (table["mean_ppm"][0] + 9) / 2
    first = centile_curves(fit_norms(again, controls=np.append(CONTROLS, True)), by=BY)
    pd.testing.assert_frame_equal(first, centile_curves(fit_norms(mean, controls=CONTROLS), by=BY))


def test_rare_or_unknown_sex(table):
    rare = table.assign(sex=["F"] * 4 + ["M"] * 20)
    pd.testing.assert_frame_equal(score(rare, CONTROLS), score(table, CONTROLS))
    norms = fit_norms(table.assign(sex=["F", "M"] * 12), controls=CONTROLS)
    patients = table.iloc[20:23].assign(sex=["F", "O", "M"], mean_ppm=[0.1, 0.1, np.nan])
    scores = score_scans(patients, norms)
    assert scores["z"].notna().tolist() == [True, False, False]
    assert scores["note"].tolist() == ["", "no score: the norms are of F and M", "no value or age"]


def test_wrong_unit_has_a_finite_score():
    """The tail of the t distribution of 400 controls is smaller than the smallest number, about 2.2e-308."""
    rng = np.random.default_rng(4)
    age = rng.uniform(40, 80, 401)
    value = 0.1 + rng.normal(0, 0.01, 401)
    value[400] *= 1000  # in ppb
    ids = [f"sub-{k:03d}" for k in range(401)]
    rows = {"participant_id": ids, "abbreviation": "SN_L", "age": age, "sex": "F", "mean_ppm": value}
    assert score(pd.DataFrame(rows), np.arange(401) < 400)["z"].iloc[400] == pytest.approx(37.52, abs=0.01)


def test_saved_norms_are_checked():
    norm_of_line = AgeSexNorm(12, 40, 80, 60, 10, (), False, np.zeros(2), np.eye(2), 0.01)
    assert norm_of_line.df == 10
    for changes in ({"coefficients": np.zeros(3)}, {"std": 0.0}, {"n_controls": 2}):
        with pytest.raises(ValueError, match=r"coefficients, expected 2|not usable"):
            AgeSexNorm(**{**norm_of_line.__dict__, **changes})
