import dataclasses

import numpy as np
import pytest
import torch

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import (
    HEALTHY,
    IN_VEIN,
    LabelMap,
    Pathology,
    TemplateLocator,
    add_calcifications,
    add_details,
    draw_pathology,
)
from bids_dgmseg.lab.simulate.ranges import (
    NO_PATHOLOGY,
    DetailRanges,
    PathologyRanges,
    ShapeRanges,
    SusceptibilityRanges,
)
from bids_dgmseg.lab.simulate.sample import SEGMENTER_VIEW, template_head, typical_view
from bids_dgmseg.lab.simulate.shapes import draw_shapes
from bids_dgmseg.lab.simulate.susceptibility import draw_values
from bids_dgmseg.phantom.head import PHANTOM

ALIKE = SusceptibilityRanges(age_years=(45, 45), mixture=0, iron_sd=0, odd=0, nuclei_gain=(1, 1), side_difference=0)
MEAN_SHAPE = ShapeRanges(volume_sd=0, odd=(0, 0), ventricle_mm=(0, 0))


@pytest.fixture(scope="module")
def points():
    """Voxel centres of 2 mm around the nuclei of the phantom."""
    axes = [torch.arange(-50.0, 51.0, 2), torch.arange(-90.0, 51.0, 2), torch.arange(-60.0, 51.0, 2)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


@pytest.fixture(scope="module")
def striatum():
    """The basal ganglia of the phantom with voxels of 1 mm."""
    grid = world_grid(Box((-40, -40, -25), (40, 40, 30)), (1.0, 1.0, 1.0))
    return template_head(Volume(PHANTOM.labels(grid.centres_mm()), grid.affine))


def volumes(head, points, factors):
    """Voxels per structure of the same head with changed volumes."""
    pathology, generator = Pathology(volume=factors), torch.Generator().manual_seed(3)
    drawn = draw_shapes(head, points, ranges=MEAN_SHAPE, ageing=0.0, pathology=pathology, generator=generator)
    return {shape.structure.label: int((shape.depth_mm > 0).sum()) for shape in drawn}


def test_prevalence_of_pathology():
    drawn = [draw_pathology(PathologyRanges(), torch.Generator().manual_seed(seed)) for seed in range(2000)]
    # 6 % of 2000 are 120 with an SD of 11, 4 % are 80 with one of 9.
    assert sum("DN" in one.volume for one in drawn) == pytest.approx(120, abs=33)
    assert sum("CN" in one.volume for one in drawn) == pytest.approx(120, abs=33)
    assert sum(one.mineral_ppm < 0 for one in drawn) == pytest.approx(80, abs=27)


def test_typical_view_has_no_pathology():
    ranges = typical_view(SEGMENTER_VIEW).values.pathology
    assert {draw_pathology(ranges, torch.Generator().manual_seed(seed)) == HEALTHY for seed in range(200)} == {True}


def test_ataxia_dentates_are_small_with_abnormal_iron():
    ranges = dataclasses.replace(NO_PATHOLOGY, ataxia=1.0)
    drawn = [draw_pathology(ranges, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert all(0.4 <= one.volume["DN"] <= 0.8 for one in drawn)
    iron = torch.tensor([one.iron["DN"] for one in drawn])
    low, high = (iron >= 0.4) & (iron <= 0.7), (iron >= 1.3) & (iron <= 1.9)
    assert (low | high).all()
    assert 30 <= int(low.sum()) <= 70


def test_atrophy_reduces_volume(striatum, points):
    healthy, diseased = (volumes(striatum, points, factors) for factors in ({}, {"CN": 0.6, "PUT": 0.6}))
    for label in (11, 12, 13, 14):
        assert diseased[label] / healthy[label] == pytest.approx(0.6, abs=0.06)
    assert diseased[15] == healthy[15]


def test_abnormal_iron_affects_one_nucleus():
    healthy, _ = draw_values(ALIKE, torch.Generator().manual_seed(8))
    diseased, _ = draw_values(ALIKE, torch.Generator().manual_seed(8), Pathology(iron={"DN": 1.5}))
    # chi = 0.0072 iron - 0.02, so chi + 0.02 is proportional to iron.
    assert float(diseased[1] + 0.02) == pytest.approx(1.5 * float(healthy[1] + 0.02), rel=1e-4)
    assert torch.equal(diseased[5:21], healthy[5:21])


def test_calcifications_lie_in_pallidum():
    labels = torch.zeros((40, 40, 40), dtype=torch.uint8)
    labels[:, 10:30], labels[:, :10] = 15, 13
    chi = torch.full(labels.shape, 0.1)
    generator = torch.Generator().manual_seed(2)
    changed = add_calcifications(chi, labels, Pathology(mineral_ppm=-0.5), spacing_mm=1.0, generator=generator)
    assert torch.equal(changed[labels != 15], chi[labels != 15])
    inside = changed[labels == 15]
    assert 0.02 < float((inside < -0.3).float().mean()) < 0.9
    assert -0.5 <= float(inside.min()) < -0.45
    assert add_calcifications(chi, labels, HEALTHY, spacing_mm=1.0, generator=generator) is chi


def test_label_map_is_indexed_in_mm():
    array = np.zeros((3, 3, 3), np.uint8)
    array[2, 1, 0] = 7
    head = LabelMap.from_volume(Volume(array, np.diag([2.0, 2.0, 2.0, 1.0])))
    points = torch.tensor([[4.0, 2.0, 0.0], [4.9, 2.9, 0.9], [5.1, 2.0, 0.0], [-20.0, 0.0, 0.0]])
    assert head.at(head.indices(points)).tolist() == [7, 7, 0, 0]


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
