from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T
from bids_dgmseg.qsm.masking import exclude_unreliable, find_brain, phase_residual_rad

VOXEL_MM = (1.0, 1.0, 1.5)
SHAPE = (24, 24, 24)
TIMES_S = (0.01, 0.02)
RATE = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0
"""rad/s per ppm at 3 T."""


def radius_mm():
    """Distance from the centre of a grid of 80 x 80 x 54 voxels."""
    x, y, z = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (80, 80, 54)), indexing="ij")
    return np.sqrt(x**2 + y**2 + (1.5 * z) ** 2)


def head():
    """A brain of 25 mm, skull to 31 mm, scalp to 36 mm, with noise of 1/40 of the signal."""
    r = radius_mm()
    signal = np.select([r < 25, r < 31, r < 36], [1.0, 0.05, 1.2], 0.0)
    sensitivity = np.linspace(0.6, 1.4, 80)[:, None, None]
    noise = np.random.default_rng(0).normal(scale=0.025, size=(2, *signal.shape))
    return np.hypot(signal * sensitivity + noise[0], noise[1]).astype(np.float32)


def test_brain_is_found_without_skull_and_scalp():
    found, true = find_brain(head(), voxel_size_mm=VOXEL_MM), radius_mm() < 25
    assert (found & true).sum() / true.sum() > 0.98
    assert (found & ~true).sum() / true.sum() < 0.01


def test_vessel_through_skull_does_not_connect_scalp():
    magnitude = head()
    magnitude[39:41, 60:75, 26:28] = 1.0
    assert not find_brain(magnitude, voxel_size_mm=VOXEL_MM)[radius_mm() > 31].any()


def test_skull_stripped_scan_keeps_its_mask():
    true = radius_mm() < 25
    found = find_brain(np.where(true, head(), 0), voxel_size_mm=VOXEL_MM)
    assert (found != true).sum() / true.sum() < 0.02


def test_dark_nuclei_are_filled():
    magnitude = head()
    magnitude[30:36, 40:46, 24:28] = 0.1  # signal decay due to iron
    assert find_brain(magnitude, voxel_size_mm=VOXEL_MM)[30:36, 40:46, 24:28].all()


def test_isolated_voxels_are_not_brain():
    speckled = np.random.default_rng(0).uniform(0, 0.2, SHAPE).astype(np.float32)
    speckled[::4, ::4, ::4] = 1.0
    assert not find_brain(speckled, voxel_size_mm=VOXEL_MM).any()


def test_slab_is_kept_up_to_its_faces():
    slab, true = head()[:, :, 18:36], (radius_mm() < 25)[:, :, 18:36]
    assert (find_brain(slab, voxel_size_mm=VOXEL_MM) != true).sum() / true.sum() < 0.02


@pytest.mark.parametrize(("value", "expected"), [(0.0, False), (1.0, True)])
def test_constant_magnitude(value, expected):
    assert (find_brain(np.full((8, 8, 8), value, np.float32), voxel_size_mm=VOXEL_MM) == expected).all()


def residual(field_ppm, rest_rad=(0.0, 0.0), magnitude=(1.0, 1.0)):
    """Residual of two echoes of one voxel among many that fit."""
    phase, signal, field = torch.zeros((2, 1, 1, 9)), torch.ones((2, 1, 1, 9)), torch.zeros((1, 1, 9))
    field[..., 0] = field_ppm
    for echo, time_s in enumerate(TIMES_S):
        phase[echo, ..., 0] = RATE * time_s * field_ppm + rest_rad[echo]
        signal[echo, ..., 0] = magnitude[echo]
    mask = torch.ones((1, 1, 9), dtype=torch.bool)
    mask[..., 0] = False
    return phase_residual_rad(phase, signal, field, echo_times_s=TIMES_S, b0_tesla=3.0, mask=mask)[0, 0, 0].item()


def test_linear_phase_has_no_residual():
    assert residual(0.2) == pytest.approx(0, abs=1e-5)


