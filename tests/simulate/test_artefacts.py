import dataclasses

import pytest
import torch

from bids_dgmseg.simulate.artefacts import (
    degrade,
    draw_b0_direction,
    draw_coverage,
    draw_scan_grid,
    simulate_reconstruction,
)
from bids_dgmseg.simulate.ranges import ArtefactRanges, ReconstructionRanges

SHAPE = (24, 24, 20)
BRAIN_SHAPE = (40, 40, 32)
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


@pytest.fixture
def chi():
    head = torch.zeros(SHAPE)
    head[3:-3, 3:-3, 3:-3] = -0.02
    head[9:15, 9:15, 7:13] = 0.1
    return head


def draw(chi, seed, *, spacing_mm=1.25, **changes):
    ranges = dataclasses.replace(ArtefactRanges(), **changes)
    return degrade(chi, spacing_mm=spacing_mm, ranges=ranges, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("physics", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_maps_are_finite_with_visible_nucleus(chi, physics, seed):
    degraded = draw(chi, seed, physics=physics)
    assert degraded.shape == SHAPE
    assert degraded.dtype == torch.float32
    assert degraded.isfinite().all()
    assert degraded[10:14, 10:14, 8:12].mean() > degraded[chi < 0].mean() + 0.015


def test_fraction_of_reconstructed_maps(chi, monkeypatch):
    calls = []

    def spy(scan, *_, **__):
        calls.append(1)
        return scan

    monkeypatch.setattr("bids_dgmseg.simulate.artefacts.simulate_reconstruction", spy)
    fractions = {}
    for physics in (0.0, 0.5, 1.0):
        calls.clear()
        for seed in range(40):
            draw(chi, seed, physics=physics)
        fractions[physics] = len(calls) / 40
    assert fractions[0.0] == 0
    assert fractions[1.0] == 1
    assert 0.25 < fractions[0.5] < 0.75  # 20 of 40, SD 3.2


def test_fine_scans_keep_array_voxels():
    ranges = ArtefactRanges(in_plane_mm=(0.5, 0.5), slice_mm=(1.0, 1.0))
    for seed in range(6):
        assert draw_scan_grid(SHAPE, 1.25, ranges, torch.Generator().manual_seed(seed)).steps == (1.0, 1.0, 1.0)


def test_half_of_scans_have_thick_mostly_axial_slices():
    ranges = ArtefactRanges(in_plane_mm=(0.8, 0.8), slice_mm=(3.0, 3.0))
    grids = [draw_scan_grid(SHAPE, 1.0, ranges, torch.Generator().manual_seed(seed)) for seed in range(200)]
    thick = [grid for grid in grids if max(grid.steps) == 3.0]
    assert 70 < len(thick) < 130  # 100 of 200, SD 7
    assert 0.65 < sum(grid.steps[2] == 3.0 for grid in thick) / len(thick) < 0.95  # 0.8, SD 0.04
    assert all(grid.rotation is None for grid in grids if max(grid.steps) == 1.0)


def test_thick_slices_average_thin_structures(chi):
    stripes = torch.zeros(SHAPE)
    stripes[:, :, ::2] = 0.1
    averaged = draw(
        stripes,
        0,
        spacing_mm=1.0,
        physics=0.0,
        slice_mm=(4.0, 4.0),
        noise_ppm=(1e-5, 1e-4),
        field_noise_ppm=(0.0, 0.0),
        oblique_deg=0.0,
        in_plane_mm=(4.0, 4.0),
    )
    assert averaged[8:16, 8:16, 6:14].std() < 0.02  # 0.05 before


def test_zero_filling_truncates_frequencies_in_plane(chi, monkeypatch):
    kept_of: dict[int, list[list[float]]] = {}
    cut: list[list[float]] = []
    ranges = ArtefactRanges(physics=0.0, in_plane_mm=(1.0, 1.0), slice_mm=(3.0, 3.0))

    def spy(scan, kept):
        cut.append(kept)
        return scan

    monkeypatch.setattr("bids_dgmseg.simulate.artefacts.truncate_frequencies", spy)
    for seed in range(150):
        cut.clear()
        degrade(chi, spacing_mm=1.0, ranges=ranges, generator=torch.Generator().manual_seed(seed))
        steps = draw_scan_grid(SHAPE, 1.0, ranges, torch.Generator().manual_seed(seed)).steps
        kept_of.setdefault(steps.index(max(steps)) if max(steps) > 1 else 2, []).extend(cut)
    assert set(kept_of) == {0, 1, 2}
    for slices, all_kept in kept_of.items():
        for kept in all_kept:
            assert kept[slices] == 1
            assert len({kept[axis] for axis in range(3) if axis != slices}) == 1
            assert 0.6 <= min(kept) < 1


@pytest.mark.parametrize("seed", range(24))
def test_tensors_are_created_on_device_of_map(chi, seed):
    """Tensors created without a device land on "meta" here, which torch does not combine with the CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        covered = draw_coverage(chi != 0, spacing_mm=1.25, cut_mm=(5.0, 5.0), generator=generator)
        degraded = degrade(chi, spacing_mm=1.25, ranges=ArtefactRanges(), generator=generator, mask=covered)
    assert covered.device == degraded.device == chi.device


@pytest.fixture(scope="module")
def head():
    """A brain of 18 mm with a nucleus of 5 mm at 0.1 ppm."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in BRAIN_SHAPE]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    brain = x**2 + y**2 + (1.2 * z) ** 2 < 18**2
    nucleus = (x - 5) ** 2 + y**2 + z**2 < 25
    return 0.1 * nucleus.float(), brain, nucleus


def reconstruct(head, ranges, seed, voxel_size_mm=(1.0, 1.0, 1.0)):
    chi, brain, _ = head
    generator = torch.Generator().manual_seed(seed)
    return simulate_reconstruction(chi, brain, voxel_size_mm=voxel_size_mm, ranges=ranges, generator=generator)


@pytest.mark.parametrize("seed", range(8))
def test_nucleus_is_visible_in_every_reconstruction(head, seed):
    _, brain, nucleus = head
    chi = reconstruct(head, CLEAN, seed)
    contrast = (chi[nucleus].mean() - chi[brain & ~nucleus].mean()).item()
    assert 0.04 < contrast < 0.125  # true 0.1; reduced by truncation, early stopping and small spheres


def test_mean_over_mask_is_preserved(head):
    true, brain, _ = head
    assert reconstruct(head, CLEAN, 0)[brain].mean().item() == pytest.approx(true[brain].mean().item(), abs=1e-5)


def test_noise_is_inverse_to_snr(head):
    _, brain, _ = head
    clean = reconstruct(head, CLEAN, 0)
    noisy = [reconstruct(head, dataclasses.replace(CLEAN, snr=(snr, snr)), 0) for snr in (100, 25)]
    errors = [(chi - clean)[brain].std().item() for chi in noisy]
    assert errors[1] == pytest.approx(4 * errors[0], rel=0.05)  # linear while the weights stay the same


def test_residual_field_affects_mainly_the_border(head):
    _, brain, _ = head
    middle = torch.zeros(BRAIN_SHAPE, dtype=torch.bool)
    middle[14:26, 14:26, 12:20] = True
    rim = brain & ~(torch.roll(brain, 3, 0) & torch.roll(brain, -3, 0) & torch.roll(brain, 3, 2))
    biased = dataclasses.replace(CLEAN, rim_ppm=(0.02, 0.02))
    error = torch.stack(
        [(reconstruct(head, biased, seed) - reconstruct(head, CLEAN, seed)).abs() for seed in range(6)]
    ).mean(dim=0)
    assert error[rim].mean() > 1.5 * error[middle].mean() > 0


def test_thick_slices(head):
    chi, brain, nucleus = (part[:, :, 8:24] for part in head)
    thick = reconstruct((chi, brain, nucleus), CLEAN, 1, voxel_size_mm=(1.0, 1.0, 3.0))
    assert thick.isfinite().all()
    assert (thick[nucleus].mean() - thick[brain & ~nucleus].mean()).item() > 0.03


def test_b0_does_not_rotate_with_oblique_slices():
    quarter = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # the scan's y axis points up, its z axis back
    upright, oblique = (
        draw_b0_direction(0.35, torch.Generator().manual_seed(3), rotation) for rotation in (None, quarter)
    )
    assert max(abs(upright[0]), abs(upright[1])) <= 0.35
    assert oblique == pytest.approx((upright[0], upright[2], -upright[1]))
