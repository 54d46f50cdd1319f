from __future__ import annotations

import heapq
import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, combine_echoes
from bids_dgmseg.qsm.phase import (
    correct_bipolar_readout,
    exclude_unreliable,
    fit_residual_rad,
    fit_total_field,
    measure_fringes,
    thermal_noise_sd,
    unwrap_by_region_growing,
    unwrap_echoes,
    unwrap_laplacian,
    wrap,
)

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


def total_of_one_echo(phase, mask=EVERYWHERE):
    """Total field of one echo at 20 ms and 3 T, as phase in rad."""
    magnitude = torch.ones((1, *SHAPE))
    options: dict[str, Any] = {"echo_times_s": [0.02], "b0_tesla": 3.0, "voxel_size_mm": VOXEL_MM}
    total = fit_total_field(phase[None], magnitude, mask, magnitude[0].numpy(), **options)
    return total, RATE * 0.02 * torch.from_numpy(total.field_ppm)


def test_single_echo_is_unwrapped_spatially():
    true = bump(4 * math.pi)
    total, phase = total_of_one_echo(wrap(true))
    difference = phase - true
    torch.testing.assert_close(difference, difference[0, 0, 0].expand_as(difference), atol=1e-3, rtol=0)
    assert (total.fringe_mm, total.disagreement_rad) == (0, 0)


def test_steep_phase_of_a_single_echo_is_excluded():
    # Slices 0 to 5 differ by 2.5 rad from one another, the others not at all.
    true = (2.5 * torch.arange(24.0).clamp(max=5)).view(-1, 1, 1).expand(SHAPE)
    total, _ = total_of_one_echo(wrap(true), TISSUE)
    assert not total.reliable[:6].any()
    np.testing.assert_array_equal(total.reliable[6:], TISSUE[6:])


def vortex():
    """Phase that turns once around the line through the middle of the slices, and the line's length in mm."""
    x, y, z = torch.meshgrid(*(torch.arange(float(n)) - n / 2 + 0.3 for n in SHAPE), indexing="ij")
    return torch.atan2(y, x) + 0 * z, SHAPE[2] * VOXEL_MM[2]


def test_open_fringe_lines_are_measured():
    phase, length_mm = vortex()
    assert measure_fringes(phase, EVERYWHERE, voxel_size_mm=VOXEL_MM) == pytest.approx(length_mm)
    assert measure_fringes(wrap(bump(6 * math.pi)), EVERYWHERE, voxel_size_mm=VOXEL_MM) == 0
    total, unwrapped = total_of_one_echo(phase)
    assert total.fringe_mm == pytest.approx(length_mm)
    # the Laplacian has no cut of a whole turn
    assert float(unwrapped.diff(dim=1).abs()[:, :, 5].max()) < 3


def grow_voxel_by_voxel(phase, magnitude, mask):
    """Grow each part from its first voxel, always to the neighbour of highest weight (Prim's algorithm)."""
    grown: dict[tuple[int, ...], float] = {}
    inside = set(map(tuple, mask.nonzero().tolist()))
    for seed in sorted(inside):
        if seed in grown:
            continue
        part, heap = {}, [(0.0, seed, float(phase[seed]))]
        while heap:
            _, voxel, value = heapq.heappop(heap)
            if voxel in part:
                continue
            part[voxel] = value
            for axis, step in product(range(3), (-1, 1)):
                other = tuple(index + step * (axis == place) for place, index in enumerate(voxel))
                if other in inside and other not in part:
                    change = math.remainder(float(phase[other]) - float(phase[voxel]), 2 * math.pi)
                    darker, brighter = sorted((float(magnitude[voxel]), float(magnitude[other])))
                    weight = (1 - abs(change) / math.pi) * darker / brighter
                    heapq.heappush(heap, (-weight, other, value + change))
        turns = round(float(np.median(list(part.values()))) / (2 * math.pi))
        grown |= {voxel: value - 2 * math.pi * turns for voxel, value in part.items()}
    image = torch.zeros(phase.shape)
    for voxel, value in grown.items():
        image[voxel] = value
    return image


