from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.segmentation.regions import clip_and_remove_small_components, valid_box


def head(*specks):
    """A brain from 10 to 30 mm along each axis, and single voxels elsewhere."""
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


def test_voxels_touching_the_head_count():
    box = valid_box(head((9, 20, 20)))
    np.testing.assert_allclose(box.low_mm, (8.5, 9.5, 9.5))


def test_large_separate_components_count():
    chi = head().array
    chi[10:30, 10:30, 0:3] = 0.1  # a seventh of the brain
    np.testing.assert_allclose(valid_box(Volume(chi, np.eye(4))).low_mm, (9.5, 9.5, -0.5))


def test_empty_map_has_no_box():
    with pytest.raises(InputError, match=r"^the map is 0 everywhere"):
        valid_box(Volume(np.zeros((4, 4, 4), np.float32), np.eye(4)))


def test_extreme_values_are_clipped():
    chi = head().array
    assert clip_and_remove_small_components(Volume(chi, np.eye(4))).array is chi
    wild = chi.copy()
    wild[10, 10, 10:13] = (1e6, -300, 4.9)
    found = clip_and_remove_small_components(Volume(wild, np.eye(4))).array
    np.testing.assert_allclose(found[10, 10, 10:13], (5, -5, 4.9))
    np.testing.assert_array_equal(found[11:], chi[11:])


def test_small_components_are_removed():
    wild = head((0, 0, 0), (39, 20, 20))
    wild.array[0, 0, 0] = 1e6
    np.testing.assert_array_equal(clip_and_remove_small_components(wild).array, head().array)


def test_empty_map_stays_empty():
    assert not clip_and_remove_small_components(Volume(np.zeros((4, 4, 4), np.float32), np.eye(4))).array.any()
