import dataclasses

import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid, resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.artefacts import (
    ScanGrid,
    blur,
    degrade,
    diffuse_anisotropically,
    draw_b0_direction,
    draw_coverage,
    draw_scan_grid,
    simulate_reconstruction,
    spherical_mean_kernel,
    truncate_frequencies,
    v_sharp,
)
from bids_dgmseg.lab.simulate.ranges import ArtefactRanges, ReconstructionRanges
from bids_dgmseg.qsm.field import apply_kernel

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
    ranges, generator = dataclasses.replace(ArtefactRanges(), **changes), torch.Generator().manual_seed(seed)
    grid = draw_scan_grid(SHAPE, spacing_mm, ranges, generator)
    return degrade(chi, grid, spacing_mm=spacing_mm, ranges=ranges, generator=generator)


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

    monkeypatch.setattr("bids_dgmseg.lab.simulate.artefacts.simulate_reconstruction", spy)
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
    ranges = ArtefactRanges(in_plane_mm=(0.5, 0.5), thick=0.0, coarse=0.0)
    for seed in range(6):
        assert draw_scan_grid(SHAPE, 1.25, ranges, torch.Generator().manual_seed(seed)).steps == (1.0, 1.0, 1.0)


def test_most_scans_have_thick_mostly_axial_slices():
    ranges = ArtefactRanges(in_plane_mm=(0.8, 0.8), slice_mm=(3.0, 3.0), clinical_mm=(3.0, 3.0), coarse=0.0)
    grids = [draw_scan_grid(SHAPE, 1.0, ranges, torch.Generator().manual_seed(seed)) for seed in range(200)]
    thick = [grid for grid in grids if max(grid.steps) == 3.0]
    assert 105 < len(thick) < 155  # 130 of 200, SD 7
    assert 0.65 < sum(grid.steps[2] == 3.0 for grid in thick) / len(thick) < 0.95  # 0.8, SD 0.04
    assert all(grid.rotation is None for grid in grids if max(grid.steps) == 1.0)


def test_half_of_thick_slices_are_clinical_and_some_scans_are_coarse():
    grids = [draw_scan_grid(SHAPE, 1.0, ArtefactRanges(), torch.Generator().manual_seed(seed)) for seed in range(400)]
    coarse = [grid for grid in grids if min(grid.steps) > 1.2]
    thick = [grid for grid in grids if max(grid.steps) > 1.25 and min(grid.steps) <= 1.2]
    clinical = [grid for grid in thick if max(grid.steps) > 2]
    assert 15 < len(coarse) < 50  # 0.08 of 400, SD 5.4
    assert 0.5 < len(clinical) / len(thick) < 0.75  # 0.5, or 0.5 / (1 - 0.125) among those above 1.25 mm, SD 0.04


def test_label_of_a_scans_voxel_is_that_of_its_largest_share():
    """Slices of 3 voxels, centred on the array: 2 of 3 voxels label one slice, 1 of 3 none."""
    labels = torch.zeros((4, 4, 9), dtype=torch.uint8)
    labels[..., 3:5], labels[..., 1] = 5, 7
    drawn = ScanGrid((4, 4, 9), (1.0, 1.0, 3.0), (0.0, 0.0, 0.5)).majority(labels)
    assert set(drawn[..., 4].unique().tolist()) == {5}  # centre of the slice of voxels 3 to 5
    assert 7 not in drawn
    assert torch.equal(ScanGrid((4, 4, 9), (1.0, 1.0, 1.0)).majority(labels), labels)


