from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import adjust_for_size, iter_groups, numeric_column, robust_z

AGES = pd.DataFrame({"participant_id": ["sub-1"], "age": ["30"]})


def test_text_in_numeric_column_is_rejected():
    with pytest.raises(ValueError, match=r"column age holds .*, expected numbers"):
        numeric_column(AGES, "age")


@pytest.mark.parametrize("access", [numeric_column, lambda table, column: list(iter_groups(table, [column]))])
def test_missing_column_is_rejected(access):
    with pytest.raises(InputError, match=r"^group table: no column sex \(columns: participant_id, age\); add it"):
        access(AGES, "sex")


def site(values: list[float], name: str | None = "A") -> pd.DataFrame:
    return pd.DataFrame({"abbreviation": "SN_L", "site": name, "mean_ppm": values})


@pytest.mark.parametrize("name", ["A", None])
def test_robust_z_by_hand(name):
    """Median 3, deviations 2 1 0 1 97: their median is 1, the normal quartile 0.67449; no site counts as one."""
    result = robust_z(site([1.0, 2, 3, 4, 100], name))
    assert result["robust_z"].tolist() == pytest.approx([z * 0.6744898 for z in (-2, -1, 0, 1, 97)])
    assert result["outlier"].tolist() == [False] * 4 + [True]


def test_sites_are_separate():
    table = pd.concat([site([1.0, 2, 3, 4, 5]), site([101.0, 102, 103, 104, 105], "B")])
    result = robust_z(table)
    assert not result["outlier"].any()
    assert result.index.equals(table.index)
    assert result["median"].tolist() == [3.0] * 5 + [103.0] * 5


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        pytest.param([1.0, 2, 3, 4], ["no z: 4 values, a site needs 5"] * 4, id="few"),
        pytest.param([1.0, 1, 1, 1, 9], ["no z: half of the values are equal"] * 5, id="no spread"),
        pytest.param([1.0, 2, 3, 4, 5, np.nan], [""] * 5 + ["missing"], id="missing"),
    ],
)
def test_missing_z_has_a_note(values, notes):
    result = robust_z(site(values))
    assert result["note"].tolist() == notes
    assert result["robust_z"].isna().tolist() == [bool(note) for note in notes]


@pytest.fixture
def ageing_sites():
    """Two sites that differ by 0.02 ppm, 40 scans each; iron saturates with age. The first is 0.03 above its curve."""
    rng = np.random.default_rng(6)
    age = np.concatenate([[25.0], rng.uniform(20, 85, 79)])
    name = np.repeat(["A", "B"], 40)
    chi = 0.15 * (1 - np.exp(-0.03 * age)) + 0.02 * (name == "B") + rng.normal(0, 0.005, 80)
    chi[0] = 0.15 * (1 - np.exp(-0.75)) + 0.03
    return pd.DataFrame({"abbreviation": "PUT_L", "site": name, "age": age, "mean_ppm": chi})


def test_outlier_for_its_age_is_found(ageing_sites):
    """Its value is typical of the site, but six standard deviations too high for a 25-year-old."""
    assert abs(robust_z(ageing_sites)["robust_z"].iloc[0]) < 1
    result = robust_z(ageing_sites, age="age")
    assert result.index[result["outlier"]].tolist() == [0]
    assert result.loc[0, "robust_z"] == pytest.approx(6, abs=1.5)
    assert result.loc[0, "expected"] == pytest.approx(ageing_sites.loc[0, "mean_ppm"] - 0.03, abs=0.004)
    assert result["age_adjusted"].all()
    assert result["n_site"].tolist() == [40] * 80


def test_gross_errors_do_not_change_other_scores(ageing_sites):
    clean = robust_z(ageing_sites, age="age")
    ageing_sites.loc[[50, 60], "mean_ppm"] *= 1000  # ppb taken for ppm
    result = robust_z(ageing_sites, age="age")
    assert result.index[result["outlier"]].tolist() == [0, 50, 60]
    others = ~result.index.isin([50, 60])
    assert result.loc[others, "robust_z"].to_numpy() == pytest.approx(clean.loc[others, "robust_z"], abs=0.5)


