import pytest

from bids_dgmseg.simulate.artefacts import ArtefactRanges
from bids_dgmseg.simulate.field_reconstruction import ReconstructionRanges
from bids_dgmseg.simulate.ranges import narrow


def test_range_is_narrowed_about_its_middle():
    narrowed = narrow(ArtefactRanges(highpass=(0.2, 0.8), physics=0.5), 0.5)
    assert narrowed.highpass == pytest.approx((0.35, 0.65))
    assert narrowed.physics == 0.5


def test_logarithmic_range_is_narrowed_about_geometric_mean():
    assert narrow(ReconstructionRanges(snr=(25.0, 100.0)), 0.0).snr == pytest.approx((50.0, 50.0))
    assert narrow(ReconstructionRanges(snr=(16.0, 256.0)), 0.5).snr == pytest.approx((32.0, 128.0))


def test_probabilities_are_not_narrowed():
    assert narrow(ReconstructionRanges(), 0.0).methods == ReconstructionRanges().methods