def test_zero_filling_truncates_frequencies_in_plane(chi, monkeypatch):
    kept_of: dict[int, list[list[float]]] = {}
    cut: list[list[float]] = []
    ranges = ArtefactRanges(
        physics=0.0, in_plane_mm=(1.0, 1.0), slice_mm=(3.0, 3.0), clinical_mm=(3.0, 3.0), thick=1.0, coarse=0.0
    )

    def spy(scan, kept):
        cut.append(kept)
        return scan

    monkeypatch.setattr("bids_dgmseg.lab.simulate.artefacts.truncate_frequencies", spy)
    for seed in range(150):
        cut.clear()
        generator = torch.Generator().manual_seed(seed)
        grid = draw_scan_grid(SHAPE, 1.0, ranges, generator)
        degrade(chi, grid, spacing_mm=1.0, ranges=ranges, generator=generator)
        kept_of.setdefault(grid.steps.index(max(grid.steps)), []).extend(cut)
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
        grid = draw_scan_grid(SHAPE, 1.25, ArtefactRanges(), generator)
        degraded = degrade(chi, grid, spacing_mm=1.25, ranges=ArtefactRanges(), generator=generator, mask=covered)
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


def thick(**changes):
    return dataclasses.replace(ScanGrid((8, 8, 12), (1.0, 1.0, 3.0)), **changes)


def ramp(shape):
    return torch.arange(shape[2], dtype=torch.float32).expand(shape).contiguous()


