import math

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import (
    apply_kernel,
    combine_echoes,
    dipole_field,
    dipole_kernel,
    field_noise_sd,
    fit_r2star,
    interpolation_factors,
    noise_beyond_dipoles,
    r2star_per_s,
)

SHAPE = (8, 8, 8)


@pytest.mark.parametrize(
    ("k", "value"),
    [
        pytest.param((0, 0, 2), -2 / 3, id="along the field: 1/3 - 1"),
        pytest.param((2, 0, 0), 1 / 3, id="across the field: 1/3 - 0"),
        pytest.param((0, -3, 0), 1 / 3, id="across the field, other axis and sign"),
        pytest.param((1, 1, 1), 0.0, id="magic angle: cos2 = 1/3"),
        pytest.param((1, 0, 1), -1 / 6, id="45 degrees: 1/3 - 1/2"),
        pytest.param((0, 0, 0), 0.0, id="no field at frequency 0"),
    ],
)
def test_kernel_by_hand(k, value):
    assert dipole_kernel(SHAPE, (1, 1, 1))[k].item() == pytest.approx(value, abs=1e-6)


def test_frequencies_are_per_mm():
    # Voxels of 1 x 1 x 2 mm: index (1, 0, 1) is k = (1/8, 0, 1/16), so cos2 = (1/256) / (1/64 + 1/256) = 1/5.
    assert dipole_kernel(SHAPE, (1, 1, 2))[1, 0, 1].item() == pytest.approx(1 / 3 - 1 / 5, abs=1e-6)


def test_kernel_of_tilted_head_is_symmetric():
    # Reciprocity, which depends on the Nyquist frequency of even sizes.
    kernel = dipole_kernel(SHAPE, (1, 1, 2), b0_direction=(0.3, -0.2, 1))
    a, b = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    forth, back = (apply_kernel(a, kernel) * b).sum(), (apply_kernel(b, kernel) * a).sum()
    assert forth.item() == pytest.approx(back.item(), rel=1e-4)


