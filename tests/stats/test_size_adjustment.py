from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import adjust_for_size


def table(volumes: Any, values: Any, **columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"abbreviation": "DN_L", "volume_mm3": volumes, "mean_ppm": values} | columns)


def test_slope_of_controls_applies_to_all():
    """Controls rise by 0.01 ppm from 600 to 680 mm3 around 640: 1e-4 ppm/mm3; the patient with 540 mm3 gains 0.01."""
    rows = table([600.0, 620, 640, 660, 680, 540], [0.10, 0.102, 0.104, 0.106, 0.108, 0.12])
    result = adjust_for_size(rows, controls=[True] * 5 + [False])
    assert result.values.tolist() == pytest.approx([0.104] * 5 + [0.13])
    coefficients: Any = result.coefficients.loc[0]
    assert (coefficients["slope"], coefficients["mean_volume_controls"]) == pytest.approx((1e-4, 640))
    assert (coefficients["n_controls"], coefficients["n_controls_missing"]) == (5, 0)


def test_adjusted_controls_have_no_slope():
    rng = np.random.default_rng(2)
    volume = rng.normal(650, 60, 30)
    rows = table(volume, 0.05 + 1e-4 * volume + rng.normal(0, 0.01, 30))
    adjusted = adjust_for_size(rows, controls=np.full(30, True)).values
    assert adjusted.mean() == pytest.approx(rows["mean_ppm"].mean())
    assert linregress(volume, adjusted).slope == pytest.approx(0, abs=1e-12)


def test_coefficients_agree_with_statsmodels():
    import statsmodels.api as statsmodels

    rng: Any = np.random.default_rng(3)
    volume, chi = rng.normal(650, 60, 12), rng.normal(0.1, 0.02, 12)
    theirs: Any = statsmodels.OLS(chi, statsmodels.add_constant(volume)).fit()
    ours: Any = adjust_for_size(table(volume, chi), controls=np.full(12, True)).coefficients.loc[0]
    assert (ours["intercept"], ours["slope"]) == pytest.approx(tuple(theirs.params))
    assert (ours["slope_low"], ours["slope_high"]) == pytest.approx(tuple(theirs.conf_int()[1]))
    assert ours["p"] == pytest.approx(theirs.pvalues[1])


def test_missing_values_stay_missing_and_are_counted():
    rows = table([600.0, 620, 640, 660, 680, np.nan, 540], [0.10, 0.102, 0.104, 0.106, 0.108, 0.1, np.nan])
    result = adjust_for_size(rows, controls=[True] * 6 + [False])
    assert result.values.isna().tolist() == [False] * 5 + [True] * 2
    assert result.coefficients[["n_controls", "n_controls_missing"]].to_numpy().tolist() == [[5, 1]]


def test_nuclei_are_adjusted_separately_in_order():
    left, right = (table([1.0, 2, 3, 4, 5], [slope * volume for volume in range(1, 6)]) for slope in (1, 2))
    both = pd.concat([left, right.assign(abbreviation="DN_R")]).sample(frac=1, random_state=0)
    result = adjust_for_size(both, controls=np.full(10, True))
    assert result.coefficients.set_index("abbreviation")["slope"].to_dict() == pytest.approx({"DN_L": 1, "DN_R": 2})
    assert result.values.index.equals(both.index)
    assert np.where(both["abbreviation"] == "DN_L", 3, 6) == pytest.approx(result.values)


@pytest.mark.parametrize(
    ("volumes", "note"),
    [
        pytest.param([1.0, 2, 3, 4], "not adjusted: 4 controls, a slope needs 5", id="few"),
        pytest.param([7.0] * 6, "not adjusted: the volumes of all controls are 7", id="all alike"),
    ],
)
def test_missing_slope_has_a_note(volumes, note):
    result = adjust_for_size(table(volumes, np.arange(len(volumes)) / 10), controls=np.full(len(volumes), True))
    assert result.coefficients.loc[0, "note"] == note
    assert result.values.isna().all()


def test_repeated_controls_count_once():
    rows = table(np.arange(600.0, 606), np.arange(6) / 10, participant_id=list("aabbcc"))
    result = adjust_for_size(rows, controls=np.full(6, True), participant="participant_id")
    assert result.coefficients.loc[0, "note"] == "not adjusted: 3 controls, a slope needs 5"
    assert result.values.isna().all()


def test_invalid_controls_are_rejected():
    with pytest.raises(InputError, match=r"^group table: no scan of a control; check the filter"):
        adjust_for_size(table([1.0], [0.1]), controls=[False])
    with pytest.raises(ValueError, match=r"controls is bool of shape \(2,\), expected bool of shape \(1,\)"):
        adjust_for_size(table([1.0], [0.1]), controls=[True, False])
