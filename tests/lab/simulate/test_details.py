import dataclasses

import pytest
import torch

from bids_dgmseg.lab.simulate.anatomy import IN_VEIN
from bids_dgmseg.lab.simulate.details import TemplateLocator, add_details
from bids_dgmseg.lab.simulate.ranges import DetailRanges

NOTHING = DetailRanges(
    texture=(0, 0),
    fine_ppm=(0, 0),
    slow_ppm=(0, 0),
    halo_ppm=(0, 0),
    tracts=0,
    vein_ppm=(0, 0),
    veins=0,
    medullary=(0, 0),
    lesions=0,
    spots=(0, 0),
)


@pytest.fixture
def scan_points():
    """Template coordinates of a scan of a head 10 % larger than the template, rotated and deformed."""
    axes = [torch.arange(size) - (size - 1) / 2 for size in (60, 90, 70)]
    scan = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    turn = torch.tensor([[0.98, 0.17, 0.0], [-0.17, 0.98, 0.0], [0.0, 0.0, 1.0]])
    bent = 1.5 * torch.sin(scan.flip(-1) / 8)
    return scan @ turn.T / 1.1 + bent + torch.tensor([0.0, -20.0, 0.0])


def test_template_point_is_found_in_scan(scan_points):
    wanted = torch.tensor([[20, 40, 30], [41, 55, 22]])
    template_mm = scan_points[wanted[:, 0], wanted[:, 1], wanted[:, 2]]
    assert torch.allclose(TemplateLocator(scan_points, 1.0).find(template_mm), wanted.float(), atol=0.1)


def test_point_beyond_scan_is_extrapolated(scan_points):
    assert TemplateLocator(scan_points, 1.0).find(torch.tensor([[200.0, -20.0, 0.0]]))[0, 0] > 60


@pytest.mark.parametrize(("spacing_mm", "radius_mm"), [(1.0, 4.0), (0.5, 2.0), (1.0, 2.5)])
def test_ball_has_its_volume(scan_points, spacing_mm, radius_mm):
    chi = torch.zeros(scan_points.shape[:3])
    numbers, fraction = TemplateLocator(scan_points, spacing_mm).volume_fractions(
        torch.tensor([[30.2, 44.7, 35.0]]), radius_mm
    )
    chi.view(-1).index_add_(0, numbers, fraction)
    # The soft edge adds its second moment: a few percent for balls of some voxels.
    assert float(chi.sum()) * spacing_mm**3 == pytest.approx(4 / 3 * torch.pi * radius_mm**3, rel=0.05)


def test_thin_tube_fills_fraction_of_voxel(scan_points):
    chi = torch.zeros(scan_points.shape[:3])
    numbers, fraction = TemplateLocator(scan_points, 4.0).volume_fractions(torch.tensor([[30.0, 44.0, 35.0]]), 0.8)
    chi.view(-1).index_add_(0, numbers, fraction)
    assert float(chi[30, 44, 35]) == pytest.approx(torch.pi * 0.2**2)


def test_zero_ranges_leave_map_unchanged(scan_points):
    labels = torch.full(scan_points.shape[:3], 22, dtype=torch.uint8)
    labels[:10] = 0
    chi = torch.where(labels > 0, -0.03, 0.0)
    generator = torch.Generator()
    for seed in range(8):
        detailed, here = add_details(
            chi, labels, scan_points, spacing_mm=1.0, ranges=NOTHING, generator=generator.manual_seed(seed)
        )
        assert torch.equal(detailed, chi)
        assert torch.equal(here, labels)


def test_veins_are_bright_on_both_sides_and_labelled(scan_points):
    labels = torch.full(scan_points.shape[:3], 22, dtype=torch.uint8)
    labels[:, :, 30:36] = 27
    labels[:, :, 36:40] = 11
    ranges = dataclasses.replace(NOTHING, vein_ppm=(0.2, 0.2), veins=1.0)
    bright = torch.zeros(labels.shape, dtype=torch.bool)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        chi, here = add_details(
            torch.zeros(labels.shape), labels, scan_points, spacing_mm=1.0, ranges=ranges, generator=generator
        )
        bright |= chi > 0.05
        in_vein = (chi > 0.04) & (labels == 22)  # neither in the thalamus nor in the caudate
        assert torch.equal(here, torch.where(in_vein, 22 + IN_VEIN, labels))
    for side in (-1, 1):
        assert bright[scan_points[..., 0] * side > 5].sum() > 50
    assert bright.float().mean() < 0.1