def test_region_growing_follows_most_coherent_neighbours():
    # Noise of 1.2 rad opens the wraps, so that the result depends on the path; a third of the voxels, in many parts.
    generator = torch.Generator().manual_seed(3)
    phase = wrap(bump(6 * math.pi) + 1.2 * torch.randn(SHAPE, generator=generator))
    magnitude = 0.1 + torch.rand(SHAPE, generator=generator)
    for mask in (EVERYWHERE, torch.rand(SHAPE, generator=generator) < 1 / 3):
        result = unwrap_by_region_growing(phase, magnitude, mask)
        torch.testing.assert_close(result, grow_voxel_by_voxel(phase, magnitude, mask), atol=1e-4, rtol=0)


def test_laplacian_keeps_a_third_of_a_ramp_in_a_ball():
    # The sources of the solution are those of a ball of uniform magnetization, whose demagnetizing factor is 1/3.
    x, y, z = torch.meshgrid(*(torch.arange(96.0) - 47.5 for _ in range(3)), indexing="ij")
    r = (x**2 + y**2 + z**2).sqrt()
    result = unwrap_laplacian(wrap(0.9 * z), r < 12, voxel_size_mm=(1.0, 1.0, 1.0))
    inner = r < 8
    slope = float((result[inner] * z[inner]).sum() / z[inner].square().sum())
    assert slope == pytest.approx(0.3, rel=0.05)
    assert not result[r >= 12].any()


@pytest.mark.parametrize(("alter", "expected"), [("none", 0), ("one", 0.1), ("conjugate", 0.1)])
def test_disagreement_of_echoes_is_free_of_noise(alter, expected):
    phase = measure(bump(0.5), 0.3)
    noise = 0.1 * torch.randn(phase.shape, generator=torch.Generator().manual_seed(6))
    x = torch.linspace(-1, 1, 24).view(-1, 1, 1)
    if alter == "one":
        phase[3] += x
    if alter == "conjugate":
        phase[2] = -phase[2]
    phase, magnitude = wrap(phase + noise), torch.ones_like(phase)
    unwrapped = unwrap_echoes(phase, magnitude, EVERYWHERE, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM)
    field = combine_echoes(unwrapped, magnitude, echo_times_s=TIMES_S, b0_tesla=3.0)
    _, disagreement_rad = fit_residual_rad(
        unwrapped, magnitude, field, echo_times_s=TIMES_S, b0_tesla=3.0, voxel_size_mm=VOXEL_MM, mask=EVERYWHERE
    )
    assert disagreement_rad < 0.03 if not expected else disagreement_rad > expected


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
    result, ramp_rad = correct_bipolar_readout(
        phase, torch.ones_like(phase), TISSUE, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM
    )
    index = torch.meshgrid(*(torch.arange(float(size)) for size in SHAPE), indexing="ij")
    ramp = sum(slope * part for slope, part in zip(slopes_rad, index, strict=True))
    low, high = np.percentile(ramp[TISSUE].numpy(), (2, 98))
    assert ramp_rad == pytest.approx(high - low, rel=1e-3)
    np.testing.assert_allclose(wrap(result - true)[:, TISSUE].numpy(), 0, atol=1e-3)


@pytest.mark.parametrize(
    ("times_s", "slope", "expected"),
    [(TIMES_S, 0, 0), (TIMES_S[:1], 0.3, None), (TIMES_S[:2], 0.3, None), ((0.004, 0.009, 0.015, 0.02), 0.3, None)],
    ids=["monopolar", "one echo", "two echoes", "uneven"],
)
def test_phase_without_a_known_ramp_is_unchanged(times_s, slope, expected):
    phase = bipolar((slope, 0, 0), noise=0 if slope else 0.1)[0][: len(times_s)]
    options: dict[str, Any] = {"echo_times_s": times_s, "voxel_size_mm": VOXEL_MM}
    result, ramp_rad = correct_bipolar_readout(phase, torch.ones_like(phase), TISSUE, **options)
    assert result is phase
    assert ramp_rad == expected


