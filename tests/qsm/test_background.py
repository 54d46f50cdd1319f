import pytest
import torch

from bids_dgmseg.qsm.background import spherical_mean_kernel, v_sharp
from bids_dgmseg.qsm.field import apply_kernel, dipole_field

SHAPE = (48, 48, 40)
VOXEL_MM = (1.5, 1.5, 1.5)


@pytest.fixture(scope="module")
def head():
    """Coordinates and distance from the centre in mm; the brain is a ball of 24 mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(SHAPE, VOXEL_MM, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    return x, y, z, (x**2 + y**2 + z**2).sqrt()


def test_sphere_of_one_voxel_averages_seven_voxels():
    # Radius 1 voxel: itself and six neighbours.
    spot = torch.zeros(8, 8, 8)
    spot[4, 4, 4] = 7.0
    mean = apply_kernel(spot, spherical_mean_kernel((8, 8, 8), (2.0, 2.0, 2.0), 2.0))
    assert mean[4, 4, 4].item() == pytest.approx(1, abs=1e-5)
    assert mean[4, 4, 3].item() == pytest.approx(1, abs=1e-5)
    assert mean[4, 3, 3].item() == pytest.approx(0, abs=1e-5)


def test_sphere_is_round_in_mm():
    spot = torch.zeros(12, 12, 12)
    spot[6, 6, 6] = 1.0
    mean = apply_kernel(spot, spherical_mean_kernel((12, 12, 12), (1.0, 1.0, 3.0), 3.5))
    assert mean[9, 6, 6].item() == pytest.approx(mean[6, 6, 7].item())
    assert mean[6, 6, 8].item() == pytest.approx(0, abs=1e-6)  # 6 mm away


def test_harmonic_background_is_removed(head):
    x, y, z, r = head
    background = 0.02 * x + 0.001 * (x**2 - z**2) + 2e-4 * x * y * z  # ppm; the Laplacian is 0
    local, eroded = v_sharp(background, r < 24, voxel_size_mm=VOXEL_MM, radii_mm=(9, 6, 3))
    assert background[eroded].abs().max().item() > 0.5
    assert local[eroded].abs().max().item() < 1e-3


def test_air_field_is_removed_and_nucleus_field_kept(head):
    x, y, z, r = head
    nucleus = 0.1 * ((x - 6) ** 2 + y**2 + z**2 < 25).float()
    air = 9.0 * ((x**2 + (y + 34) ** 2 + (z + 10) ** 2) < 49).float()
    own = dipole_field(nucleus, voxel_size_mm=VOXEL_MM)
    total = dipole_field(nucleus + air, voxel_size_mm=VOXEL_MM)
    local, eroded = v_sharp(total, r < 24, voxel_size_mm=VOXEL_MM, radii_mm=(12, 11, 10, 9, 8, 7, 6, 5, 4, 3))
    deep = eroded & (r < 15)
    before, after = ((field - own)[deep].std() / own[deep].std() for field in (total, local))
    assert before > 2
    assert after < 0.1
    assert torch.corrcoef(torch.stack([local[deep], own[deep]]))[0, 1].item() > 0.99


def test_mask_is_eroded_by_smallest_radius(head):
    r = head[3]
    local, eroded = v_sharp(torch.ones(SHAPE), r < 24, voxel_size_mm=VOXEL_MM, radii_mm=(6, 3))
    assert eroded[r < 24 - 3.01].all()  # a ball of 3 mm fits
    assert not eroded[r > 24 - 2.2].any()  # voxel centres of the ball reach 2.6 mm and more in every direction
    assert (local[~eroded] == 0).all()


def test_values_outside_mask_are_ignored(head):
    mask = head[3] < 24
    field = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    other = torch.where(mask, field, 1000.0)
    first, second = (v_sharp(f, mask, voxel_size_mm=VOXEL_MM, radii_mm=(6, 3))[0] for f in (field, other))
    assert torch.equal(first, second)


def test_grid_is_zero_padded_unless_periodic():
    full = torch.ones(16, 16, 16, dtype=torch.bool)
    cut, whole = (
        v_sharp(full.float(), full, voxel_size_mm=(1, 1, 1), radii_mm=(3, 2), periodic=periodic)[1]
        for periodic in (False, True)
    )
    assert whole.all()
    assert int(cut.sum()) == 12**3  # two voxels from each face
