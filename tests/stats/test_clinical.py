"""Relations with clinical variables, against statsmodels' formulas and correlations of residuals."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm, pearsonr
from statsmodels.formula.api import mixedlm, ols

from bids_dgmseg.stats.clinical import ClinicalOptions, correlate, fit_random_intercept, mixed_changes

OPTIONS = ClinicalOptions(variable="updrs", covariates=("age", "sex", "site"))


@pytest.fixture
def people():
    """Forty participants at two sites, one scan each, of two nuclei: the first falls with the score."""
    rng = np.random.default_rng(3)
    n = 40
    table = pd.DataFrame({"participant_id": [f"sub-{k:02d}" for k in range(n)], "age": rng.uniform(50, 80, n)})
    table["sex"], table["site"], table["group"] = rng.choice(["F", "M"], n), rng.choice(["A", "B"], n), "PD"
    table["updrs"] = 20 + 0.3 * table["age"] + rng.normal(0, 6, n)
    parts = []
    for name, slope in (("SN_L", -0.001), ("DN_L", 0.0)):
        y = 0.1 + slope * table["updrs"] + 0.001 * table["age"] + 0.02 * (table["site"] == "B") + rng.normal(0, 0.01, n)
        parts.append(table.assign(abbreviation=name, mean_ppm=y))
    return pd.concat(parts, ignore_index=True)


def test_slope_agrees_with_statsmodels(people):
    found = correlate(people, options=OPTIONS)[0].set_index("abbreviation")
    for nucleus, table in people.groupby("abbreviation"):
        fit = ols("mean_ppm ~ updrs + age + C(sex) + C(site)", table).fit()
        row = found.loc[nucleus]
        low, high = fit.conf_int().loc["updrs"]
        theirs = [fit.params["updrs"], low, high, fit.tvalues["updrs"], fit.df_resid, fit.pvalues["updrs"]]
        names = ["slope", "slope_low", "slope_high", "t", "df", "p"]
        assert row[names].astype(float).to_numpy() == pytest.approx(theirs)
        assert row["n"] == 40
    p = found["p"].to_numpy()
    assert found["q"].to_numpy() == pytest.approx(
        [min(2 * p.min(), p.max()) if k == p.argmin() else p.max() for k in (0, 1)]
    )
    assert found["mixed_slope"].isna().all()


def test_partial_correlation_is_that_of_residuals(people):
    """Limits: tanh(atanh(r) -+ 1.96 / sqrt(40 - 3 - 3)) with three covariates."""
    row = correlate(people, options=OPTIONS)[0].iloc[0]
    table = people[people["abbreviation"] == "SN_L"]
    residuals = [ols(f"{name} ~ age + C(sex) + C(site)", table).fit().resid for name in ("mean_ppm", "updrs")]
    r = pearsonr(*residuals).statistic
    assert row["r"] == pytest.approx(r)
    assert r < -0.3
    limits = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / np.sqrt(34))
    assert row[["r_low", "r_high"]].astype(float).to_numpy() == pytest.approx(limits, rel=1e-6)


def test_adjusted_values_have_the_slope(people):
    relations, values = correlate(people, options=OPTIONS)
    for nucleus, table in values.groupby("abbreviation"):
        slope = relations.loc[relations["abbreviation"] == nucleus, "slope"].iloc[0]
        design = np.column_stack([table["x"] - table["x"].mean(), np.ones(len(table))])
        # the covariates are correlated with x, so that the line through adjusted values has the adjusted slope
        assert np.linalg.lstsq(design, table["value_adjusted"], rcond=None)[0][0] == pytest.approx(slope)


def test_repeated_scans_enter_a_mixed_model(people):
    rng = np.random.default_rng(8)
    later = people.assign(updrs=people["updrs"] + rng.normal(4, 3, len(people)), age=people["age"] + 2)
    later["mean_ppm"] += rng.normal(0, 0.004, len(people))
    both = pd.concat([people, later], ignore_index=True)
    row = correlate(both, options=OPTIONS)[0].iloc[0]
    assert (row["n"], row["n_scans"], row["mixed_n_scans"]) == (40, 80, 80)
    table = both[both["abbreviation"] == "SN_L"].assign(y=lambda rows: 1000 * rows["mean_ppm"])
    fit = mixedlm("y ~ updrs + age + C(sex) + C(site)", table, groups=table["participant_id"]).fit(reml=True)
    assert row["mixed_slope"] * 1000 == pytest.approx(fit.params["updrs"], rel=1e-3)
    # statsmodels takes errors from the joint Hessian, 1 % apart; these are those of generalized least squares, as lme4
    same = table["participant_id"].to_numpy()[:, None] == table["participant_id"].to_numpy()[None, :]
    covariance = fit.scale * np.eye(len(table)) + fit.cov_re.iloc[0, 0] * same
    inverse = np.linalg.inv(fit.model.exog.T @ np.linalg.solve(covariance, fit.model.exog))
    error = np.sqrt(inverse[fit.model.exog_names.index("updrs")][fit.model.exog_names.index("updrs")])
    assert row["mixed_z"] == pytest.approx(fit.params["updrs"] / error, rel=1e-3)
    assert row["mixed_z"] == pytest.approx(fit.tvalues["updrs"], rel=0.03)
    assert row["mixed_p"] == pytest.approx(2 * norm.sf(abs(fit.params["updrs"] / error)), rel=2e-2)
    limits = (fit.params["updrs"] + np.array([-1, 1]) * 1.959964 * error).tolist()
    assert [row["mixed_low"] * 1000, row["mixed_high"] * 1000] == pytest.approx(limits, rel=1e-3)


def test_missing_values_are_counted(people):
    people.loc[people["participant_id"].isin(["sub-00", "sub-01"]), "age"] = np.nan
    people.loc[people["participant_id"] == "sub-02", "updrs"] = np.nan
    row = correlate(people, options=OPTIONS)[0].iloc[0]
    assert (row["n"], row["n_missing"]) == (37, 2)


def test_pooled_groups_are_noted(people):
    people["group"] = np.where(people["participant_id"] < "sub-10", "HC", "PD")
    note = (
        "groups are pooled: PD (30), HC (10); a relation may be their difference, unless group is among the covariates"
    )
    assert correlate(people, options=OPTIONS)[0]["note"].unique().tolist() == [note]
    by_group = ClinicalOptions(variable="updrs", covariates=("age", "sex", "group"))
    row = correlate(people, options=by_group)[0].iloc[0]
    fit = ols("mean_ppm ~ updrs + age + C(sex) + C(group)", people[people["abbreviation"] == "SN_L"]).fit()
    assert (row["p"], row["note"]) == (pytest.approx(fit.pvalues["updrs"]), "")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"updrs": lambda rows: 2 * rows["age"]}, "not tested: updrs is determined by age and sex and site"),
        ({"mean_ppm": 0.1}, "not tested: 40 participants, or all values are the same"),
        ({"mean_ppm": np.nan}, "not tested: 0 participants, or all values are the same"),
    ],
)
def test_impossible_tests_have_a_note(people, change, note):
    row = correlate(people.assign(**change), options=OPTIONS)[0].iloc[0]
    assert row["note"] == note
    assert np.isnan([row["r"], row["p"], row["q"]]).all()


def test_nearly_exact_relation_has_no_limits(people):
    exact = people.assign(mean_ppm=np.round(0.003 * people["updrs"] + 0.1, 10))
    row = correlate(exact, options=ClinicalOptions(variable="updrs"))[0].iloc[0]
    assert (row["r"], row["slope"]) == (pytest.approx(1), pytest.approx(0.003))
    assert np.isnan([row["r_low"], row["r_high"]]).all()


@pytest.fixture
def visits():
    """Thirty participants with one to four scans; PD rise by 0.002, HC by 0.0005 ppm per year."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(30):
        group, age, own = ("PD", "HC")[number % 2], rng.uniform(50, 70), rng.normal(0, 0.01)
        for years in sorted(rng.choice([0, 0.25, 1, 3], size=1 + number % 4, replace=False)):
            value = 0.1 + own + 0.0005 * age + (0.002 if group == "PD" else 0.0005) * years + rng.normal(0, 0.001)
            row = {"participant_id": f"sub-{number:02d}", "abbreviation": "SN_L", "group": group, "age": age + years}
            rows.append(row | {"years": age + years, "mean_ppm": value})
    return pd.DataFrame(rows)


