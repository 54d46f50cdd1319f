import pytest
import torch

from bids_dgmseg.lab.simulate.ranges import ArtefactRanges, ReconstructionRanges, narrow, smooth_noise


def test_ranges_are_narrowed_about_their_middle():
    narrowed = narrow(ArtefactRanges(highpass=(0.2, 0.8), physics=0.5), 0.5)
    assert narrowed.highpass == pytest.approx((0.35, 0.65))
    assert narrowed.physics == 0.5
    logarithmic = narrow(ReconstructionRanges(snr=(16.0, 256.0)), 0.5)
    assert logarithmic.snr == pytest.approx((32.0, 128.0))  # about the geometric mean
    assert logarithmic.methods == ReconstructionRanges().methods  # probabilities


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
