import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import apply_kernel, dipole_kernel
from bids_dgmseg.qsm.inversion import conjugate_gradients, least_squares, total_variation, truncated_division

SHAPE, VOXEL_MM, B0 = (13, 11, 9), (1.0, 1.2, 2.0), (0.2, -0.1, 1.0)


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


def test_least_squares(field, kernel):
    chi = least_squares(field, kernel, strength=0.02)
    np.testing.assert_allclose(chi.numpy(), with_numpy(field, lambda d, _: d / (d**2 + 0.02)), atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_least_squares_of_the_gradient(field, kernel, ridge):
    def transfer(d, k):
        gradient = sum(np.abs((np.exp(2j * np.pi * ki * h) - 1) / h) ** 2 for ki, h in zip(k, VOXEL_MM, strict=True))
        return d / np.maximum(d**2 + 0.02 * gradient + ridge, 1e-12)

    chi = least_squares(field, kernel, strength=0.02, voxel_size_mm=VOXEL_MM, ridge=ridge)
    np.testing.assert_allclose(chi.numpy(), with_numpy(field, transfer), atol=1e-4)


def test_division_recovers_frequencies_above_threshold(kernel):
    # A wave along x, across the main field (B0 along z): D = 1/3, above the threshold.
    wave = torch.cos(2 * torch.pi * 2 * torch.arange(13) / 13).view(-1, 1, 1).expand(SHAPE).contiguous()
    upright = dipole_kernel(SHAPE, VOXEL_MM)
    field = apply_kernel(wave, upright)
    assert torch.allclose(field, wave / 3, atol=1e-6)
    assert torch.allclose(truncated_division(field, upright, threshold=0.2), wave, atol=1e-5)


def test_conjugate_gradients_converge_to_closed_form(field, kernel):
    # With weight 1 everywhere the normal equations are diagonal in Fourier space.
    chi = conjugate_gradients(field, kernel, weight=torch.ones(SHAPE), strength=0.02, iterations=60)
    assert torch.allclose(chi, least_squares(field, kernel, strength=0.02), atol=1e-4)


def test_conjugate_gradients_solve_the_weighted_normal_equations(field, kernel):
    weight = torch.rand(SHAPE, generator=torch.Generator().manual_seed(4))
    chi = conjugate_gradients(field, kernel, weight=weight, strength=0.02, iterations=100)
    gradient = apply_kernel(weight**2 * (apply_kernel(chi, kernel) - field), kernel) + 0.02 * chi
    assert gradient.abs().max().item() < 1e-5


def test_first_conjugate_gradient_step_is_steepest_descent(field, kernel):
    chi = conjugate_gradients(field, kernel, weight=torch.ones(SHAPE), strength=0.0, iterations=1)
    downhill = apply_kernel(field, kernel)
    step = downhill.square().sum() / apply_kernel(downhill, kernel).square().sum()
    assert torch.allclose(chi, step * downhill, atol=1e-4)


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


def test_total_variation_is_flatter_than_truncated_division():
    field, kernel = noisy_box()
    flat = total_variation(field, kernel, strength=1e-3, voxel_size_mm=(1, 1, 1))
    rough = truncated_division(field, kernel, threshold=0.1)
    inner = (slice(6, 10),) * 3
    assert flat[inner].std() < 0.5 * rough[inner].std()
    assert (flat[inner].mean() - flat[0].mean()).item() > 0.06  # and the box is still there