def test_mixed_change_agrees_with_statsmodels(visits):
    rows = mixed_changes(visits, covariates=("age",), group="group", reference="HC").set_index("group")
    start = visits.groupby("participant_id")["years"].transform("min")
    table = visits.assign(time=visits["years"] - start, age=start, y=1000 * visits["mean_ppm"])
    fit = mixedlm("y ~ time + age", table, groups=table["participant_id"]).fit(reml=True)
    row = rows.loc["all"]
    assert (row["n"], row["n_scans"]) == (30, len(visits))
    assert row["change_per_year"] * 1000 == pytest.approx(fit.params["time"], rel=1e-3)
    assert row["p"] == pytest.approx(fit.pvalues["time"], rel=2e-2)
    assert row["std_within"] * 1000 == pytest.approx(np.sqrt(fit.scale), rel=1e-2)
    assert row["std_between"] * 1000 == pytest.approx(np.sqrt(fit.cov_re.iloc[0, 0]), rel=1e-2)
    fit = mixedlm("y ~ time * C(group) + age", table, groups=table["participant_id"]).fit(reml=True)
    term = "time:C(group)[T.PD]"
    found = rows.loc["PD", ["difference", "difference_low", "difference_high", "change_per_year"]].astype(float)
    assert 1000 * found["difference"] == pytest.approx(fit.params[term], rel=1e-3)
    assert 1000 * found.iloc[1:3].to_numpy() == pytest.approx(fit.conf_int().loc[term].to_numpy(), rel=1e-2)
    assert found["change_per_year"] == pytest.approx(0.002, abs=4e-4)