def test_noise_outside_tissue_does_not_affect_ramp():
    phase, _ = bipolar((0.3, 0, 0))
    noise = 20 * torch.rand(phase.shape, generator=torch.Generator().manual_seed(1))
    bright = torch.where(TISSUE, 1.0, 5.0).expand(phase.shape)
    _, ramp_rad = correct_bipolar_readout(
        torch.where(TISSUE, phase, wrap(noise)), bright, TISSUE, echo_times_s=TIMES_S, voxel_size_mm=VOXEL_MM
    )
    assert ramp_rad == pytest.approx(0.3 * 15)


MASK_SHAPE = (24, 24, 24)
TWO_TIMES_S = (0.01, 0.02)
RATE = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0
"""rad/s per ppm at 3 T."""


def residual(field_ppm, rest_rad, magnitude):
    """Residual of two echoes of one voxel among many that fit."""
    phase, signal, field = torch.zeros((2, 1, 1, 9)), torch.ones((2, 1, 1, 9)), torch.zeros((1, 1, 9))
    field[..., 0] = field_ppm
    for echo, time_s in enumerate(TWO_TIMES_S):
        phase[echo, ..., 0] = RATE * time_s * field_ppm + rest_rad[echo]
        signal[echo, ..., 0] = magnitude[echo]
    mask = torch.ones((1, 1, 9), dtype=torch.bool)
    mask[..., 0] = False
    options: dict[str, Any] = {"echo_times_s": TWO_TIMES_S, "b0_tesla": 3.0, "voxel_size_mm": (1, 1, 1), "mask": mask}
    return fit_residual_rad(phase, signal, field, **options)[0][0, 0, 0].item()


@pytest.mark.parametrize(
    ("rest_rad", "magnitude", "expected"),
    [
        ((0.0, 0.0), (1.0, 1.0), 0.0),
        ((0.3, -0.6), (2.0, 1.0), math.sqrt(0.144)),  # (2^2 * 0.3^2 + 1^2 * 0.6^2) / (2^2 + 1^2)
        ((1.0, 1.0), (0.0, 0.0), 0.0),
    ],
    ids=["linear phase", "weighted by squared signal", "no signal"],
)
def test_residual_by_hand(rest_rad, magnitude, expected):
    assert residual(0.2, rest_rad, magnitude) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def linear_echoes(sd, *, offset_rad=0.0):
    """Phase of a field of 0.1 ppm, with noise of the stated SD over the magnitude, which decays and varies in space."""
    generator = torch.Generator().manual_seed(7)
    times = torch.tensor(TIMES_S).view(-1, 1, 1, 1)
    magnitude = (1 + torch.rand(MASK_SHAPE, generator=generator)) * torch.exp(-20 * times)
    noise = sd * torch.randn((4, *MASK_SHAPE), generator=generator) / magnitude
    return 0.1 * RATE * times + offset_rad + noise, magnitude


def test_thermal_noise_is_that_of_the_signal():
    phase, magnitude = linear_echoes(0.02)
    inside = torch.ones(MASK_SHAPE, dtype=torch.bool)
    # 24^3 voxels have 220 separate cubes of 125, whose mean square has an SD of 9 %: their decile is within 2 %
    assert thermal_noise_sd(phase, magnitude, inside, echo_times_s=TIMES_S) == pytest.approx(0.02, rel=0.05)
    two = thermal_noise_sd(phase[:2], magnitude[:2], inside, echo_times_s=TIMES_S[:2])
    assert two == pytest.approx(0.02, rel=0.07)
    assert thermal_noise_sd(phase[:1], magnitude[:1], inside, echo_times_s=TIMES_S[:1]) is None


