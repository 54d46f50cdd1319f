from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f, nct, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.group_tests import ComparisonOptions, ancova, change_per_year, compare_groups

CONTROLS = [0.10, 0.11, 0.12, 0.13]
PATIENTS = [0.14, 0.15, 0.16]
OPTIONS = ComparisonOptions(reference="HC")


def cohort(values: Any, groups: Any, abbreviation: str = "SN_L", **columns: Any) -> pd.DataFrame:
    ids = [f"sub-{number:02d}" for number in range(len(values))]
    return pd.DataFrame(
        {"participant_id": ids, "abbreviation": abbreviation, "mean_ppm": values, "group": groups} | columns
    )


@pytest.fixture
def small() -> pd.DataFrame:
    return cohort(CONTROLS + PATIENTS, ["HC"] * 4 + ["PD"] * 3)


@pytest.fixture
def big() -> pd.DataFrame:
    """Thirty controls, twenty patients, twelve others with ages, sexes and three nuclei."""
    rng = np.random.default_rng(4)
    groups = ["HC"] * 30 + ["PD"] * 20 + ["PSP"] * 12
    age, sex = rng.uniform(40, 80, 62), rng.choice(["F", "M"], 62)
    shift = pd.Series(groups).map({"HC": 0, "PD": 0.02, "PSP": 0.05}).to_numpy()
    tables = [
        cohort(0.05 + 0.001 * age + share * shift + rng.normal(0, 0.01, 62), groups, name, age=age, sex=sex)
        for name, share in (("SN_L", 1), ("RN_L", 0.2), ("DN_L", 0))
    ]
    return pd.concat(tables, ignore_index=True)


def test_group_comparison_by_hand(small):
    """Means 0.115, 0.15; variances 5e-4/3, 1e-4; J(5) = gamma(2.5) / sqrt(2.5) gamma(2)."""
    row = compare_groups(small, options=OPTIONS).iloc[0]
    assert row["difference"] == pytest.approx(0.035)
    error = np.sqrt(5e-4 / 12 + 1e-4 / 3)
    assert row["t"] == pytest.approx(0.035 / error)
    assert row["df"] == pytest.approx(error**4 / ((5e-4 / 12) ** 2 / 3 + (1e-4 / 3) ** 2 / 2))
    width = t.ppf(0.975, row["df"]) * error
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((0.035 - width, 0.035 + width))
    assert row["p_t"] == pytest.approx(2 * t.sf(0.035 / error, row["df"]))
    pooled = np.sqrt((5e-4 + 2e-4) / 5)
    assert row["hedges_g"] == pytest.approx(0.035 / pooled * (0.75 * np.sqrt(np.pi)) / np.sqrt(2.5))
    assert (row["n_reference"], row["n_group"], row["n_scans"], row["n_missing"]) == (4, 3, 7, 0)


def test_repeated_scans_and_missing_values_are_counted(small):
    again = small[small["participant_id"] == "sub-06"].assign(mean_ppm=0.18)
    row = compare_groups(pd.concat([small, again]), options=OPTIONS).iloc[0]
    assert row["mean_group"] == pytest.approx((0.14 + 0.15 + 0.17) / 3)
    assert (row["n_group"], row["n_scans"]) == (3, 8)
    small.loc[0, "mean_ppm"] = np.nan
    small.loc[4, "group"] = None
    row = compare_groups(small, options=OPTIONS).iloc[0]
    assert (row["n_reference"], row["n_group"], row["n_missing"], row["n_no_group"]) == (3, 2, 1, 1)


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([0.1, 0.2, np.nan, np.nan, 0.3, np.nan, np.nan], "not compared: 2 and 1 participants, a group needs 2"),
        ([0.1] * 4 + [0.2] * 3, "not tested: the values do not vary within the groups"),
    ],
    ids=["few", "no spread"],
)
def test_missing_test_has_a_note(values, note):
    row = compare_groups(cohort(values, ["HC"] * 4 + ["PD"] * 3), options=OPTIONS).iloc[0]
    assert row["note"] == note
    assert np.isnan([row["p_t"], row["hedges_g"]]).all()


def test_contradicting_scans_are_rejected(small, big):
    again = small[small["participant_id"] == "sub-06"].assign(group="HC")
    with pytest.raises(InputError, match=r"^sub-06: several values of group \(PD, HC\); each participant"):
        compare_groups(pd.concat([small, again]), options=OPTIONS)
    with pytest.raises(InputError, match=r"^sub-00: several values of sex"):
        ancova(pd.concat([big, big.head(1).assign(sex="?")]), options=OPTIONS)


