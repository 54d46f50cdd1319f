from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.image.masks import close_with_ball, is_valid, large_components, masked_gaussian


def test_zeros_and_nan_are_not_valid():
    chi = np.array([0.0, np.nan, 1e-5, -0.002, 0.1])
    assert is_valid(chi).tolist() == [False, False, False, True, True]


def test_closing_fills_gaps_narrower_than_the_ball():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:10] = slabs[17:] = True  # gaps of 3 and 7 voxels
    closed = close_with_ball(slabs, 2.0, (1.0, 1.0, 1.0))
    assert closed[:10].all()
    np.testing.assert_array_equal(closed[10:], slabs[10:])


def test_ball_is_round_in_millimetres():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:] = True
    np.testing.assert_array_equal(close_with_ball(slabs, 2.0, (3.0, 1.0, 1.0)), slabs)  # the gap is 9 mm wide
    assert close_with_ball(slabs, 6.0, (3.0, 1.0, 1.0)).all()


def test_closing_of_empty_mask_is_empty():
    assert not close_with_ball(np.zeros((4, 4, 4), bool), 2.0, (1.0, 1.0, 1.0)).any()


def test_masked_gaussian_ignores_values_outside():
    inside = np.zeros((24, 24, 24), bool)
    inside[6:18, 6:18, 6:18] = True
    values = np.where(inside, np.float32(0.2), np.float32(np.nan))
    sums, weights = masked_gaussian(values, inside, (2.0, 2.0, 2.0))
    assert sums[inside] / weights[inside] == pytest.approx(0.2, rel=1e-4)
    assert weights[12, 12, 12] > 0.95
    assert weights[6, 12, 12] == pytest.approx(0.5 + 0.5 * 0.199, abs=0.02)  # half, and half a voxel's weight


def test_only_the_first_largest_component_is_kept():
    mask = np.zeros((9, 1, 1), bool)
    mask[[0, 2, 3, 5, 6]] = True  # components of 1, 2 and 2 voxels
    assert np.flatnonzero(large_components(mask)).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("min_fraction", "kept"), [(0.3, [0, 2, 3, 4, 6, 7]), (0.5, [2, 3, 4, 6, 7]), (0.7, [2, 3, 4])]
)
def test_components_below_the_fraction_are_removed(min_fraction, kept):
    mask = np.zeros((9, 1, 1), bool)
    mask[[0, 2, 3, 4, 6, 7]] = True  # components of 1, 3 and 2 voxels
    assert np.flatnonzero(large_components(mask, min_fraction)).tolist() == kept


@pytest.mark.parametrize(("over_corners", "kept"), [(False, 1), (True, 2)])
def test_components_connect_over_corners_if_wanted(over_corners, kept):
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert large_components(mask, over_corners=over_corners).sum() == kept