def test_scans_without_age_keep_the_raw_score(ageing_sites):
    raw = robust_z(ageing_sites)
    ageing_sites.loc[[3, 4], "age"] = np.nan
    result = robust_z(ageing_sites, age="age")
    assert result.index[~result["age_adjusted"]].tolist() == [3, 4]
    pd.testing.assert_series_equal(result.loc[[3, 4], "robust_z"], raw.loc[[3, 4], "robust_z"])
    assert set(result.loc[[3, 4], "note"]) == {"not adjusted for age: no age"}
    assert set(result["n_site"]) == {38, 40}


def test_few_ages_are_not_adjusted(ageing_sites):
    result = robust_z(ageing_sites[:9], age="age")
    pd.testing.assert_series_equal(result["robust_z"], robust_z(ageing_sites[:9])["robust_z"])
    assert set(result["note"]) == {"not adjusted for age: fewer than 10 ages, 5 of them at the site"}
    assert robust_z(ageing_sites[:12], age="age")["age_adjusted"].all()


def sized(volumes: Any, values: Any, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"abbreviation": "DN_L", "volume_mm3": volumes, "mean_ppm": values} | columns)


def test_slope_of_controls_applies_to_all():
    """Controls rise by 0.01 ppm from 600 to 680 mm3 around 640: 1e-4 ppm/mm3; the patient with 540 mm3 gains 0.01.

    A control without volume and a patient without measure stay missing.
    """
    volumes, values = [600.0, 620, 640, 660, 680, np.nan, 540, 540], [0.10, 0.102, 0.104, 0.106, 0.108, 0.1, 0.12]
    result = adjust_for_size(sized(volumes, [*values, np.nan]), controls=[True] * 6 + [False] * 2)
    assert result.values.tolist() == pytest.approx([0.104] * 5 + [np.nan, 0.13, np.nan], nan_ok=True)
    coefficients: Any = result.coefficients.loc[0]
    assert (coefficients["slope"], coefficients["mean_volume_controls"]) == pytest.approx((1e-4, 640))
    assert (coefficients["n_controls"], coefficients["n_controls_missing"]) == (5, 1)


def test_coefficients_agree_with_scipy():
    rng: Any = np.random.default_rng(3)
    volume, chi = rng.normal(650, 60, 12), rng.normal(0.1, 0.02, 12)
    theirs: Any = linregress(volume, chi)
    ours: Any = adjust_for_size(sized(volume, chi), controls=np.full(12, True)).coefficients.loc[0]
    assert (ours["intercept"], ours["slope"]) == pytest.approx((theirs.intercept, theirs.slope))
    half = t.ppf(0.975, 10) * theirs.stderr
    assert (ours["slope_low"], ours["slope_high"]) == pytest.approx((theirs.slope - half, theirs.slope + half))
    assert (ours["r"], ours["p"]) == pytest.approx((theirs.rvalue, theirs.pvalue))


@pytest.fixture
def controls():
    """Sites, ages and sexes that change volume and measure; the slope of volume is 1e-4."""
    rng = np.random.default_rng(7)
    site, sex, age = np.arange(60) % 3, rng.integers(0, 2, 60), rng.uniform(20, 80, 60)
    volume = 600 + 60.0 * site + 30 * sex - age + rng.normal(0, 20, 60)
    chi = 1e-4 * volume - 0.02 * site + 0.001 * age + 0.005 * sex + rng.normal(0, 0.001, 60)
    names: Any = {"site": np.array(["A", "B", "C"])[site], "age": age, "sex": np.array(["F", "M"])[sex]}
    return sized(volume, chi, participant_id=[f"sub-{n}" for n in range(60)], **names)


COVARIATES = ("site", "age", "sex")


def test_slope_is_that_of_residuals_after_covariates(controls):
    """Frisch-Waugh-Lovell theorem: regress both on the covariates, then one residual on the other."""
    design = np.column_stack([pd.get_dummies(controls[["site", "sex"]]).astype(float), controls["age"]])
    residuals = [y - design @ np.linalg.lstsq(design, y)[0] for y in controls[["volume_mm3", "mean_ppm"]].to_numpy().T]
    line: Any = linregress(*residuals)
    row: Any = adjust_for_size(controls, controls=np.full(60, True), covariates=COVARIATES).coefficients.loc[0]
    free = 60 - 6  # constant, volume, two sites, age, sex
    half = t.ppf(0.975, free) * line.stderr * np.sqrt(58 / free)
    assert (row["slope"], row["r"]) == pytest.approx((line.slope, line.rvalue))
    assert (row["slope_low"], row["slope_high"]) == pytest.approx((line.slope - half, line.slope + half))
    assert (row["covariates"], row["note"]) == ("site, age, sex", "")
    assert row["slope_low"] < 1e-4 < row["slope_high"]
    without: Any = adjust_for_size(controls, controls=np.full(60, True)).coefficients.loc[0]
    assert without["slope_high"] < 1e-4


