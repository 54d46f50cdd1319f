import numpy as np
import pytest
import torch

from bids_dgmseg.qsm import inversion
from bids_dgmseg.qsm.field import apply_kernel, conjugate_gradients, dipole_kernel
from bids_dgmseg.qsm.inversion import invert, least_squares, regularization_weight, total_variation

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


@pytest.mark.parametrize(("voxel_size_mm", "ridge"), [(None, 0.0), (VOXEL_MM, 0.0), (VOXEL_MM, 0.01)])
def test_least_squares(field, kernel, voxel_size_mm, ridge):
    def transfer(d, k):
        gradient = sum(np.abs((np.exp(2j * np.pi * ki * h) - 1) / h) ** 2 for ki, h in zip(k, VOXEL_MM, strict=True))
        return d / np.maximum(d**2 + 0.02 * (gradient if voxel_size_mm else 1) + ridge, 1e-12)

    chi = least_squares(field, kernel, strength=0.02, voxel_size_mm=voxel_size_mm, ridge=ridge)
    np.testing.assert_allclose(chi.numpy(), with_numpy(field, transfer), atol=1e-4)


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
def nucleus():
    """Susceptibility of a ball of 0.1 ppm and of a vein beside it, the mask of the ball, and that of the brain."""
    x, y, z = torch.meshgrid(*[torch.arange(36) - 17.5] * 3, indexing="ij")
    ball, vein = (x - 6) ** 2 + y**2 + z**2 < 25, ((x - 2) ** 2 + (y - 9) ** 2 < 2) & (z.abs() < 9)
    return 0.1 * ball + 0.2 * vein, ball, x**2 + y**2 + z**2 < 256


def invert_noisy(nucleus, error_ppm=0.0):
    """Invert the field of the nucleus with noise and, if not 0, a random error in a ball of 14 voxels diameter."""
    chi, _, brain = nucleus
    kernel, generator = dipole_kernel(chi.shape, (1, 1, 1)), torch.Generator().manual_seed(1)
    field = apply_kernel(chi, kernel) + 0.002 * torch.randn(chi.shape, generator=generator)
    x, y, z = torch.meshgrid(*[torch.arange(36) - 17.5] * 3, indexing="ij")
    wrong = (x + 7) ** 2 + y**2 + z**2 < 49
    field = field + wrong * error_ppm * torch.randn(chi.shape, generator=generator)
    done = invert(
        torch.where(brain, field, 0.0),
        brain,
        1 - 3 * chi,
        kernel=kernel,
        strength=regularization_weight(noise_ppm=0.002, voxel_size_mm=(1, 1, 1)),
        voxel_size_mm=(1, 1, 1),
    )
    return done, brain & ~wrong


def test_inversion_recovers_a_nucleus(nucleus):
    chi, ball, brain = nucleus
    done, _ = invert_noisy(nucleus)
    contrast_ppm = float(done[ball].mean() - done[brain & ~ball & (chi == 0)].mean())
    assert 0.085 < contrast_ppm < 0.11
    assert float(torch.corrcoef(torch.stack([done[brain], chi[brain]]))[0, 1]) > 0.8


def test_errors_around_a_strong_source_count_less(nucleus, monkeypatch):
    def error(trusted):
        monkeypatch.setattr(inversion, "_TRUSTED", trusted)
        done, elsewhere = invert_noisy(nucleus, error_ppm=0.2)
        return float((done - nucleus[0])[elsewhere].std())

    assert error(inversion._TRUSTED) < 0.9 * error(1e9)
