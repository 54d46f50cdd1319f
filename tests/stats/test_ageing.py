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
    table = fit_age_curves(long(*cohort))[1]
    assert table["curve"].value_counts().to_dict() == {"exponential": 101, "linear": 101, "logarithmic": 101}
    assert (table["age"].min(), table["age"].max()) == pytest.approx((cohort[0].min(), cohort[0].max()))


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
