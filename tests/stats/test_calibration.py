import math

import numpy as np
import pytest

from bids_dgmseg.stats.calibration import expected_calibration_error, overestimate


def test_probabilities_that_hold_have_no_error():
    # Ten voxels at 0.3, of which three are of the class.
    assert expected_calibration_error([0.3] * 10, [True] * 3 + [False] * 7) == pytest.approx(0)


def test_each_bin_weighs_as_many_voxels_as_it_holds():
    # Three voxels at 0.9, two of them right: |0.9 − 2/3|. One at 0.2, wrong: 0.2. (3·0.2333 + 0.2) / 4 = 0.225.
    probability, truth = [0.9, 0.9, 0.9, 0.2], [True, True, False, False]
    assert expected_calibration_error(probability, truth, n_bins=10) == pytest.approx(0.225)


def test_certainty_falls_into_the_last_bin():
    assert expected_calibration_error([1.0, 1.0], [True, False], n_bins=4) == pytest.approx(0.5)


def test_too_sure_and_not_sure_enough_do_not_cancel_across_bins():
    probability = np.repeat([0.25, 0.75], 100)
    truth = np.repeat([False, True], 100)
    assert expected_calibration_error(probability, truth, n_bins=2) == pytest.approx(0.25)


def test_without_voxels_there_is_no_error_to_tell():
    assert math.isnan(expected_calibration_error([], []))


def test_what_two_maps_say_too_much_and_too_little_cancels():
    # Two of three voxels at 0.5 are right in the one map, one of three in the other: 1.5 − 2 and 1.5 − 1 voxels.
    one, other = (overestimate([0.5] * 3, [True] * n + [False] * (3 - n), n_bins=2) for n in (2, 1))
    assert one.tolist() == [0.0, -0.5]
    assert (one + other).tolist() == [0.0, 0.0]
