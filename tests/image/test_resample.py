import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bids_dgmseg.image.boxes import Box, OrientedBox
from bids_dgmseg.image.grids import Grid, aligned_grid, covering_block, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume

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


def turned(degrees: float, scale: tuple[float, float, float], start: tuple[float, float, float]) -> np.ndarray:
    """An affine of voxels of some size, turned about the x axis."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) * scale
    affine[:3, 3] = start
    return affine


def noise(shape: tuple[int, int, int], affine: np.ndarray) -> Volume:
    return Volume(np.random.default_rng(0).normal(0, 1, shape).astype(np.float32), affine)


@pytest.mark.parametrize("degrees", [0.0, 9.0])
@pytest.mark.parametrize("voxel_mm", [(1.0, 1.0, 1.0), (0.94, 1.06, 1.0)])
def test_a_meeting_grid_has_the_voxels_of_a_map_of_about_its_spacing(degrees, voxel_mm):
    chi = noise((20, 22, 24), turned(degrees, voxel_mm, (-3.3, 4.4, 5.55)))
    centre = (chi.affine @ [9.8, 11.1, 12.7, 1])[:3]
    grid = aligned_grid(Box.centred(centre, (7.0, 8.0, 9.0)), (1.0, 1.0, 1.0), Grid(chi.shape, chi.affine), 0.1)
    # 7, 8 and 9 mm in voxels of 0.94, 1.06 and 1 mm, rounded up.
    assert grid.shape == ((8, 8, 9) if voxel_mm[0] < 1 else (7, 8, 9))
    place = np.linalg.inv(chi.affine) @ grid.affine
    np.testing.assert_allclose(place[:3, :3], np.eye(3), atol=1e-9)
    x, y, z = np.round(place[:3, 3]).astype(int)
    np.testing.assert_allclose(place[:3, 3], (x, y, z), atol=1e-9)
    nx, ny, nz = grid.shape
    np.testing.assert_array_equal(
        resample(chi, grid, antialias=True).array.round(5), chi.array[x : x + nx, y : y + ny, z : z + nz].round(5)
    )
    middle = grid.affine @ [(nx - 1) / 2, (ny - 1) / 2, (nz - 1) / 2, 1]
    assert np.abs(np.linalg.inv(chi.affine)[:3] @ [*(middle[:3] - centre), 0]).max() <= 0.5 + 1e-9


def test_a_meeting_grid_joins_whole_voxels_and_cuts_slices_into_equal_parts():
    chi = noise((20, 20, 10), turned(0.0, (0.5, 0.5, 3.0), (0.1, 0.2, 0.3)))
    box = Box.centred((chi.affine @ [9.7, 10.2, 5.1, 1])[:3], (4.0, 4.0, 9.0))
    grid = aligned_grid(box, (1.0, 1.0, 1.0), Grid(chi.shape, chi.affine), 0.1)
    assert grid.shape == (4, 4, 9)
    assert grid.voxel_size_mm == pytest.approx((1.0, 1.0, 1.0))
    seen = resample(chi, grid, antialias=True).array
    joined = chi.array.reshape(10, 2, 10, 2, 10).mean(axis=(1, 3))
    # The middle third of a slice has the slice's values: slices 4, 5 and 6, from 10.8 to 19.8 mm.
    np.testing.assert_allclose(seen[:, :, 1::3], joined[3:7, 3:7, 4:7], atol=1e-6)
    # One third of the way to the next slice.
    np.testing.assert_allclose(seen[:, :, 2], (2 * joined[3:7, 3:7, 4] + joined[3:7, 3:7, 5]) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("degrees", "voxel_mm", "tilt", "tolerance"),
    [
        (0, 1.0, None, 0.0),
        (0, 1.2, None, 0.1),
        (11, 1.0, None, 0.1),
        (0, 1.0, OrientedBox((20.0, 0, 0), (6, 7, 8)), 0.1),
    ],
)
def test_a_grid_that_cannot_meet_the_map_lies_along_the_world_or_the_tilt(degrees, voxel_mm, tilt, tolerance):
    own = Grid((30, 30, 30), turned(degrees, (voxel_mm,) * 3, (-9.3, -9.1, -9.7)))
    size_mm = (6.0, 7.0, 8.0)
    box = Box.around(np.zeros(3), tilt) if tilt else Box.centred(np.array((0.2, 0.1, 0.3)), size_mm)
    grid, expected = aligned_grid(box, (1.0, 1.0, 1.0), own, tolerance), world_grid(box, (1.0, 1.0, 1.0))
    assert grid.shape == expected.shape
    np.testing.assert_allclose(grid.affine, expected.affine, atol=1e-9)


def test_a_meeting_grid_meets_a_map_that_is_about_as_tilted_as_the_box():
    own = Grid((30, 30, 30), turned(16.0, (1.0, 1.0, 1.0), (-15.3, -15.1, -15.7)))
    box = Box.around(np.zeros(3), OrientedBox((20.0, 0, 0), (6.0, 7.0, 8.0)))
    grid = aligned_grid(box, (1.0, 1.0, 1.0), own, 0.1)
    assert grid.shape == (6, 7, 8)  # of what is tilted, not of what encloses it
    place = np.linalg.inv(own.affine) @ grid.affine
    np.testing.assert_allclose(place, place.round(), atol=1e-9)