def test_ancova_agrees_with_normal_equations(big):
    sn = big[big["abbreviation"] == "SN_L"]
    columns = [np.ones(62), sn["age"], sn["sex"] == "M", sn["group"] == "PD", sn["group"] == "PSP"]
    design, y = np.column_stack(columns).astype(float), sn["mean_ppm"].to_numpy()
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ y
    rss, rss_without = (((y - x @ np.linalg.lstsq(x, y)[0]) ** 2).sum() for x in (design, design[:, :3]))
    f_groups = (rss_without - rss) / 2 / (rss / 57)
    for row, term in zip(ancova(big, options=OPTIONS).head(2).to_dict("records"), (3, 4), strict=True):
        error = np.sqrt(rss / 57 * inverse[term, term])
        low, high = solution[term] + t.ppf([0.025, 0.975], 57) * error
        statistic = solution[term] / error
        ours = [row[key] for key in ("difference", "difference_low", "difference_high", "t", "p", "df")]
        assert ours == pytest.approx([solution[term], low, high, statistic, 2 * t.sf(abs(statistic), 57), 57])
        ours = [row[key] for key in ("f_groups", "df_groups", "p_groups")]
        assert ours == pytest.approx([f_groups, 2, f.sf(f_groups, 2, 57)])
        assert row["partial_eta2"] == pytest.approx(1 - rss / rss_without)
        assert row["std"] == pytest.approx(np.sqrt(rss / 57))


BY_SITE = ComparisonOptions(reference="HC", covariates=("age", "sex", "site"), site="site")


