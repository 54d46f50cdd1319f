from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.image.masks import close_with_ball, masked_gaussian


def test_a_gap_that_is_narrower_than_the_ball_is_closed_and_a_wider_one_is_not():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:10] = slabs[17:] = True  # gaps of 3 and 7 voxels
    closed = close_with_ball(slabs, 2.0, (1.0, 1.0, 1.0))
    assert closed[:10].all()
    np.testing.assert_array_equal(closed[10:], slabs[10:])


def test_the_ball_is_round_in_millimetres():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:] = True
    np.testing.assert_array_equal(close_with_ball(slabs, 2.0, (3.0, 1.0, 1.0)), slabs)  # the gap is 9 mm wide
    assert close_with_ball(slabs, 6.0, (3.0, 1.0, 1.0)).all()


def test_nothing_is_closed_to_nothing():
    assert not close_with_ball(np.zeros((4, 4, 4), bool), 2.0, (1.0, 1.0, 1.0)).any()


def test_what_lies_outside_has_no_say_in_a_weighted_mean():
    inside = np.zeros((24, 24, 24), bool)
    inside[6:18, 6:18, 6:18] = True
    values = np.where(inside, np.float32(0.2), np.float32(np.nan))
    sums, share = masked_gaussian(values, inside, (2.0, 2.0, 2.0))
    assert sums[inside] / share[inside] == pytest.approx(0.2, rel=1e-4)
    assert share[12, 12, 12] > 0.95
    assert share[6, 12, 12] == pytest.approx(0.5 + 0.5 * 0.199, abs=0.02)  # half, and half a voxel's weight
