from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.segmentation.regions import Midplane, find_midplane, split_hemispheres
from bids_dgmseg.simulate.phantom import PHANTOM
from tests.conftest import coarse_chi, make_grid

UPRIGHT = Midplane(np.array([1.0, 0.0, 0.0]), 0.0)


def moved(volume, *, yaw=0.0, roll=0.0, shift_mm=(0.0, 0.0, 0.0)):
    """The same head, turned and shifted in the world; gives the rotation too."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zy", [yaw, roll], degrees=True).as_matrix()
    turn[:3, 3] = shift_mm
    return Volume(volume.array, turn @ volume.affine), turn


@pytest.mark.parametrize(
    "pose",
    [
        {},
        {"shift_mm": (12, 5, -3)},
        {"yaw": 12, "roll": -10, "shift_mm": (7, 0, 0)},
        {"yaw": -15, "roll": -15},
    ],
)
def test_midplane_is_found_for_any_head_position(pose):
    chi, turn = moved(coarse_chi(), **pose)
    plane = find_midplane(chi)
    nuclei = turn[:3, :3] @ np.array([[0, 0], [-60, 20], [-30, 10]]) + turn[:3, 3:]  # middles of dentates and caudates
    np.testing.assert_allclose(plane.distance_mm(nuclei.T), 0, atol=0.5)
    assert np.degrees(np.arccos(plane.normal @ turn[:3, 0])) < 1


def test_cut_field_of_view_does_not_shift_the_midplane():
    chi = PHANTOM.chi(world_grid(Box((-75, -110, -80), (45, 74, 80)), (3, 3, 3)), seed=0)
    assert find_midplane(chi).distance_mm(np.array([0.0, -20.0, 0.0])) == pytest.approx(0, abs=0.5)


def test_noise_outside_the_brain_does_not_shift_the_midplane():
    chi = coarse_chi()
    noise = np.random.default_rng(0).normal(0, 0.02, chi.shape).astype(np.float32)
    noisy = chi.with_array(np.where(chi.array == 0, noise, chi.array))
    assert find_midplane(noisy).distance_mm(np.array([0.0, -20.0, 0.0])) == pytest.approx(0, abs=0.5)


def test_nuclei_without_a_side_are_split_by_hand():
    grid = Grid((4, 1, 1), np.diag([2.0, 1.0, 1.0, 1.0]) + np.outer([1, 0, 0, 0], [0, 0, 0, -3.0]))  # x = -3, -1, 1, 3
    probabilities = np.array([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.0], [0.0, 0.0, 0.0, 0.6]], np.float32)
    divided = split_hemispheres(probabilities[:, :, None, None], grid, MODELS["dcnnet"], UPRIGHT)[:, :, 0, 0]
    np.testing.assert_array_equal(
        divided,
        np.array(
            [
                [0.1, 0.2, 0.3, 0.4],
                [0.9, 0.8, 0, 0],
                [0, 0, 0.7, 0],
                [0, 0, 0, 0],
                [0, 0, 0, 0.6],
            ],
            np.float32,
        ),
    )


def test_sided_classes_stay_unchanged():
    model = replace(MODELS["dcnnet"], labels=("DN_L", "DN_R", "IN_L"), heads=(("DN", "IN_L"),))
    grid = Grid((2, 1, 1), np.diag([2.0, 1.0, 1.0, 1.0]) + np.outer([1, 0, 0, 0], [0, 0, 0, -1.0]))
    probabilities = np.array([[0.2, 0.2], [0.5, 0.5], [0.3, 0.3]], np.float32)[:, :, None, None]
    divided = split_hemispheres(probabilities, grid, model, UPRIGHT)[:, :, 0, 0]
    np.testing.assert_array_equal(divided[1:], np.array([[0.5, 0], [0, 0.5], [0.3, 0.3]], np.float32))


@pytest.mark.parametrize("name", ["RAS", "LPS", "oblique"])
def test_left_is_the_patients_left_in_any_orientation(name):
    grid = make_grid(name)
    plane = find_midplane(PHANTOM.chi(grid, supersampling=1))
    distance, labels = plane.distance_mm(grid.centres_mm()), PHANTOM.dseg(grid).array
    assert (distance[(labels > 0) & (labels % 2 == 1)] < 0).all()  # odd numbers are left
    assert (distance[(labels > 0) & (labels % 2 == 0)] > 0).all()
