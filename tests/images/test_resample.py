import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.resample import Grid, covering_block, resample, world_grid
from bids_dgmseg.images.volume import Volume

IDENTITY = np.eye(4)


def shifted(x_mm: float) -> np.ndarray:
    affine = np.eye(4)
    affine[0, 3] = x_mm
    return affine


def line(*values: float) -> Volume:
    return Volume(np.array(values, np.float32).reshape(-1, 1, 1), IDENTITY)


def test_a_world_grid_covers_its_box_and_no_more():
    grid = world_grid(Box((-3, 0, 10), (3, 5, 12)), (1.0, 2.0, 2.0))
    assert grid.shape == (6, 3, 1)  # 6 / 1, 5 / 2 rounded up, 2 / 2
    # Centred: voxel centres at -2.5 … 2.5, at 0.5, 2.5, 4.5 around 2.5, and at 11.
    np.testing.assert_allclose(grid.affine[:3, 3], (-2.5, 0.5, 11.0))


def test_a_world_grid_of_given_shape_keeps_the_centre():
    grid = world_grid(Box((0, 0, 0), (10, 10, 10)), (1.0, 1.0, 1.0), (4, 4, 4))
    np.testing.assert_allclose(grid.affine[:3, 3], (3.5, 3.5, 3.5))  # 5 - (4 - 1) / 2


def test_a_linear_ramp_is_sampled_exactly_on_any_grid(store, affine):
    # Trilinear interpolation reproduces x + 10 y + 100 z, wherever all eight neighbours exist.
    volume = Volume.read(store(affine))
    centre = volume.affine[:3, :3] @ (np.array(volume.shape) - 1) / 2 + volume.affine[:3, 3]
    grid = world_grid(Box.centred(centre, (1.0, 1.0, 1.0)), (0.25, 0.25, 0.25))
    indices = np.moveaxis(np.indices(grid.shape), 0, -1)
    expected = (indices @ grid.affine[:3, :3].T + grid.affine[:3, 3]) @ (1.0, 10.0, 100.0)
    np.testing.assert_allclose(resample(volume, grid).array, expected, atol=2e-3)  # float32 at 1500


def test_labels_take_the_nearest_voxel():
    out = resample(line(1, 2, 3), Grid((3, 1, 1), shifted(0.4)), order=0)
    assert out.array.ravel().tolist() == [1, 2, 3]


def test_outside_is_the_fill():
    out = resample(line(1, 2, 3), Grid((3, 1, 1), shifted(2.0)), order=0, fill=-7)
    assert out.array.ravel().tolist() == [3, -7, -7]


@pytest.mark.parametrize("rounding", [-1e-12, 1e-12])
@pytest.mark.parametrize("order", [0, 1])
def test_rounding_does_not_cost_an_edge_slice(order, rounding):
    out = resample(line(1, 2, 3), Grid((3, 1, 1), shifted(rounding)), order=order, fill=-7)
    np.testing.assert_allclose(out.array.ravel(), (1, 2, 3), atol=1e-6)  # float32


def test_antialias_blurs_what_the_target_cannot_show():
    # Alternating 0 and 1, sampled every second voxel: without the blur only zeros are seen.
    stripes = line(*[0, 1] * 20)
    grid = Grid((20, 1, 1), np.diag([2.0, 1, 1, 1]))
    assert resample(stripes, grid).array.max() == 0
    # Every block of two holds a 0 and a 1.
    np.testing.assert_allclose(resample(stripes, grid, antialias=True).array.ravel()[1:], 0.5, atol=1e-6)


def test_antialias_blurs_by_the_part_of_a_voxel_that_blocks_leave():
    # Sampled every 1.5 voxels no whole block fits; a Gaussian of FWHM sqrt(1.5² - 1) voxels has sigma 0.4748, and
    # its taps 1, exp(-1 / 2 sigma²) = 0.1088 pass (1 - 0.2177) / (1 + 0.2177) = 0.642 of half a cycle a voxel.
    grid = Grid((12, 1, 1), np.diag([1.5, 1, 1, 1]))
    seen = resample(line(*[0, 1] * 10), grid, antialias=True).array.ravel()[2:-2]
    assert seen.max() - 0.5 == pytest.approx(0.5 * 0.642, abs=1e-3)


def test_antialias_repeats_the_edge_of_an_incomplete_block():
    affine = np.diag([2.0, 1, 1, 1])
    affine[0, 3] = 2.5  # the middle of the second block: the third voxel and its copy
    assert resample(line(1, 1, 5), Grid((1, 1, 1), affine), antialias=True).array.ravel() == pytest.approx([5])


def test_antialias_leaves_finer_grids_alone():
    grid = Grid((5, 1, 1), np.diag([0.5, 1, 1, 1]))
    np.testing.assert_array_equal(
        resample(line(1, 5, 2), grid).array, resample(line(1, 5, 2), grid, antialias=True).array
    )


def test_the_covering_block_holds_the_voxels_whose_centres_lie_in_the_box(grid):
    inside = np.all((grid.centres_mm() >= (-20.1, -10.1, 0.1)) & (grid.centres_mm() <= (9.9, 15.2, 30.3)), axis=-1)
    block = covering_block(grid, Box((-20.1, -10.1, 0.1), (9.9, 15.2, 30.3)))
    assert inside[block].sum() == inside.sum() > 0


def test_the_covering_block_of_an_upright_grid_is_tight():
    block = covering_block(Grid((10, 10, 10), IDENTITY), Box((1.5, 2.0, -5.0), (4.0, 2.5, 50.0)))
    assert block == (slice(2, 5), slice(2, 3), slice(0, 10))


def test_the_covering_block_of_a_box_elsewhere_is_empty():
    block = covering_block(Grid((10, 10, 10), IDENTITY), Box((20, 0, 0), (30, 5, 5)))
    assert np.zeros((10, 10, 10))[block].size == 0


@given(shift=st.tuples(*[st.floats(-4, 4)] * 3), seed=st.integers(0, 99))
def test_a_constant_stays_constant_inside(shift, seed):
    value = np.random.default_rng(seed).random()
    volume = Volume(np.full((9, 9, 9), value, np.float32), IDENTITY)
    affine = np.eye(4)
    affine[:3, 3] = np.add(shift, 4)
    out = resample(volume, Grid((1, 1, 1), affine))
    np.testing.assert_allclose(out.array, value, rtol=1e-5)  # float32; the point lies within the 9 voxels
