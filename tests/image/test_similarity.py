import numpy as np
import pytest
from numpy.testing import assert_allclose

from bids_dgmseg.image.grids import fit_similarity

CORNERS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])


def test_rotation_scaling_and_translation_are_recovered():
    # A quarter rotation about z takes x to y and y to -x; then twice as large, and 5 upward.
    targets = np.array([[0.0, 0, 5], [0, 2, 5], [-4, 0, 5], [0, 0, 11]])
    transform = fit_similarity(CORNERS, targets)
    assert_allclose(transform(CORNERS), targets, atol=1e-12)
    assert_allclose(transform(np.array([1.0, 1.0, 1.0])), [-2, 2, 7], atol=1e-12)


def test_reflection_is_found_only_if_allowed():
    targets = CORNERS * [-1, 1, 1]
    assert_allclose(fit_similarity(CORNERS, targets, mirrored=True)(CORNERS), targets, atol=1e-12)
    assert np.linalg.det(fit_similarity(CORNERS, targets).matrix) > 0


def test_points_without_weight_are_ignored():
    targets = CORNERS + 7
    targets[3] += 100
    fitted = fit_similarity(CORNERS, targets, np.array([1.0, 1.0, 1.0, 0.0]))
    assert fitted(CORNERS[3]) == pytest.approx([7, 7, 10])