@pytest.mark.parametrize("voxel_size_mm", [(1.0, 1.0, 1.0), (0.8, 1.0, 2.0)])
@pytest.mark.parametrize("tilt_deg", [0, 20])
def test_field_of_a_sphere(voxel_size_mm, tilt_deg):
    # A sphere with a soft edge; outside, its field is that of a point dipole: m / 4 pi (3 cos2 - 1) / r^3.
    shape, radius_mm = [round(60 / step) for step in voxel_size_mm], 8.0
    axes = [(torch.arange(n) - n // 2) * step for n, step in zip(shape, voxel_size_mm, strict=True)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    b0 = (math.sin(math.radians(tilt_deg)), 0.0, math.cos(math.radians(tilt_deg)))
    r = (x**2 + y**2 + z**2).sqrt()
    chi = torch.sigmoid((radius_mm - r) / 0.8)
    field = dipole_field(chi, voxel_size_mm=voxel_size_mm, b0_direction=b0, padding=2)
    cos2 = ((x * b0[0] + z * b0[2]) / r.clamp(min=1e-3)) ** 2
    moment = float(chi.sum()) * math.prod(voxel_size_mm)
    expected = moment / (4 * math.pi) * (3 * cos2 - 1) / r.clamp(min=1e-3) ** 3
    shell = (r > 1.7 * radius_mm) & (r < 2.3 * radius_mm)
    # On the shell the field reaches 2/3 / 1.7^3 = 0.14; neighbours 120 mm away add (8 / 120)^3 = 0.0003 each.
    assert expected[shell].max().item() > 0.1
    assert (field - expected)[shell].abs().max().item() < 0.003
    assert field[r < 0.5 * radius_mm].abs().max().item() < 0.003


@pytest.mark.parametrize("tilt_deg", [0, 40])
def test_field_of_a_sharp_edge_does_not_ring(tilt_deg):
    """In a sphere of tissue in air there is no field; that of its rough surface has decayed five voxels inside."""
    axis = torch.arange(64) - 32.0
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    distance = (x**2 + y**2 + z**2).sqrt()
    b0 = (0.0, math.sin(math.radians(tilt_deg)), math.cos(math.radians(tilt_deg)))
    field = dipole_field(torch.where(distance < 28, -9.4, 0.0), voxel_size_mm=(1, 1, 1), b0_direction=b0)
    around = sum(field.roll(step, along) for along in range(3) for step in (1, -1)) / 6
    assert (field - around)[distance < 23].abs().median().item() < 0.002  # ppm


def test_padding_prevents_aliasing():
    # A dipole on the left face: on a periodic grid it is one voxel away from the right face.
    chi = torch.zeros(16, 16, 16)
    chi[0, 8, 8] = 1.0
    near, far = (dipole_field(chi, voxel_size_mm=(1, 1, 1), padding=p)[15, 8, 8].item() for p in (1, 2))
    assert near < -0.05  # -1 / (4 pi) at a distance of 1
    assert far == pytest.approx(0, abs=0.002)


def test_iron_and_calcium_increase_r2star():
    # 137 / 3 Hz per ppm and tesla: 0.1 ppm at 3 T adds 13.7 Hz, of either sign.
    decay = r2star_per_s(torch.tensor([0.0, 0.1, -0.1]), b0_tesla=3.0, r2_per_s=15.0)
    assert decay.tolist() == pytest.approx([15.0, 28.7, 28.7])


def test_integer_echoes_are_combined_to_field():
    phase = torch.tensor([[0.1, 0.0], [0.3, 0.0]])  # 0.3 rad at three times the echo time: the same field
    magnitude = torch.tensor([[1000, 0], [700, 0]], dtype=torch.int16)
    field = combine_echoes(phase, magnitude, echo_times_s=[0.005, 0.015], b0_tesla=3.0)
    assert field.tolist() == pytest.approx([0.1 / (2 * math.pi * 42.577478518 * 3 * 0.005), 0.0])


@pytest.mark.parametrize(("chi_ppm", "b0_tesla"), [(0.0, 3.0), (0.15, 3.0), (0.3, 7.0)])
def test_field_noise_matches_simulated_echoes(chi_ppm, b0_tesla):
    """Mean and SD of the field from complex signals with noise, simulated in NumPy, are as predicted."""
    times_s, snr, n = np.array([0.004, 0.010, 0.016, 0.022]) * 3 / b0_tesla, 60.0, 40_000
    decay = r2star_per_s(torch.tensor(chi_ppm), b0_tesla=b0_tesla, r2_per_s=15.0)
    rng, true_ppm = np.random.default_rng(1), 0.03
    clean = np.exp(-times_s * float(decay) + 2j * np.pi * 42.577478518 * b0_tesla * true_ppm * times_s)[:, None]
    noisy = clean + (rng.standard_normal((4, n)) + 1j * rng.standard_normal((4, n))) / snr
    phase, weight = torch.from_numpy(np.angle(noisy)), torch.from_numpy(np.abs(clean)).expand(-1, n)
    field = combine_echoes(phase, weight, echo_times_s=times_s.tolist(), b0_tesla=b0_tesla)
    sd = field_noise_sd(decay, snr=snr, echo_times_s=times_s.tolist(), b0_tesla=b0_tesla)
    assert field.mean().item() == pytest.approx(true_ppm, abs=4 * sd.item() / math.sqrt(n))
    # The SD of 40,000 draws is known to 0.35 %; phase noise exceeds its approximation slightly at a third of the SNR.
    assert field.std().item() == pytest.approx(sd.item(), rel=0.02)


def test_texture_of_tissue_is_no_noise():
    """A field of sources is no noise however fine they are, unlike errors on top of it."""
    generator, size, noise_ppm, tilt_deg = torch.Generator().manual_seed(3), 64, 0.002, 25
    axis = torch.arange(size) - 31.5
    x, y, z = torch.meshgrid(axis, axis, axis, indexing="ij")
    mask = x**2 + y**2 + z**2 < 28**2
    tissue = torch.where(mask, 0.03 * torch.randn(mask.shape, generator=generator), 0.0)
    b0 = (0.0, math.sin(math.radians(tilt_deg)), math.cos(math.radians(tilt_deg)))
    kernel = dipole_kernel(mask.shape, (1, 1, 1), b0)
    field = apply_kernel(tissue, kernel) + noise_ppm * torch.randn(mask.shape, generator=generator)
    options = {"voxel_size_mm": (1, 1, 1), "b0_direction": b0}
    # the window and 0 < |D| < 0.02 let some of the field through
    assert noise_beyond_dipoles(field, mask, **options) == pytest.approx(noise_ppm, rel=0.25)
    tiny = x**2 + y**2 + z**2 < 3
    assert noise_beyond_dipoles(field, tiny & (x > 100), **options) == 0


def acquire(kept, seed=4):
    """Complex white noise of SD 1 in both parts, of which k-space is `kept`, with a signal of 50."""
    noise = np.random.default_rng(seed).normal(size=(2, *kept.shape))
    signal = np.fft.fftn(50 + noise[0] + 1j * noise[1]) * np.fft.ifftshift(kept)
    image = np.fft.ifftn(signal)
    return torch.from_numpy(np.angle(image)).float(), torch.from_numpy(np.abs(image)).float()


@pytest.mark.parametrize("factors", [(1, 1, 1), (1.5, 1.5, 2), (1, 1, 4)])
def test_zero_filling_is_recognized(factors):
    kept = np.zeros((60, 48, 64), bool)
    widths = [round(size / factor) // 2 for size, factor in zip(kept.shape, factors, strict=True)]
    kept[tuple(slice(size // 2 - n, size // 2 + n) for size, n in zip(kept.shape, widths, strict=True))] = True
    phase, magnitude = acquire(kept)
    result = interpolation_factors(phase, magnitude)
    assert result == pytest.approx(factors, rel=0.08)  # up to rounding to lines of k-space
    spectral = noise_beyond_dipoles(
        phase, torch.ones(phase.shape, dtype=torch.bool), voxel_size_mm=(1, 1, 1), interpolation=result
    )
    assert spectral == pytest.approx(float(phase.std()), rel=0.15)


@pytest.mark.parametrize("times_s", [(0.004, 0.010), (0.004, 0.010, 0.013), (0.005, 0.010, 0.015, 0.020)])
def test_r2star_of_exponentials_is_exact(times_s):
    r2star = torch.tensor([0.0, 20.0, 60.0, 150.0, 300.0]).view(5, 1, 1)
    magnitude = torch.stack([100 * torch.exp(-time_s * r2star) for time_s in times_s])
    torch.testing.assert_close(fit_r2star(magnitude, echo_times_s=times_s), r2star, rtol=1e-3, atol=1e-2)
    magnitude[1, 0] = 0
    assert fit_r2star(magnitude, echo_times_s=times_s)[0].item() == 0
    assert (fit_r2star(magnitude.flip(0), echo_times_s=times_s) == 0).all()  # signal that rises


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4, 1e6])
def test_r2star_is_zero_without_decay_at_any_scale(scale):
    magnitude = scale * torch.tensor([[1.0, 1.01, 1.0, 1.02], [1.0, 1.0, 1.0, 1.0], [1.0, 0.9, 0.81, 0.729]]).T
    expected = [0, 0, -math.log(0.9) / 0.005]
    assert fit_r2star(magnitude, echo_times_s=[0.005, 0.01, 0.015, 0.02]).tolist() == pytest.approx(expected, rel=1e-5)


def test_r2star_of_inexact_signal_is_that_of_arlo():
    # Signals 9, 5, 4, 3: integrals (9+20+4)/3 = 11 and (5+16+3)/3 = 8 spacings, differences 5 and 2 [Pei 2015].
    # y = (121 + 64 + (55 + 16)/3) / ((25 + 4)/3 + 55 + 16) = 626/242 spacings; the decay by q per spacing with this
    # ratio of integral and difference, (1 + 4q + q^2)/3 = y (1 - q^2), is (sqrt(9 y^2 + 3) - 2) / (3y + 1).
    y = 626 / 242
    q = (math.sqrt(9 * y**2 + 3) - 2) / (3 * y + 1)
    assert (1 + 4 * q + q**2) / 3 == pytest.approx(y * (1 - q**2))
    result = fit_r2star(torch.tensor([9.0, 5.0, 4.0, 3.0]), echo_times_s=(0.01, 0.02, 0.03, 0.04)).item()
    assert result == pytest.approx(-math.log(q) / 0.01, rel=1e-5)
    assert result == pytest.approx(1 / (0.01 * y), rel=1e-3)  # Simpson's rule is nearly exact


def test_weights_limit_the_noise_floor():
    # The floor of 10 in the last of three uneven echoes has the weight 10^2 against 100^2 and 50^2.
    floor = torch.tensor([100.0, 50.0, 10.0])
    plain = np.polyfit((0.01, 0.02, 0.06), -np.log(floor.numpy()), 1)[0]
    expected = np.polyfit((0.01, 0.02, 0.06), -np.log(floor.numpy()), 1, w=floor.numpy())[0]  # independent
    result = fit_r2star(floor, echo_times_s=(0.01, 0.02, 0.06)).item()
    assert result == pytest.approx(expected, rel=1e-5)
    assert plain < result < math.log(2) / 0.01
