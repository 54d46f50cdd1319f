import numpy as np
import pytest
import torch
from nibabel.affines import from_matvec
from numpy.testing import assert_allclose

from bids_dgmseg.image.grids import (
    Box,
    Grid,
    OrientedBox,
    aligned_grid,
    box_of_mask,
    covering_block,
    describe_grid_mismatch,
    fit_similarity,
    resample,
    sample_points,
    world_grid,
)
from bids_dgmseg.image.volume import Volume

IDENTITY = np.eye(4)


def test_centred_box_has_size_and_centre():
    box = Box.centred(np.array([1.0, 0.5, 5.0]), (4, 1, 6))
    assert box == Box((-1, 0, 2), (3, 1, 8))
    assert (box.size_mm, box.centre_mm) == ((4.0, 1.0, 6.0), (1.0, 0.5, 5.0))


def test_box_of_mask_includes_voxel_edges():
    mask = np.zeros((5, 5, 5), bool)
    mask[1, 2, 3] = True
    # One voxel of 2 x 1 x 1 mm at index (1, 2, 3): its centre at (2, 2, 3) mm.
    box = box_of_mask(Volume(mask, np.diag([2.0, 1, 1, 1])))
    assert box == Box((1, 1.5, 2.5), (3, 2.5, 3.5))


