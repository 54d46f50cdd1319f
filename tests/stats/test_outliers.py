import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.stats.long_table import robust_z


def site(values: list[float], name: str | None = "A") -> pd.DataFrame:
    return pd.DataFrame({"abbreviation": "SN_L", "site": name, "mean_ppm": values})


def test_robust_z_by_hand():
    """Median 3, deviations 2 1 0 1 97: their median is 1, the normal quartile 0.67449."""
    result = robust_z(site([1.0, 2, 3, 4, 100]))
    assert result["robust_z"].tolist() == pytest.approx([z * 0.6744898 for z in (-2, -1, 0, 1, 97)])
    assert result["outlier"].tolist() == [False] * 4 + [True]


def test_sites_are_separate():
    table = pd.concat([site([1.0, 2, 3, 4, 5]), site([101.0, 102, 103, 104, 105], "B")])
    result = robust_z(table)
    assert not result["outlier"].any()
    assert result.index.equals(table.index)
    assert result["median"].tolist() == [3.0] * 5 + [103.0] * 5


def test_scans_without_site_form_one_site():
    assert robust_z(site([1.0, 2, 3, 4, 100], None))["outlier"].sum() == 1


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
