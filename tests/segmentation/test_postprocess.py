from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.models.registry import MODELS, Postprocessing
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.postprocess import Components, distances_from_typical_positions, postprocess
from bids_dgmseg.segmentation.predict import ProbabilityBlock
from bids_dgmseg.simulate.phantom import PHANTOM

DN_L, DN_R, IN_L, PUT_R = 1, 2, 3, 14
VOXEL_MM = (2.0, 2.0, 4.0)


def cleaned(labels, **how):
    """Clean one-hot probabilities of DN_L (1) and DN_R (2)."""
    model = replace(MODELS["dgm16"], labels=("DN_L", "DN_R"), postprocessing=Postprocessing(**how))
    one_hot = np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 0)
    return postprocess(ProbabilityBlock(one_hot, (slice(None),) * 3), model)


def test_threshold_must_be_exceeded():
    model = replace(
        MODELS["dgm16"],
        labels=("DN_L", "DN_R"),
        postprocessing=Postprocessing(threshold=0.5, min_component_fraction=0.0),
    )
    #                         background, left, right: most probable nucleus below, at and above one half
    voxels = np.array([[0.2, 0.45, 0.35], [0.25, 0.5, 0.25], [0.1, 0.3, 0.6], [0.6, 0.2, 0.2]], np.float32)
    labels = postprocess(ProbabilityBlock(voxels.T[:, :, None, None], (slice(None),) * 3), model)
    assert labels.ravel().tolist() == [0, 0, DN_R, 0]


def test_only_one_of_equal_components_is_kept():
    labels = np.zeros((12, 5, 5), int)
    labels[1:3, 1:3, 1:3] = labels[6:8, 1:3, 1:3] = DN_L  # 8 voxels each
    labels[10, 4, 4] = DN_R
    kept = cleaned(labels, min_component_fraction=1.0)
    assert (kept == DN_L).sum() == 8
    assert (kept == DN_R).sum() == 1


def test_nnunet_labels_stay_unchanged():
    labels = np.zeros((9, 5, 5), int)
    labels[1:4, 1:4, 1:4] = labels[7, 4, 4] = DN_L  # a body of 27 voxels and a single one
    block = ProbabilityBlock(np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 0), (slice(None),) * 3)
    np.testing.assert_array_equal(postprocess(block, MODELS["nnunet2step"]), labels)
    assert postprocess(block, replace(MODELS["dgm16"], labels=("DN_L", "DN_R")))[7, 4, 4] == 0


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
    labels[7, 4, 4] = DN_L  # a thorn: itself and one neighbour of seven
    labels[2, 4, 4] = 0  # a notch: five of six neighbours
    smooth = cleaned(labels, smooth=True)
    assert smooth[7, 4, 4] == 0
    assert smooth[2, 4, 4] == DN_L
    assert smooth[2, 2, 2] == DN_L  # a corner: itself and three neighbours, the least majority


def test_thin_nucleus_survives_smoothing():
    labels = np.zeros((5, 5, 5), int)
    labels[2, 1:4, 2] = DN_L
    np.testing.assert_array_equal(cleaned(labels, smooth=True), labels)


def test_smoothing_never_overwrites_another_nucleus():
    labels = np.full((4, 4, 4), DN_L)
    labels[2, 2, 2] = DN_R
    np.testing.assert_array_equal(cleaned(labels, smooth=True), labels)


@pytest.fixture
def nuclei():
    """The phantom's nuclei in thick slices, numbered as structures.tsv."""
    return PHANTOM.dseg(world_grid(Box((-60, -80, -60), (60, 40, 60)), VOXEL_MM)).array.astype(int)


def placed(labels, *, axes=(0, 1, 2), position_sd_mm=6.0):
    """Clean one-hot probabilities of all sixteen nuclei, the array stored with its axes in that order."""
    model = replace(MODELS["dgm16"], postprocessing=Postprocessing(position_sd_mm=position_sd_mm))
    one_hot = np.moveaxis(np.eye(17, dtype=np.float32)[labels.transpose(axes)], -1, 0)
    x, y, z = (VOXEL_MM[axis] for axis in axes)
    return postprocess(ProbabilityBlock(one_hot, (slice(None),) * 3, voxel_size_mm=(x, y, z)), model).transpose(
        np.argsort(axes)
    )


def with_patch(nuclei):
    """Add a patch of putamen outside the head, larger than the putamen itself."""
    labels = nuclei.copy()
    labels[50:60, 40:54, 20:26] = PUT_R
    assert (labels == PUT_R).sum() - (nuclei == PUT_R).sum() == 840
    assert 100 < (nuclei == PUT_R).sum() < 840
    return labels


