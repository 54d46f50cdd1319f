import numpy as np
import pytest
from numpy.testing import assert_allclose

from bids_dgmseg.image.similarity import fit_similarity

CORNERS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])


def test_points_that_are_turned_scaled_and_shifted_are_met():
    # A quarter turn about z takes x to y and y to -x; then twice as large, and 5 upward.
    goals = np.array([[0.0, 0, 5], [0, 2, 5], [-4, 0, 5], [0, 0, 11]])
    carry = fit_similarity(CORNERS, goals)
    assert_allclose(carry(CORNERS), goals, atol=1e-12)
    assert_allclose(carry(np.array([1.0, 1.0, 1.0])), [-2, 2, 7], atol=1e-12)


def test_mirror_images_are_met_only_where_they_are_allowed():
    goals = CORNERS * [-1, 1, 1]
    assert_allclose(fit_similarity(CORNERS, goals, mirrored=True)(CORNERS), goals, atol=1e-12)
    assert np.linalg.det(fit_similarity(CORNERS, goals).matrix) > 0


def test_what_weighs_nothing_has_no_say():
    goals = CORNERS + 7
    goals[3] += 100
    fitted = fit_similarity(CORNERS, goals, np.array([1.0, 1.0, 1.0, 0.0]))
    assert fitted(CORNERS[3]) == pytest.approx([7, 7, 10])
