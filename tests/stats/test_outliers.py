"""Outliers: values of single nuclei; scale, zero and size that all nuclei of a scan have in common."""

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.stats.outliers import common_change, compare_sites, find_changed_scans, robust_z


def site(values: list[float], name: str | None = "A") -> pd.DataFrame:
    return pd.DataFrame({"abbreviation": "SN_L", "site": name, "mean_ppm": values})


@pytest.mark.parametrize("name", ["A", None])
def test_robust_z_by_hand(name):
    """Median 3, deviations 2 1 0 1 97: their median is 1, the normal quartile 0.67449; no site counts as one."""
    result = robust_z(site([1.0, 2, 3, 4, 100], name), n_min=5)
    assert result["robust_z"].tolist() == pytest.approx([z * 0.6744898 for z in (-2, -1, 0, 1, 97)])
    assert result["outlier"].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        pytest.param([1.0, 2, 3, 4], ["no z: 4 values, a site needs 5"] * 4, id="few"),
        pytest.param([1.0, 1, 1, 1, 9], ["no z: half of the values are equal"] * 5, id="no spread"),
        pytest.param([1.0, 2, 3, 4, 5, np.nan], [""] * 5 + ["missing"], id="missing"),
    ],
)
def test_missing_z_has_a_note(values, notes):
    result = robust_z(site(values), n_min=5)
    assert robust_z(site(list(np.arange(14.0))))["robust_z"].isna().all()
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


def test_scans_without_age_keep_the_raw_score(ageing_sites):
    raw = robust_z(ageing_sites)
    ageing_sites.loc[[3, 4], "age"] = np.nan
    result = robust_z(ageing_sites, age="age")
    assert result.index[~result["age_adjusted"]].tolist() == [3, 4]
    pd.testing.assert_series_equal(result.loc[[3, 4], "robust_z"], raw.loc[[3, 4], "robust_z"])
    assert set(result.loc[[3, 4], "note"]) == {"not adjusted for age: no age"}
    assert set(result["n_site"]) == {38, 40}


PPM = {"CN": 0.045, "PUT": 0.04, "GP": 0.13, "RN": 0.1, "SN": 0.11, "STN": 0.085, "DN": 0.12, "IN": 0.06}
MM3 = {"CN": 4000.0, "PUT": 4800.0, "GP": 1500.0, "RN": 270.0, "SN": 450.0, "STN": 130.0, "DN": 700.0, "IN": 80.0}


def scans(typical: dict[str, float], *, site: str = "A", n: int = 12, seed: int = 0) -> pd.DataFrame:
    """People whose nuclei differ by 10 % all together, by 10 % each, and by 5 % between the sides."""
    rng = np.random.default_rng(seed)
    rows = []
    for scan in range(n):
        common = 1 + 0.1 * rng.standard_normal()
        for name, mean in typical.items():
            nucleus = mean * common * (1 + 0.1 * rng.standard_normal())
            for side in "LR":
                value = nucleus * (1 + 0.05 * rng.standard_normal())
                row = {"scan": f"{site}{scan:02d}", "model": "m", "site": site, "abbreviation": f"{name}_{side}"}
                rows.append({**row, "value": value})
    return pd.DataFrame(rows)


def expect(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(
        **robust_z(table, value="value", by=("model", "abbreviation"))[["expected", "median", "n_site"]]
    )


def outliers(table: pd.DataFrame, *, with_shift: bool) -> dict[str, tuple[float, float]]:
    changed = find_changed_scans(expect(table), value="value", by=("model",), with_shift=with_shift)
    rows = changed[changed["outlier"]]
    return dict(zip(rows["scan"], zip(rows["ratio"], rows["shift"], strict=True), strict=True))


def test_ratio_and_shift_are_exact_without_noise():
    expected = np.array([*PPM.values()])
    assert common_change(2 * expected, expected, with_shift=False)[1] == pytest.approx(2)
    values = expected + 0.02
    values[2:4] = 0.3, np.nan  # one haemorrhage, one nucleus that was not found
    assert common_change(values, expected, with_shift=True)[2] == pytest.approx(0.02)
    assert np.isnan(common_change(values[:5], expected[:5], with_shift=True)[1:]).all()  # four nuclei


@pytest.mark.parametrize(("factor", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, -0.04)])
def test_map_with_another_scale_or_zero_is_an_outlier(factor, shift):
    table = scans(PPM, n=20)
    assert not outliers(table, with_shift=True)
    changed = table["scan"] == "A03"
    table.loc[changed, "value"] = factor * table.loc[changed, "value"] + shift
    assert list(outliers(table, with_shift=True)) == ["A03"]


def test_sites_are_compared_with_each_other():
    parts = [scans(PPM, site=site, n=30, seed=seed) for seed, site in enumerate("ABC")]
    parts[1]["value"] *= 2
    parts[2]["value"] += 0.03
    shifts = compare_sites(expect(pd.concat(parts, ignore_index=True)), by=("model",), with_shift=True)
    shifts = shifts.set_index("site")
    assert shifts.loc["B", "ratio"] == pytest.approx(2 / 1.15, rel=0.15)  # C, half of the others, is shifted
    assert shifts.loc["C", "shift"] == pytest.approx(0.03, abs=0.01)  # medians of 30 scans are known to 2 to 3 %
    assert compare_sites(expect(parts[0]), by=("model",), with_shift=True).empty
