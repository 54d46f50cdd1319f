from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, combine_echoes
from bids_dgmseg.qsm.unwrap import correct_bipolar_readout, unwrap_echoes, unwrap_spatially, wrap

TIMES_S = (0.005, 0.010, 0.015, 0.020)
VOXEL_MM = (1.5, 1.5, 2.0)
SHAPE = (24, 26, 20)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)
TISSUE = torch.zeros(SHAPE, dtype=torch.bool)
TISSUE[2:18, 3:21, 1:15] = True


def bump(height):
    """A Gaussian hill with an SD of 6 voxels."""
    x, y, z = torch.meshgrid(*(torch.arange(float(n)) - n / 2 for n in SHAPE), indexing="ij")
    return height * torch.exp(-(x**2 + y**2 + z**2) / 72)


def measure(field_ppm, offset=0.0, times_s=TIMES_S):
    """Wrapped phase of the echoes at 3 T, from the definition of the gyromagnetic ratio."""
    hertz = GYROMAGNETIC_MHZ_PER_T * 3.0 * field_ppm
    return torch.stack([wrap(2 * math.pi * hertz * time_s + offset) for time_s in times_s])


def fit(phase, magnitude, times_s=TIMES_S):
    unwrapped = unwrap_echoes(phase, magnitude, EVERYWHERE, echo_times_s=times_s, voxel_size_mm=VOXEL_MM)
    return combine_echoes(unwrapped, magnitude, echo_times_s=times_s, b0_tesla=3.0)


def test_spatial_unwrapping_recovers_three_turns():
    true = bump(6 * math.pi)
    found = unwrap_spatially(wrap(true), EVERYWHERE)
    turns = (found - true) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-4, rtol=0)
    assert turns.round().unique().numel() == 1
    assert abs(float(found.median())) <= math.pi


def test_noise_outside_mask_does_not_affect_unwrapping():
    true, mask = bump(6 * math.pi), bump(1.0) > 0.2
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)) * 6
    found = unwrap_spatially(torch.where(mask, wrap(true), noise - 3), mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask] - found[mask][0], true[mask] - true[mask][0], atol=1e-4, rtol=0)


def test_field_is_recovered_despite_wraps_and_offset():
    # 1.2 ppm is three quarters of a turn per echo, three turns at the last.
    field_ppm = bump(1.2)
    phase = measure(field_ppm, 2.0 + 0.5 * torch.linspace(-1, 1, 24).view(-1, 1, 1))  # 0.03 rad per mm
    difference = fit(phase, torch.ones_like(phase)) - field_ppm
    assert float((difference - difference.median()).abs().max()) < 0.01
    # Full turns between the first two echoes are a constant field that cannot be determined.
    turns = float(difference.median()) * GYROMAGNETIC_MHZ_PER_T * 3.0 * 0.005
    assert abs(turns - round(turns)) < 0.02


@pytest.mark.parametrize("hertz", [0.0, 60.0, 150.0, -270.0])
def test_uneven_echo_times_at_any_centre_frequency(hertz):
    # 150 Hz is three quarters of a turn between the first two echoes, which looks like minus a quarter.
    field_ppm, times_s = bump(0.3), (0.005, 0.010, 0.0175, 0.024)
    phase = measure(field_ppm + hertz / (GYROMAGNETIC_MHZ_PER_T * 3.0), times_s=times_s)
    phase = wrap(phase + 0.02 * torch.randn(phase.shape, generator=torch.Generator().manual_seed(2)))
    magnitude = torch.ones_like(phase)
    magnitude[:, :12] = torch.tensor([1.0, 0.8, 0.6, 0.4]).view(4, 1, 1, 1)  # decays on one side
    difference = fit(phase, magnitude, times_s) - field_ppm
    assert float((difference - difference.median()).abs().max()) < 0.02


def test_echo_without_signal_does_not_affect_field():
    field_ppm = bump(0.4)
    phase, magnitude = measure(field_ppm), torch.ones(4, *SHAPE)
    phase[3] = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 6 - 3
    magnitude[3] = 0.0
    torch.testing.assert_close(fit(phase, magnitude), field_ppm, atol=2e-3, rtol=0)


