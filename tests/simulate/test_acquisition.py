import dataclasses

import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.simulate.artefacts import ScanGrid, blur, diffuse_anisotropically, truncate_frequencies


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


def test_fine_scan_is_unchanged():
    array = torch.randn(8, 8, 12)
    grid = ScanGrid((8, 8, 12), (1.0, 1.0, 1.0))
    assert torch.equal(grid.interpolate(grid.average(array)), array)


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


def test_truncation_causes_gibbs_ringing():
    step = torch.zeros(64, 4, 4)
    step[16:48] = 1.0
    # The overshoot is 9 % of the step, and voxel centres lie next to its peak.
    assert 1.05 < truncate_frequencies(step, [0.5, 1.0, 1.0]).max().item() < 1.10


def test_diffusion_removes_noise_and_keeps_edges(noise):
    box = torch.zeros(14, 12, 10)
    box[7:] = 0.2
    flat = diffuse_anisotropically(box + 0.005 * noise, edge_ppm=0.02, steps=10)
    assert flat[:7].std() < 0.4 * (0.005 * noise[:7]).std()
    assert (flat[9:].mean() - flat[:5].mean()).item() == pytest.approx(0.2, rel=0.03)
    assert (flat[7] - flat[6]).mean().item() > 0.16  # an equally strong Gaussian would leave 0.06


def test_diffusion_preserves_mean(noise):
    diffused = diffuse_anisotropically(noise, edge_ppm=0.1, steps=3)
    assert diffused.mean().item() == pytest.approx(noise.mean().item(), abs=1e-6)
