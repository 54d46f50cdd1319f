import pytest
import torch
from scipy import ndimage

from bids_dgmseg.simulate.smoothing import blur, flatten, truncate_frequencies


@pytest.fixture
def noise():
    return torch.randn((14, 12, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [(0.7, 0.0, 1.2), (5.0, 5.0, 5.0)])
def test_blur_is_a_gaussian_with_replicated_edges(noise, sigma):
    expected = noise.numpy()
    for axis, s in enumerate(sigma):
        radius = min(int(-(-3 * s // 1)), noise.shape[axis] - 1)
        if s:
            expected = ndimage.gaussian_filter1d(expected, s, axis=axis, mode="nearest", radius=radius)
    assert torch.allclose(blur(noise, sigma), torch.from_numpy(expected), atol=1e-5)


def test_truncation_drops_the_high_frequencies_only():
    x = torch.arange(20).view(-1, 1, 1)
    slow, fast = (torch.cos(2 * torch.pi * n * x / 20).expand(20, 6, 6) for n in (3, 8))
    kept = truncate_frequencies(slow + fast, [0.5, 1.0, 1.0])  # up to 5 periods of 10
    assert torch.allclose(kept, slow, atol=1e-5)


def test_truncation_rings_at_edges():
    step = torch.zeros(64, 4, 4)
    step[16:48] = 1.0
    # Gibbs: the overshoot is 9 % of the step, and voxel centres lie beside its peak.
    assert 1.05 < truncate_frequencies(step, [0.5, 1.0, 1.0]).max().item() < 1.10


def test_flattening_levels_noise_and_keeps_edges(noise):
    box = torch.zeros(14, 12, 10)
    box[7:] = 0.2
    flat = flatten(box + 0.005 * noise, edge_ppm=0.02, steps=10)
    assert flat[:7].std() < 0.4 * (0.005 * noise[:7]).std()
    assert (flat[9:].mean() - flat[:5].mean()).item() == pytest.approx(0.2, rel=0.03)
    assert (flat[7] - flat[6]).mean().item() > 0.16  # a blur as strong would leave 0.06


def test_flattening_keeps_the_mean(noise):
    assert flatten(noise, edge_ppm=0.1, steps=3).mean().item() == pytest.approx(noise.mean().item(), abs=1e-6)
