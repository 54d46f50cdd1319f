from itertools import product

import numpy as np
import pytest
from numpy.testing import assert_allclose

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.segmentation.postprocess import Components, distances_from_typical_positions
from bids_dgmseg.simulate.phantom import PHANTOM

CENTRES_MM = {
    STRUCTURES.numbered(body.label): np.array(body.centre_mm) for body in PHANTOM.nuclei
}  # the phantom's are drawn after the MNI152 brain, not after the template
CN_R, PUT_R, RN_L = (STRUCTURES.named(name) for name in ("CN_R", "PUT_R", "RN_L"))


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
    found[PUT_R] = Components(np.array([200, 100]), CENTRES_MM[PUT_R] + [[30.0, 0.0, 40.0], [0.0, 0.0, 0.0]])
    after = distances_from_typical_positions(found)
    assert after[PUT_R][0] == pytest.approx(50, abs=7)  # 3-4-5, give or take what phantom and template differ by
    assert after[PUT_R][1] < 4
    assert_allclose(after[RN_L], before[RN_L], atol=1)


def test_exchanged_putamen_is_distant():
    found = whole(CENTRES_MM)
    found[PUT_R] = Components(np.array([100]), CENTRES_MM[PUT_R][None] * [[-1, 1, 1]])
    assert distances_from_typical_positions(found)[PUT_R][0] == pytest.approx(2 * 27.4, abs=7)


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
    five[PUT_R] = Components(np.array([9, 1]), np.array([[0.0, 0.0, 0.0], [500.0, 0.0, 0.0]]))
    assert [missed.tolist() for missed in distances_from_typical_positions(five).values()] == [[0]] * 4 + [[0, 0]]
    assert distances_from_typical_positions({}) == {}
