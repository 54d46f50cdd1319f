import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.measure.overlap import dice
from bids_dgmseg.structures import STRUCTURES

DN = STRUCTURES.sides(["DN"])


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