def test_single_echo_is_unwrapped_spatially():
    phase = wrap(bump(4 * math.pi))[None]
    found = unwrap_echoes(phase, torch.ones_like(phase), EVERYWHERE, echo_times_s=[0.02], voxel_size_mm=VOXEL_MM)
    torch.testing.assert_close(found[0], unwrap_spatially(phase[0], EVERYWHERE))


def test_unwrapping_is_reproducible_to_the_bit():
    phase = wrap(bump(6 * math.pi) + torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(unwrap_spatially(phase, EVERYWHERE), unwrap_spatially(phase, EVERYWHERE))


def bipolar(slopes_rad, *, noise=0.0):
    """Wrapped phase with a ramp (rad per voxel) of alternating sign, and without."""
    x, y, z = torch.meshgrid(*(torch.arange(float(size)) for size in SHAPE), indexing="ij")
    rate = 40 * (x / 20) ** 2 - 300 * (y / 24) + 90 * torch.sin(z / 5)  # rad/s
    offset = 2 * torch.cos(y / 9) + 0.1 * x
    ramp = slopes_rad[0] * x + slopes_rad[1] * y + slopes_rad[2] * z
    noisy = noise * torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(0))
    monopolar = torch.stack([offset + rate * time_s for time_s in TIMES_S]) + noisy
    alternating = torch.stack([phase + (-1) ** echo * ramp for echo, phase in enumerate(monopolar)])
    return wrap(alternating), wrap(monopolar)


@pytest.mark.parametrize("slopes_rad", [(0.3, 0, 0), (0, -0.15, 0), (0, 0, 0.6), (0.1, 0.05, -0.08)])
def test_bipolar_ramp_is_removed_along_any_axis(slopes_rad):
    phase, true = bipolar(slopes_rad)
    found, ramp_rad = correct_bipolar_readout(phase, torch.ones_like(phase), TISSUE, echo_times_s=TIMES_S)
    # 16, 18 and 14 voxels of tissue are 15, 17 and 13 steps apart.
    assert ramp_rad == pytest.approx(sum(abs(slope) * n for slope, n in zip(slopes_rad, (15, 17, 13), strict=True)))
    np.testing.assert_allclose(wrap(found - true)[:, TISSUE].numpy(), 0, atol=1e-3)


def test_bipolar_correction_is_robust_to_noise():
    phase, true = bipolar((0.2, 0, 0), noise=0.1)
    found, ramp_rad = correct_bipolar_readout(phase, torch.ones_like(phase), TISSUE, echo_times_s=TIMES_S)
    assert ramp_rad == pytest.approx(0.2 * 15, abs=0.05)
    assert wrap(found - true)[:, TISSUE].abs().max() < 0.05


def test_monopolar_phase_is_returned_unchanged():
    phase, _ = bipolar((0, 0, 0), noise=0.1)
    found, ramp_rad = correct_bipolar_readout(phase, torch.ones_like(phase), TISSUE, echo_times_s=TIMES_S)
    assert found is phase
    assert ramp_rad == 0


@pytest.mark.parametrize("times_s", [TIMES_S[:1], TIMES_S[:2], (0.004, 0.009, 0.015, 0.02)])
def test_ramp_is_unknown_for_few_or_uneven_echoes(times_s):
    phase = bipolar((0.3, 0, 0))[0][: len(times_s)]
    found, ramp_rad = correct_bipolar_readout(phase, torch.ones_like(phase), TISSUE, echo_times_s=times_s)
    assert found is phase
    assert ramp_rad is None


def test_noise_outside_tissue_does_not_affect_ramp():
    phase, _ = bipolar((0.3, 0, 0))
    noise = 20 * torch.rand(phase.shape, generator=torch.Generator().manual_seed(1))
    bright = torch.where(TISSUE, 1.0, 5.0).expand(phase.shape)
    _, ramp_rad = correct_bipolar_readout(torch.where(TISSUE, phase, wrap(noise)), bright, TISSUE, echo_times_s=TIMES_S)
    assert ramp_rad == pytest.approx(0.3 * 15)
