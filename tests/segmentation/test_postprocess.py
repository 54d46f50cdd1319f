from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.models.registry import MODELS, Postprocessing
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM
from bids_dgmseg.registration.midplane import Midplane
from bids_dgmseg.segmentation.postprocess import (
    Components,
    distances_from_typical_positions,
    keep_best_placed,
    label_grid,
    postprocess,
)
from bids_dgmseg.segmentation.predict import ProbabilityBlock

DN_L, DN_R, IN_L, CN_L, PUT_R = 1, 2, 3, 11, 14
VOXEL_MM = (2.0, 2.0, 4.0)
TWO = replace(MODELS["dgm16"], labels=("DN_L", "DN_R"))


def one_hot(labels, voxel_size_mm=(1.0, 1.0, 1.0)):
    channels = np.moveaxis(np.eye(17, dtype=np.float32)[labels], -1, 0)
    return ProbabilityBlock(channels, (slice(None),) * 3, voxel_size_mm=voxel_size_mm)


def cleaned(labels, **options):
    return postprocess(one_hot(labels), replace(MODELS["dgm16"], postprocessing=Postprocessing(**options)))


def test_threshold_must_be_exceeded():
    model = replace(TWO, postprocessing=Postprocessing(threshold=0.5, min_component_fraction=0.0))
    #                         background, left, right: most probable nucleus below, at and above one half
    voxels = np.array([[0.2, 0.45, 0.35], [0.25, 0.5, 0.25], [0.1, 0.3, 0.6], [0.6, 0.2, 0.2]], np.float32)
    labels = postprocess(ProbabilityBlock(voxels.T[:, :, None, None], (slice(None),) * 3), model)
    assert labels.ravel().tolist() == [0, 0, DN_R, 0]


def test_small_component_is_removed():
    labels = np.zeros((20, 10, 10), int)
    labels[1:5, 1:5, 1:5] = DN_L  # 64 voxels
    labels[15, 1:7, 5] = DN_L  # 6 voxels, less than a tenth
    labels[15, 1:8, 9] = DN_L  # 7 voxels, more than a tenth
    kept = postprocess(one_hot(labels), MODELS["dgm16"])
    assert (kept == DN_L).sum() == 64 + 7
    assert kept[15, :, 5].max() == 0
    assert_array_equal(cleaned(labels, min_component_fraction=0.0), labels)
    assert (postprocess(one_hot(labels), MODELS["nnunet2step"]) == DN_L).sum() == 64


def test_only_one_of_equal_components_is_kept():
    labels = np.zeros((12, 5, 5), int)
    labels[1:3, 1:3, 1:3] = labels[6:8, 1:3, 1:3] = DN_L  # 8 voxels each
    labels[10, 4, 4] = DN_R
    kept = cleaned(labels, min_component_fraction=1.0)
    assert (kept == DN_L).sum() == 8
    assert (kept == DN_R).sum() == 1


def test_outside_the_block_is_background():
    block = replace(one_hot(np.ones((2, 3, 4), int)), slices=(slice(1, 3), slice(0, 3), slice(5, 9)))
    dseg = label_grid(block, MODELS["dgm16"], np.zeros((6, 4, 10), np.float32))
    assert dseg.shape == (6, 4, 10)
    assert (dseg[1:3, 0:3, 5:9] == 1).all()
    assert dseg.sum() == 24  # the block's 2 x 3 x 4 voxels of label 1


@pytest.mark.parametrize(("voxel_size_mm", "thin"), [((1.0, 1.0, 1.0), True), ((2.0, 2.0, 2.0), False)])
@pytest.mark.parametrize(("strand_ppm", "vein"), [(0.1, True), (0.05, False)])
@pytest.mark.parametrize("number", [CN_L, PUT_R])
def test_strands_of_the_caudate_as_bright_as_veins_are_removed(number, strand_ppm, vein, voxel_size_mm, thin):
    labels = np.zeros((12, 12, 30), int)
    labels[2:9, 2:9, 2:9] = number
    solid = labels > 0
    labels[5, 5, 9:25] = number  # fills one voxel, which is thin at 1 mm and wider than the ball's radius at 2 mm
    strand = (labels > 0) & ~solid
    values = np.where(np.indices(labels.shape).sum(axis=0) % 2 == 0, 0.03, 0.07)  # median .05, median deviation .02
    chi = np.where(strand, strand_ppm, values).astype(np.float32)
    result = postprocess(one_hot(labels, voxel_size_mm), MODELS["dgm16"], chi)
    assert result[solid].all()
    assert result[5, 5, 12:25].any() != (number == CN_L and vein and thin)
    assert_array_equal(postprocess(one_hot(labels, voxel_size_mm), MODELS["dgm16"]), labels)  # without the map


