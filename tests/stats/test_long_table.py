from typing import Any

import numpy as np
import pandas as pd
import pytest

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


def test_coefficients_agree_with_statsmodels():
    import statsmodels.api as statsmodels

    rng: Any = np.random.default_rng(3)
    volume, chi = rng.normal(650, 60, 12), rng.normal(0.1, 0.02, 12)
    theirs: Any = statsmodels.OLS(chi, statsmodels.add_constant(volume)).fit()
    ours: Any = adjust_for_size(sized(volume, chi), controls=np.full(12, True)).coefficients.loc[0]
    assert (ours["intercept"], ours["slope"]) == pytest.approx(tuple(theirs.params))
    assert (ours["slope_low"], ours["slope_high"]) == pytest.approx(tuple(theirs.conf_int()[1]))
    assert ours["p"] == pytest.approx(theirs.pvalues[1])


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
