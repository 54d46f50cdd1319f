from dataclasses import replace

import pytest
import torch

from bids_dgmseg.simulate.artefacts import ArtefactRanges, draw_grid
from bids_dgmseg.simulate.reconstruction import ReconstructionRanges
from bids_dgmseg.simulate.sample import SEGMENTER_VIEW
from bids_dgmseg.simulate.typical import in_own_voxels, narrow, ordinary_view


def test_a_range_is_narrowed_about_its_middle():
    narrowed = narrow(ArtefactRanges(highpass=(0.2, 0.8), physics=0.5), 0.5)
    assert narrowed.highpass == pytest.approx((0.35, 0.65))
    assert narrowed.physics == 0.5


def test_the_middle_of_a_logarithmic_range_is_the_geometric_one():
    assert narrow(ReconstructionRanges(snr=(25.0, 100.0)), 0.0).snr == pytest.approx((50.0, 50.0))
    assert narrow(ReconstructionRanges(snr=(16.0, 256.0)), 0.5).snr == pytest.approx((32.0, 128.0))


def test_how_often_each_method_is_drawn_is_no_range():
    assert narrow(ReconstructionRanges(), 0.0).methods == ReconstructionRanges().methods


def test_an_ordinary_person_is_of_middle_age_with_plausible_values():
    values = ordinary_view(SEGMENTER_VIEW).values
    assert values.mixture == 0
    assert values.age_years == (45.0, 45.0)
    assert values.iron_sd == SEGMENTER_VIEW.values.iron_sd


def test_an_ordinary_scan_is_of_three_tesla_and_keeps_its_voxels_and_view():
    view = replace(SEGMENTER_VIEW, outside_noise=0.4)
    ordinary = ordinary_view(view, 0.5)
    assert ordinary.artefacts.reconstruction.b0_tesla == (3.0,)
    for name in ("in_plane_mm", "slice_mm"):
        assert getattr(ordinary.artefacts, name) == getattr(view.artefacts, name)
    assert (ordinary.cut_mm, ordinary.outside_noise, ordinary.shape) == (view.cut_mm, 0.4, view.shape)


def test_a_scan_in_own_voxels_is_not_interpolated():
    ranges = in_own_voxels(SEGMENTER_VIEW).artefacts
    array = torch.randn((12, 14, 16), generator=torch.Generator().manual_seed(0))
    for seed in range(40):  # an eighth of the scans are drawn with oblique slices
        grid = draw_grid((12, 14, 16), 1.0, ranges, torch.Generator().manual_seed(seed))
        assert torch.allclose(grid.interpolate(grid.average(array)), array, atol=1e-4)


def test_ordinary_heads_are_turned_by_half_as_much():
    ordinary = ordinary_view(SEGMENTER_VIEW, 1.0)
    assert ordinary.head.rotation_deg == tuple(angle / 2 for angle in SEGMENTER_VIEW.head.rotation_deg)
