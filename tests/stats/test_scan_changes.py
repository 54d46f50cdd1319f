"""Scale, zero and size that all nuclei of a scan have in common."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.stats.long_table import robust_z
from bids_dgmseg.stats.scan_changes import common_change, compare_sites, find_changed_scans

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
    found = find_changed_scans(expect(table), value="value", by=("model",), with_shift=with_shift)
    rows = found[found["outlier"]]
    return dict(zip(rows["scan"], zip(rows["ratio"], rows["shift"], strict=True), strict=True))


def test_ratio_and_shift_are_exact_without_noise():
    expected = np.array([*PPM.values()])
    assert common_change(2 * expected, expected, with_shift=False)[1] == pytest.approx(2)
    values = expected + 0.02
    values[2:4] = 0.3, np.nan  # one haemorrhage, one nucleus that was not found
    assert common_change(values, expected, with_shift=True)[2] == pytest.approx(0.02)
    assert np.isnan(common_change(values[:5], expected[:5], with_shift=True)[1:]).all()  # four nuclei


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("factor", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.04), (1.0, -0.04)])
def test_map_with_another_scale_or_zero_is_an_outlier(seed, factor, shift):
    table = scans(PPM, n=20, seed=seed)
    assert not outliers(table, with_shift=True)
    changed = table["scan"] == "A03"
    table.loc[changed, "value"] = factor * table.loc[changed, "value"] + shift
    assert list(outliers(table, with_shift=True)) == ["A03"]


def test_map_with_other_voxels_is_an_outlier():
    table = scans(MM3, n=20)
    changed = table["scan"] == "A03"
    table.loc[changed, "value"] *= 1.25**3
    found = outliers(table, with_shift=False)
    assert list(found) == ["A03"]
    assert found["A03"][0] == pytest.approx(1.25**3, rel=0.3)  # the head itself may differ by 20 %


def test_single_nucleus_is_no_change_of_the_scan():
    table = scans(PPM)
    table.loc[(table["scan"] == "A03") & (table["abbreviation"] == "PUT_L"), "value"] += 0.2
    assert not outliers(table, with_shift=True)


def test_small_site_is_not_compared():
    table = scans(PPM, n=4)
    table.loc[table["scan"] == "A03", "value"] *= 3
    found = find_changed_scans(expect(table), value="value", by=("model",), with_shift=True)
    assert found["outlier"].tolist() == [False] * 4
    assert set(found["note"]) == {"no z: 4 values, a site needs 5"}


def test_sites_are_compared_with_each_other():
    parts = [scans(PPM, site=site, n=30, seed=seed) for seed, site in enumerate("ABC")]
    parts[1]["value"] *= 2
    parts[2]["value"] += 0.03
    found = compare_sites(expect(pd.concat(parts, ignore_index=True)), by=("model",), with_shift=True)
    found = found.set_index("site")
    assert found.loc["B", "ratio"] == pytest.approx(2 / 1.15, rel=0.15)  # C, half of the others, is shifted
    assert found.loc["C", "shift"] == pytest.approx(0.03, abs=0.01)  # medians of 30 scans are known to 2 to 3 %
    assert compare_sites(expect(parts[0]), by=("model",), with_shift=True).empty