def test_repeated_scans_do_not_narrow_the_limits(controls):
    options: Any = {"participant": "participant_id", "covariates": COVARIATES}
    once = adjust_for_size(controls, controls=np.full(60, True), **options).coefficients
    twice = adjust_for_size(pd.concat([controls] * 2), controls=np.full(120, True), **options).coefficients
    assert twice[["n_controls", "n_participants"]].to_numpy().tolist() == [[120, 60]]
    pd.testing.assert_frame_equal(twice.drop(columns="n_controls"), once.drop(columns="n_controls"))


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"age": 50.0}, ""),
        ({"age": [40.0] * 20 + [np.nan] * 39 + [50.0]}, "not adjusted for age: 21 of 60 controls have it"),
        ({"age": [n % 3 for n in range(60)]}, "not adjusted for age: not separable from site, volume_mm3"),
    ],
    ids=["constant", "mostly missing", "confounded"],
)
def test_covariate_that_cannot_be_used_is_left_out(controls, change, note):
    table = controls.assign(**change)
    row: Any = adjust_for_size(table, controls=np.full(60, True), covariates=COVARIATES).coefficients.loc[0]
    without: Any = adjust_for_size(table, controls=np.full(60, True), covariates=("site", "sex")).coefficients.loc[0]
    assert (row["covariates"], row["note"]) == ("site, sex", note)
    assert row["slope"] == without["slope"]


def test_few_controls_have_no_covariates(controls):
    row: Any = adjust_for_size(controls[:8], controls=np.full(8, True), covariates=COVARIATES).coefficients.loc[0]
    assert row["covariates"] == "age"
    assert row["note"] == "not adjusted for site: 8 controls for 4 terms; not adjusted for sex: 8 controls for 4 terms"


def test_nuclei_are_adjusted_separately_in_order():
    left, right = (sized([1.0, 2, 3, 4, 5], [slope * volume for volume in range(1, 6)]) for slope in (1, 2))
    both = pd.concat([left, right.assign(abbreviation="DN_R")]).sample(frac=1, random_state=0)
    result = adjust_for_size(both, controls=np.full(10, True))
    assert result.coefficients.set_index("abbreviation")["slope"].to_dict() == pytest.approx({"DN_L": 1, "DN_R": 2})
    assert result.values.index.equals(both.index)
    assert np.where(both["abbreviation"] == "DN_L", 3, 6) == pytest.approx(result.values)


@pytest.mark.parametrize(
    ("volumes", "participants", "note"),
    [
        pytest.param([1.0, 2, 3, 4], "abcd", "not adjusted: 4 controls, a slope needs 5", id="few"),
        pytest.param([1.0, 2, 3, 4, 5, 6], "aabbcc", "not adjusted: 3 controls, a slope needs 5", id="repeated scans"),
        pytest.param([7.0] * 6, "abcdef", "not adjusted: the volumes of all controls are 7", id="all alike"),
    ],
)
def test_missing_slope_has_a_note(volumes, participants, note):
    table = sized(volumes, np.arange(len(volumes)) / 10, participant_id=list(participants))
    result = adjust_for_size(table, controls=np.full(len(volumes), True), participant="participant_id")
    assert result.coefficients.loc[0, "note"] == note
    assert result.values.isna().all()


def test_invalid_controls_are_rejected():
    with pytest.raises(InputError, match=r"^group table: no scan of a control; check the filter"):
        adjust_for_size(sized([1.0], [0.1]), controls=[False])
    with pytest.raises(ValueError, match=r"controls is bool of shape \(2,\), expected bool of shape \(1,\)"):
        adjust_for_size(sized([1.0], [0.1]), controls=[True, False])
