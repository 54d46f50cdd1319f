from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.qsm.tissue import find_tissue

VOXEL_MM = (1.0, 1.0, 1.5)


def distance_mm():
    """Distance from the middle of a grid of 80 x 80 x 54 voxels."""
    x, y, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (80, 80, 54)), indexing="ij")
    return np.sqrt(x**2 + y**2 + (1.5 * z) ** 2)


def head(seed=0):
    """A brain of 25 mm, a skull until 31 mm, a scalp until 36 mm, with noise of a fortieth of the signal."""
    r = distance_mm()
    signal = np.select([r < 25, r < 31, r < 36], [1.0, 0.05, 1.2], 0.0)
    x = np.linspace(0.6, 1.4, 80)[:, None, None]  # the coil sees one side better
    noise = np.random.default_rng(seed).normal(scale=0.025, size=(2, *signal.shape))
    return np.hypot(signal * x + noise[0], noise[1]).astype(np.float32)


def test_the_brain_is_found_without_skull_and_scalp():
    found, true = find_tissue(head(), voxel_size_mm=VOXEL_MM), distance_mm() < 25
    assert (found & true).sum() / true.sum() > 0.98
    assert (found & ~true).sum() / true.sum() < 0.01


def test_a_vessel_through_the_skull_does_not_join_them():
    magnitude = head()
    magnitude[39:41, 60:75, 26:28] = 1.0
    found = find_tissue(magnitude, voxel_size_mm=VOXEL_MM)
    assert not found[distance_mm() > 31].any()


def test_a_scan_without_skull_keeps_its_mask():
    true = distance_mm() < 25
    found = find_tissue(np.where(true, head(), 0), voxel_size_mm=VOXEL_MM)
    assert (found != true).sum() / true.sum() < 0.02


def test_dark_nuclei_are_filled():
    magnitude = head()
    magnitude[30:36, 40:46, 24:28] = 0.1  # iron lets the signal decay
    assert find_tissue(magnitude, voxel_size_mm=VOXEL_MM)[30:36, 40:46, 24:28].all()


def test_specks_are_no_tissue():
    speckled = np.random.default_rng(0).uniform(0, 0.2, (24, 24, 24)).astype(np.float32)
    speckled[::4, ::4, ::4] = 1.0
    assert not find_tissue(speckled, voxel_size_mm=VOXEL_MM).any()


def test_a_slab_that_the_brain_fills_is_kept_at_its_faces():
    slab = head()[:, :, 18:36]  # cut through the brain above and below
    true = (distance_mm() < 25)[:, :, 18:36]
    assert (find_tissue(slab, voxel_size_mm=VOXEL_MM) != true).sum() / true.sum() < 0.02


@pytest.mark.parametrize(("value", "expected"), [(0.0, False), (1.0, True)])
def test_one_value_everywhere(value, expected):
    found = find_tissue(np.full((8, 8, 8), value, np.float32), voxel_size_mm=VOXEL_MM)
    assert (found == expected).all()