def test_box_of_mask_encloses_oblique_voxels():
    # A unit square rotated by 45 degrees reaches sqrt(1/2) from its centre.
    half = np.sqrt(0.5)
    affine = np.array([[half, -half, 0, 0], [half, half, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    box = box_of_mask(Volume(np.ones((1, 1, 1), bool), affine))
    assert box.high_mm == pytest.approx((half, half, 0.5))


def test_tight_box_encloses_voxels_alone():
    # Turned by 45 degrees, voxels (0, 3) and (3, 0) lie side by side; the block of 4 x 4 is a diamond as high as wide.
    root, mask = np.sqrt(2), np.zeros((4, 4, 1), bool)
    mask[0, 3] = mask[3, 0] = True
    affine = np.array([[1 / root, -1 / root, 0, 0], [1 / root, 1 / root, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    turned = Volume(mask, affine)
    np.testing.assert_allclose(box_of_mask(turned, axes=np.eye(3)).size_mm, (6 / root + root, root, 1))
    np.testing.assert_allclose(box_of_mask(turned).size_mm, (4 * root, 4 * root, 1))


def test_box_along_axes_encloses_voxels():
    # Seen along its own axes, a diagonal of voxels of 2 x 1 x 1 mm from (0, 3) to (3, 0) fills the block.
    mask = np.zeros((4, 4, 2), bool)
    mask[0, 3] = mask[3, 0] = True
    turn = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    box = box_of_mask(Volume(mask, from_matvec(turn @ np.diag([2.0, 1, 1]), (5, 6, 7))), axes=turn)
    size_mm, axes = box.frame
    assert_allclose(size_mm, (8, 4, 2))
    assert_allclose(axes, turn, atol=1e-12)
    assert_allclose(box.centre_mm, turn @ (3, 1.5, 0.5) + (5, 6, 7))
    assert_allclose(box.expanded(1).frame[0], (10, 6, 4))
    assert_allclose(box.at_least((9, 2, 2)).frame[0], (9, 4, 2))
    assert_allclose(box.at_least((9, 2, 2)).centre_mm, box.centre_mm)


def test_oriented_box_has_the_axes():
    axes = np.array([[0.6, -0.8, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])  # 3-4-5, about z
    box = OrientedBox.from_axes(axes, (1.0, 2.0, 3.0))
    assert_allclose(box.axes, axes, atol=1e-12)
    assert box.rotation_deg == pytest.approx((0, 0, np.rad2deg(np.arcsin(0.8))))


def test_oriented_box_is_shifted_along_its_axes():
    # Turned by 90 degrees about z, the box's x is the world's y: 10 mm along y, 4 mm along x.
    box = Box.around(np.zeros(3), OrientedBox((0.0, 0.0, 90.0), (10.0, 4.0, 4.0)))
    moved = box.shifted_to_cover(Box((-1, 3, -1), (1, 7, 1)))  # reaches 2 mm beyond y = 5
    assert_allclose(moved.centre_mm, (0, 2, 0), atol=1e-9)
    assert moved.oriented == box.oriented
    wider = box.shifted_to_cover(Box((-3, -1, -1), (3, 1, 1)), grow=True)
    assert_allclose(wider.frame[0], (10, 6, 4))
    assert_allclose(wider.size_mm, (6, 10, 4))


@pytest.mark.parametrize("pitch_deg", [-90.0, -25.0, 14.0, 90.0])
def test_grid_of_oriented_box_follows_its_axes(pitch_deg):
    centre = np.array([3.0, -7.0, 11.0])
    box = Box.around(centre, OrientedBox((pitch_deg, 0.0, 0.0), (10.0, 20.0, 30.0)))
    grid = world_grid(box, (1.0, 2.0, 3.0))
    assert grid.shape == (10, 10, 10)
    points = grid.centres_mm()
    assert_allclose(points.mean(axis=(0, 1, 2)), centre, atol=1e-9)
    assert (points >= np.array(box.low_mm)).all()
    assert (points <= np.array(box.high_mm)).all()
    front = (points[0, 1, 0] - points[0, 0, 0]) / 2
    angle = np.deg2rad(pitch_deg)
    assert_allclose(front, [0, np.cos(angle), np.sin(angle)], atol=1e-9)  # chin up: the front rises


def test_world_grid_covers_its_box():
    grid = world_grid(Box((-3, 0, 10), (3, 5, 12)), (1.0, 2.0, 2.0))
    assert grid.shape == (6, 3, 1)  # 6 / 1, 5 / 2 rounded up, 2 / 2
    # Centred: voxel centres at -2.5 … 2.5, at 0.5, 2.5, 4.5 around 2.5, and at 11.
    assert_allclose(grid.affine[:3, 3], (-2.5, 0.5, 11.0))


def test_covering_block_contains_voxel_centres_in_box(grid):
    inside = np.all((grid.centres_mm() >= (-20.1, -10.1, 0.1)) & (grid.centres_mm() <= (9.9, 15.2, 30.3)), axis=-1)
    block = covering_block(grid, Box((-20.1, -10.1, 0.1), (9.9, 15.2, 30.3)))
    assert inside[block].sum() == inside.sum() > 0


def test_covering_block_of_axis_aligned_grid_is_tight():
    grid = Grid((10, 10, 10), IDENTITY)
    block = covering_block(grid, Box((1.5, 2.0, -5.0), (4.0, 2.5, 50.0)))
    assert block == (slice(2, 5), slice(2, 3), slice(0, 10))
    assert np.zeros((10, 10, 10))[covering_block(grid, Box((20, 0, 0), (30, 5, 5)))].size == 0


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
    assert_allclose(to_index[:3, :3], np.eye(3), atol=1e-9)
    x, y, z = np.round(to_index[:3, 3]).astype(int)
    assert_allclose(to_index[:3, 3], (x, y, z), atol=1e-9)
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
    assert_allclose(seen[:, :, 1::3], joined[3:7, 3:7, 4:7], atol=1e-6)
    # One third of the way to the next slice.
    assert_allclose(seen[:, :, 2], (2 * joined[3:7, 3:7, 4] + joined[3:7, 3:7, 5]) / 3, atol=1e-6)


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
    tilted = Grid((30, 30, 30), rotated(degrees, (voxel_mm,) * 3, (-9.3, -9.1, -9.7)))
    size_mm = (6.0, 7.0, 8.0)
    box = Box.around(np.zeros(3), oriented) if oriented else Box.centred(np.array((0.2, 0.1, 0.3)), size_mm)
    grid, expected = aligned_grid(box, (1.0, 1.0, 1.0), tilted, tolerance), world_grid(box, (1.0, 1.0, 1.0))
    assert grid.shape == expected.shape
    assert_allclose(grid.affine, expected.affine, atol=1e-9)


def test_aligned_grid_covers_the_oriented_box():
    tilted = Grid((30, 30, 30), rotated(16.0, (1.0, 1.0, 1.0), (-15.3, -15.1, -15.7)))
    box = Box.around(np.zeros(3), OrientedBox((20.0, 0, 0), (6.0, 7.0, 8.0)))
    grid = aligned_grid(box, (1.0, 1.0, 1.0), tilted, 0.1)
    assert grid.shape == (6, 7, 8)  # of the oriented box, not of the box around it
    to_index = np.linalg.inv(tilted.affine) @ grid.affine
    assert_allclose(to_index, to_index.round(), atol=1e-9)


def test_grid_mismatch_is_described():
    first, shifted = noise((2, 3, 4), IDENTITY), IDENTITY.copy()
    shifted[0, 3] = 3
    assert describe_grid_mismatch(first, noise((2, 3, 5), IDENTITY)) == "shape (2, 3, 4) differs from (2, 3, 5)"
    assert describe_grid_mismatch(first, noise((2, 3, 4), shifted)) == "corners are 3 mm apart"


CORNERS = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])


def test_rotation_scaling_and_translation_are_recovered():
    # A quarter rotation about z takes x to y and y to -x; then twice as large, and 5 upward.
    targets = np.array([[0.0, 0, 5], [0, 2, 5], [-4, 0, 5], [0, 0, 11]])
    transform = fit_similarity(CORNERS, targets)
    assert_allclose(transform(CORNERS), targets, atol=1e-12)
    assert_allclose(transform(np.array([1.0, 1.0, 1.0])), [-2, 2, 7], atol=1e-12)


def test_reflection_is_found_only_if_allowed():
    targets = CORNERS * [-1, 1, 1]
    assert_allclose(fit_similarity(CORNERS, targets, mirrored=True)(CORNERS), targets, atol=1e-12)
    assert np.linalg.det(fit_similarity(CORNERS, targets).matrix) > 0


def test_points_without_weight_are_ignored():
    targets = CORNERS + 7
    targets[3] += 100
    fitted = fit_similarity(CORNERS, targets, np.array([1.0, 1.0, 1.0, 0.0]))
    assert fitted(CORNERS[3]) == pytest.approx([7, 7, 10])


IDENTITY = np.eye(4)


def shifted(x_mm: float) -> np.ndarray:
    affine = np.eye(4)
    affine[0, 3] = x_mm
    return affine


def line(*values: float) -> Volume:
    return Volume(np.array(values, np.float32).reshape(-1, 1, 1), IDENTITY)


def test_linear_ramp_is_sampled_exactly(store, affine):
    # Trilinear interpolation reproduces x + 10 y + 100 z, wherever all eight neighbours exist.
    volume = Volume.read(store(affine))
    centre = volume.affine[:3, :3] @ (np.array(volume.shape) - 1) / 2 + volume.affine[:3, 3]
    grid = world_grid(Box.centred(centre, (1.0, 1.0, 1.0)), (0.25, 0.25, 0.25))
    indices = np.moveaxis(np.indices(grid.shape), 0, -1)
    expected = (indices @ grid.affine[:3, :3].T + grid.affine[:3, 3]) @ (1.0, 10.0, 100.0)
    np.testing.assert_allclose(resample(volume, grid).array, expected, atol=2e-3)  # float32 at 1500


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("shift_mm", "expected"), [(2.0, [3, -7, -7]), (-1e-12, [1, 2, 3]), (1e-12, [1, 2, 3])], ids=["fill", "low", "high"]
)
def test_fill_value_is_used_beyond_edge_slices(order, shift_mm, expected):
    out = resample(line(1, 2, 3), Grid((3, 1, 1), shifted(shift_mm)), order=order, fill=-7)
    np.testing.assert_allclose(out.array.ravel(), expected, atol=1e-6)  # float32


def test_antialias_averages_fine_stripes():
    # Alternating 0 and 1, sampled every second voxel: without the blur only zeros are seen.
    stripes = line(*[0, 1] * 20)
    grid = Grid((20, 1, 1), np.diag([2.0, 1, 1, 1]))
    assert resample(stripes, grid).array.max() == 0
    # Every block of two holds a 0 and a 1.
    np.testing.assert_allclose(resample(stripes, grid, antialias=True).array.ravel()[1:], 0.5, atol=1e-6)


def test_antialias_blurs_by_the_remaining_fraction():
    # Sampled every 1.5 voxels no whole block fits; a Gaussian of FWHM sqrt(1.5² - 1) voxels has sigma 0.4748, and
    # its taps 1, exp(-1 / 2 sigma²) = 0.1088 pass (1 - 0.2177) / (1 + 0.2177) = 0.642 of half a cycle per voxel.
    grid = Grid((12, 1, 1), np.diag([1.5, 1, 1, 1]))
    seen = resample(line(*[0, 1] * 10), grid, antialias=True).array.ravel()[2:-2]
    assert seen.max() - 0.5 == pytest.approx(0.5 * 0.642, abs=1e-3)


def test_antialias_repeats_the_edge_of_partial_blocks():
    affine = np.diag([2.0, 1, 1, 1])
    affine[0, 3] = 2.5  # the middle of the second block: the third voxel and its copy
    assert resample(line(1, 1, 5), Grid((1, 1, 1), affine), antialias=True).array.ravel() == pytest.approx([5])


INDICES = torch.tensor([[0.0, 0, 0], [1.25, 0, 0], [2.0, 0, 0], [2.5, 0, 0], [9.0, 0, 0]])[None, None]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 2.5, 4, 2, 0]),  # 0.75 x 2 + 0.25 x 4; half a voxel outside, half of 4 is left
        ({"extend": True}, [1, 2.5, 4, 4, 4]),
        ({"nearest": True}, [1, 2, 4, 4, 0]),
    ],
)
def test_points_are_sampled_inside_and_outside(options, expected):
    values = torch.tensor([1.0, 2, 4]).view(1, 3, 1, 1)
    assert sample_points(values, INDICES, **options).flatten().tolist() == pytest.approx(expected)


def test_channels_are_sampled_separately():
    values = torch.arange(16.0).view(2, 2, 2, 2)
    centre = torch.full((1, 1, 1, 3), 0.5)
    assert sample_points(values, centre).flatten().tolist() == [3.5, 11.5]  # means of 0 to 7 and of 8 to 15
