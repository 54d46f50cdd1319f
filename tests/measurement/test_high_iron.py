import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.measurement.columns import HIGH_IRON_COLUMNS
from bids_dgmseg.measurement.nuclei import measure_high_iron
from bids_dgmseg.models.structures import STRUCTURES

DN_L, DN_R = STRUCTURES.both_sides(["DN"])


def measure_line(chi: list[float], labels: list[int] | None = None) -> pd.Series:
    values = np.array(chi, float).reshape(-1, 1, 1)
    dseg = np.array(labels or [1] * len(chi)).reshape(-1, 1, 1)
    return measure_high_iron(values, dseg, structures=[DN_L], voxel_size_mm=(1.0, 1.0, 2.0)).iloc[0]


def test_the_part_lies_one_sd_above_the_mean():
    # 0, 0, 0, 0.4, 0.1: mean 0.1; squares 0.03 + 0.09 = 0.12 over 4: SD 0.1732; only 0.4 lies above 0.2732.
    row = measure_line([0, 0, 0, 0.4, 0.1])
    assert row["high_iron_threshold_ppm"] == pytest.approx(0.1 + np.sqrt(0.03))
    assert row["high_iron_mean_ppm"] == pytest.approx(0.4)
    assert row["high_iron_volume_mm3"] == 2
    assert row["high_iron_fraction"] == pytest.approx(0.2)
    assert row["sem_ppm"] == pytest.approx(np.sqrt(0.03 / 5))
    assert np.isnan(row["high_iron_sem_ppm"])  # one voxel has no spread


def test_the_error_of_the_part_is_that_of_its_own_voxels():
    # Ten voxels at 0 and two at 1 and 1.2: SD of the two 0.1414, over the root of 2.
    row = measure_line([0.0] * 10 + [1.0, 1.2])
    assert row["high_iron_mean_ppm"] == pytest.approx(1.1)
    assert row["high_iron_sem_ppm"] == pytest.approx(0.1)


def test_gaussian_noise_has_the_part_that_the_docstring_tells():
    values = np.random.default_rng(0).normal(0.1, 0.02, 20_000)
    row = measure_line(values.tolist())
    # Standard error of the tail's mean: 0.44 SD over the root of 16 % of 20000 voxels, 0.008 SD; five of them.
    assert (row["high_iron_mean_ppm"] - 0.1) / 0.02 == pytest.approx(1.525, abs=0.04)


def test_another_reference_moves_threshold_and_mean_alike():
    values = np.random.default_rng(1).random(30)
    first, second = measure_line(values.tolist()), measure_line((values + 0.05).tolist())
    for name in ("high_iron_threshold_ppm", "high_iron_mean_ppm"):
        assert second[name] - first[name] == pytest.approx(0.05)
    assert second["high_iron_volume_mm3"] == first["high_iron_volume_mm3"]


def test_equal_voxels_have_no_high_part():
    row = measure_line([0.1, 0.1, 0.1])
    assert row["high_iron_volume_mm3"] == 0
    assert np.isnan(row["high_iron_mean_ppm"])


@pytest.mark.parametrize(
    ("chi", "labels"),
    [
        pytest.param([0.1, 0.2], [0, 0], id="absent"),
        pytest.param([0.1, 0.2], [1, 0], id="one voxel"),
        pytest.param([np.nan, 0.2], [1, 1], id="one measured voxel"),
    ],
)
def test_fewer_than_two_measured_voxels_have_no_value(chi, labels):
    assert measure_line(chi, labels)[list(HIGH_IRON_COLUMNS)].isna().all()


def test_rows_are_the_structures_in_their_order():
    table = measure_high_iron(
        np.zeros((2, 2, 2)), np.ones((2, 2, 2), np.uint8), structures=[DN_R, DN_L], voxel_size_mm=(1.0, 1.0, 1.0)
    )
    assert table["abbreviation"].tolist() == ["DN_R", "DN_L"]
    assert list(table.columns) == ["index", "abbreviation", *HIGH_IRON_COLUMNS]


def test_labels_on_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"dseg has shape \(2, 2, 2\), expected \(2, 2, 3\)"):
        measure_high_iron(np.zeros((2, 2, 3)), np.zeros((2, 2, 2), int), structures=[DN_L], voxel_size_mm=(1, 1, 1))
