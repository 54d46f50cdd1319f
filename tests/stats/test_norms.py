"""Centiles by age and z-scores, against the predictions of statsmodels."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, t
from statsmodels.formula.api import ols

from bids_dgmseg.stats.norms import apply_norms, find_norms, fit_norms


@pytest.fixture
def table():
    """Twenty controls and four patients, one scan each, the value rises with age."""
    rng = np.random.default_rng(2)
    age = np.concatenate([rng.uniform(40, 80, 20), [50, 60, 70, 90]])
    value = 0.05 + 0.001 * age + rng.normal(0, 0.01, 24)
    ids = [f"sub-{k:02d}" for k in range(24)]
    return pd.DataFrame({"participant_id": ids, "abbreviation": "SN_L", "age": age, "mean_ppm": value})


CONTROLS = np.arange(24) < 20


def test_centiles_are_prediction_limits(table):
    norms, _ = fit_norms(table, controls=CONTROLS)
    fit = ols("mean_ppm ~ age", table[CONTROLS]).fit()
    for percent, alpha, side in ((5, 0.1, "obs_ci_lower"), (95, 0.1, "obs_ci_upper"), (75, 0.5, "obs_ci_upper")):
        theirs = fit.get_prediction(norms[["age"]]).summary_frame(alpha=alpha)[side].to_numpy()
        assert norms[f"p{percent:02d}"].to_numpy() == pytest.approx(theirs)
    assert norms["p50"].to_numpy() == pytest.approx(fit.predict(norms[["age"]]).to_numpy())
    assert norms["age"].iloc[0] == table["age"][CONTROLS].min()
    assert set(norms["n_controls"]) == {20}


def test_two_ages_have_a_line_between_them():
    """0.1 at 25, 0.14 at 65 years, each ± 0.01, so that 45 years are half-way; no quadratic is determined."""
    age = np.repeat([25.0, 65.0], 20)
    value = np.where(age < 30, 0.1, 0.14) + np.tile([-0.01, 0.01], 20)
    ids = [f"sub-{k:02d}" for k in range(41)]
    rows = {"participant_id": ids, "abbreviation": "SN_L", "age": [*age, 45.0], "mean_ppm": [*value, 0.12]}
    norms, scores = fit_norms(pd.DataFrame(rows), controls=np.arange(41) < 40)
    assert norms.loc[norms["age"] == 45, "p50"].tolist() == pytest.approx([0.12])
    assert scores["expected"].iloc[40] == pytest.approx(0.12)


def test_new_people_are_scored_by_the_prediction(table):
    _, scores = fit_norms(table, controls=CONTROLS)
    fit = ols("mean_ppm ~ age", table[CONTROLS]).fit()
    patients = table.iloc[20:23]
    frame = fit.get_prediction(patients).summary_frame(alpha=0.05)
    half = (frame["obs_ci_upper"] - frame["mean"]) / t.ppf(0.975, 18)
    centile = t.cdf((patients["mean_ppm"] - frame["mean"]) / half, 18)
    assert scores["centile"].iloc[20:23].to_numpy() == pytest.approx(100 * centile)
    assert scores["z"].iloc[20:23].to_numpy() == pytest.approx(norm.ppf(centile))
    last = scores.iloc[23]
    assert np.isnan(last["z"])
    low, high = table["age"][CONTROLS].agg(["min", "max"])
    assert last["note"] == f"no score: age beyond those of the controls ({low:.0f} to {high:.0f})"


def test_controls_are_compared_with_the_others(table):
    """The prediction from the others is the externally studentized residual, with one degree of freedom less."""
    _, scores = fit_norms(table, controls=CONTROLS)
    fit = ols("mean_ppm ~ age", table[CONTROLS]).fit()
    theirs = norm.ppf(t.cdf(fit.get_influence().resid_studentized_external, 17))
    assert scores["z"].iloc[:20].to_numpy() == pytest.approx(theirs)


@pytest.mark.parametrize(("women", "men"), [(12, 11), (5, 9), (15, 15), (20, 20)])
def test_each_scan_of_a_control_is_scored_by_a_regression_without_this_person(women, men):
    """Also where a sex has too few without it (5), or the controls are too few for a curve (30)."""
    rng = np.random.default_rng(3)
    people = pd.DataFrame({"sex": ["F"] * women + ["M"] * men, "age": rng.uniform(30, 80, women + men)})
    people["participant_id"] = people.index.astype(str)
    scans = pd.concat([people, people.assign(age=people["age"] + 0.5)], ignore_index=True)
    scans["mean_ppm"] = 0.1 + 0.001 * scans["age"] + rng.normal(0, 0.01, len(scans))
    scans["abbreviation"] = "SN_L"
    _, scores = fit_norms(scans, controls=np.ones(len(scans), bool), sex="sex")
    averaged = scans.groupby("participant_id").agg({"mean_ppm": "mean", "age": "mean", "sex": "first"})
    checked = scores.dropna(subset="z").index
    assert len(checked) >= len(scans) - 2  # at the limits of age there is none
    for row in checked:
        others = averaged.drop(index=scans["participant_id"][row])
        formula = "mean_ppm ~ age" + (" + I(age ** 2)" if len(others) >= 30 else "")
        formula += " + sex" if others["sex"].value_counts().min() >= 5 else ""
        fit = ols(formula, others).fit()
        new = fit.get_prediction(scans.loc[[row]])
        ratio = (scans["mean_ppm"][row] - new.predicted_mean[0]) / new.se_obs[0]
        assert scores["expected"][row] == pytest.approx(new.predicted_mean[0])
        assert scores["z"][row] == pytest.approx(norm.ppf(t.cdf(ratio, fit.df_resid)), abs=1e-6)


def test_scores_of_controls_are_standard_normal():
    rng = np.random.default_rng(0)
    n = 4000
    table = pd.DataFrame({"participant_id": np.arange(n).astype(str), "abbreviation": "SN_L"})
    table["age"] = rng.uniform(20, 80, n)
    table["mean_ppm"] = 0.1 + 1e-5 * (table["age"] - 50) ** 2 + rng.normal(0, 0.01, n)  # a line would not fit
    _, scores = fit_norms(table, controls=np.arange(n) < 200)
    z = scores["z"].iloc[200:].dropna()
    assert abs(z.mean()) < 0.2  # 200 controls: 1 / sqrt(200) = 0.07
    assert z.std() == pytest.approx(1, abs=0.1)


def test_few_controls_have_no_norm(table):
    norms, scores = fit_norms(table, controls=np.arange(24) < 9)
    assert norms.empty
    assert scores["z"].isna().all()
    assert set(scores["note"]) == {"no norm: 9 controls with values and ages, 10 are needed"}


def test_repeated_scans_of_a_control_count_once(table):
    again = pd.concat([table, table.iloc[[0]].assign(mean_ppm=9.0)], ignore_index=True)
    mean = table.copy()
    mean.loc[0, "mean_ppm"] = (table["mean_ppm"][0] + 9) / 2
    first, _ = fit_norms(again, controls=np.append(CONTROLS, True))
    second, _ = fit_norms(mean, controls=CONTROLS)
    pd.testing.assert_frame_equal(first, second)


def test_sex_is_part_of_the_prediction(table):
    """With five controls of each sex, as in the regression of statsmodels."""
    sexes = table.assign(sex=["F", "M"] * 12)
    norms, scores = fit_norms(sexes, controls=CONTROLS, sex="sex")
    fit = ols("mean_ppm ~ age + C(sex)", sexes[CONTROLS]).fit()
    assert set(norms["sex"]) == {"F", "M"}
    frame = fit.get_prediction(norms[["age", "sex"]]).summary_frame(alpha=0.1)
    assert norms["p95"].to_numpy() == pytest.approx(frame["obs_ci_upper"].to_numpy())
    others = fit.get_influence().resid_studentized_external
    assert scores["z"].iloc[:20].to_numpy() == pytest.approx(norm.ppf(t.cdf(others, 16)))
    rare = table.assign(sex=["F"] * 4 + ["M"] * 20)
    pd.testing.assert_frame_equal(
        fit_norms(rare, controls=CONTROLS, sex="sex")[1], fit_norms(table, controls=CONTROLS)[1]
    )


def test_saved_norms_score_new_people_alike(table):
    """Those of `fit_norms`; ages beyond the controls' have a score and a note, an unknown sex has none."""
    sexes = table.assign(sex=["F", "M"] * 12)
    ((key, found),) = find_norms(sexes, controls=CONTROLS, value="mean_ppm", sex="sex")
    assert key == {"abbreviation": "SN_L"}
    patients = sexes.iloc[20:].assign(sex=["F", "M", "O", "M"])
    curves, scores = apply_norms(patients, {"SN_L": found}, value="mean_ppm")
    norms, first = fit_norms(sexes, controls=CONTROLS, sex="sex")
    pd.testing.assert_frame_equal(curves, norms)
    assert scores["z"].iloc[:2].to_numpy() == pytest.approx(first["z"].iloc[20:22].to_numpy())
    assert scores["note"].iloc[2] == "no score: the norms are of F and M"
    assert np.isfinite(scores["z"].iloc[3])
    assert scores["note"].iloc[3].startswith("extrapolated: age beyond those of the controls (")
    assert set(apply_norms(patients, {}, value="mean_ppm")[1]["note"]) == {"no norm of this nucleus"}


def test_age_is_not_extrapolated_for_a_sex_without_norms(table):
    sexes = table.assign(sex=["F", "M"] * 12)
    ((_, found),) = find_norms(sexes, controls=CONTROLS, value="mean_ppm", sex="sex")
    oldest = sexes.iloc[23:].assign(sex="O")  # 90 years
    _, scores = apply_norms(oldest, {"SN_L": found}, value="mean_ppm")
    assert scores[["z", "note"]].iloc[0].fillna("none").tolist() == ["none", "no score: the norms are of F and M"]


def test_wrong_unit_has_a_finite_score():
    """Of 400 controls; the tail of the t distribution is smaller than the smallest number, about 2.2e-308."""
    rng = np.random.default_rng(4)
    age = rng.uniform(40, 80, 401)
    value = 0.1 + rng.normal(0, 0.01, 401)
    value[400] *= 1000  # in ppb
    ids = [f"sub-{k:03d}" for k in range(401)]
    table = pd.DataFrame({"participant_id": ids, "abbreviation": "SN_L", "age": age, "mean_ppm": value})
    _, scores = fit_norms(table, controls=np.arange(401) < 400)
    assert scores["z"].iloc[400] == pytest.approx(37.52, abs=0.01)