def by_site(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Participants of each group (site → group → number), shifted by 0.02 ppm per site, without a group effect."""
    people = [(site, group) for site, groups in counts.items() for group, n in groups.items() for _ in range(n)]
    sites, groups = map(list, zip(*people, strict=True))
    rng = np.random.default_rng(3)
    shift = 0.02 * pd.factorize(np.array(sites))[0]
    age, sex = rng.uniform(40, 80, len(people)), rng.choice(["F", "M"], len(people))
    return cohort(shift + 0.001 * age + rng.normal(0, 0.01, len(people)), groups, site=sites, age=age, sex=sex)


UNEVEN = {"A": {"HC": 18, "PD": 2}, "B": {"HC": 10, "PD": 10}, "C": {"HC": 2, "PD": 18}}


@pytest.mark.parametrize(
    ("counts", "options", "note"),
    [
        (UNEVEN, BY_SITE, "groups are unbalanced over sites (column site): use the ancova_ columns"),
        (
            UNEVEN,
            ComparisonOptions(reference="HC", site="site", site_from="output folder"),
            "groups are unbalanced over sites (output folder): name site among the covariates and use the ancova_ "
            "columns",
        ),
        ({"A": {"HC": 10, "PD": 8}, "B": {"HC": 9, "PD": 12}}, BY_SITE, ""),
        ({"A": {"HC": 10, "PD": 8}}, BY_SITE, ""),
    ],
    ids=["unbalanced", "without site", "balanced", "one site"],
)
def test_unbalanced_sites_are_noted(counts, options, note):
    """Chi-square of 18:2, 10:10, 2:18 is 25.6 (p 3e-6), of 10:8, 9:12 it is 0.62 (p 0.43)."""
    row = compare_groups(by_site(counts), options=options).iloc[0]
    assert row["note"] == note
    assert row["p_t"] <= 1


CONFOUNDED = {"A": {"HC": 12}, "B": {"PD": 12}}


def test_group_of_one_site_is_not_tested():
    note = "group and site are confounded (column site, all PD are at site B): compare within sites or add HC there"
    row, adjusted = (test(by_site(CONFOUNDED), options=BY_SITE).iloc[0] for test in (compare_groups, ancova))
    assert row["note"] == adjusted["note"] == note
    assert row[["t", "p_t", "hedges_g", "difference_low"]].isna().all()
    assert row["difference"] == pytest.approx(row["mean_group"] - row["mean_reference"])
    assert adjusted[["difference", "p", "p_groups"]].isna().all()
    ignored = compare_groups(by_site(CONFOUNDED), options=ComparisonOptions(reference="HC", site="site")).iloc[0]
    assert ignored["note"] == note  # the user named other covariates, and gets the test
    assert ignored["p_t"] < 0.05


def test_confounded_group_leaves_others_their_test():
    """PSP are at their own site; PD and HC share two and are compared as without PSP, except for slopes and spread."""
    table = by_site({"A": {"HC": 12, "PD": 8}, "B": {"HC": 9, "PD": 12}, "C": {"PSP": 15}})
    both, alone = (ancova(rows, options=BY_SITE).iloc[0] for rows in (table, table[table["group"] != "PSP"]))
    assert both["difference"] == pytest.approx(alone["difference"], abs=2e-3)
    assert both["df"] == alone["df"] + 14
    assert np.isnan(both["p_groups"])
    assert "all PSP are at site C" in ancova(table, options=BY_SITE)["note"].iloc[1]


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (
            {"age": [50.0] * 4 + [60.0] * 3},
            "group and age are confounded (all PD have age 60.0): add participants or leave age out of the covariates",
        ),
        (
            {"mean_ppm": CONTROLS + [np.nan] * 3},
            "not fitted: 4 and 0 participants with all covariates, a group needs 2",
        ),
        (
            {"mean_ppm": [0.1, np.nan, np.nan, np.nan, 0.2, 0.3, np.nan]},
            "not fitted: 1 and 2 participants with all covariates, a group needs 2",
        ),
    ],
    ids=["age equals group", "one group", "few"],
)
def test_failed_ancova_has_a_note(small, change, note):
    table = small.assign(age=[50.0, 61, 55, 43, 58, 49, 66]).assign(**change)
    row = ancova(table, options=ComparisonOptions(reference="HC", covariates=("age",))).iloc[0]
    assert row["note"] == note
    assert np.isnan([row["difference"], row["p"]]).all()


def test_adjusted_means_agree_with_statsmodels(big):
    """Predictions of all participants as if each were in the group, averaged."""
    from statsmodels.formula.api import ols

    rows = ancova(big, options=OPTIONS)
    for nucleus, table in big.groupby("abbreviation"):
        fit = ols("mean_ppm ~ age + C(sex) + C(group)", table).fit()
        expected = {name: fit.predict(table.assign(group=name)).mean() for name in ("HC", "PD", "PSP")}
        for row in rows[rows["abbreviation"] == nucleus].to_dict("records"):
            assert row["mean_reference"] == pytest.approx(expected["HC"])
            assert row["mean_group"] == pytest.approx(expected[row["group"]])


def test_adjusted_difference_is_standardized_by_residual_spread(big):
    """g = J(58) b / s; at its limits, the noncentral t distribution has the observed t at 97.5 and 2.5 %."""
    from statsmodels.formula.api import ols

    table = big[big["abbreviation"] == "SN_L"]
    fit = ols("mean_ppm ~ age + C(sex) + C(group)", table).fit()
    row = ancova(table, options=OPTIONS).iloc[0]
    b, std, correction = fit.params["C(group)[T.PD]"], np.sqrt(fit.mse_resid), 1 - 3 / (4 * 57 - 1)
    assert fit.df_resid == 57
    assert row["hedges_g"] == pytest.approx(correction * b / std, rel=1e-4)  # the usual approximation of J
    unit = fit.bse["C(group)[T.PD]"] / std * row["hedges_g"] / (b / std)
    for end, quantile in (("low", 0.975), ("high", 0.025)):
        assert nct.cdf(row["t"], 57, row[f"hedges_g_{end}"] / unit) == pytest.approx(quantile, abs=1e-6)


def test_group_of_one_is_not_tested(big):
    """Its participant changes nothing for the others."""
    whole = ancova(big, options=OPTIONS)
    odd = pd.concat([big, big.iloc[[0, 62, 124]].assign(participant_id="sub-99", group="pd?")])
    rows = ancova(odd, options=OPTIONS)
    alone = rows[rows["group"] == "pd?"]
    assert alone["note"].unique().tolist() == ["not compared: 1 participant(s), a group needs 2"]
    assert alone[["difference", "p", "p_groups"]].isna().all(axis=None)
    others = rows[rows["group"] != "pd?"].reset_index(drop=True)
    numbers = ["difference", "p", "df", "mean_reference"]
    pd.testing.assert_frame_equal(others[numbers], whole[numbers], check_dtype=False)


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


def test_group_named_all_is_not_everybody():
    groups = dict(zip(TWO["participant_id"].unique(), ("all", "PD"), strict=True))
    change = change_per_year(TWO.assign(group=TWO["participant_id"].map(groups)), reference="all")
    assert change.summary["group"].tolist() == ["all groups", "all", "PD"]
