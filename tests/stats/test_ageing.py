from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.age_curves import EXPONENTIAL, LINEAR, bootstrap, fit_curve
from bids_dgmseg.stats.ageing import AgeingOptions, change_per_year, fit_age_curves


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def cohort(rng):
    """Ages and noisy susceptibilities of 80 scans."""
    age = rng.uniform(8, 85, 80)
    return age, 0.1 * (1 - np.exp(-0.05 * age)) + 0.02 + rng.normal(0, 0.008, age.size)


def long(age: Any, chi: Any, abbreviation: str = "GP_L") -> pd.DataFrame:
    ids = [f"sub-{number:03d}" for number in range(len(age))]
    return pd.DataFrame({"participant_id": ids, "abbreviation": abbreviation, "age": age, "mean_ppm": chi})


def parameters_of(table: pd.DataFrame, **options: Any) -> pd.DataFrame:
    return fit_age_curves(table, **options)[0]


def test_best_curve_is_selected_per_nucleus(cohort, rng):
    age, chi = cohort
    line = 0.001 * age + rng.normal(0, 0.004, age.size)
    table = pd.concat([long(age, chi), long(age, line, "DN_L")])
    result = parameters_of(table).set_index(["abbreviation", "curve"])
    best = result[result["best"]].reset_index()
    assert dict(zip(best["abbreviation"], best["curve"], strict=True)) == {"GP_L": "exponential", "DN_L": "linear"}
    assert (result.loc[result["best"], "delta_aicc"] == 0).all()
    assert result.loc[("GP_L", "exponential"), "alpha"] == fit_curve(age, chi, curve=EXPONENTIAL).alpha


def test_missing_values_and_repeated_scans_are_counted(cohort):
    table = long(*cohort)
    table.loc[:4, "age"] = np.nan
    table.loc[4:9, "mean_ppm"] = np.nan
    row = parameters_of(table).iloc[0]
    assert (row["n"], row["n_missing"], row["n_participants"], row["note"]) == (70, 10, 70, "")
    table["participant_id"] = np.repeat(table["participant_id"].iloc[:40].to_numpy(), 2)
    row = parameters_of(table).iloc[0]
    assert (row["n"], row["n_participants"]) == (70, 35)
    assert "scans of one participant count as independent" in row["note"]


def test_too_few_scans_have_a_note():
    table = long(np.arange(20, 28.0), np.sin(np.arange(8.0)))
    rows: Any = parameters_of(table).set_index("curve")
    assert rows.loc["exponential", "note"] == "not fitted: 8 scans, the exponential curve needs 10"
    assert np.isnan(rows.loc["exponential", "alpha"])
    assert not rows.loc["exponential", "best"]
    assert rows["best"].sum() == 1


def test_models_are_fitted_separately(cohort):
    table = pd.concat([long(*cohort).assign(model="manual"), long(cohort[0], cohort[1] + 0.01).assign(model="dgm16")])
    options = AgeingOptions(by=("model", "abbreviation"), curves=(LINEAR,))
    gamma = parameters_of(table, options=options).set_index("model")["gamma"]
    assert gamma["dgm16"] - gamma["manual"] == pytest.approx(0.01)


def test_bootstrap_replaces_profile_limits(cohort):
    options = AgeingOptions(curves=(EXPONENTIAL,), n_replicates=60)
    with pytest.raises(ValueError, match="a bootstrap needs rng"):
        parameters_of(long(*cohort), options=options)
    row = parameters_of(long(*cohort), options=options, rng=np.random.default_rng(0)).iloc[0]
    limits = bootstrap(fit_curve(*cohort, curve=EXPONENTIAL), *cohort, rng=np.random.default_rng(0), n_replicates=60)
    assert (row["beta_per_year_low"], row["beta_per_year_high"]) == limits["beta"]


@pytest.mark.parametrize(("n", "note"), [(4, "no limits: 4 participants, a bootstrap needs 5"), (5, "")])
def test_bootstrap_of_few_participants_has_no_limits(cohort, n, note):
    table = long(*cohort).assign(participant_id=[f"sub-{number % n}" for number in range(80)])
    options = AgeingOptions(curves=(LINEAR,), n_replicates=20)
    row = parameters_of(table, options=options, rng=np.random.default_rng(0)).iloc[0]
    assert row["note"] == note
    assert row[["alpha_low", "alpha_high", "gamma_low", "gamma_high"]].isna().tolist() == [n < 5] * 4
    assert np.isfinite(row["alpha"])


def test_bands_span_the_ages(cohort):
    """At 101 equidistant ages, and 20, 30, … 80 years."""
    table = fit_age_curves(long(*cohort))[1]
    assert table["curve"].value_counts().to_dict() == {"exponential": 108, "linear": 108, "logarithmic": 108}
    assert set(range(20, 81, 10)) <= set(table["age"])
    assert (table["age"].min(), table["age"].max()) == pytest.approx((cohort[0].min(), cohort[0].max()))


LIMITS = [f"{name}_{end}" for name in ("alpha", "beta_per_year", "gamma") for end in ("low", "high")]


