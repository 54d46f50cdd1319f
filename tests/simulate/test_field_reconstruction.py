import dataclasses

import pytest
import torch

from bids_dgmseg.simulate.field_reconstruction import ReconstructionRanges, draw_b0_direction, simulate_reconstruction
from bids_dgmseg.simulate.ranges import smooth_noise

SHAPE = (40, 40, 32)
CLEAN = dataclasses.replace(
    ReconstructionRanges(),
    snr=(1e5, 1e5),
    rim_ppm=(0.0, 0.0),
    slow_ppm=(0.0, 0.0),
    tilt=0.0,
    largest_radius_mm=(12.0, 12.0),
    threshold=(0.08, 0.08),
    least_squares=(0.002, 0.002),
)


@pytest.fixture(scope="module")
def head():
    """A brain of 18 mm with a nucleus of 5 mm at 0.1 ppm."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in SHAPE]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    brain = x**2 + y**2 + (1.2 * z) ** 2 < 18**2
    nucleus = (x - 5) ** 2 + y**2 + z**2 < 25
    return 0.1 * nucleus.float(), brain, nucleus


def draw(head, ranges, seed, voxel_size_mm=(1.0, 1.0, 1.0)):
    chi, brain, _ = head
    generator = torch.Generator().manual_seed(seed)
    return simulate_reconstruction(chi, brain, voxel_size_mm=voxel_size_mm, ranges=ranges, generator=generator)


@pytest.mark.parametrize("seed", range(8))
def test_nucleus_is_visible_in_every_reconstruction(head, seed):
    _, brain, nucleus = head
    chi = draw(head, CLEAN, seed)
    contrast = (chi[nucleus].mean() - chi[brain & ~nucleus].mean()).item()
    assert 0.04 < contrast < 0.125  # true 0.1; reduced by truncation, early stopping and small spheres


def test_mean_over_mask_is_preserved(head):
    true, brain, _ = head
    assert draw(head, CLEAN, 0)[brain].mean().item() == pytest.approx(true[brain].mean().item(), abs=1e-5)


def test_noise_is_inverse_to_snr(head):
    _, brain, _ = head
    clean = draw(head, CLEAN, 0)
    errors = [
        (draw(head, dataclasses.replace(CLEAN, snr=(snr, snr)), 0) - clean)[brain].std().item() for snr in (100, 25)
    ]
    assert errors[1] == pytest.approx(4 * errors[0], rel=0.05)  # linear while the weights stay the same


def test_residual_field_affects_mainly_the_border(head):
    _, brain, _ = head
    middle = torch.zeros(SHAPE, dtype=torch.bool)
    middle[14:26, 14:26, 12:20] = True
    rim = brain & ~(torch.roll(brain, 3, 0) & torch.roll(brain, -3, 0) & torch.roll(brain, 3, 2))
    biased = dataclasses.replace(CLEAN, rim_ppm=(0.02, 0.02))
    error = torch.stack([(draw(head, biased, seed) - draw(head, CLEAN, seed)).abs() for seed in range(6)]).mean(dim=0)
    assert error[rim].mean() > 1.5 * error[middle].mean() > 0


def test_thick_slices(head):
    chi, brain, nucleus = (part[:, :, 8:24] for part in head)
    thick = draw((chi, brain, nucleus), CLEAN, 1, voxel_size_mm=(1.0, 1.0, 3.0))
    assert thick.isfinite().all()
    assert (thick[nucleus].mean() - thick[brain & ~nucleus].mean()).item() > 0.03


def test_b0_does_not_rotate_with_oblique_slices():
    quarter = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # the scan's y axis points up, its z axis back
    upright, oblique = (
        draw_b0_direction(0.35, torch.Generator().manual_seed(3), rotation) for rotation in (None, quarter)
    )
    assert max(abs(upright[0]), abs(upright[1])) <= 0.35
    assert oblique == pytest.approx((upright[0], upright[2], -upright[1]))


def test_smooth_noise_is_isotropic_in_mm():
    """With a wavelength of 12 mm, values 3 mm apart are correlated and those 12 mm apart hardly."""
    shape, voxel_size_mm = (48, 48, 16), (1.0, 1.0, 3.0)
    noise = torch.stack(
        [
            smooth_noise(shape, [12 / step for step in voxel_size_mm], torch.Generator().manual_seed(seed))[0]
            for seed in range(30)
        ]
    )

    def correlation(axis, distance_mm):
        step = round(distance_mm / voxel_size_mm[axis])
        first, second = (noise.narrow(axis + 1, start, shape[axis] - step) for start in (0, step))
        return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()

    for axis in range(3):
        assert correlation(axis, 3) > 0.8
        assert correlation(axis, 12) < 0.35
