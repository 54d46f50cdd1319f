from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T
from bids_dgmseg.qsm.reliable import leave_out, misfit_rad

SHAPE = (24, 24, 24)
TIMES_S = (0.01, 0.02)
TURN = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * 3.0
"""Rad a second and ppm at 3 T."""


def block(start, stop):
    inside = np.zeros(SHAPE, bool)
    inside[(slice(start, stop),) * 3] = True
    return inside


BRAIN = block(2, 22)
SLOPE = np.broadcast_to(np.linspace(0, 1, 24, dtype=np.float32), SHAPE)


def keep(wrong, *, signal=1.0, noise=0.0, edge_mm=1.0):
    """What is left of a field on a slope whose echoes disagree by 1 rad in some voxels, of that signal."""
    misfit = np.where(wrong, np.float32(1), np.float32(noise))
    field = np.where(wrong, np.float32(50), SLOPE)
    strength = np.where(wrong, np.float32(signal), np.float32(1))
    return leave_out(field, misfit, strength, BRAIN, voxel_size_mm=(edge_mm,) * 3)


def measure(field_ppm, rest_rad=(0.0, 0.0), magnitude=(1.0, 1.0)):
    """The misfit of two echoes of one voxel among many that fit."""
    phase = torch.zeros((2, 1, 1, 9))
    strength = torch.ones((2, 1, 1, 9))
    field = torch.zeros((1, 1, 9))
    field[..., 0] = field_ppm
    for echo, time_s in enumerate(TIMES_S):
        phase[echo, ..., 0] = TURN * time_s * field_ppm + rest_rad[echo]
        strength[echo, ..., 0] = magnitude[echo]
    mask = torch.ones((1, 1, 9), dtype=torch.bool)
    mask[..., 0] = False
    return misfit_rad(phase, strength, field, echo_times_s=TIMES_S, b0_tesla=3.0, mask=mask)[0, 0, 0].item()


def test_phases_on_a_line_fit():
    assert measure(0.2) == pytest.approx(0, abs=1e-5)


def test_the_misfit_is_the_root_of_the_mean_square_weighted_by_the_squared_signal():
    # (2^2 * 0.3^2 + 1^2 * 0.6^2) / (2^2 + 1^2) = 0.144
    assert measure(0.2, rest_rad=(0.3, -0.6), magnitude=(2.0, 1.0)) == pytest.approx(math.sqrt(0.144), rel=1e-4)


def test_what_all_tissue_shares_in_an_echo_is_no_misfit():
    phase = torch.stack([torch.full((4, 4, 4), 0.7), torch.full((4, 4, 4), -2.0)])
    found = misfit_rad(
        phase,
        torch.ones_like(phase),
        torch.zeros((4, 4, 4)),
        echo_times_s=TIMES_S,
        b0_tesla=3.0,
        mask=torch.ones((4, 4, 4), dtype=torch.bool),
    )
    assert found.abs().max().item() < 1e-6


def test_no_signal_has_no_misfit():
    assert measure(0.2, rest_rad=(1.0, 1.0), magnitude=(0.0, 0.0)) == 0


def test_where_all_agree_nothing_changes():
    field, kept = keep(np.zeros(SHAPE, bool), noise=0.2)
    np.testing.assert_array_equal(field, SLOPE)
    np.testing.assert_array_equal(kept, BRAIN)


@pytest.mark.parametrize("signal", [1.0, 0.01])
def test_voxels_at_the_border_that_disagree_are_left_out(signal):
    wrong = BRAIN & ~block(3, 22)
    field, kept = keep(wrong, signal=signal)
    np.testing.assert_array_equal(kept, BRAIN & ~wrong)
    np.testing.assert_array_equal(field[kept], SLOPE[kept])


def test_flowing_blood_within_the_brain_gets_the_field_about_it():
    vessel = block(10, 13)
    field, kept = keep(vessel)
    np.testing.assert_array_equal(kept, BRAIN)
    np.testing.assert_allclose(field[vessel], SLOPE[vessel], atol=0.02)
    np.testing.assert_array_equal(field[~vessel], SLOPE[~vessel])


def test_a_dark_cavity_within_the_brain_is_left_out():
    cavity = block(10, 13)
    _, kept = keep(cavity, signal=0.05)
    np.testing.assert_array_equal(kept, BRAIN & ~cavity)


@pytest.mark.parametrize(("edge_mm", "left_out"), [(1.0, False), (1.2, True)])
def test_a_dark_spot_of_ten_cubic_millimetres_is_none(edge_mm, left_out):
    # Eight voxels of 1 mm are 8 mm3, of 1.2 mm 13.8 mm3.
    spot = block(10, 12)
    _, kept = keep(spot, signal=0.05, edge_mm=edge_mm)
    assert kept[spot].any() != left_out


def test_a_noisy_scan_is_kept():
    # 0.25 rad is the rule there, so that 1 rad is no exception, as it is where 0.1 rad is the rule.
    _, kept = keep(BRAIN & ~block(3, 22), noise=0.25)
    np.testing.assert_array_equal(kept, BRAIN)
    _, kept = keep(BRAIN & ~block(3, 22), noise=0.1)
    assert not kept[2].any()


def test_an_empty_mask_stays_empty():
    field, kept = leave_out(SLOPE, SLOPE, SLOPE, np.zeros(SHAPE, bool), voxel_size_mm=(1, 1, 1))
    np.testing.assert_array_equal(field, SLOPE)
    assert not kept.any()
