"""Differences between groups and changes per year, against statsmodels and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import nct, t
from statsmodels.formula.api import ols, wls

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.group_tests import compare_changes, compare_groups
from bids_dgmseg.stats.regression import robust_contrasts

AGES = [50.0, 61, 55, 43, 58, 49, 66]
FORMULA = "mean_ppm ~ age + C(sex) + C(group)"


def cohort(values: Any, groups: Any, abbreviation: str = "SN_L", **columns: Any) -> pd.DataFrame:
    ids = [f"sub-{number:02d}" for number in range(len(values))]
    return pd.DataFrame(
        {"participant_id": ids, "abbreviation": abbreviation, "mean_ppm": values, "group": groups} | columns
    )


@pytest.fixture
def small() -> pd.DataFrame:
    return cohort([0.10, 0.11, 0.12, 0.13, 0.14, 0.15, 0.16], ["HC"] * 4 + ["PD"] * 3)


@pytest.fixture
def big() -> pd.DataFrame:
    """Thirty controls, twenty patients with twice their spread, twelve others; with ages, sexes and three nuclei."""
    rng = np.random.default_rng(4)
    groups = ["HC"] * 30 + ["PD"] * 20 + ["PSP"] * 12
    age, sex = rng.uniform(40, 80, 62), rng.choice(["F", "M"], 62)
    shift, spread = (pd.Series(groups).map(values).to_numpy() for values in ({"HC": 0, "PD": 0.02, "PSP": 0.05},) * 2)
    tables = [
        cohort(0.05 + 0.001 * age + share * shift + rng.normal(0, 0.01 + spread / 2), groups, name, age=age, sex=sex)
        for name, share in (("SN_L", 1), ("RN_L", 0.2), ("DN_L", 0))
    ]
    return pd.concat(tables, ignore_index=True)


def test_differences_agree_with_statsmodels(big):
    """Adjusted means are predictions of all participants as if each were in the group, averaged."""
    rows = compare_groups(big, reference="HC")[0]
    for nucleus, table in big.groupby("abbreviation"):
        fit = ols(FORMULA, table).fit(cov_type="HC3", use_t=True)
        expected = {name: fit.predict(table.assign(group=name)).mean() for name in ("HC", "PD", "PSP")}
        for row in rows[rows["abbreviation"] == nucleus].to_dict("records"):
            term = f"C(group)[T.{row['group']}]"
            difference, error = fit.params[term], fit.bse[term]
            assert (row["difference"], row["t"]) == pytest.approx((difference, difference / error))
            assert row["std"] == pytest.approx(np.sqrt(fit.mse_resid))
            half = t.ppf(0.975, row["df"]) * error
            limits = (difference - half, difference + half, 2 * t.sf(abs(row["t"]), row["df"]))
            assert (row["difference_low"], row["difference_high"], row["p"]) == pytest.approx(limits)
            assert (row["mean_reference"], row["mean_group"]) == pytest.approx((expected["HC"], expected[row["group"]]))
            means = np.array([1, 0, 0, (table["sex"] == "M").mean(), table["age"].mean()])
            order = ["Intercept", "C(group)[T.PD]", "C(group)[T.PSP]", "C(sex)[T.M]", "age"]
            assert row["se_reference"] == pytest.approx(np.sqrt(means @ fit.cov_params().loc[order, order] @ means))


def test_two_groups_by_hand(small):
    """Means 0.115, 0.15; with n participants and squares S of their residuals, HC3 has S / (n - 1)^2 for each.

    Degrees of freedom are (sum 1/(n - 1))^2 / sum 1/(n - 1)^3.
    """
    row = compare_groups(small, reference="HC", covariates=())[0].iloc[0]
    error = np.sqrt(5e-4 / 9 + 2e-4 / 4)
    df = (1 / 3 + 1 / 2) ** 2 / (1 / 27 + 1 / 8)
    assert (row["difference"], row["t"], row["df"]) == pytest.approx((0.035, 0.035 / error, df))
    std = np.sqrt(7e-4 / 5)  # J(5) = gamma(2.5) / sqrt(2.5) gamma(2)
    assert row["hedges_g"] == pytest.approx(0.035 / std * (0.75 * np.sqrt(np.pi)) / np.sqrt(2.5))
    for end, quantile in (("low", 0.975), ("high", 0.025)):
        centre = row[f"hedges_g_{end}"] * std / error
        assert nct.cdf(row["t"], df, centre) == pytest.approx(quantile, abs=1e-6)
    assert (row["n_reference"], row["n_group"], row["n_scans"], row["n_missing"]) == (4, 3, 7, 0)


def test_repeated_scans_and_missing_values_are_counted(small):
    again = small[small["participant_id"] == "sub-06"].assign(mean_ppm=0.18)
    row = compare_groups(pd.concat([small, again]), reference="HC", covariates=())[0].iloc[0]
    assert row["mean_group"] == pytest.approx((0.14 + 0.15 + 0.17) / 3)
    assert (row["n_group"], row["n_scans"]) == (3, 8)
    small.loc[0, "mean_ppm"] = np.nan
    row = compare_groups(small, reference="HC", covariates=())[0].iloc[0]
    assert (row["n_reference"], row["n_group"], row["n_missing"]) == (3, 3, 1)


def test_contradicting_scans_are_rejected(small, big):
    again = small[small["participant_id"] == "sub-06"].assign(group="HC")
    with pytest.raises(InputError, match=r"^sub-06: several values of group \(PD, HC\); each participant"):
        compare_groups(pd.concat([small, again]), reference="HC", covariates=())
    with pytest.raises(InputError, match=r"^sub-00: several values of sex"):
        compare_groups(pd.concat([big, big.head(1).assign(sex="?")]), reference="HC")
    with pytest.raises(InputError, match=r"^participants.tsv: no group to compare with MSA \(groups: HC, PD\)"):
        compare_groups(small, reference="MSA", covariates=())


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (
            {"age": [50.0] * 4 + [60.0] * 3},
            "group and age are confounded (all PD have age 60.0): add participants or leave age out of the covariates",
        ),
        (
            {"mean_ppm": [0.1, 0.2, 0.3, 0.4, 0.2, np.nan, np.nan]},
            "not tested: 4 and 1 participants with all covariates, a group needs 3",
        ),
        ({"mean_ppm": np.nan}, "not tested: 0 and 0 participants with all covariates, a group needs 3"),
        ({"mean_ppm": [0.1] * 4 + [0.2] * 3}, "not tested: the values do not vary beyond groups and covariates"),
    ],
    ids=["age equals group", "few", "no values", "no spread"],
)
def test_missing_test_has_a_note(small, change, note):
    row = compare_groups(small.assign(age=AGES).assign(**change), reference="HC", covariates=("age",))[0].iloc[0]
    assert row["note"] == note
    assert np.isnan([row["difference"], row["p"], row["hedges_g"]]).all()


def by_site(counts: dict[str, dict[str, int]]) -> pd.DataFrame:
    """Participants of each group (site → group → number), shifted by 0.02 ppm per site, without a group effect."""
    people = [(site, group) for site, groups in counts.items() for group, n in groups.items() for _ in range(n)]
    sites, groups = map(list, zip(*people, strict=True))
    rng = np.random.default_rng(3)
    shift = 0.02 * pd.factorize(np.array(sites))[0]
    age, sex = rng.uniform(40, 80, len(people)), rng.choice(["F", "M"], len(people))
    return cohort(shift + 0.001 * age + rng.normal(0, 0.01, len(people)), groups, site=sites, age=age, sex=sex)


SITES: Any = {"reference": "HC", "covariates": ("age", "sex", "site")}


def test_confounded_group_leaves_others_their_test():
    """PSP are at their own site; PD and HC share two and are compared as without PSP, except for slopes and spread."""
    table = by_site({"A": {"HC": 12, "PD": 8}, "B": {"HC": 9, "PD": 12}, "C": {"PSP": 15}})
    both, alone = (compare_groups(rows, **SITES)[0].iloc[0] for rows in (table, table[table["group"] != "PSP"]))
    assert both["difference"] == pytest.approx(alone["difference"], abs=2e-3)
    assert (both["p"] < 1, np.isnan(both["mean_group"])) == (True, True)
    note = compare_groups(table, **SITES)[0]["note"].iloc[1]
    assert note.startswith("group and site are confounded (all PSP have site C): add participants or leave site out")


def test_participant_alone_at_a_site_changes_nothing():
    table = by_site({"A": {"HC": 12, "PD": 8}, "B": {"HC": 9, "PD": 12}, "C": {"PD": 1}})
    row, expected = (compare_groups(rows, **SITES)[0].iloc[0] for rows in (table, table[table["site"] != "C"]))
    assert (row["n_missing"], expected["n_missing"]) == (1, 0)
    pd.testing.assert_series_equal(row.drop("n_missing"), expected.drop("n_missing"))


def test_small_group_changes_nothing_for_others(big):
    whole = compare_groups(big, reference="HC")[0]
    odd = pd.concat([big, big.iloc[[0, 62, 124]].assign(participant_id="sub-99", group="pd?")])
    rows = compare_groups(odd, reference="HC")[0]
    assert rows.loc[rows["group"] == "pd?", "difference"].isna().all()
    pd.testing.assert_frame_equal(rows[rows["group"] != "pd?"].reset_index(drop=True), whole)


def visits(n: int, rng: np.random.Generator, **columns: Any) -> pd.DataFrame:
    """Two or three visits of each of `n` participants at uneven times, with slopes that differ."""
    rows = [
        (f"sub-{number}", 50.0 + year, 0.1 + 0.002 * year * (number % 3) + rng.normal(0, 0.003))
        for number in range(n)
        for year in [0, 1 + number % 4, 6][: 2 + number % 2]
    ]
    table = pd.DataFrame(rows, columns=["participant_id", "age", "mean_ppm"])
    return table.assign(abbreviation="RN_L", **columns)


def test_equal_visits_have_the_mean_slope():
    """0.01, 0.02, 0.03, 0.04, 0.05 per year: mean 0.03, squares S = 0.001, HC3 error √S / (n - 1), 4 df."""
    rows = [(f"sub-{k}", 50.0 + year, 0.1 + 0.01 * k * year) for k in range(1, 6) for year in (0, 2)]
    table = pd.DataFrame(rows, columns=["participant_id", "age", "mean_ppm"]).assign(abbreviation="RN_L")
    row: Any = compare_changes(table).loc[0]
    half = t.ppf(0.975, 4) * np.sqrt(0.001) / 4
    assert (row["change_low"], row["change_per_year"], row["change_high"]) == pytest.approx(
        (0.03 - half, 0.03, 0.03 + half)
    )
    assert (row["n"], row["n_scans"], row["years_median"], row["df"]) == (5, 10, 2, pytest.approx(4))
    assert row["p"] == pytest.approx(2 * t.sf(0.03 / np.sqrt(0.001) * 4, 4))


def test_weighted_contrasts_agree_with_statsmodels():
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"y": rng.normal(size=30), "x": rng.normal(size=30), "w": rng.uniform(0.1, 3, 30)})
    fit = wls("y ~ x", table, weights=table["w"]).fit(cov_type="HC3")
    design, weights = np.column_stack([np.ones(30), table["x"]]), table["w"].to_numpy()
    values, errors, df = robust_contrasts(table["y"].to_numpy(), design, np.eye(2), weights=weights)
    assert (*values, *errors) == pytest.approx((*fit.params, *fit.bse))
    x = design * np.sqrt(weights)[:, None]  # degrees of freedom by the matrices of the definition
    shares = np.linalg.pinv(x)
    residual = np.eye(30) - x @ shares
    for share, freedom in zip(shares, df, strict=True):
        product = residual @ np.diag((share / np.diag(residual)) ** 2)
        assert freedom == pytest.approx(np.trace(product) ** 2 / np.trace(product @ product))


def test_changes_are_compared_between_groups():
    """The difference of the groups is that of their rows; people at two sites or with one scan are left out."""
    rng = np.random.default_rng(1)
    table = visits(24, rng)
    number = table["participant_id"].str.removeprefix("sub-").astype(int)
    table = table.assign(group=np.where(number < 10, "HC", np.where(number < 21, "PD", "PSP")), site="A")
    table.loc[(number == 9) & (table["age"] > 50), "site"] = "B"
    table = table[(number != 8) | (table["age"] == 50)]
    rows = compare_changes(table, reference="HC").set_index("group")
    assert rows["n"].to_dict() == {"all": 22, "HC": 8, "PD": 11, "PSP": 3}
    patients, controls = (dict(rows.loc[name]) for name in ("PD", "HC"))
    expected = patients["change_per_year"] - controls["change_per_year"]
    assert patients["difference"] == pytest.approx(expected)
    assert patients["difference_low"] < expected < patients["difference_high"]
    assert 0 < patients["p_difference"] < 1
    assert patients["p"] == pytest.approx(2 * t.sf(abs(patients["t"]), patients["df"]))
    assert rows.loc["PSP", "note"] == "not tested: 3 changes, or all the same (5 are needed)"
    assert rows.loc["PSP", ["change_low", "p", "difference"]].isna().all()
    named = compare_changes(table.assign(group=table["group"].replace("HC", "all")), reference="all")
    assert named["group"].tolist() == ["all groups", "all", "PD", "PSP"]


def test_precise_slopes_have_more_weight():
    """Fifteen people over six years without a change, five over half a year with noise."""
    rng = np.random.default_rng(8)
    rows = []
    for number in range(20):
        years = 6 if number < 15 else 0.5
        rows += [(f"sub-{number}", 50 + year, rng.normal(0.1, 0.003)) for year in (0, years / 2, years)]
    table = pd.DataFrame(rows, columns=["participant_id", "age", "mean_ppm"]).assign(abbreviation="RN_L")
    row: Any = compare_changes(table).loc[0]
    assert row["change_high"] - row["change_low"] < 6 * 0.003 / np.sqrt(
        15 * 18
    )  # of the long series alone: 2 · 2.1; of equal weights: 21


def test_single_sessions_are_rejected():
    with pytest.raises(InputError, match=r"no participant has scans at two time points \(age\); give each session"):
        compare_changes(visits(6, np.random.default_rng(0)).drop_duplicates("participant_id"))
