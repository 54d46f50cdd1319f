"""A saved ComBat on other scans, and longitudinal ComBat, against independent implementations."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from statsmodels.regression.mixed_linear_model import MixedLM

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.combat import harmonize
from bids_dgmseg.stats.combat_model import add_sites
from bids_dgmseg.stats.long_table import natural_spline
from tests.stats.test_combat import AGE, NUCLEI, RAW, SEX, SITE

KNOWN = {
    0: [0.1241837951, 0.1340589393, 0.0682013136, 0.1826096500, 0.1526191916],
    7: [0.1172578623, 0.1427453157, 0.0556386010, 0.1118710794, 0.1283854340],
    20: [0.1060972845, 0.1514109002, 0.0546175158, 0.1211971019, 0.1242699147],
}
"""neuroHarmonize 2.5.2, harmonizationApply at sites A, B, C in turn; EB tolerance 1e-13 instead of 1e-4."""

NEW = {
    0: [0.1232605439, 0.1340873013, 0.0588471106, 0.1304767006, 0.1350623777],
    7: [0.1101130502, 0.1329036039, 0.0498832617, 0.1092803366, 0.1243286993],
    14: [0.1321844636, 0.1539607793, 0.0672513159, 0.1315099613, 0.1463108383],
    21: [0.1145761378, 0.1413610698, 0.0568451683, 0.1182489416, 0.1286811892],
    28: [0.1050197641, 0.1077953913, 0.0411514124, 0.0889663264, 0.1032470573],
}
"""neuroHarmonize 2.5.2, harmonizationLearn with orig_model at sites D, E, F in turn; info_dict given its ref_level,
without which this version fails."""


@pytest.fixture
def model():
    site, covariates = pd.Series(list(SITE)), pd.DataFrame({"age": AGE, "sex": list(SEX)})
    return harmonize(pd.DataFrame(RAW, columns=NUCLEI), site=site, covariates=covariates).model


@pytest.fixture
def scans():
    """Thirty other scans: values, covariates and participants."""
    raw, age = np.array(RAW), np.array(AGE)
    values = pd.DataFrame(np.vstack([1.1 * raw[::-1] + 0.003, 0.9 * raw + 0.001]), columns=NUCLEI)
    covariates = pd.DataFrame({"age": [*(age[::-1] + 2), *(age - 3)], "sex": [*SEX[::-1], *SEX]})
    return values, covariates, pd.Series([f"sub-{number:02d}" for number in range(30)])


def test_known_sites_agree_with_neuroharmonize(model, scans):
    values, covariates, _ = scans
    result = model.apply(values, site=pd.Series(list("ABC") * 10), covariates=covariates)
    assert np.abs(result.loc[list(KNOWN)].to_numpy() - list(KNOWN.values())).max() < 1e-9


def test_new_sites_agree_with_neuroharmonize(model, scans):
    values, covariates, participant = scans
    site = pd.Series(list("DEF") * 10)
    extended, found = add_sites(model, values, site=site, covariates=covariates, participant=participant)
    assert [(new.name, new.method, new.n_participants) for new in found] == [(name, "matched", 10) for name in "DEF"]
    result = extended.apply(values, site=site, covariates=covariates)
    assert np.abs(result.loc[list(NEW)].to_numpy() - list(NEW.values())).max() < 1e-9
    assert model.apply(values, site=site, covariates=covariates).isna().all(axis=None)  # unchanged


def test_nine_matched_participants_are_too_few(model, scans):
    values, covariates, participant = scans
    fit_on = np.arange(30) != 29
    _, found = add_sites(
        model, values, site=pd.Series(list("DEF") * 10), covariates=covariates, participant=participant, fit_on=fit_on
    )
    assert [(new.method, new.n_participants) for new in found] == [("matched", 10), ("matched", 10), ("", 9)]


def test_travelling_participants_give_the_shift(model, scans):
    """Five people at A and D, where everything is 0.02 ppm higher: their values become those at A."""
    values, covariates, _ = scans
    at_home = values[:5]
    both = pd.concat([at_home, at_home + 0.02], ignore_index=True)
    twice = pd.concat([covariates[:5]] * 2, ignore_index=True)
    people, site = pd.Series([*range(5)] * 2), pd.Series(["A"] * 5 + ["D"] * 5)
    extended, found = add_sites(model, both, site=site, covariates=twice, participant=people)
    assert [(new.method, new.n_travelling) for new in found] == [("travelling", 5)]
    result = extended.apply(both, site=site, covariates=twice)
    assert result[5:].mean().to_numpy() == pytest.approx(result[:5].mean().to_numpy())


def test_unknown_category_is_missing(model, scans):
    values, covariates, _ = scans
    site = pd.Series(list("ABC") * 10)
    result = model.apply(values, site=site, covariates=covariates.assign(sex="O"))
    assert result.isna().all(axis=None)
    assert model.beyond(covariates)["age"].sum() == (covariates["age"] > 76).sum() + (covariates["age"] < 20).sum()


def test_controls_determine_the_effects(model, scans):
    """With `fit_on`, other scans change nothing in the fit and lose the same site effects."""
    values, covariates, _ = scans
    site = pd.Series(list("ABC") * 10)
    together = harmonize(
        pd.concat([pd.DataFrame(RAW, columns=NUCLEI), values], ignore_index=True),
        site=pd.Series([*SITE, *site]),
        covariates=pd.concat([pd.DataFrame({"age": AGE, "sex": list(SEX)}), covariates], ignore_index=True),
        fit_on=np.arange(45) < 15,
    )
    expected = model.apply(values, site=site, covariates=covariates)
    assert together.values[15:].to_numpy() == pytest.approx(expected.to_numpy())
    row: Any = together.sites.set_index(["site", "nucleus"]).loc[("A", "DN_L")]
    assert (row["n"], row["n_participants"]) == (15, 5)


def test_splines_are_lines_beyond_the_ages_of_the_fit():
    rng = np.random.default_rng(0)
    age = rng.uniform(20, 60, 60)
    values = pd.DataFrame(0.001 * age[:, None] + rng.normal(0, 0.01, (60, 3)), columns=["a", "b", "c"])
    site = pd.Series(["A", "B"] * 30)
    fitted = harmonize(values, site=site, covariates=pd.DataFrame({"age": age}), smooth=["age"]).model
    basis = fitted.terms[0].columns(pd.Series(age))
    assert basis == pytest.approx(natural_spline(age))
    beyond = fitted.expected(pd.DataFrame({"age": [70.0, 80, 90]}))
    assert np.diff(beyond, 2, axis=0) == pytest.approx(0, abs=1e-12)


@pytest.fixture
def repeated():
    """Thirty people, two to four scans, some of whom change scanner; three nuclei."""
    rng = np.random.default_rng(3)
    rows = []
    for person in range(30):
        own, start = rng.normal(0, 0.015, 3), rng.uniform(40, 70)
        for visit in range(2 + person % 3):
            site = "ABC"[(person + (visit > 1 and person % 2)) % 3]
            shift = {"A": 0.0, "B": 0.01, "C": -0.015}[site] * np.array([1, 0.8, 1.2])
            spread = {"A": 1.0, "B": 0.6, "C": 1.5}[site]
            age = start + 1.5 * visit
            mean = 0.1 + 0.0005 * age + own + shift + rng.normal(0, 0.004 * spread, 3)
            rows.append([f"sub-{person:02d}", age, site, *mean])
    return pd.DataFrame(rows, columns=["who", "age", "site", "GP_L", "PUT_L", "SN_L"])


def test_longitudinal_combat_agrees_with_its_definition(repeated):
    """The steps of longCombat (Beer 2020), with the mixed models of statsmodels instead of lme4."""
    sites, nuclei = ["A", "B", "C"], ["GP_L", "PUT_L", "SN_L"]
    indicator = np.array([repeated["site"] == name for name in sites]).T.astype(float)
    n = indicator.sum(axis=0)
    design = np.column_stack([np.ones(len(repeated)), indicator[:, 1:], repeated["age"]])
    z, predicted, sigma = np.empty((3, len(repeated), 3))
    for place, nucleus in enumerate(nuclei):
        scale = repeated[nucleus].std()  # MixedLM's optimizer fails with small numbers
        fit = MixedLM(repeated[nucleus] / scale, design, groups=repeated["who"]).fit(reml=True, method="bfgs")
        batch = np.array([0, *fit.fe_params[1:3]])
        batch = batch - (n * batch).sum() / n.sum()
        within = indicator @ batch
        predicted[:, place] = (fit.fittedvalues - within) * scale
        sigma[:, place] = np.sqrt(fit.scale) * scale
        z[:, place] = (repeated[nucleus] - predicted[:, place]) / sigma[:, place]
    expected = np.empty_like(z)
    for at in (indicator > 0).T:
        shift, variance = z[at].mean(axis=0), z[at].var(axis=0, ddof=1)
        mean, spread, d, s = shift.mean(), shift.var(ddof=1), variance.mean(), variance.var(ddof=1)
        shape, rate = (d**2 + 2 * s) / s, (d**3 + d * s) / s
        new, new_variance = shift, variance
        for _ in range(200):
            new = (at.sum() * spread * shift + new_variance * mean) / (at.sum() * spread + new_variance)
            new_variance = (rate + ((z[at] - new) ** 2).sum(axis=0) / 2) / (at.sum() / 2 + shape - 1)
        expected[at] = sigma[at] / np.sqrt(new_variance) * (z[at] - new) + predicted[at]
    ours = harmonize(
        repeated[nuclei],
        site=repeated["site"],
        covariates=repeated[["age"]],
        participant=repeated["who"],
        longitudinal=True,
    )
    assert np.abs(ours.values.to_numpy() - expected).max() < 1e-6  # the optimizers' tolerances
    again = ours.model.apply(
        repeated[nuclei], site=repeated["site"], covariates=repeated[["age"]], participant=repeated["who"]
    )
    pd.testing.assert_frame_equal(again, ours.values)


def test_longitudinal_combat_needs_repeated_scans(repeated):
    first = repeated.drop_duplicates("who")
    with pytest.raises(InputError, match="longitudinal ComBat needs repeated scans"):
        harmonize(first[["GP_L", "SN_L"]], site=first["site"], participant=first["who"], longitudinal=True)


def test_new_site_of_longitudinal_combat_by_generalized_least_squares(repeated):
    """Fifteen people scanned once more, at D; the effect of D is computed with the covariance of each person."""
    nuclei = ["GP_L", "PUT_L", "SN_L"]
    known = {"site": repeated["site"], "covariates": repeated[["age"]], "participant": repeated["who"]}
    model = harmonize(repeated[nuclei], longitudinal=True, **known).model
    again = repeated.drop_duplicates("who").iloc[:15].assign(site="D")
    again[nuclei] += 0.03 + np.random.default_rng(1).normal(0, 0.004, (15, 3))
    scans = pd.concat([repeated, again], ignore_index=True)
    own = {"site": scans["site"], "covariates": scans[["age"]], "participant": scans["who"]}
    extended, found = add_sites(model, scans[nuclei], **own)
    assert [(new.name, new.method, new.n_travelling) for new in found] == [("D", "travelling", 15)]
    assert model.offset is not None
    assert model.std_between is not None
    assert extended.offset is not None
    at = dict(zip(model.sites.names, model.offset[:, 0], strict=True)) | {"D": 0.0}
    y = scans["GP_L"].to_numpy() - model.expected(scans[["age"]])[:, 0] - scans["site"].map(at).to_numpy()
    numerator = denominator = 0.0
    for who in again["who"]:
        rows = (scans["who"] == who).to_numpy()
        a = (scans["site"][rows] == "D").to_numpy(float)
        v = model.std[0] ** 2 * np.eye(rows.sum()) + model.std_between[0] ** 2
        numerator += a @ np.linalg.solve(v, y[rows])
        denominator += a @ np.linalg.solve(v, a)
    assert extended.offset[-1, 0] == pytest.approx(numerator / denominator)
    result = extended.apply(scans[nuclei], **own)
    first = repeated.index[~repeated["who"].duplicated()][:15]
    gap = result[len(repeated) :].to_numpy() - result.loc[first].to_numpy()
    assert np.abs(gap.mean(axis=0)).max() < 0.004  # of 0.03

    again.iloc[1:, again.columns.get_loc("SN_L")] = np.nan  # of one participant, which does not affect the others
    few = pd.concat([repeated, again], ignore_index=True)
    extended, _ = add_sites(model, few[nuclei], **own)
    at_new = extended.apply(few[nuclei], **own)[len(repeated) :]
    assert at_new.notna().sum().tolist() == [15, 15, 0]
    assert extended.sites.n_participants[-1].tolist() == [15, 15, 1]
