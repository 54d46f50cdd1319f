import dataclasses

import pytest
import torch

from bids_dgmseg.simulate.anatomy import TemplateLocator, add_details
from bids_dgmseg.simulate.ranges import DetailRanges

NOTHING = DetailRanges(
    texture=(0, 0), fine_ppm=(0, 0), slow_ppm=(0, 0), tracts=0, vein_ppm=(0, 0), veins=0, spots=(0, 0)
)


@pytest.fixture
def points():
    """Template coordinates of a scan of a head 10 % larger than the template, rotated and deformed."""
    axes = [torch.arange(size) - (size - 1) / 2 for size in (60, 90, 70)]
    scan = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    turn = torch.tensor([[0.98, 0.17, 0.0], [-0.17, 0.98, 0.0], [0.0, 0.0, 1.0]])
    bent = 1.5 * torch.sin(scan.flip(-1) / 8)
    return scan @ turn.T / 1.1 + bent + torch.tensor([0.0, -20.0, 0.0])


def test_template_point_is_found_in_scan(points):
    wanted = torch.tensor([[20, 40, 30], [41, 55, 22]])
    template_mm = points[wanted[:, 0], wanted[:, 1], wanted[:, 2]]
    assert torch.allclose(TemplateLocator(points, 1.0).find(template_mm), wanted.float(), atol=0.1)


def test_point_beyond_scan_is_extrapolated(points):
    assert TemplateLocator(points, 1.0).find(torch.tensor([[200.0, -20.0, 0.0]]))[0, 0] > 60


@pytest.mark.parametrize(("spacing_mm", "radius_mm"), [(1.0, 4.0), (0.5, 2.0), (1.0, 2.5)])
def test_ball_has_its_volume(points, spacing_mm, radius_mm):
    chi = torch.zeros(points.shape[:3])
    numbers, fraction = TemplateLocator(points, spacing_mm).volume_fractions(
        torch.tensor([[30.2, 44.7, 35.0]]), radius_mm
    )
    chi.view(-1).index_add_(0, numbers, fraction)
    # The soft edge adds its second moment: a few percent for balls of some voxels.
    assert float(chi.sum()) * spacing_mm**3 == pytest.approx(4 / 3 * torch.pi * radius_mm**3, rel=0.05)


def test_thin_tube_fills_fraction_of_voxel(points):
    chi = torch.zeros(points.shape[:3])
    numbers, fraction = TemplateLocator(points, 4.0).volume_fractions(torch.tensor([[30.0, 44.0, 35.0]]), 0.8)
    chi.view(-1).index_add_(0, numbers, fraction)
    assert float(chi[30, 44, 35]) == pytest.approx(torch.pi * 0.2**2)


def test_zero_ranges_leave_map_unchanged(points):
    labels = torch.full(points.shape[:3], 22, dtype=torch.uint8)
    labels[:10] = 0
    chi = torch.where(labels > 0, -0.03, 0.0)
    generator = torch.Generator()
    changed = [
        add_details(chi, labels, points, spacing_mm=1.0, ranges=NOTHING, generator=generator.manual_seed(seed)) - chi
        for seed in range(8)
    ]
    # Some seeds draw no lesion.
    assert min(float(change.abs().max()) for change in changed) == 0
    assert all((change[:10] == 0).all() for change in changed)


def test_veins_are_bright_on_both_sides(points):
    labels = torch.full(points.shape[:3], 22, dtype=torch.uint8)
    ranges = dataclasses.replace(NOTHING, vein_ppm=(0.2, 0.2), veins=1.0)
    seeds = (torch.Generator().manual_seed(seed) for seed in range(4))
    maps = [
        add_details(torch.zeros(labels.shape), labels, points, spacing_mm=1.0, ranges=ranges, generator=seed)
        for seed in seeds
    ]
    bright = torch.stack(maps).amax(dim=0) > 0.05
    for side in (-1, 1):
        assert bright[points[..., 0] * side > 5].sum() > 50
    assert bright.float().mean() < 0.05