def test_absurd_limits_are_replaced_by_a_note(rng):
    """A straight line from 50 to 80 years: alpha is anything from 0.02 to 400 ppm, the curve is known to 0.01 ppm."""
    age = rng.uniform(50, 80, 60)
    table = long(age, 0.05 + 0.001 * age + rng.normal(0, 0.005, 60))
    raw = fit_curve(table["age"], table["mean_ppm"], curve=EXPONENTIAL).intervals["alpha"]
    assert np.ptp(raw) > 10 * np.ptp(table["mean_ppm"])
    parameters, curves = fit_age_curves(table)
    row: Any = parameters.set_index("curve").loc["exponential"]
    assert row[LIMITS].isna().all()
    assert "alpha, beta, gamma and plateau are not identified; use the values of group_ageing_curves" in row["note"]
    assert np.isnan(row["plateau_high"])
    values = curves[(curves["curve"] == "exponential") & curves["age"].isin([60, 70])]
    assert (values["low"] < 0.05 + 0.001 * values["age"]).all()
    assert (0.05 + 0.001 * values["age"] < values["high"]).all()
    assert (values["high"] - values["low"]).max() < 0.01
    assert np.isfinite(parameters.loc[parameters["curve"] == "linear", "gamma_low"]).all()


def test_plateau_remains_if_rate_is_not_identified(rng):
    """Children of two years and adults at the plateau: any fast rate fits."""
    child = np.arange(200) < 10
    age = np.where(child, 2, rng.uniform(20, 80, 200))
    table = long(age, 0.12 - 0.05 * child + rng.normal(0, 0.01, 200))
    row: Any = parameters_of(table).iloc[0]
    assert row[LIMITS].isna().all()
    assert "alpha, beta, gamma are not identified" in row["note"]
    assert row["plateau_low"] < 0.12 < row["plateau_high"] < row["plateau_low"] + 0.02


def test_absurd_limits_of_a_line(rng):
    """Ages from 60 to 61 do not tell the value at age 0."""
    table = long(rng.uniform(60, 61, 30), rng.normal(0.1, 0.01, 30))
    rows: Any = parameters_of(table).set_index("curve")
    assert np.isnan(rows.loc["linear", "gamma_low"])
    assert np.isfinite(rows.loc["linear", "alpha_low"])
    assert rows.loc["linear", "note"] == (
        "limits of gamma are wider than 10 times the range of the values and not given"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.assign(age=-3.0), "^sub-000: age is -3, expected years from 0"),
        (lambda table: table.drop(columns="age"), r"^group table: no column age \(columns: participant_id"),
    ],
    ids=["negative", "no ages"],
)
def test_invalid_ages_are_rejected(cohort, change, message):
    with pytest.raises(InputError, match=message):
        parameters_of(change(long(*cohort)))


def scans(rows: list[tuple[str, float, float]], abbreviation: str = "RN_L") -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["participant_id", "age", "mean_ppm"])
    return table.assign(abbreviation=abbreviation)


TWO = scans([("sub-1", 50.0, 0.10), ("sub-1", 52.0, 0.12), ("sub-2", 60.0, 0.10), ("sub-2", 60.5, 0.12)])


def test_change_per_year_by_hand():
    """0.02 ppm in two years and in half a year: 0.01 and 0.04 per year, mean 0.025, standard error 0.015."""
    change = change_per_year(TWO)
    assert change.participants["change_per_year"].tolist() == pytest.approx([0.01, 0.04])
    row: Any = change.summary.loc[0]
    assert (row["change_per_year"], row["std"], row["t"]) == pytest.approx((0.025, 0.015 * np.sqrt(2), 5 / 3))
    assert (row["n"], row["n_single"], row["n_scans"], row["years_median"]) == (2, 0, 4, 1.25)


def test_three_sessions_give_a_least_squares_slope():
    """Times -1, 0, 1 around their mean: half the difference of the ends."""
    change = change_per_year(scans([("sub-1", 53.0, 0.13), ("sub-1", 51.0, 0.10), ("sub-1", 52.0, 0.5)]))
    row: Any = change.participants.loc[0]
    assert (row["change_per_year"], row["first"], row["years"]) == pytest.approx((0.015, 0.10, 2))


def test_summary_is_a_t_test_of_slopes():
    rng = np.random.default_rng(1)
    visits = [(f"sub-{number}", year) for number in range(8) for year in range(3)]
    change = change_per_year(
        scans([(name, 50.0 + year, rng.normal(0.1 + 0.002 * year, 0.003)) for name, year in visits])
    )
    slopes = change.participants["change_per_year"]
    mean, error = slopes.mean(), slopes.std() / np.sqrt(8)
    row: Any = change.summary.loc[0]
    assert (row["t"], row["df"], row["p"]) == pytest.approx((mean / error, 7, 2 * t.sf(abs(mean / error), 7)))
    assert (row["change_low"], row["change_high"]) == pytest.approx(tuple(mean + t.ppf([0.025, 0.975], 7) * error))
    assert row["q"] == row["p"]


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        pytest.param([("sub-3", 40.0, 0.1)], "no change: 1 scans", id="one session"),
        pytest.param([("sub-3", 40.0, 0.1), ("sub-3", 42.0, np.nan)], "no change: 1 scans", id="one value"),
        pytest.param([("sub-3", 40.0, 0.1), ("sub-3", 40.0, 0.2)], "no change: all scans at 40 years", id="one age"),
    ],
)
def test_participants_without_change_have_a_note(rows, note):
    change = change_per_year(pd.concat([TWO, scans(rows)]))
    assert change.participants["note"].tolist() == ["", "", note]
    assert change.summary[["n", "n_single"]].iloc[0].tolist() == [2, 1]


def test_single_changes_and_sessions_are_not_tested():
    row: Any = change_per_year(TWO.head(2)).summary.loc[0]
    assert row["note"] == "not tested: 1 participants with a change, or all the same"
    assert np.isnan(row["p"])
    with pytest.raises(InputError, match="no participant has scans at two values of age; give each session"):
        change_per_year(TWO.iloc[[0, 2]])
