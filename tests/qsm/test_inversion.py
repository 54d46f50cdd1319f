import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import apply_kernel, conjugate_gradients, dipole_kernel
from bids_dgmseg.qsm.inversion import (
    find_flat,
    find_ventricles,
    invert,
    least_squares,
    regularization_weight,
    total_variation,
)

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
def nucleus():
    """Susceptibility of a ball of 0.1 ppm and of a vein beside it, its mask, that of fluid, and that of the brain."""
    x, y, z = torch.meshgrid(*[torch.arange(36) - 17.5] * 3, indexing="ij")
    ball, fluid = (x - 6) ** 2 + y**2 + z**2 < 25, (x + 7) ** 2 + y**2 + z**2 < 16
    vein = ((x - 2) ** 2 + (y - 9) ** 2 < 2) & (z.abs() < 9)
    return 0.1 * ball + 0.2 * vein, ball, fluid, x**2 + y**2 + z**2 < 256


@pytest.mark.parametrize(
    ("method", "lowest"),
    [("star", 0.85), ("medi", 0.85), ("ilsqr", 0.7)],  # fraction of the true contrast
)
def test_every_inversion_recovers_a_nucleus(nucleus, method, lowest):
    chi, ball, fluid, brain = nucleus
    kernel = dipole_kernel(chi.shape, (1, 1, 1))
    noise = 0.002 * torch.randn(chi.shape, generator=torch.Generator().manual_seed(1))
    result = invert(
        torch.where(brain, apply_kernel(chi, kernel) + noise, 0.0),
        kernel,
        method=method,
        strength=regularization_weight(method, noise_ppm=0.002, voxel_size_mm=(1, 1, 1)),
        voxel_size_mm=(1, 1, 1),
        mask=brain,
        magnitude=1 - 3 * chi,
        weight=torch.ones_like(chi),
        fluid=fluid,
    )
    around = brain & ~ball & (chi == 0)
    contrast_ppm = float(result[ball].mean() - result[around].mean())
    assert lowest * 0.1 < contrast_ppm < 0.11
    assert float(torch.corrcoef(torch.stack([result[brain], chi[brain]]))[0, 1]) > 0.8
    if method == "medi":  # the fluid is uniform and the reference
        assert float(result[fluid].mean()) == pytest.approx(0, abs=1e-6)
        assert float(result[fluid].std()) < 0.01 * 0.1  # of the nucleus


def brain_with_fluid(half_width, fluid_hz=1.0):
    """R2* of a ball of 38 mm with a cube of fluid in its centre and a plane of one voxel outside, 1.5 mm voxels."""
    axes = np.ogrid[:61, :61, :61]
    brain = np.asarray(sum((axis - 30) ** 2 for axis in axes) < 25**2)
    r2star = np.full(brain.shape, 20, np.float32)
    cube = (slice(30 - half_width, 31 + half_width),) * 3
    r2star[cube] = fluid_hz
    r2star[20, 25:36, 25:36] = fluid_hz
    fluid = np.zeros(brain.shape, bool)
    fluid[cube] = True
    return torch.from_numpy(r2star), torch.from_numpy(brain), fluid


def test_fluid_is_where_the_signal_hardly_decays():
    r2star, brain, fluid = brain_with_fluid(3)
    result = find_ventricles(r2star, brain, voxel_size_mm=(1.5, 1.5, 1.5))
    assert result is not None
    assert not (result.numpy() & ~fluid).any()
    assert result.sum() > 0.8 * fluid.sum()  # an opening rounds corners


# 5 Hz is tissue; 27 voxels of 3.4 mm³ are below 100 mm³; cubes of 25 and 29 voxels are 53 and 82 of 113 ml in 30 mm.
@pytest.mark.parametrize(("half_width", "fluid_hz", "is_found"), [(3, 5, 0), (1, 1, 0), (12, 1, 1), (14, 1, 0)])
def test_fluid_is_neither_too_little_nor_too_much(half_width, fluid_hz, is_found):
    r2star, brain, _ = brain_with_fluid(half_width, fluid_hz)
    assert (find_ventricles(r2star, brain, voxel_size_mm=(1.5, 1.5, 1.5)) is not None) == is_found


def test_flat_voxels_are_all_but_the_largest_differences():
    # along x: differences 1, 0, 5, 0, 0 and, from the last voxel to the first, -6
    image = torch.tensor([0.0, 1.0, 1.0, 6.0, 6.0, 6.0]).view(6, 1, 1)
    mask = torch.ones((6, 1, 1), dtype=torch.bool)
    flat = find_flat(image, mask, voxel_size_mm=(1, 1, 1), edge_share=0.11)  # two of eighteen, as y and z have none
    assert flat[0, :, 0, 0].tolist() == [True, True, False, True, True, False]
    assert flat[1:].all()
    mask[5] = False
    flat = find_flat(image, mask, voxel_size_mm=(1, 1, 1), edge_share=0.05)  # one of fifteen
    assert flat[0, :, 0, 0].tolist() == [True, True, False, True, True, True]
    assert find_flat(torch.ones((6, 1, 1)), mask, voxel_size_mm=(1, 1, 1), edge_share=0.05).all()
