import numpy as np
import pytest

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.phantom.head import PHANTOM, Ellipsoid, Phantom


@pytest.mark.parametrize("ellipsoid", PHANTOM.nuclei, ids=[structure.abbreviation for structure in STRUCTURES])
def test_voxel_count_matches_analytic_volume(ellipsoid):
    x, y, z = ellipsoid.semi_axes_mm
    volume_mm3 = 4 / 3 * np.pi * x * y * z
    assert ellipsoid.volume_mm3 == pytest.approx(volume_mm3)
    step_mm = (volume_mm3 / 5_000) ** (1 / 3)
    grid = world_grid(ellipsoid.box.expanded(1), (step_mm,) * 3)
    # With 5,000 points the counting error is N^(-2/3), a third of a percent.
    counted_mm3 = np.count_nonzero(PHANTOM.labels(grid.centres_mm()) == ellipsoid.label) * step_mm**3
    assert counted_mm3 == pytest.approx(volume_mm3, rel=0.01)


def test_left_is_at_negative_x():
    for ellipsoid in PHANTOM.nuclei:
        low, high = ellipsoid.box.low_mm[0], ellipsoid.box.high_mm[0]
        assert high < 0 if STRUCTURES.numbered(ellipsoid.label).hemisphere == "L" else low > 0


@pytest.mark.parametrize(
    ("semi_axes_mm", "yaw_deg", "half_mm"),
    [
        pytest.param((1, 2, 3), 90, (2, 1, 3), id="90 degrees about z swap x and y"),
        # sqrt((1 cos45)^2 + (3 sin45)^2) = sqrt(5)
        pytest.param((1, 3, 1), 45, (5**0.5, 5**0.5, 1), id="45 degrees"),
    ],
)
def test_bounding_box_of_rotated_ellipsoid(semi_axes_mm, yaw_deg, half_mm):
    box = Ellipsoid(1, (10, 0, 0), semi_axes_mm, 0.1, (0, 0, yaw_deg)).box
    assert np.subtract(box.high_mm, (10, 0, 0)) == pytest.approx(half_mm)
    assert np.subtract((10, 0, 0), box.low_mm) == pytest.approx(half_mm)


def test_partial_volume_preserves_integral():
    tissue, nucleus = Ellipsoid(22, (0, 0, 0), (18, 18, 18), 0.02), Ellipsoid(1, (1, 0, 0.3), (4, 5, 6), 0.12)
    grid = world_grid(Box((-10,) * 3, (10,) * 3), (2.0, 2.0, 2.0))
    chi = Phantom(tissues=(tissue,), nuclei=(nucleus,)).chi(grid, supersampling=4)
    mass = (chi.array - 0.02).sum() * 8
    assert mass == pytest.approx(0.1 * nucleus.volume_mm3, rel=0.01)  # 0.5 mm points: 4,000 in 500 mm3


def test_map_is_independent_of_orientation():
    grid = world_grid(Box((-30, -70, -45), (30, -40, -20)), (2.0, 2.0, 2.0))
    flipped = Grid(
        grid.shape,
        grid.affine
        @ np.array([[-1, 0, 0, grid.shape[0] - 1], [0, -1, 0, grid.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    np.testing.assert_allclose(PHANTOM.chi(flipped).array[::-1, ::-1], PHANTOM.chi(grid).array, atol=1e-7)
    np.testing.assert_array_equal(PHANTOM.dseg(flipped).array[::-1, ::-1], PHANTOM.dseg(grid).array)


def test_noise_is_seeded_and_inside_head_only():
    grid = world_grid(Box((-75, -110, -80), (75, 74, 80)), (4.0, 4.0, 4.0))
    truth, noisy, dseg = PHANTOM.chi(grid).array, *(volume.array for volume in PHANTOM.scan(grid, seed=3))
    assert (noisy[truth == 0] == 0).all()
    assert np.std((noisy - truth)[truth != 0]) == pytest.approx(0.005, rel=0.05)  # 20,000 voxels: 0.5 %
    np.testing.assert_array_equal(noisy, PHANTOM.chi(grid, seed=3).array)
    np.testing.assert_array_equal(dseg, PHANTOM.dseg(grid).array)
    assert (noisy != PHANTOM.chi(grid, seed=4).array).any()