def test_categories_of_participants_change_nothing(visits):
    """Each participant has another age."""
    text, categories = (
        mixed_changes(one, covariates=("age",), group="group", reference="HC")
        for one in (visits, visits.astype({"participant_id": "category"}))
    )
    pd.testing.assert_frame_equal(text, categories)


def test_session_without_a_sex_has_that_of_the_participant(people):
    later = people.assign(updrs=people["updrs"] + np.arange(80) % 7, mean_ppm=people["mean_ppm"] + 0.001)
    expected, found = (
        correlate(pd.concat([people, other], ignore_index=True), options=OPTIONS)[0]
        for other in (later, later.assign(sex=None))
    )
    assert expected["mixed_p"].notna().all()
    pd.testing.assert_frame_equal(found, expected)


def test_session_without_a_group_has_that_of_the_participant(visits):
    is_first = ~visits["participant_id"].duplicated()
    options: Any = {"covariates": ("age",), "group": "group", "reference": "HC"}
    found = mixed_changes(visits.assign(group=visits["group"].where(is_first)), **options)
    pd.testing.assert_frame_equal(found, mixed_changes(visits, **options))


def test_redundant_covariates_do_not_prevent_mixed_models(visits, people):
    """A scanner per site says no more than the site; a site per group leaves the difference of the changes."""
    later = people.assign(updrs=people["updrs"] + np.arange(80) % 7, mean_ppm=people["mean_ppm"] + 0.001)
    both = pd.concat([people, later], ignore_index=True).assign(scanner=lambda rows: "scanner of " + rows["site"])
    wider = ClinicalOptions(variable="updrs", covariates=(*OPTIONS.covariates, "scanner"))
    expected, found = (correlate(both, options=options)[0] for options in (OPTIONS, wider))
    assert found["mixed_slope"].to_numpy() == pytest.approx(expected["mixed_slope"].to_numpy())
    assert found["mixed_p"].to_numpy() == pytest.approx(expected["mixed_p"].to_numpy())

    visits["site"] = visits["group"].map({"HC": "A", "PD": "B"})
    rows = mixed_changes(visits, covariates=("site", "age"), group="group", reference="HC").set_index("group")
    table = visits.assign(start=visits.groupby("participant_id")["years"].transform("min"), y=1000 * visits["mean_ppm"])
    table["time"] = table["years"] - table["start"]
    fit = mixedlm("y ~ time * C(group) + start", table, groups=table["participant_id"]).fit(reml=True)
    change = rows.loc["PD", ["difference"]].astype(float)
    assert 1000 * change["difference"] == pytest.approx(fit.params["time:C(group)[T.PD]"], rel=1e-3)


def test_groups_too_small_for_a_change_have_no_difference(visits):
    """A difference of the slope of a single participant would have the error of scans, not of people."""
    visits.loc[visits["participant_id"].isin(["sub-03", "sub-07"]), "group"] = "MSA"
    rows = mixed_changes(visits, covariates=("age",), group="group", reference="HC").set_index("group")
    assert rows.loc["MSA", "note"] == "not fitted: too few scans, or no variation"
    assert rows.loc["MSA", ["change_per_year", "difference", "p_difference"]].isna().all()
    assert rows.loc["PD", ["p_difference"]].astype(float).to_numpy() < 0.05
    reverse = mixed_changes(visits, covariates=("age",), group="group", reference="MSA")
    assert reverse["difference"].isna().all()


def test_no_variance_between_participants_is_least_squares():
    """Values whose scatter within participants exceeds that of their means."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), rng.normal(size=60)
    y += np.tile([-3.0, 3.0], 30)
    fit = fit_random_intercept(y, x[:, None], pd.Series(np.repeat(np.arange(30), 2)))
    assert fit is not None
    least = ols("y ~ x", pd.DataFrame({"x": x, "y": y})).fit()
    assert fit.std_between == 0
    assert (fit.slopes[0], fit.errors[0]) == pytest.approx((least.params["x"], least.bse["x"]))