def test_residual_is_weighted_by_squared_signal():
    # (2^2 * 0.3^2 + 1^2 * 0.6^2) / (2^2 + 1^2) = 0.144
    assert residual(0.2, rest_rad=(0.3, -0.6), magnitude=(2.0, 1.0)) == pytest.approx(math.sqrt(0.144), rel=1e-4)


def test_no_signal_has_no_residual():
    assert residual(0.2, rest_rad=(1.0, 1.0), magnitude=(0.0, 0.0)) == 0


def test_offset_common_to_all_tissue_is_not_a_residual():
    phase = torch.stack([torch.full((4, 4, 4), 0.7), torch.full((4, 4, 4), -2.0)])
    mask = torch.ones((4, 4, 4), dtype=torch.bool)
    found = phase_residual_rad(
        phase, torch.ones_like(phase), torch.zeros((4, 4, 4)), echo_times_s=TIMES_S, b0_tesla=3.0, mask=mask
    )
    assert found.abs().max().item() < 1e-6


def block(start, stop):
    inside = np.zeros(SHAPE, bool)
    inside[(slice(start, stop),) * 3] = True
    return inside


BRAIN, RIM, CAVITY = block(2, 22), block(2, 22) & ~block(3, 22), block(10, 13)
SLOPE = np.broadcast_to(np.linspace(0, 1, 24, dtype=np.float32), SHAPE)


def exclude(unreliable, *, signal=1.0, noise_rad=0.0, edge_mm=1.0):
    """Exclude voxels with a residual of 1 rad and the given signal from a linear field."""
    return exclude_unreliable(
        np.where(unreliable, np.float32(50), SLOPE),
        np.where(unreliable, np.float32(1), np.float32(noise_rad)),
        np.where(unreliable, np.float32(signal), np.float32(1)),
        BRAIN,
        voxel_size_mm=(edge_mm,) * 3,
    )


def test_reliable_field_is_unchanged():
    field, kept = exclude(np.zeros(SHAPE, bool), noise_rad=0.2)
    np.testing.assert_array_equal(field, SLOPE)
    np.testing.assert_array_equal(kept, BRAIN)


@pytest.mark.parametrize("signal", [1.0, 0.01])
def test_unreliable_voxels_at_border_are_excluded(signal):
    field, kept = exclude(RIM, signal=signal)
    np.testing.assert_array_equal(kept, BRAIN & ~RIM)
    np.testing.assert_array_equal(field[kept], SLOPE[kept])


def test_enclosed_flowing_blood_is_interpolated():
    field, kept = exclude(CAVITY)
    np.testing.assert_array_equal(kept, BRAIN)
    np.testing.assert_allclose(field[CAVITY], SLOPE[CAVITY], atol=0.02)
    np.testing.assert_array_equal(field[~CAVITY], SLOPE[~CAVITY])


def test_enclosed_dark_cavity_is_excluded():
    _, kept = exclude(CAVITY, signal=0.05)
    np.testing.assert_array_equal(kept, BRAIN & ~CAVITY)


@pytest.mark.parametrize(("edge_mm", "excluded"), [(1.0, False), (1.2, True)])
def test_cavity_needs_ten_cubic_millimetres(edge_mm, excluded):
    # Eight voxels of 1 mm are 8 mm3, of 1.2 mm 13.8 mm3.
    _, kept = exclude(block(10, 12), signal=0.05, edge_mm=edge_mm)
    assert kept[block(10, 12)].any() != excluded


def test_noisy_scan_is_kept():
    # 1 rad is four times a median residual of 0.25 rad, but ten times one of 0.1 rad.
    _, kept = exclude(RIM, noise_rad=0.25)
    np.testing.assert_array_equal(kept, BRAIN)
    _, kept = exclude(RIM, noise_rad=0.1)
    assert not kept[2].any()


def test_empty_mask_stays_empty():
    field, kept = exclude_unreliable(SLOPE, SLOPE, SLOPE, np.zeros(SHAPE, bool), voxel_size_mm=(1, 1, 1))
    np.testing.assert_array_equal(field, SLOPE)
    assert not kept.any()
