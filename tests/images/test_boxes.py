import numpy as np
import pytest

from bids_dgmseg.images.boxes import Box, box_of_mask
from bids_dgmseg.images.volume import Volume


def test_a_box_knows_its_size_and_centre():
    box = Box((-1, 0, 2), (3, 1, 8))
    assert box.size_mm == (4.0, 1.0, 6.0)
    assert box.centre_mm == (1.0, 0.5, 5.0)


def test_a_margin_is_added_on_every_side():
    assert Box((0, 0, 0), (1, 2, 3)).grown(0.5) == Box((-0.5, -0.5, -0.5), (1.5, 2.5, 3.5))


def test_a_box_around_a_centre_has_the_size():
    assert Box.centred(np.array([1.0, 2, 3]), (2, 4, 6)) == Box((0, 0, 0), (2, 4, 6))


def test_a_box_without_extent_is_refused():
    with pytest.raises(ValueError, match=r"box has no extent: \(0, 0, 0\) to \(1, 0, 1\)"):
        Box((0, 0, 0), (1, 0, 1))


def test_a_mask_is_enclosed_with_its_voxels_edges():
    mask = np.zeros((5, 5, 5), bool)
    mask[1, 2, 3] = True
    # One voxel of 2 x 1 x 1 mm at index (1, 2, 3): its centre at (2, 2, 3) mm.
    box = box_of_mask(Volume(mask, np.diag([2.0, 1, 1, 1])))
    assert box == Box((1, 1.5, 2.5), (3, 2.5, 3.5))


def test_an_oblique_voxel_is_enclosed_with_its_corners():
    # A unit square turned by 45 degrees reaches sqrt(1/2) from its centre.
    half = np.sqrt(0.5)
    affine = np.array([[half, -half, 0, 0], [half, half, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    box = box_of_mask(Volume(np.ones((1, 1, 1), bool), affine))
    assert box.high_mm == pytest.approx((half, half, 0.5))


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError, match="the mask is empty"):
        box_of_mask(Volume(np.zeros((2, 2, 2), bool), np.eye(4)))
