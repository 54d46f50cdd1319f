import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.asymmetry import asymmetry_index, measure_asymmetry


@pytest.mark.parametrize(
    ("left", "right", "index"),
    [
        pytest.param(110.0, 90.0, 0.2, id="20 of a mean of 100"),
        pytest.param(90.0, 110.0, -0.2, id="the other way round"),
        pytest.param(5.0, 5.0, 0.0, id="equal"),
        pytest.param(0.0, 5.0, -2.0, id="nothing on the left"),
        pytest.param(0.0, 0.0, np.nan, id="nothing on both sides"),
        pytest.param(np.nan, 5.0, np.nan, id="one side was not measured"),
        pytest.param(-0.01, 0.03, np.nan, id="signs differ"),
    ],
)
def test_the_index_is_the_difference_over_the_mean(left, right, index):
    assert asymmetry_index(left, right) == pytest.approx(index, nan_ok=True)


def test_swapping_the_sides_turns_the_sign():
    left, right = np.random.default_rng(0).random((2, 50))
    np.testing.assert_allclose(asymmetry_index(left, right), -asymmetry_index(right, left))


def test_sides_of_a_nucleus_are_matched_by_name():
    stats = pd.DataFrame(
        {
            "abbreviation": ["GP_R", "RN_L", "GP_L"],
            "hemisphere": ["R", "L", "L"],
            "volume_mm3": [900.0, 300.0, 1100.0],
            "mean_ppm": [0.1, 0.1, 0.3],
        }
    )
    table = measure_asymmetry(stats).set_index("nucleus")
    assert table.loc["GP", "volume_asymmetry"] == pytest.approx(0.2)
    assert table.loc["GP", "mean_ppm_asymmetry"] == pytest.approx(1.0)  # 0.2 over 0.2
    assert table["volume_asymmetry"].isna().tolist() == [False, True]
    assert list(table.columns) == ["volume_asymmetry", "mean_ppm_asymmetry"]
