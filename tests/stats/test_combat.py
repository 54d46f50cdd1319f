from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.combat import fit_combat, sites_apart

NUCLEI = ["DN_L", "GP_L", "PUT_L", "RN_L", "SN_L"]
TABLE = pd.read_csv(Path(__file__).with_name("neurocombat.tsv"), sep="\t", index_col="participant")
"""Fifteen people, and neuroCombat 0.2.12 (numpy 1.26) on them, convergence tolerance 1e-12 instead of 1e-4."""
RAW, NEUROCOMBAT = TABLE[NUCLEI], TABLE[[f"{name}_harmonized" for name in NUCLEI]].to_numpy()


@pytest.fixture
def raw() -> pd.DataFrame:
    return RAW.copy()


@pytest.fixture
def site() -> Any:
    return TABLE["site"]


@pytest.fixture
def covariates() -> pd.DataFrame:
    return TABLE[["age", "sex"]]


def harmonize(values: pd.DataFrame, *, site: Any, covariates: Any = None, **options: Any) -> tuple[Any, Any]:
    """Return the harmonized values, and the table of the sites by site and nucleus."""
    covariates = pd.DataFrame(index=values.index) if covariates is None else covariates
    model = fit_combat(values, site=site, covariates=covariates, **options)
    harmonized = model.apply(values, site=site, covariates=covariates)
    return harmonized, model.describe_sites(harmonized, site).set_index(["site", "nucleus"])


def test_combat_agrees_with_neurocombat(raw, site, covariates):
    before = raw.copy()
    harmonized, _ = harmonize(raw, site=site, covariates=covariates)
    assert np.abs(harmonized.to_numpy() - NEUROCOMBAT).max() < 1e-9  # printed to 1e-10
    pd.testing.assert_frame_equal(raw, before)
    twice, _ = harmonize(raw, site=site, covariates=covariates.assign(months=12 * covariates["age"]))  # duplicate
    assert np.abs(twice.to_numpy() - NEUROCOMBAT).max() < 1e-9


def test_repeated_scans_count_once(raw, site, covariates):
    """Two scans of five participants with the same means as one: estimates are unchanged."""
    changes = np.random.default_rng(2).normal(0, 0.002, (5, 5))
    again = pd.concat([raw, raw[:5] - changes]).set_axis(range(20))
    again.iloc[:5] += changes
    places = [*range(15), *range(5)]
    harmonized, sites = harmonize(
        again,
        site=site.iloc[places].set_axis(range(20)),
        covariates=covariates.iloc[places].set_axis(range(20)),
        participant=pd.Series(raw.index[places]),
    )
    once, sites_once = harmonize(raw, site=site, covariates=covariates)
    means = (harmonized[:5] + harmonized[15:].set_axis(range(5))) / 2
    assert means.to_numpy() == pytest.approx(once[:5].to_numpy())
    assert harmonized[5:15].to_numpy() == pytest.approx(once[5:].to_numpy())
    pd.testing.assert_frame_equal(sites.drop(columns="n"), sites_once.drop(columns="n"))
    assert sites.loc[("A", "DN_L"), ["n", "n_participants"]].tolist() == [10, 5]


@pytest.mark.parametrize(
    ("ages", "apart"),
    [
        pytest.param({"A": (18, 45), "B": (50, 85)}, ["A", "B"], id="apart"),
        pytest.param({"A": (18, 45), "B": (50, 85), "C": (20, 80)}, [], id="bridged"),
        pytest.param({"A": (18, 30), "B": (70, 85), "C": (40, 55)}, ["A", "B", "C"], id="between"),
    ],
)
def test_sites_of_other_ages_are_found(ages, apart):
    age = np.concatenate([np.linspace(low, high, 20) for low, high in ages.values()])
    assert sites_apart(pd.Series(age), pd.Series(np.repeat(list(ages), 20))) == apart


