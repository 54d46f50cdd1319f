from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bids_dgmseg.qsm.readout import remove_alternation

SHAPE = (20, 24, 16)
TIMES_S = (0.004, 0.009, 0.014, 0.019)
INSIDE = torch.zeros(SHAPE, dtype=torch.bool)
INSIDE[2:18, 3:21, 1:15] = True


def wrap(angle):
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def measure(slopes_rad, *, noise=0.0, n_echoes=4):
    """Wrapped phases of a smooth field and offset, with a ramp (rad a voxel) that alternates; and without."""
    x, y, z = torch.meshgrid(*(torch.arange(float(size)) for size in SHAPE), indexing="ij")
    field = 40 * (x / 20) ** 2 - 300 * (y / 24) + 90 * torch.sin(z / 5)  # rad a second
    offset = 2 * torch.cos(y / 9) + 0.1 * x
    ramp = slopes_rad[0] * x + slopes_rad[1] * y + slopes_rad[2] * z
    noisy = noise * torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(0))
    straight = torch.stack([offset + field * time_s for time_s in TIMES_S]) + noisy
    bent = torch.stack([one + (-1) ** echo * ramp for echo, one in enumerate(straight)])
    return wrap(bent)[:n_echoes], wrap(straight)[:n_echoes]


@pytest.mark.parametrize("slopes_rad", [(0.3, 0, 0), (0, -0.15, 0), (0, 0, 0.6), (0.1, 0.05, -0.08)])
def test_a_ramp_that_alternates_is_removed_along_any_axis(slopes_rad):
    bent, straight = measure(slopes_rad)
    found, ramp_rad = remove_alternation(bent, torch.ones_like(bent), INSIDE, echo_times_s=TIMES_S)
    # 16, 18 and 14 voxels of tissue are 15, 17 and 13 steps apart.
    assert ramp_rad == pytest.approx(sum(abs(slope) * n for slope, n in zip(slopes_rad, (15, 17, 13), strict=True)))
    np.testing.assert_allclose(wrap(found - straight)[:, INSIDE].numpy(), 0, atol=1e-3)


def test_noise_moves_the_ramp_by_little():
    bent, straight = measure((0.2, 0, 0), noise=0.1)
    found, ramp_rad = remove_alternation(bent, torch.ones_like(bent), INSIDE, echo_times_s=TIMES_S)
    assert ramp_rad == pytest.approx(0.2 * 15, abs=0.05)
    assert wrap(found - straight)[:, INSIDE].abs().max() < 0.05


def test_phase_without_a_ramp_is_left_to_the_bit():
    bent, _ = measure((0, 0, 0), noise=0.1)
    found, ramp_rad = remove_alternation(bent, torch.ones_like(bent), INSIDE, echo_times_s=TIMES_S)
    assert found is bent
    assert ramp_rad == 0


@pytest.mark.parametrize(
    ("n_echoes", "times_s"),
    [
        (2, TIMES_S[:2]),
        (1, TIMES_S[:1]),
        (4, (0.004, 0.009, 0.015, 0.02)),
    ],
)
def test_too_few_echoes_and_uneven_times_tell_nothing(n_echoes, times_s):
    bent, _ = measure((0.3, 0, 0), n_echoes=n_echoes)
    found, ramp_rad = remove_alternation(bent, torch.ones_like(bent), INSIDE, echo_times_s=times_s)
    assert found is bent
    assert ramp_rad is None


def test_noise_outside_the_tissue_has_no_say():
    bent, _ = measure((0.3, 0, 0))
    noise = 20 * torch.rand(bent.shape, generator=torch.Generator().manual_seed(1))
    loud = torch.where(INSIDE, 1.0, 5.0).expand(bent.shape)
    _, ramp_rad = remove_alternation(torch.where(INSIDE, bent, wrap(noise)), loud, INSIDE, echo_times_s=TIMES_S)
    assert ramp_rad == pytest.approx(0.3 * 15)
