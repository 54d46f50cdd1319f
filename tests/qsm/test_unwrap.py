from __future__ import annotations

import math

import pytest
import torch

from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, combine_echoes
from bids_dgmseg.qsm.unwrap import unwrap_echoes, unwrap_in_space

TIMES_S = (0.005, 0.010, 0.015, 0.020)
VOXEL_MM = (1.5, 1.5, 2.0)


def wrapped(angle):
    return torch.atan2(angle.sin(), angle.cos())


def bump(height):
    """Height of a hill of 12 voxels' width on a grid of 24, 26 and 20 voxels."""
    x, y, z = torch.meshgrid(*(torch.arange(float(n)) - n / 2 for n in (24, 26, 20)), indexing="ij")
    return height * torch.exp(-(x**2 + y**2 + z**2) / 72)


def test_a_hill_of_three_turns_is_unwrapped_in_space():
    true, mask = bump(6 * math.pi), torch.ones(24, 26, 20, dtype=torch.bool)
    found = unwrap_in_space(wrapped(true), mask)
    turns = (found - true) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-4, rtol=0)
    assert turns.round().unique().numel() == 1
    assert abs(float(found.median())) <= math.pi


def test_what_lies_outside_the_mask_is_0_and_does_not_count():
    true, mask = bump(6 * math.pi), bump(1.0) > 0.2
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(0)) * 6
    found = unwrap_in_space(torch.where(mask, wrapped(true), noise - 3), mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask] - found[mask][0], true[mask] - true[mask][0], atol=1e-4, rtol=0)


def measure(field_ppm, offset, times_s=TIMES_S):
    """Wrapped phases of the echoes at 3 T, by the definition of the gyromagnetic ratio."""
    hertz = GYROMAGNETIC_MHZ_PER_T * 3.0 * field_ppm
    return torch.stack([wrapped(2 * math.pi * hertz * time_s + offset) for time_s in times_s])


def test_echoes_give_the_field_in_spite_of_wraps_and_an_offset():
    # 1.2 ppm turn by three quarters of a turn from echo to echo, by three turns until the last.
    field_ppm = bump(1.2)
    x = torch.linspace(-1, 1, 24).view(-1, 1, 1)
    phase = measure(field_ppm, 2.0 + 0.5 * x)  # 0.03 rad a mm
    magnitude, mask = torch.ones_like(phase), torch.ones(24, 26, 20, dtype=torch.bool)
    unwrapped = unwrap_echoes(phase, magnitude, mask, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM)
    found = combine_echoes(unwrapped, magnitude, echo_times_s=TIMES_S, b0_tesla=3.0)
    apart = found - field_ppm
    assert float((apart - apart.median()).abs().max()) < 0.01
    # Whole turns between the first two echoes are a constant field that nothing tells.
    constant = float(apart.median()) * GYROMAGNETIC_MHZ_PER_T * 3.0 * 0.005
    assert abs(constant - round(constant)) < 0.02


@pytest.mark.parametrize("hertz", [0.0, 60.0, 150.0, -270.0])
def test_times_need_not_be_even_wherever_the_scanner_is_centred(hertz):
    # At 150 Hz three quarters of a turn pass between the first two echoes: a quarter the other way cannot be told.
    field_ppm, times_s = bump(0.3), (0.005, 0.010, 0.0175, 0.024)
    generator = torch.Generator().manual_seed(2)
    phase = measure(field_ppm + hertz / (GYROMAGNETIC_MHZ_PER_T * 3.0), torch.zeros(24, 26, 20), times_s)
    phase = wrapped(phase + 0.02 * torch.randn(phase.shape, generator=generator))
    magnitude, mask = torch.ones_like(phase), torch.ones(24, 26, 20, dtype=torch.bool)
    magnitude[:, :12] = torch.tensor([1.0, 0.8, 0.6, 0.4]).view(4, 1, 1, 1)  # decays on one side
    unwrapped = unwrap_echoes(phase, magnitude, mask, echo_times_s=times_s, voxel_size_mm=VOXEL_MM)
    found = combine_echoes(unwrapped, magnitude, echo_times_s=times_s, b0_tesla=3.0)
    apart = found - field_ppm
    assert float((apart - apart.median()).abs().max()) < 0.02


def test_a_dark_echo_does_not_spoil_the_field():
    field_ppm = bump(0.4)
    phase, magnitude = measure(field_ppm, torch.zeros(24, 26, 20)), torch.ones(4, 24, 26, 20)
    phase[3] = torch.rand(24, 26, 20, generator=torch.Generator().manual_seed(0)) * 6 - 3
    magnitude[3] = 0.0
    mask = torch.ones(24, 26, 20, dtype=torch.bool)
    unwrapped = unwrap_echoes(phase, magnitude, mask, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM)
    found = combine_echoes(unwrapped, magnitude, echo_times_s=TIMES_S, b0_tesla=3.0)
    torch.testing.assert_close(found, field_ppm, atol=2e-3, rtol=0)


def test_one_echo_is_unwrapped_in_space():
    phase = wrapped(bump(4 * math.pi))[None]
    mask = torch.ones(24, 26, 20, dtype=torch.bool)
    found = unwrap_echoes(phase, torch.ones_like(phase), mask, echo_times_s=[0.02], voxel_size_mm=VOXEL_MM)
    torch.testing.assert_close(found[0], unwrap_in_space(phase[0], mask))


def test_the_same_phase_gives_the_same_bits():
    phase = wrapped(bump(6 * math.pi) + torch.rand(24, 26, 20, generator=torch.Generator().manual_seed(1)))
    mask = torch.ones(24, 26, 20, dtype=torch.bool)
    assert torch.equal(unwrap_in_space(phase, mask), unwrap_in_space(phase, mask))