def test_holes_with_another_nucleus_stay_unfilled():
    labels = np.zeros((9, 7, 7), int)
    labels[1:8, 1:6, 1:6] = DN_L
    labels[2, 3, 3] = 0
    labels[5, 3, 3] = DN_R
    filled = cleaned(labels, fill_holes=True)
    assert filled[2, 3, 3] == DN_L
    assert filled[5, 3, 3] == DN_R
    assert cleaned(labels)[2, 3, 3] == 0


def test_smoothing_removes_spikes_and_fills_notches():
    labels = np.zeros((9, 9, 9), int)
    labels[2:7, 2:7, 2:7] = DN_L
    labels[7, 4, 4] = DN_L  # a spike: itself and one neighbour of seven
    labels[2, 4, 4] = 0  # a notch: five of six neighbours
    smooth = cleaned(labels, smooth=True)
    assert smooth[7, 4, 4] == 0
    assert smooth[2, 4, 4] == DN_L
    assert smooth[2, 2, 2] == DN_L  # a corner: itself and three neighbours, the least majority


@pytest.fixture(scope="module")
def nuclei():
    """Labels of the phantom's nuclei in thick slices."""
    return PHANTOM.dseg(world_grid(Box((-60, -80, -60), (60, 40, 60)), VOXEL_MM)).array.astype(int)


@pytest.fixture
def with_patch(nuclei):
    """Add a patch of putamen outside the head, larger than the putamen itself."""
    labels = nuclei.copy()
    labels[50:60, 40:54, 20:26] = PUT_R
    assert 100 < (nuclei == PUT_R).sum() < (labels == PUT_R).sum() - (nuclei == PUT_R).sum() == 840
    return labels


def cleaned_by_position(labels, *, axes=(0, 1, 2), position_sd_mm=6.0):
    """Clean up nuclei by position; the array is stored with its axes in a given order."""
    model = replace(MODELS["dgm16"], postprocessing=Postprocessing(position_sd_mm=position_sd_mm))
    x, y, z = (VOXEL_MM[axis] for axis in axes)
    return postprocess(one_hot(labels.transpose(axes), (x, y, z)), model).transpose(np.argsort(axes))


def test_large_misplaced_component_is_removed(nuclei, with_patch):
    assert_array_equal(cleaned_by_position(nuclei), nuclei)
    assert_array_equal(cleaned_by_position(with_patch), nuclei)
    assert_array_equal(cleaned_by_position(with_patch, position_sd_mm=0.0), with_patch)


def test_entirely_misplaced_nucleus_is_kept(nuclei, with_patch):
    labels = np.where(nuclei == PUT_R, 0, with_patch)
    assert_array_equal(cleaned_by_position(labels), labels)


CENTRES_MM = {STRUCTURES.numbered(body.label): np.array(body.centre_mm) for body in PHANTOM.nuclei}
"""Nuclei of the phantom, which follow the MNI152 brain and not the label template."""
CN_R, RIGHT_PUTAMEN, RN_L = (STRUCTURES.named(name) for name in ("CN_R", "PUT_R", "RN_L"))


def distances_mm(centres_mm, **parts):
    """Distances of nuclei with one component each, except for those given as lists of (size, centre)."""
    result = {structure: Components(np.array([100]), centre[None]) for structure, centre in centres_mm.items()}
    for name, components in parts.items():
        sizes, centres = zip(*components, strict=True)
        result[STRUCTURES.named(name)] = Components(np.array(sizes), np.array(centres))
    return distances_from_typical_positions(result)


def test_typical_nuclei_have_small_distances():
    found_mm = distances_mm(CENTRES_MM)
    assert list(found_mm) == list(STRUCTURES)
    assert max(float(distance[0]) for distance in found_mm.values()) < 4


