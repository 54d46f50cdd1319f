import numpy as np
import pytest

from bids_dgmseg.image.grids import (
    Box,
    Grid,
    OrientedBox,
    aligned_grid,
    covering_block,
    describe_grid_mismatch,
    world_grid,
)
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume

IDENTITY = np.eye(4)


def test_world_grid_covers_its_box():
    grid = world_grid(Box((-3, 0, 10), (3, 5, 12)), (1.0, 2.0, 2.0))
    assert grid.shape == (6, 3, 1)  # 6 / 1, 5 / 2 rounded up, 2 / 2
    # Centred: voxel centres at -2.5 … 2.5, at 0.5, 2.5, 4.5 around 2.5, and at 11.
    np.testing.assert_allclose(grid.affine[:3, 3], (-2.5, 0.5, 11.0))


def test_world_grid_of_given_shape_keeps_the_centre():
    grid = world_grid(Box((0, 0, 0), (10, 10, 10)), (1.0, 1.0, 1.0), (4, 4, 4))
    np.testing.assert_allclose(grid.affine[:3, 3], (3.5, 3.5, 3.5))  # 5 - (4 - 1) / 2


def test_covering_block_contains_voxel_centres_in_box(grid):
    inside = np.all((grid.centres_mm() >= (-20.1, -10.1, 0.1)) & (grid.centres_mm() <= (9.9, 15.2, 30.3)), axis=-1)
    block = covering_block(grid, Box((-20.1, -10.1, 0.1), (9.9, 15.2, 30.3)))
    assert inside[block].sum() == inside.sum() > 0


def test_covering_block_of_axis_aligned_grid_is_tight():
    block = covering_block(Grid((10, 10, 10), IDENTITY), Box((1.5, 2.0, -5.0), (4.0, 2.5, 50.0)))
    assert block == (slice(2, 5), slice(2, 3), slice(0, 10))


def test_covering_block_of_distant_box_is_empty():
    block = covering_block(Grid((10, 10, 10), IDENTITY), Box((20, 0, 0), (30, 5, 5)))
    assert np.zeros((10, 10, 10))[block].size == 0


def rotated(degrees: float, scale: tuple[float, float, float], start: tuple[float, float, float]) -> np.ndarray:
    """An affine of voxels of some size, rotated about the x axis."""
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) * scale
    affine[:3, 3] = start
    return affine


def noise(shape: tuple[int, int, int], affine: np.ndarray) -> Volume:
    return Volume(np.random.default_rng(0).normal(0, 1, shape).astype(np.float32), affine)


@pytest.mark.parametrize("degrees", [0.0, 9.0])
@pytest.mark.parametrize("voxel_mm", [(1.0, 1.0, 1.0), (0.94, 1.06, 1.0)])
def test_aligned_grid_has_the_voxels_of_the_map(degrees, voxel_mm):
    chi = noise((20, 22, 24), rotated(degrees, voxel_mm, (-3.3, 4.4, 5.55)))
    centre = (chi.affine @ [9.8, 11.1, 12.7, 1])[:3]
    grid = aligned_grid(Box.centred(centre, (7.0, 8.0, 9.0)), (1.0, 1.0, 1.0), Grid(chi.shape, chi.affine), 0.1)
    # 7, 8 and 9 mm in voxels of 0.94, 1.06 and 1 mm, rounded up.
    assert grid.shape == ((8, 8, 9) if voxel_mm[0] < 1 else (7, 8, 9))
    to_index = np.linalg.inv(chi.affine) @ grid.affine
    np.testing.assert_allclose(to_index[:3, :3], np.eye(3), atol=1e-9)
    x, y, z = np.round(to_index[:3, 3]).astype(int)
    np.testing.assert_allclose(to_index[:3, 3], (x, y, z), atol=1e-9)
    nx, ny, nz = grid.shape
    np.testing.assert_array_equal(
        resample(chi, grid, antialias=True).array.round(5), chi.array[x : x + nx, y : y + ny, z : z + nz].round(5)
    )
    middle = grid.affine @ [(nx - 1) / 2, (ny - 1) / 2, (nz - 1) / 2, 1]
    assert np.abs(np.linalg.inv(chi.affine)[:3] @ [*(middle[:3] - centre), 0]).max() <= 0.5 + 1e-9


def test_aligned_grid_joins_voxels_and_divides_slices():
    chi = noise((20, 20, 10), rotated(0.0, (0.5, 0.5, 3.0), (0.1, 0.2, 0.3)))
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
    ("degrees", "voxel_mm", "oriented", "tolerance"),
    [
        (0, 1.0, None, 0.0),
        (0, 1.2, None, 0.1),
        (11, 1.0, None, 0.1),
        (0, 1.0, OrientedBox((20.0, 0, 0), (6, 7, 8)), 0.1),
    ],
)
def test_unalignable_grid_follows_the_box(degrees, voxel_mm, oriented, tolerance):
    own = Grid((30, 30, 30), rotated(degrees, (voxel_mm,) * 3, (-9.3, -9.1, -9.7)))
    size_mm = (6.0, 7.0, 8.0)
    box = Box.around(np.zeros(3), oriented) if oriented else Box.centred(np.array((0.2, 0.1, 0.3)), size_mm)
    grid, expected = aligned_grid(box, (1.0, 1.0, 1.0), own, tolerance), world_grid(box, (1.0, 1.0, 1.0))
    assert grid.shape == expected.shape
    np.testing.assert_allclose(grid.affine, expected.affine, atol=1e-9)


def test_aligned_grid_covers_the_oriented_box():
    own = Grid((30, 30, 30), rotated(16.0, (1.0, 1.0, 1.0), (-15.3, -15.1, -15.7)))
    box = Box.around(np.zeros(3), OrientedBox((20.0, 0, 0), (6.0, 7.0, 8.0)))
    grid = aligned_grid(box, (1.0, 1.0, 1.0), own, 0.1)
    assert grid.shape == (6, 7, 8)  # of the oriented box, not of the box around it
    to_index = np.linalg.inv(own.affine) @ grid.affine
    np.testing.assert_allclose(to_index, to_index.round(), atol=1e-9)


def test_equal_grids_up_to_rounding_match():
    affine = IDENTITY.copy()
    affine[0, 3] = 0.04  # of a voxel
    assert describe_grid_mismatch(noise((2, 3, 4), IDENTITY), noise((2, 3, 4), affine)) is None


def test_grid_mismatch_is_described():
    first, shifted = noise((2, 3, 4), IDENTITY), IDENTITY.copy()
    shifted[0, 3] = 3
    assert describe_grid_mismatch(first, noise((2, 3, 5), IDENTITY)) == "shape (2, 3, 4) differs from (2, 3, 5)"
    assert describe_grid_mismatch(first, noise((2, 3, 4), shifted)) == "corners are 3 mm apart"