def test_missing_value_hardly_affects_other_scans(raw, site, covariates):
    holed = raw.copy()
    holed.loc["sub-11", "GP_L"] = np.nan
    harmonized, sites = harmonize(holed, site=site, covariates=covariates)
    missing = harmonized.isna()
    assert missing.to_numpy().sum() == 1
    assert missing.loc["sub-11", "GP_L"]
    assert sites.loc[("C", "GP_L"), ["n", "n_unused"]].tolist() == [5, 1]
    assert np.nanmax(np.abs(harmonized.to_numpy() - NEUROCOMBAT)) < 0.01


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda raw, site: raw["DN_L"].where(site == "A"), "only one site has enough data"),
        (lambda raw, site: 0 * raw["DN_L"] + 0.1, "values do not vary beyond sites and covariates"),
    ],
    ids=["one site", "constant"],
)
def test_nucleus_not_harmonized_has_a_note(raw, site, change, note):
    harmonized, sites = harmonize(raw.assign(DN_L=change(raw, site)), site=site)
    assert harmonized["DN_L"].isna().all()
    assert set(sites.xs("DN_L", level="nucleus")["note"]) == {f"not harmonized: {note}"}
    without, _ = harmonize(raw.drop(columns="DN_L"), site=site)
    pd.testing.assert_frame_equal(harmonized.drop(columns="DN_L"), without)


def test_single_sites_and_nuclei_are_rejected(raw, site):
    with pytest.raises(InputError, match=r"only 0 nuclei can be harmonized \(only one site has enough data\)"):
        fit_combat(raw, site=site.where(site == "A", "A"))
    with pytest.raises(InputError, match=r"only 1 nuclei can be harmonized \(no more columns\), ComBat needs 2"):
        fit_combat(raw[["DN_L"]], site=site)


def test_confounded_covariate_is_rejected(raw, site):
    covariates = pd.DataFrame({"sex": ["F", "M", "F"] * 5, "group": np.where(site == "A", "PD", "HC")})
    message = r"^participants.tsv: group and site are confounded .*; compare within sites$"
    with pytest.raises(InputError, match=message):
        fit_combat(raw, site=site, covariates=covariates)


EXPECTED = {
    0: [0.1241837951, 0.1340589393, 0.0682013136, 0.1826096500, 0.1526191916],
    7: [0.1172578623, 0.1427453157, 0.0556386010, 0.1118710794, 0.1283854340],
    20: [0.1060972845, 0.1514109002, 0.0546175158, 0.1211971019, 0.1242699147],
}
"""neuroHarmonize 2.5.2, harmonizationApply at sites A, B, C in turn; EB tolerance 1e-13 instead of 1e-4."""


def test_other_scans_of_the_sites_agree_with_neuroharmonize(raw, site, covariates):
    model = fit_combat(raw, site=site, covariates=covariates)
    values = pd.DataFrame(np.vstack([1.1 * np.array(RAW)[::-1] + 0.003, 0.9 * np.array(RAW) + 0.001]), columns=NUCLEI)
    ages, sexes = (TABLE[name].to_numpy() for name in ("age", "sex"))
    others = pd.DataFrame({"age": [*(ages[::-1] + 2), *(ages - 3)], "sex": [*sexes[::-1], *sexes]})
    result = model.apply(values, site=pd.Series(list("ABC") * 10), covariates=others)
    assert np.abs(result.loc[list(EXPECTED)].to_numpy() - list(EXPECTED.values())).max() < 1e-9
    new = pd.Series(list("ABD") * 10)
    at_others = model.apply(values, site=new, covariates=others)
    assert at_others.isna().all(axis=1).tolist() == (new == "D").tolist()
    notes = model.describe_sites(at_others, new).set_index("site")["note"]
    assert set(notes["D"]) == {"not harmonized: site not in the fit"}
    unknown = model.apply(values, site=pd.Series(list("ABC") * 10), covariates=others.assign(sex="O"))
    assert unknown.isna().all(axis=None)