@pytest.mark.parametrize("flips", list(product([1, -1], repeat=3)))
def test_distances_are_invariant_to_similarities(flips):
    turned = {name: 1.3 * np.array(flips) * centre[[2, 0, 1]] + 50 for name, centre in CENTRES_MM.items()}
    expected, result = distances_mm(CENTRES_MM), distances_mm(turned)
    for structure, distance in result.items():
        assert_allclose(distance, expected[structure], atol=1e-6)


def test_distance_of_a_moved_component():
    putamen = CENTRES_MM[RIGHT_PUTAMEN]
    before = distances_mm(CENTRES_MM)
    after = distances_mm(CENTRES_MM, PUT_R=[(200, putamen + np.array([30.0, 0.0, 40.0])), (100, putamen)])
    assert after[RIGHT_PUTAMEN][0] == pytest.approx(50, abs=7)  # 3-4-5; phantom and template differ by a few mm
    assert after[RIGHT_PUTAMEN][1] < 4
    assert_allclose(after[RN_L], before[RN_L], atol=1)
    exchanged = distances_mm(CENTRES_MM, PUT_R=[(100, putamen * [-1, 1, 1])])
    assert exchanged[RIGHT_PUTAMEN][0] == pytest.approx(2 * 27.4, abs=7)


def test_caudate_ends_follow_its_course():
    # Its body above the thalamus, and as far out on the other side.
    body, across, middle = np.array([17.0, -16.0, 21.0]), np.array([-17.0, -16.0, 21.0]), CENTRES_MM[CN_R]
    assert np.linalg.norm(body - middle) > 25
    result = distances_mm(CENTRES_MM, CN_R=[(100, middle), (20, body), (20, across)])[CN_R]
    assert result[1] < 7
    assert result[2] > 25


def test_few_nuclei_have_distance_zero():
    four = {name: centre for name, centre in CENTRES_MM.items() if name.nucleus in ("RN", "SN")}
    result = distances_mm(four, PUT_R=[(9, (0.0, 0.0, 0.0)), (1, (500.0, 0.0, 0.0))])
    assert [distance.tolist() for distance in result.values()] == [[0]] * 4 + [[0, 0]]
    assert distances_mm({}) == {}


@pytest.mark.parametrize(
    ("expected_mm", "kept"),
    [
        pytest.param([[-15.0, 0, 0], [15, 0, 0]], [10], id="small and in place"),
        pytest.param([[-30.0, 0, 0], [15, 0, 0]], [25, 26], id="large and in place"),
        pytest.param([[-22.5, 0, 0], [15, 0, 0]], [25, 26], id="as far away: the larger one"),
        pytest.param([[15.0, 0, 0]], [10, 25, 26], id="no place on this side"),
    ],
)
def test_best_placed_component_of_a_nucleus_is_kept(expected_mm, kept):
    # x = -5, -6, … -44 mm; the left dentate is one voxel at -15 and two at -30 and -31 mm, the right one is absent.
    grid = Grid((40, 3, 3), np.array([[-1.0, 0, 0, -5], [0, 1, 0, -1], [0, 0, 1, -1], [0, 0, 0, 1]]))
    left = np.full(grid.shape, 0.2, np.float32)
    left[[10, 25, 26], 1, 1] = 0.9
    model = replace(MODELS["nnunet2step"], postprocessing=Postprocessing(region_sd_mm=5.0))
    channels = np.stack([1 - left, left, np.zeros_like(left)])
    plane = Midplane(np.array([1.0, 0.0, 0.0]), 0.0)
    cleaned = keep_best_placed(channels, grid, model, plane, lambda: np.array(expected_mm))
    assert np.flatnonzero(cleaned[1, :, 1, 1] > 0.5).tolist() == kept
    np.testing.assert_allclose(cleaned.sum(axis=0), 1, atol=1e-6)
    assert (cleaned[1] == np.float32(0.2)).sum() == 360 - 3  # what is not labelled keeps its probability


def test_place_of_nuclei_in_one_piece_is_not_searched():
    labels = np.zeros((8, 8, 8), np.uint8)
    labels[2:4, 2:4, 2:4] = DN_L
    channels = one_hot(labels).probabilities[:3]
    plane = Midplane(np.array([1.0, 0.0, 0.0]), 0.0)
    kept = keep_best_placed(channels, Grid((8, 8, 8), np.eye(4)), MODELS["nnunet2step"], plane, pytest.fail)
    assert kept is channels
