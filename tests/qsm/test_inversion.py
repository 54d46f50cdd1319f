import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import apply_kernel, dipole_field, dipole_kernel
from bids_dgmseg.qsm.inversion import (
    conjugate_gradients,
    least_squares,
    spherical_mean_kernel,
    total_variation,
    truncated_division,
    v_sharp,
)

SHAPE, VOXEL_MM, B0 = (13, 11, 9), (1.0, 1.2, 2.0), (0.2, -0.1, 1.0)
HEAD_SHAPE, HEAD_VOXEL_MM = (48, 48, 40), (1.5, 1.5, 1.5)


@pytest.fixture
def kernel():
    return dipole_kernel(SHAPE, VOXEL_MM, B0)


@pytest.fixture
def field():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def with_numpy(field, transfer):
    """Apply a transfer function of dipole kernel and frequencies (per mm) on the full complex spectrum."""
    k = np.meshgrid(*(np.fft.fftfreq(n, step) for n, step in zip(SHAPE, VOXEL_MM, strict=True)), indexing="ij")
    unit = np.array(B0) / np.linalg.norm(B0)
    with np.errstate(invalid="ignore"):
        kernel = 1 / 3 - sum(b * ki for b, ki in zip(unit, k, strict=True)) ** 2 / sum(ki**2 for ki in k)
    kernel[0, 0, 0] = 0.0
    return np.fft.ifftn(np.fft.fftn(field.numpy().astype(float)) * transfer(kernel, k)).real


def test_truncated_division(field, kernel):
    def transfer(d, _):
        return np.where(np.abs(d) > 0.15, 1 / np.where(d == 0, 1, d), np.sign(d) / 0.15)

    chi = truncated_division(field, kernel, threshold=0.15)
    np.testing.assert_allclose(chi.numpy(), with_numpy(field, transfer), atol=1e-4)


@pytest.mark.parametrize(("voxel_size_mm", "ridge"), [(None, 0.0), (VOXEL_MM, 0.0), (VOXEL_MM, 0.01)])
def test_least_squares(field, kernel, voxel_size_mm, ridge):
    def transfer(d, k):
        gradient = sum(np.abs((np.exp(2j * np.pi * ki * h) - 1) / h) ** 2 for ki, h in zip(k, VOXEL_MM, strict=True))
        return d / np.maximum(d**2 + 0.02 * (gradient if voxel_size_mm else 1) + ridge, 1e-12)

    chi = least_squares(field, kernel, strength=0.02, voxel_size_mm=voxel_size_mm, ridge=ridge)
    np.testing.assert_allclose(chi.numpy(), with_numpy(field, transfer), atol=1e-4)


def test_conjugate_gradients_converge_to_closed_form(field, kernel):
    # With weight 1 everywhere the normal equations are diagonal in Fourier space.
    chi = conjugate_gradients(field, kernel, weight=torch.ones(SHAPE), strength=0.02, iterations=60)
    assert torch.allclose(chi, least_squares(field, kernel, strength=0.02), atol=1e-4)


def test_conjugate_gradients_solve_the_weighted_normal_equations(field, kernel):
    weight = torch.rand(SHAPE, generator=torch.Generator().manual_seed(4))
    chi = conjugate_gradients(field, kernel, weight=weight, strength=0.02, iterations=100)
    gradient = apply_kernel(weight**2 * (apply_kernel(chi, kernel) - field), kernel) + 0.02 * chi
    assert gradient.abs().max().item() < 1e-5


def noisy_box():
    """Noisy field of a box of 0.1 ppm, and the kernel of its grid."""
    box = torch.zeros(16, 16, 16)
    box[5:11, 5:11, 5:11] = 0.1
    kernel = dipole_kernel(box.shape, (1, 1, 1))
    noise = torch.randn(box.shape, generator=torch.Generator().manual_seed(5))
    return apply_kernel(box, kernel) + 0.003 * noise, kernel


