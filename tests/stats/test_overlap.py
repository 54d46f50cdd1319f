from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS, dice, overlap

DN = STRUCTURES.both_sides(["DN"])


def test_dice_is_twice_the_overlap_over_the_sum():
    # DN_L: 3 and 2 voxels, 2 in both: 4 / 5. DN_R: 1 and 2, 1 in both: 2 / 3.
    table = dice(np.array([1, 1, 1, 2, 0]), np.array([1, 1, 0, 2, 2]), structures=DN)
    assert table["dice"].tolist() == pytest.approx([4 / 5, 2 / 3])
    assert table["n_reference"].tolist() == [3, 1]
    assert table["n_prediction"].tolist() == [2, 2]
    assert table["abbreviation"].tolist() == ["DN_L", "DN_R"]


def test_swapped_sides_do_not_overlap():
    assert dice(np.array([1, 2]), np.array([2, 1]), structures=DN)["dice"].tolist() == [0, 0]


def test_a_nucleus_in_neither_has_no_dice():
    assert dice(np.array([1]), np.array([1]), structures=DN)["dice"].isna().tolist() == [False, True]


def test_a_nucleus_in_one_only_has_dice_zero():
    assert dice(np.array([1, 2]), np.array([1, 0]), structures=DN).loc[1, "dice"] == 0


def test_other_numbers_are_ignored():
    assert dice(np.array([1, 99, -5]), np.array([1, 99, -5]), structures=DN)["dice"].tolist()[0] == 1


@given(seed=st.integers(0, 2**32 - 1))
def test_dice_is_symmetric_and_one_with_itself(seed):
    first, second = np.random.default_rng(seed).integers(0, 3, (2, 4, 5, 6)).astype(np.uint8)
    there, back = dice(first, second, structures=DN), dice(second, first, structures=DN)
    np.testing.assert_array_equal(there["dice"], back["dice"])
    assert set(dice(first, first, structures=DN)["dice"].dropna()) <= {1.0}


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"prediction has shape \(2,\), expected \(1,\)"):
        dice(np.array([1]), np.array([1, 1]), structures=DN)


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="prediction holds float64, expected integers"):
        dice(np.array([1]), np.array([0.5]), structures=DN)


SIZES_MM = st.sampled_from([(1.0, 1.0, 1.0), (0.9375, 0.9375, 3.0), (2.0, 1.0, 0.5)])


def row(*labels: list[int], size_mm: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> dict[str, Any]:
    """Measures of DN_L where voxels lie along x."""
    reference, prediction = (np.array(line).reshape(-1, 1, 1) for line in labels)
    table = overlap(reference, prediction, structures=DN, voxel_size_mm=size_mm)
    assert list(table) == list(OVERLAP_COLUMNS)
    return {str(name): value for name, value in table.iloc[0].items()}


def test_two_of_four_voxels_shared():
    # R = {0, 1, 2}, P = {1, 2, 3, 4}, voxels of 2 mm3: shared 2, together 5, centres at 1 and 2.5 mm.
    found = row([1, 1, 1, 0, 0, 2], [0, 1, 1, 1, 1, 2])
    assert found["dice"] == pytest.approx(4 / 7)
    assert found["jaccard"] == pytest.approx(2 / 5)
    assert found["volume_similarity"] == pytest.approx(1 - 1 / 7)
    assert (found["volume_reference_mm3"], found["volume_prediction_mm3"]) == (6, 8)
    assert found["volume_difference_mm3"] == 2
    assert found["volume_difference_percent"] == pytest.approx(100 / 3)
    assert found["centre_distance_mm"] == pytest.approx(1.5)
    assert found["hausdorff_mm"] == 2
    assert found["mean_surface_distance_mm"] == pytest.approx((1 + 1 + 2) / 7)


def test_distances_follow_the_edges_of_voxels():
    found = row([1, 0, 0], [0, 0, 1], size_mm=(0.7, 1, 1))
    assert [found["hausdorff_mm"], found["centre_distance_mm"]] == pytest.approx([1.4, 1.4])


def test_a_nucleus_that_was_not_predicted_has_no_distance_but_a_volume_difference():
    found = row([1, 1, 0], [0, 0, 0])
    assert (found["dice"], found["jaccard"], found["volume_similarity"]) == (0, 0, 0)
    assert (found["volume_difference_mm3"], found["volume_difference_percent"]) == (-4, -100)
    assert np.isnan([found[name] for name in found if name.endswith("_mm")]).all()


def test_a_nucleus_that_only_the_prediction_has_makes_nothing_infinite():
    found = row([0, 0, 0], [1, 1, 0])
    assert found["volume_difference_mm3"] == 4
    assert np.isnan(found["volume_difference_percent"])


def test_a_nucleus_in_neither_has_no_measure_at_all():
    found = row([0, 2], [0, 2])
    counts = ("index", "abbreviation", "n_reference", "n_prediction", "volume_reference_mm3", "volume_prediction_mm3")
    assert np.isnan([value for name, value in found.items() if name not in counts]).all()


@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_overlap_is_that_of_simpleitk(seed, size_mm):
    rng = np.random.default_rng(seed)
    density = rng.choice([0.01, 0.2, 0.9])
    first, second = (rng.random((2, 5, 4, 6)) < density).astype(np.uint8)
    if not (first.any() and second.any()):
        return
    measure = SimpleITK.LabelOverlapMeasuresImageFilter()
    measure.Execute(SimpleITK.GetImageFromArray(first), SimpleITK.GetImageFromArray(second))
    found = overlap(first, second, structures=DN, voxel_size_mm=size_mm).iloc[0]
    assert found["dice"] == pytest.approx(measure.GetDiceCoefficient(1))
    assert found["jaccard"] == pytest.approx(measure.GetJaccardCoefficient(1))
    # SimpleITK's is 2 (source - target) / (source + target).
    assert found["volume_similarity"] == pytest.approx(1 - abs(measure.GetVolumeSimilarity(1)) / 2)


@given(seed=st.integers(0, 2**32 - 1), size_mm=SIZES_MM)
def test_measures_do_not_depend_on_where_in_the_image_a_nucleus_lies(seed, size_mm):
    first, second = np.random.default_rng(seed).integers(0, 3, (2, 4, 5, 3)).astype(np.uint8)
    moved = [np.pad(labels, ((2, 0), (1, 3), (0, 4))) for labels in (first, second)]
    here, there = (
        overlap(*pair, structures=DN, voxel_size_mm=size_mm).drop(columns="abbreviation").to_numpy(float)
        for pair in ((first, second), moved)
    )
    np.testing.assert_allclose(here, there)


def test_no_structures_make_an_empty_table():
    empty = np.zeros((2, 2, 2), int)
    assert list(overlap(empty, empty, structures=[], voxel_size_mm=(1, 1, 1))) == list(OVERLAP_COLUMNS)
