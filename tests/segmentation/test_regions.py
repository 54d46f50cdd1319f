from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.masks import valid_box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration.midplane import Midplane, find_midplane
from bids_dgmseg.segmentation.localize import clear_other_side, clip_and_remove_small_components
from bids_dgmseg.segmentation.predict import split_hemispheres
from tests.conftest import coarse_chi, make_grid


def head(*specks):
    """Brain from 10 to 30 mm along each axis, and single voxels elsewhere."""
    chi = np.zeros((40, 40, 40), np.float32)
    chi[10:30, 10:30, 10:30] = 0.1
    for speck in specks:
        chi[speck] = 0.1
    return Volume(chi, np.eye(4))


@pytest.mark.parametrize("specks", [(), ((0, 0, 0),), ((39, 20, 20),), ((0, 0, 0), (39, 39, 39), (20, 3, 20))])
def test_small_components_do_not_change_the_box(specks):
    box = valid_box(head(*specks))
    np.testing.assert_allclose(box.low_mm, (9.5, 9.5, 9.5))
    np.testing.assert_allclose(box.high_mm, (29.5, 29.5, 29.5))


def test_empty_map_has_no_box():
    empty = Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))
    assert not clip_and_remove_small_components(empty).array.any()
    with pytest.raises(InputError, match=r"^the map is 0 everywhere"):
        valid_box(empty)


def test_extreme_values_are_clipped():
    chi = head().array
    assert clip_and_remove_small_components(Volume(chi, np.eye(4))).array is chi
    wild = chi.copy()
    wild[10, 10, 10:13] = (1e6, -300, 4.9)
    result = clip_and_remove_small_components(Volume(wild, np.eye(4))).array
    np.testing.assert_allclose(result[10, 10, 10:13], (5, -5, 4.9))
    np.testing.assert_array_equal(result[11:], chi[11:])


def test_small_components_are_removed():
    wild = head((0, 0, 0), (39, 20, 20))
    wild.array[0, 0, 0] = 1e6
    np.testing.assert_array_equal(clip_and_remove_small_components(wild).array, head().array)


def moved(volume, *, yaw=0.0, roll=0.0, shift_mm=(0.0, 0.0, 0.0)):
    """Turn and shift a map in the world; return the transform too."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zy", [yaw, roll], degrees=True).as_matrix()
    turn[:3, 3] = shift_mm
    return Volume(volume.array, turn @ volume.affine), turn


@pytest.mark.parametrize("pose", [{"yaw": 12, "roll": -10, "shift_mm": (7, 5, -3)}, {"yaw": -15, "roll": -15}])
def test_midplane_is_found_for_any_head_position(pose):
    chi, turn = moved(coarse_chi(), **pose)
    plane = find_midplane(chi)
    nuclei = turn[:3, :3] @ np.array([[0, 0], [-60, 20], [-30, 10]]) + turn[:3, 3:]  # middles of dentates and caudates
    np.testing.assert_allclose(plane.distance_mm(nuclei.T), 0, atol=0.5)
    assert np.degrees(np.arccos(plane.normal @ turn[:3, 0])) < 1


@pytest.mark.parametrize("problem", ["cut field of view", "noise outside the brain"])
def test_midplane_is_robust(problem):
    if problem == "cut field of view":
        chi = PHANTOM.chi(world_grid(Box((-75, -110, -80), (45, 74, 80)), (3, 3, 3)), seed=0)
    else:
        noise = np.random.default_rng(0).normal(0, 0.02, coarse_chi().shape).astype(np.float32)
        chi = coarse_chi().with_array(np.where(coarse_chi().array == 0, noise, coarse_chi().array))
    assert find_midplane(chi).distance_mm(np.array([0.0, -20.0, 0.0])) == pytest.approx(0, abs=0.5)


def test_midplane_with_tissue_around_the_brain_is_that_of_the_regions():
    chi, turn = moved(coarse_chi(), yaw=6, roll=-8, shift_mm=(9, 0, 0))
    brain = chi.array != 0
    around = gaussian_filter(np.random.default_rng(0).normal(size=chi.shape), 3)
    chi = chi.with_array(np.where(brain, chi.array, 0.3 * around / around.std()).astype(np.float32))
    plane = find_midplane(chi, chi.with_array(brain.astype(np.uint8)))
    middles = turn[:3, :3] @ np.array([[0, 0], [-60, 20], [-30, 10]]) + turn[:3, 3:]
    np.testing.assert_allclose(plane.distance_mm(middles.T), 0, atol=2.0)  # 9 to 33 mm without regions


def test_regions_of_a_few_ml_are_no_brain(coarse_midplane):
    chi = coarse_chi()
    few = np.zeros(chi.shape, np.uint8)
    few[:5, :5, :5] = 1  # 3.4 ml
    np.testing.assert_array_equal(find_midplane(chi, chi.with_array(few)).normal, find_midplane(chi).normal)


@pytest.mark.parametrize(
    ("heads", "labels", "probabilities", "expected"),
    [
        pytest.param(
            (("DN",), ("IN",)),
            ("DN_L", "DN_R", "IN_L", "IN_R"),
            [[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.0], [0.0, 0.0, 0.0, 0.6]],
            [[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 0], [0, 0, 0, 0.6]],
            id="without a side",
        ),
        pytest.param(
            (("DN", "IN_L"),),
            ("DN_L", "DN_R", "IN_L"),
            [[0.2] * 4, [0.5] * 4, [0.3] * 4],
            [[0.2] * 4, [0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0.3] * 4],
            id="one with a side",
        ),
    ],
)
def test_nuclei_are_split_by_hand(heads, labels, probabilities, expected):
    model = replace(MODELS["dcnnet"], heads=heads, labels=labels)
    grid = Grid((4, 1, 1), np.diag([2.0, 1.0, 1.0, 1.0]) + np.outer([1, 0, 0, 0], [0, 0, 0, -3.0]))  # x = -3, -1, 1, 3
    channels = np.array(probabilities, np.float32)[:, :, None, None]
    divided = split_hemispheres(channels, grid, model, Midplane(np.array([1.0, 0.0, 0.0]), 0.0))
    np.testing.assert_array_equal(divided[:, :, 0, 0], np.array(expected, np.float32))


def test_patch_beyond_the_midplane_becomes_background():
    grid = Grid((4, 1, 1), np.diag([6.0, 1.0, 1.0, 1.0]) + np.outer([1, 0, 0, 0], [0, 0, 0, -9.0]))  # x = -9, -3, 3, 9
    left, right = [0.9, 0.6, 0.3, 0.8], [0.1, 0.2, 0.4, 0.2]
    background = [0.0, 0.2, 0.3, 0.0]
    channels = np.array([background, left, right], np.float32)[:, :, None, None]
    cleared = clear_other_side(channels, grid, MODELS["nnunet2step"], Midplane(np.array([1.0, 0.0, 0.0]), 0.0))
    expected = [[0.1, 0.2, 0.3, 0.8], [0.9, 0.6, 0.3, 0.0], [0.0, 0.2, 0.4, 0.2]]  # within 5 mm both may be
    np.testing.assert_allclose(cleared[:, :, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["LPS", "oblique"])
def test_left_is_the_patients_left_in_any_orientation(coarse_midplane, name):
    grid = make_grid(name)
    plane = find_midplane(PHANTOM.chi(grid, supersampling=1))
    distance, labels = plane.distance_mm(grid.centres_mm()), PHANTOM.dseg(grid).array
    assert (distance[(labels > 0) & (labels % 2 == 1)] < 0).all()  # odd numbers are left
    assert (distance[(labels > 0) & (labels % 2 == 0)] > 0).all()
