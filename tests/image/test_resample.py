import numpy as np
import pytest
import torch

from bids_dgmseg.image.grids import Box, Grid, resample, sample_points, world_grid
from bids_dgmseg.image.volume import Volume

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
