from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from bids_dgmseg.image.masks import (
    close_with_ball,
    fill_holes,
    find_missing,
    is_valid,
    large_components,
    masked_gaussian,
    open_with_ball,
    outside_field_of_view,
)


def test_zeros_and_nan_are_not_valid():
    chi = np.array([0.0, np.nan, 1e-5, -0.002, 0.1])
    assert is_valid(chi).tolist() == [False, False, False, True, True]


def noisy_head(step_ppm: float = 0.0, shape: tuple[int, int, int] = (44, 40, 36)) -> np.ndarray:
    """Ellipsoid of 0.02 ppm noise, stored in steps if given; 0 outside."""
    x, y, z = (np.linspace(-1.2, 1.2, size).reshape(np.roll((-1, 1, 1), axis)) for axis, size in enumerate(shape))
    chi = np.random.default_rng(7).normal(0, 0.02, shape)
    stored = np.rint(chi / step_ppm) * step_ppm if step_ppm else chi
    return np.where(x**2 + y**2 + z**2 < 1, stored, 0).astype(np.float32)


def plane(normal: tuple[float, float, float], width: float) -> np.ndarray:
    """Voxels within half a width of a plane through the centre."""
    distance = (np.indices((44, 40, 36)).T - (21, 19, 17)) @ np.asarray(normal) / np.linalg.norm(normal)
    return np.asarray(np.abs(distance.T) < width / 2)


def ball(radius: float) -> np.ndarray:
    return np.asarray(np.linalg.norm((np.indices((44, 40, 36)).T - (24, 17, 15)).T, axis=0) < radius)


HOLES = {
    "sagittal slice": plane((1, 0, 0), 1),
    "coronal slice": plane((0, 1, 0), 1),
    "two axial slices": plane((0, 0, 1), 3) & (np.arange(36) > 16),
    "thick slab": plane((0, 0, 1), 9),
    "oblique": plane((0.3, 0.4, 0.8), 1.5),
    "voxels on a diagonal plane": plane((1, 1, 1), 1),
    "small block": ball(2),
    "large block": ball(5),
}


@pytest.mark.parametrize(("value", "step_ppm"), [(0, 0.0), (0, 0.001), (np.nan, 0.0)])
@pytest.mark.parametrize("name", HOLES)
def test_slices_and_blocks_inside_the_head_are_missing(name, step_ppm, value):
    chi = noisy_head(step_ppm)
    hole = HOLES[name] & (chi != 0)
    missing = find_missing(np.where(hole, np.float32(value), chi))
    core = ball(9)  # the rim of an oblique plane touches the background
    assert missing[hole & core].all()
    # Of steps of 0.001 ppm, 2 % of the voxels are 0 by chance, also of the about ten neighbours of each.
    assert (missing & ~HOLES[name]).sum() <= 0.25 * hole.sum() * (step_ppm > 0)


@pytest.mark.parametrize("step_ppm", [0.0, 0.0002, 0.001, 0.005, 0.02, 0.05])
def test_zeros_by_chance_are_values(step_ppm):
    assert not find_missing(noisy_head(step_ppm)).any()


def test_smooth_maps_of_coarse_steps_have_no_missing_zeros():
    smooth = ndimage.gaussian_filter(noisy_head(), 2) * 10  # zeros form surfaces where the map crosses 0
    stored = np.rint(smooth / 0.002) * 0.002
    chi = np.where(noisy_head() != 0, stored, 0).astype(np.float32)
    assert not find_missing(chi).any()
    chi[:, :, 17] = 0
    assert find_missing(chi)[15:28, 13:26, 17].all()


@pytest.mark.parametrize("background", [0, np.nan, 0.3])
def test_background_is_not_missing(background):
    chi = noisy_head()
    head = chi != 0
    if background != 0.3:
        chi[20:24, 15:25, 25:] = 0  # a cleft that opens to the outside
    outside = np.random.default_rng(8).normal(0, 0.3, chi.shape) if background == 0.3 else background
    assert not find_missing(np.where(head, chi, outside).astype(np.float32)).any()


def test_zeros_of_maps_of_one_sign_are_values_except_slices():
    chi = np.maximum(noisy_head(), 0)  # half of the head
    assert not find_missing(chi, zeros=False).any()
    chi[:, :, 17] = 0
    assert find_missing(chi, zeros=False)[15:28, 13:26, 17].mean() > 0.2  # where both neighbours have a value


