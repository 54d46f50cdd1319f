import dataclasses

import pytest
import torch

from bids_dgmseg.image.grids import Box, world_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import IN_VEIN
from bids_dgmseg.lab.simulate.details import HEALTHY, Pathology, add_calcifications, add_lesions, draw_pathology
from bids_dgmseg.lab.simulate.ranges import NO_PATHOLOGY, PathologyRanges, ShapeRanges, SusceptibilityRanges
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
    assert sum("DN" in change.volume for change in drawn) == pytest.approx(120, abs=33)
    assert sum("CN" in change.volume for change in drawn) == pytest.approx(120, abs=33)
    assert sum(change.mineral_ppm < 0 for change in drawn) == pytest.approx(80, abs=27)


def test_typical_view_has_no_pathology():
    ranges = typical_view(SEGMENTER_VIEW).values.pathology
    assert {draw_pathology(ranges, torch.Generator().manual_seed(seed)) == HEALTHY for seed in range(200)} == {True}


def test_ataxia_dentates_are_small_with_abnormal_iron():
    ranges = dataclasses.replace(NO_PATHOLOGY, ataxia=1.0)
    drawn = [draw_pathology(ranges, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert all(0.4 <= change.volume["DN"] <= 0.8 for change in drawn)
    iron = torch.tensor([change.iron["DN"] for change in drawn])
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


@pytest.fixture(scope="module")
def tissue(points):
    """White matter at the voxels of `points`, with a ventricle, a putamen on each side, and air on the left."""
    labels = torch.full(points.shape[:3], 22, dtype=torch.uint8)
    x, y, z = points.unbind(-1)
    labels[(x.abs() < 6) & (z.abs() < 12)] = 23
    labels[(x.abs() > 22) & (x.abs() < 32) & (y.abs() < 16) & (z.abs() < 12)] = 13
    labels[x < -46] = 0
    return labels


def changed_by(points, tissue, **ranges):
    """Voxels that differ from white matter (-0.03 ppm) in forty draws, and their values."""
    chi = torch.full(tissue.shape, -0.03)
    seen = torch.zeros(tissue.shape, dtype=torch.bool)
    values = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        drawn = add_lesions(
            chi, tissue, points, spacing_mm=2.0, ranges=dataclasses.replace(NO_PATHOLOGY, **ranges), generator=generator
        )
        seen |= drawn != chi
        values.append(drawn[drawn != chi])
    return seen, torch.cat(values)


def test_healthy_brain_has_no_lesions(points, tissue):
    assert not changed_by(points, tissue)[0].any()


def test_lesions_of_white_matter_lie_in_white_matter_of_both_sides(points, tissue):
    seen, values = changed_by(points, tissue, white_matter=1.0, white_matter_ppm=(0.02, 0.02), rim_ppm=(0.05, 0.05))
    assert (tissue[seen] == 22).all()
    for side in (-1, 1):
        assert seen[points[..., 0] * side > 10].sum() > 200
    # At most the change of the lesion and that of its rim.
    assert -0.03 < float(values.min())
    assert float(values.max()) <= -0.03 + 0.02 + 0.05 + 1e-6
    assert float(values.median()) == pytest.approx(-0.03 + 0.02, abs=0.02)


def test_perivascular_spaces_have_the_susceptibility_of_fluid(points, tissue):
    seen, values = changed_by(points, tissue, spaces=1.0)
    assert (tissue[seen] == 22).all()
    assert -0.03 <= float(values.min())
    assert float(values.max()) <= 0.03


def test_microbleeds_spare_fluid_and_air(points, tissue):
    seen, values = changed_by(points, tissue, microbleeds=1.0, blood_ppm=(0.5, 0.5))
    assert set(tissue[seen].tolist()) == {13, 22}
    assert float(values.max()) == pytest.approx(0.5, abs=0.01)


def test_haemorrhage_lies_beside_nuclei(points, tissue):
    seen, values = changed_by(points, tissue, haemorrhage=1.0, blood_ppm=(0.5, 0.5))
    assert set(tissue[seen].tolist()) == {22}
    assert float(values.max()) == pytest.approx(0.5, abs=0.01)
    near = (points[..., 0].abs() > 20) & (points[..., 0].abs() < 34) & (points[..., 1].abs() < 18)
    assert (seen & near).any()


def test_veins_are_recognized_as_their_tissue(points, tissue):
    in_vein = torch.where(tissue == 22, 22 + IN_VEIN, tissue)
    expected, _ = changed_by(points, tissue, white_matter=1.0, haemorrhage=1.0)
    assert torch.equal(changed_by(points, in_vein, white_matter=1.0, haemorrhage=1.0)[0], expected)
