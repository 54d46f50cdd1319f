import numpy as np
import pytest

from bids_dgmseg.image.grids import Box, OrientedBox, box_of_mask, world_grid
from bids_dgmseg.image.volume import Volume


def test_box_has_size_and_centre():
    box = Box((-1, 0, 2), (3, 1, 8))
    assert box.size_mm == (4.0, 1.0, 6.0)
    assert box.centre_mm == (1.0, 0.5, 5.0)


def test_margin_is_added_on_every_side():
    assert Box((0, 0, 0), (1, 2, 3)).expanded(0.5) == Box((-0.5, -0.5, -0.5), (1.5, 2.5, 3.5))


def test_centred_box_has_the_size():
    assert Box.centred(np.array([1.0, 2, 3]), (2, 4, 6)) == Box((0, 0, 0), (2, 4, 6))


def test_box_without_extent_is_rejected():
    with pytest.raises(ValueError, match=r"box has no extent: \(0, 0, 0\) to \(1, 0, 1\)"):
        Box((0, 0, 0), (1, 0, 1))


def test_box_of_mask_includes_voxel_edges():
    mask = np.zeros((5, 5, 5), bool)
    mask[1, 2, 3] = True
    # One voxel of 2 x 1 x 1 mm at index (1, 2, 3): its centre at (2, 2, 3) mm.
    box = box_of_mask(Volume(mask, np.diag([2.0, 1, 1, 1])))
    assert box == Box((1, 1.5, 2.5), (3, 2.5, 3.5))


def test_box_of_mask_encloses_oblique_voxels():
    # A unit square rotated by 45 degrees reaches sqrt(1/2) from its centre.
    half = np.sqrt(0.5)
    affine = np.array([[half, -half, 0, 0], [half, half, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    box = box_of_mask(Volume(np.ones((1, 1, 1), bool), affine))
    assert box.high_mm == pytest.approx((half, half, 0.5))


def test_empty_mask_is_rejected():
    with pytest.raises(ValueError, match="the mask is empty"):
        box_of_mask(Volume(np.zeros((2, 2, 2), bool), np.eye(4)))


def test_oriented_box_has_the_axes():
    axes = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])  # 3-4-5, about z
    box = OrientedBox.from_axes(axes, (1.0, 2.0, 3.0))
    np.testing.assert_allclose(box.axes, axes, atol=1e-12)
    assert box.rotation_deg == pytest.approx((0, 0, np.rad2deg(np.arcsin(0.8))))


@pytest.mark.parametrize("pitch_deg", [-90.0, -25.0, 14.0, 90.0])
def test_grid_of_oriented_box_follows_its_axes(pitch_deg):
    centre = np.array([3.0, -7.0, 11.0])
    box = Box.around(centre, OrientedBox((pitch_deg, 0.0, 0.0), (10.0, 20.0, 30.0)))
    grid = world_grid(box, (1.0, 2.0, 3.0))
    assert grid.shape == (10, 10, 10)
    points = grid.centres_mm()
    np.testing.assert_allclose(points.mean(axis=(0, 1, 2)), centre, atol=1e-9)
    assert (points >= np.array(box.low_mm)).all()
    assert (points <= np.array(box.high_mm)).all()
    front = (points[0, 1, 0] - points[0, 0, 0]) / 2
    angle = np.deg2rad(pitch_deg)
    np.testing.assert_allclose(front, [0, np.cos(angle), np.sin(angle)], atol=1e-9)  # chin up: the front rises