@pytest.mark.parametrize("block", [np.s_[0:7, 4:12, 9:20], np.s_[5:24, 0:22, 10:11], np.s_[3:4, 21:22, 0:20]])
def test_field_of_view_of_a_block_is_that_of_the_image(block):
    valid = ndimage.uniform_filter(np.random.default_rng(3).random((24, 22, 20)), 3) > 0.52
    whole = outside_field_of_view(valid)
    assert 0 < whole.sum() < whole.size
    np.testing.assert_array_equal(outside_field_of_view(valid, block), whole[block])


def test_holes_are_filled_from_both_sides():
    ramp = np.broadcast_to(np.float32(0.01) * (1 + np.arange(40, dtype=np.float32)), (40, 40, 40)).copy()
    for array in (ramp, ramp.T):
        holes = array.copy()
        holes[:, :, 20] = np.nan
        holes[10:12, 10:12, 10] = np.nan
        filled = fill_holes(holes, (1.0, 1.0, 1.0))
        inside = (slice(8, -8),) * 3
        # The mean over a symmetrical neighbourhood of a linear map is its value; the filled voxels' own row is missing.
        np.testing.assert_allclose(filled[inside], array[inside], rtol=0.02)
        np.testing.assert_array_equal(filled[np.isfinite(holes)], array[np.isfinite(holes)])


def test_background_is_filled_with_zero():
    chi = np.where(noisy_head() != 0, noisy_head(), np.float32(np.nan))
    np.testing.assert_array_equal(fill_holes(chi, (1.0, 1.0, 1.0)), np.nan_to_num(chi))


def test_closing_fills_gaps_narrower_than_the_ball():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:10] = slabs[17:] = True  # gaps of 3 and 7 voxels
    closed = close_with_ball(slabs, 2.0, (1.0, 1.0, 1.0))
    assert closed[:10].all()
    np.testing.assert_array_equal(closed[10:], slabs[10:])


def test_ball_is_round_in_millimetres():
    slabs = np.zeros((20, 8, 8), bool)
    slabs[:4] = slabs[7:] = True
    np.testing.assert_array_equal(close_with_ball(slabs, 2.0, (3.0, 1.0, 1.0)), slabs)  # the gap is 9 mm wide
    assert close_with_ball(slabs, 6.0, (3.0, 1.0, 1.0)).all()


def test_masked_gaussian_ignores_values_outside():
    inside = np.zeros((24, 24, 24), bool)
    inside[6:18, 6:18, 6:18] = True
    values = np.where(inside, np.float32(0.2), np.float32(np.nan))
    sums, weights = masked_gaussian(values, inside, (2.0, 2.0, 2.0))
    assert sums[inside] / weights[inside] == pytest.approx(0.2, rel=1e-4)
    assert weights[12, 12, 12] > 0.95
    assert weights[6, 12, 12] == pytest.approx(0.5 + 0.5 * 0.199, abs=0.02)  # half, and half a voxel's weight


@pytest.mark.parametrize(
    ("min_fraction", "kept"), [(0.3, [0, 2, 3, 4, 6, 7]), (0.5, [2, 3, 4, 6, 7]), (0.7, [2, 3, 4])]
)
def test_components_below_the_fraction_are_removed(min_fraction, kept):
    mask = np.zeros((9, 1, 1), bool)
    mask[[0, 2, 3, 4, 6, 7]] = True  # components of 1, 3 and 2 voxels
    assert np.flatnonzero(large_components(mask, min_fraction)).tolist() == kept


@pytest.mark.parametrize(("over_corners", "kept"), [(False, 1), (True, 2)])
def test_components_connect_over_corners_if_wanted(over_corners, kept):
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert large_components(mask, over_corners=over_corners).sum() == kept


def test_opening_removes_what_is_thinner_than_the_ball():
    mask = np.zeros((20, 12, 12), bool)
    mask[2:9, 2:9, 2:9] = True
    mask[9:, 4:7, 4:7] = True  # three voxels wide, to the face of the image
    wide = mask.copy()
    mask[5, 5, 9:] = True  # one voxel wide
    opened = open_with_ball(mask, 1.5, (1.0, 1.0, 1.0))
    corners = wide & ~opened
    assert opened[5, 5, 10:].sum() == 0
    assert opened[9:18, 4:7, 4:7].all()
    assert corners.sum() <= 8 + 9  # of the cube, and the end of the bar
    assert not (opened & ~mask).any()
    assert not open_with_ball(mask, 1.5, (0.4, 0.4, 0.4))[10:].any()  # the bar is 1.2 mm wide