@pytest.mark.parametrize("ridge", [0.0, 0.005])
def test_total_variation_minimizes_its_cost(ridge):
    """Its cost on a noisy box is lower than that of closed forms and of small perturbations."""
    (field, kernel), strength = noisy_box(), 1e-3
    generator = torch.Generator().manual_seed(6)

    def cost(chi):
        gradient = sum((chi.roll(-1, axis) - chi).abs().sum() for axis in range(3))
        misfit = 0.5 * (apply_kernel(chi, kernel) - field).square().sum()
        return float(misfit + strength * gradient + 0.5 * ridge * chi.square().sum())

    chi = total_variation(field, kernel, strength=strength, voxel_size_mm=(1, 1, 1), ridge=ridge, iterations=200)
    closed = [least_squares(field, kernel, strength=s, voxel_size_mm=(1, 1, 1)) for s in (1e-3, 1e-2, 1e-1)]
    assert cost(chi) < 0.95 * min(map(cost, closed))
    for _ in range(10):
        assert cost(chi + 1e-3 * torch.randn(chi.shape, generator=generator)) > cost(chi)


@pytest.fixture(scope="module")
def head():
    """Coordinates and distance from the centre in mm; the brain is a ball of 24 mm."""
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n, step in zip(HEAD_SHAPE, HEAD_VOXEL_MM, strict=True)]
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
    local, eroded = v_sharp(background, r < 24, voxel_size_mm=HEAD_VOXEL_MM, radii_mm=(9, 6, 3))
    assert background[eroded].abs().max().item() > 0.5
    assert local[eroded].abs().max().item() < 1e-3


def test_air_field_is_removed_and_nucleus_field_kept(head):
    x, y, z, r = head
    nucleus = 0.1 * ((x - 6) ** 2 + y**2 + z**2 < 25).float()
    air = 9.0 * ((x**2 + (y + 34) ** 2 + (z + 10) ** 2) < 49).float()
    own = dipole_field(nucleus, voxel_size_mm=HEAD_VOXEL_MM)
    total = dipole_field(nucleus + air, voxel_size_mm=HEAD_VOXEL_MM)
    local, eroded = v_sharp(total, r < 24, voxel_size_mm=HEAD_VOXEL_MM, radii_mm=(12, 11, 10, 9, 8, 7, 6, 5, 4, 3))
    deep = eroded & (r < 15)
    before, after = ((field - own)[deep].std() / own[deep].std() for field in (total, local))
    assert before > 2
    assert after < 0.1
    assert torch.corrcoef(torch.stack([local[deep], own[deep]]))[0, 1].item() > 0.99


def test_mask_is_eroded_by_smallest_radius(head):
    r = head[3]
    local, eroded = v_sharp(torch.ones(HEAD_SHAPE), r < 24, voxel_size_mm=HEAD_VOXEL_MM, radii_mm=(6, 3))
    assert eroded[r < 24 - 3.01].all()  # a ball of 3 mm fits
    assert not eroded[r > 24 - 2.2].any()  # voxel centres of the ball reach 2.6 mm and more in every direction
    assert (local[~eroded] == 0).all()


def test_values_outside_mask_are_ignored(head):
    mask = head[3] < 24
    field = torch.randn(HEAD_SHAPE, generator=torch.Generator().manual_seed(0))
    other = torch.where(mask, field, 1000.0)
    first, second = (v_sharp(f, mask, voxel_size_mm=HEAD_VOXEL_MM, radii_mm=(6, 3))[0] for f in (field, other))
    assert torch.equal(first, second)


def test_grid_is_zero_padded_unless_periodic():
    full = torch.ones(16, 16, 16, dtype=torch.bool)
    cut, whole = (
        v_sharp(full.float(), full, voxel_size_mm=(1, 1, 1), radii_mm=(3, 2), periodic=periodic)[1]
        for periodic in (False, True)
    )
    assert whole.all()
    assert int(cut.sum()) == 12**3  # two voxels from each face