def test_slice_is_mean_of_fine_slices():
    # 12 fine slices, 3 per scan slice: four, plus one to cover the offset; the middle one extends from 4 to 7.
    scan = thick().average(ramp((8, 8, 12)))
    assert scan.shape == (8, 8, 5)
    assert scan[0, 0, 2].item() == pytest.approx(5.5)
    step = torch.zeros(8, 8, 12)
    step[:, :, 6:] = 1.0
    assert thick().average(step)[0, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def test_slices_are_shifted_by_offset():
    spot = torch.zeros(8, 8, 12)
    spot[:, :, 4] = 1.0
    # It extends from 3.5 to 4.5: half in slice 1-4, half in 4-7; with an offset of a third of 3 in one slice alone.
    assert thick().average(spot)[0, 0].tolist() == pytest.approx([0, 1 / 6, 1 / 6, 0, 0])
    assert thick(offsets=(0.0, 0.0, 1 / 3)).average(spot)[0, 0].tolist() == pytest.approx([0, 1 / 3, 0, 0, 0])


def test_constant_is_preserved_by_any_grid():
    tilted = torch.tensor(Rotation.from_euler("xyz", [10, -5, 20], degrees=True).as_matrix(), dtype=torch.float32)
    for grid in (thick(), thick(steps=(1.3, 1.3, 2.6)), thick(rotation=tilted, offsets=(0.0, 0.0, 0.4))):
        back = grid.interpolate(grid.average(torch.full((8, 8, 12), 0.3)))
        assert back.shape == (8, 8, 12)
        assert torch.allclose(back, torch.tensor(0.3))


def test_interpolation_matches_resampling_of_maps():
    scan = torch.randn((8, 8, 5), generator=torch.Generator().manual_seed(0))
    # Scan slices lie at 5.5 + 3 (c - 2), the first at -0.5; `resample` knows from the affine.
    source = Volume(scan.numpy(), torch.diag(torch.tensor([1.0, 1, 3, 1])).double().numpy())
    affine = torch.eye(4).double().numpy()
    affine[2, 3] = 0.5
    expected = resample(source, Grid((8, 8, 12), affine)).array
    assert torch.allclose(thick().interpolate(scan), torch.from_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("step", [1.0, 1.5, 3.0])
def test_oblique_scan_does_not_shift_structures(step):
    rotation = torch.tensor(Rotation.from_euler("xyz", [15, -10, 5], degrees=True).as_matrix(), dtype=torch.float32)
    axis = torch.arange(31.0) - 15
    blob = torch.exp(-(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) / 18)
    grid = ScanGrid((31, 31, 31), (1.0, 1.0, step), offsets=(0.0, 0.0, 0.45), rotation=rotation)
    shown = grid.interpolate(grid.average(blob))
    for others in ((1, 2), (0, 2), (0, 1)):
        along = shown.sum(others)
        assert float((along * torch.arange(31)).sum() / along.sum()) == pytest.approx(15.0, abs=0.05)


def test_oblique_scan_preserves_gradient():
    rotation = torch.tensor(Rotation.from_euler("x", 15, degrees=True).as_matrix(), dtype=torch.float32)
    grid = ScanGrid((24, 24, 24), (1.0, 1.0, 3.0), rotation=rotation)
    plane = ramp((24, 24, 24))
    scan = grid.average(plane)
    inner = (slice(9, 15),) * 3
    assert torch.allclose(grid.interpolate(scan)[inner], plane[inner], atol=1e-3)
    # From one scan slice to the next, z grows by 3 cos 15 degrees; along the scan's y axis by sin 15 degrees.
    middle = grid.size[2] // 2
    assert (scan[12, 12, middle] - scan[12, 12, middle - 1]).item() == pytest.approx(2.898, abs=0.02)
    assert (scan[12, 13, middle] - scan[12, 12, middle]).item() == pytest.approx(0.2588, abs=0.02)


def test_sphere_of_one_voxel_averages_seven_voxels():
    # Radius 1 voxel: itself and six neighbours.
    spot = torch.zeros(8, 8, 8)
    spot[4, 4, 4] = 7.0
    mean = apply_kernel(spot, spherical_mean_kernel((8, 8, 8), (2.0, 2.0, 2.0), 2.0))
    assert mean[4, 4, 4].item() == pytest.approx(1, abs=1e-5)
    assert mean[4, 4, 3].item() == pytest.approx(1, abs=1e-5)
    assert mean[4, 3, 3].item() == pytest.approx(0, abs=1e-5)


def test_harmonic_background_in_the_mask_is_removed():
    x, y, z = torch.meshgrid(*[(torch.arange(48) - 23.5) * 1.5] * 3, indexing="ij")
    mask = x**2 + y**2 + z**2 < 24**2
    background = 0.02 * x + 0.001 * (x**2 - z**2) + 2e-4 * x * y * z  # ppm; the Laplacian is 0
    for field in (background, torch.where(mask, background, 1000.0)):
        local, eroded = v_sharp(field, mask, voxel_size_mm=(1.5, 1.5, 1.5), radii_mm=(9, 6, 3))
        assert background[eroded].abs().max().item() > 0.5
        assert local[eroded].abs().max().item() < 1e-3


@pytest.fixture
def noise():
    return torch.randn((14, 12, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [(0.7, 0.0, 1.2), (5.0, 5.0, 5.0)])
def test_blur_matches_scipy_with_replicated_faces(noise, sigma):
    expected = noise.numpy()
    for axis, s in enumerate(sigma):
        radius = min(int(-(-3 * s // 1)), noise.shape[axis] - 1)
        if s:
            expected = ndimage.gaussian_filter1d(expected, s, axis=axis, mode="nearest", radius=radius)
    assert torch.allclose(blur(noise, sigma), torch.from_numpy(expected), atol=1e-5)


def test_truncation_removes_high_frequencies_only():
    x = torch.arange(20).view(-1, 1, 1)
    slow, fast = (torch.cos(2 * torch.pi * n * x / 20).expand(20, 6, 6) for n in (3, 8))
    kept = truncate_frequencies(slow + fast, [0.5, 1.0, 1.0])  # up to 5 periods of 10
    assert torch.allclose(kept, slow, atol=1e-5)


def test_diffusion_removes_noise_and_keeps_edges(noise):
    box = torch.zeros(14, 12, 10)
    box[7:] = 0.2
    flat = box + 0.005 * noise
    for _ in range(3):
        flat = diffuse_anisotropically(flat, edge_ppm=0.02)
    assert flat[:7].std() < 0.4 * (0.005 * noise[:7]).std()
    assert (flat[9:].mean() - flat[:5].mean()).item() == pytest.approx(0.2, rel=0.03)
    assert (flat[7] - flat[6]).mean().item() > 0.16  # an equally strong Gaussian would leave 0.06
    assert flat.mean().item() == pytest.approx((box + 0.005 * noise).mean().item(), abs=1e-6)