def test_offset_and_mixed_voxels_are_not_thermal_noise():
    """Two fields in a voxel, in most of the tissue, and an offset that differs from voxel to voxel."""
    offset_rad = 0.1 * torch.rand(MASK_SHAPE, generator=torch.Generator().manual_seed(8))
    phase, magnitude = linear_echoes(0.02, offset_rad=offset_rad)
    mixed = torch.zeros(MASK_SHAPE, dtype=torch.bool)
    mixed[10:] = True
    times = torch.tensor(TIMES_S).view(-1, 1, 1, 1)
    both = torch.polar(torch.tensor(0.7), torch.tensor(0.0)) + 0.3 * torch.exp(0.1j * RATE * times)
    curved = phase + torch.where(mixed, both.angle(), 0.0)
    # with lines through the origin, and in the median voxel, it would be 2.4 times as large
    result = thermal_noise_sd(curved, magnitude, mixed | ~mixed, echo_times_s=TIMES_S)
    assert result == pytest.approx(0.02, rel=0.1)


def block(start, stop):
    inside = np.zeros(MASK_SHAPE, bool)
    inside[(slice(start, stop),) * 3] = True
    return inside


BRAIN, RIM, CAVITY = block(2, 22), block(2, 22) & ~block(3, 22), block(10, 13)
SLOPE = np.broadcast_to(np.linspace(0, 1, 24, dtype=np.float32), MASK_SHAPE)


def exclude(unreliable, *, signal=1.0, noise_rad=0.0, edge_mm=1.0):
    """Exclude voxels with a residual of 1 rad and the stated signal from a linear field."""
    return exclude_unreliable(
        np.where(unreliable, np.float32(50), SLOPE),
        np.where(unreliable, np.float32(1), np.float32(noise_rad)),
        np.where(unreliable, np.float32(signal), np.float32(1)),
        BRAIN,
        voxel_size_mm=(edge_mm,) * 3,
    )


@pytest.mark.parametrize(
    ("unreliable", "options"),
    [
        (np.zeros(MASK_SHAPE, bool), {"noise_rad": 0.2}),
        (RIM, {"signal": 1.0}),
        (RIM, {"signal": 0.01}),
        (CAVITY, {"signal": 0.05}),
    ],
    ids=["none", "bright border", "dark border", "dark cavity"],
)
def test_unreliable_voxels_are_excluded(unreliable, options):
    field, kept = exclude(unreliable, **options)
    np.testing.assert_array_equal(kept, BRAIN & ~unreliable)
    np.testing.assert_array_equal(field[kept], SLOPE[kept])


def test_enclosed_flowing_blood_is_interpolated():
    field, kept = exclude(CAVITY)
    np.testing.assert_array_equal(kept, BRAIN)
    np.testing.assert_allclose(field[CAVITY], SLOPE[CAVITY], atol=0.02)
    np.testing.assert_array_equal(field[~CAVITY], SLOPE[~CAVITY])


@pytest.mark.parametrize(("edge_mm", "excluded"), [(1.0, False), (1.2, True)])
def test_cavity_needs_ten_cubic_millimetres(edge_mm, excluded):
    # Eight voxels of 1 mm are 8 mm3, of 1.2 mm 13.8 mm3.
    _, kept = exclude(block(10, 12), signal=0.05, edge_mm=edge_mm)
    assert kept[block(10, 12)].any() != excluded


def test_voxels_without_signal_are_excluded():
    signal = np.where(RIM, np.float32(0), np.float32(1))
    field, kept = exclude_unreliable(SLOPE, np.zeros_like(SLOPE), signal, BRAIN, voxel_size_mm=(1, 1, 1))
    np.testing.assert_array_equal(kept, BRAIN & ~RIM)
    np.testing.assert_array_equal(field, SLOPE)