def test_well_placed_nuclei_stay_unchanged(nuclei):
    np.testing.assert_array_equal(placed(nuclei), nuclei)


def test_large_misplaced_component_is_removed(nuclei):
    np.testing.assert_array_equal(placed(with_patch(nuclei)), nuclei)
    np.testing.assert_array_equal(placed(with_patch(nuclei), position_sd_mm=0.0), with_patch(nuclei))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_work_in_any_orientation(nuclei, axis):
    labels = np.flip(with_patch(nuclei), axis)
    np.testing.assert_array_equal(placed(labels, axes=(2, 0, 1)), np.flip(nuclei, axis))


def test_well_placed_island_is_kept(nuclei):
    labels = nuclei.copy()
    labels[:, 13, :][labels[:, 13, :] == IN_L] = 0  # a gap of 2 mm across
    before, behind = (labels[:, 14:] == IN_L).sum(), (labels[:, :13] == IN_L).sum()
    assert min(before, behind) > 0.25 * max(before, behind)
    np.testing.assert_array_equal(placed(labels), labels)


def test_entirely_misplaced_nucleus_is_kept(nuclei):
    labels = np.where(nuclei == PUT_R, 0, with_patch(nuclei))
    np.testing.assert_array_equal(placed(labels), labels)


CENTRES_MM = {
    STRUCTURES.numbered(body.label): np.array(body.centre_mm) for body in PHANTOM.nuclei
}  # the phantom's are drawn after the MNI152 brain, not after the template
CN_R, RIGHT_PUTAMEN, RN_L = (STRUCTURES.named(name) for name in ("CN_R", "PUT_R", "RN_L"))


def whole(centres_mm):
    """Let each nucleus have one part."""
    return {structure: Components(np.array([100]), centre[None]) for structure, centre in centres_mm.items()}


def test_typical_nuclei_have_small_distances():
    missed_mm = distances_from_typical_positions(whole(CENTRES_MM))
    assert list(missed_mm) == list(STRUCTURES)
    assert max(float(missed[0]) for missed in missed_mm.values()) < 4


@pytest.mark.parametrize("flips", list(product([1, -1], repeat=3)))
def test_distances_are_invariant_to_similarities(flips):
    turned = {name: 1.3 * np.array(flips) * centre[[2, 0, 1]] + 50 for name, centre in CENTRES_MM.items()}
    expected, missed_mm = (
        distances_from_typical_positions(whole(CENTRES_MM)),
        distances_from_typical_positions(whole(turned)),
    )
    for structure, missed in missed_mm.items():
        assert_allclose(missed, expected[structure], atol=1e-6)


def test_distance_of_a_moved_component():
    found = whole(CENTRES_MM)
    before = distances_from_typical_positions(found)
    found[RIGHT_PUTAMEN] = Components(
        np.array([200, 100]), CENTRES_MM[RIGHT_PUTAMEN] + [[30.0, 0.0, 40.0], [0.0, 0.0, 0.0]]
    )
    after = distances_from_typical_positions(found)
    assert after[RIGHT_PUTAMEN][0] == pytest.approx(
        50, abs=7
    )  # 3-4-5, give or take what phantom and template differ by
    assert after[RIGHT_PUTAMEN][1] < 4
    assert_allclose(after[RN_L], before[RN_L], atol=1)


def test_exchanged_putamen_is_distant():
    found = whole(CENTRES_MM)
    found[RIGHT_PUTAMEN] = Components(np.array([100]), CENTRES_MM[RIGHT_PUTAMEN][None] * [[-1, 1, 1]])
    assert distances_from_typical_positions(found)[RIGHT_PUTAMEN][0] == pytest.approx(2 * 27.4, abs=7)


def test_caudate_ends_follow_its_course():
    found = whole(CENTRES_MM)
    # Its body above the thalamus, and as far out on the other side.
    body, across = np.array([17.0, -16.0, 21.0]), np.array([-17.0, -16.0, 21.0])
    middle = CENTRES_MM[CN_R]
    assert np.linalg.norm(body - middle) > 25
    found[CN_R] = Components(np.array([100, 20, 20]), np.array([middle, body, across]))
    missed = distances_from_typical_positions(found)[CN_R]
    assert missed[1] < 7
    assert missed[2] > 25


def test_few_nuclei_have_distance_zero():
    five = {name: parts for name, parts in whole(CENTRES_MM).items() if name.nucleus in ("RN", "SN")}
    five[RIGHT_PUTAMEN] = Components(np.array([9, 1]), np.array([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0]]))
    assert [missed.tolist() for missed in distances_from_typical_positions(five).values()] == [[0]] * 4 + [[0, 0]]
    assert distances_from_typical_positions({}) == {}
