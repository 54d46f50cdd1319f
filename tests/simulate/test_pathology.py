"""What diseases do to a simulated head."""

import dataclasses

import pytest
import torch

from bids_dgmseg.simulate.sample import SEGMENTER_VIEW, phantom_head
from bids_dgmseg.simulate.shapes import ShapeRanges, draw_bodies
from bids_dgmseg.simulate.susceptibility import ValueRanges, draw_values
from bids_dgmseg.simulate.tissue_details import HEALTHY, NOBODY_ILL, Disease, DiseaseRanges, calcify, draw_disease
from bids_dgmseg.simulate.typical import ordinary_view

ALIKE = ValueRanges(age_years=(45, 45), mixture=0, iron_sd=0, odd=0, nuclei_gain=(1, 1), side_difference=0)
MEAN_SHAPE = ShapeRanges(volume_sd=0, odd=(0, 0), ventricle_mm=(0, 0))


@pytest.fixture(scope="module")
def head():
    return phantom_head()


@pytest.fixture(scope="module")
def points():
    """Voxel centres of 2 mm about the phantom's nuclei."""
    axes = [torch.arange(-50.0, 51.0, 2), torch.arange(-90.0, 51.0, 2), torch.arange(-60.0, 51.0, 2)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def volumes(head, points, disease):
    """Voxels of each body, of the same head with and without the disease."""
    drawn = draw_bodies(
        head, points, ranges=MEAN_SHAPE, ageing=0.0, disease=disease, generator=torch.Generator().manual_seed(3)
    )
    return {painted.body.label: int((painted.depth_mm > 0).sum()) for painted in drawn}


def test_so_many_people_are_ill():
    drawn = [draw_disease(DiseaseRanges(), torch.Generator().manual_seed(seed)) for seed in range(2000)]
    # 6 % of 2000 are 120 with an SD of 11, 4 % are 80 with one of 9.
    assert sum("DN" in one.volume for one in drawn) == pytest.approx(120, abs=33)
    assert sum("CN" in one.volume for one in drawn) == pytest.approx(120, abs=33)
    assert sum(one.mineral_ppm < 0 for one in drawn) == pytest.approx(80, abs=27)


def test_nobody_of_an_ordinary_view_is_ill():
    ranges = ordinary_view(SEGMENTER_VIEW).values.disease
    assert {draw_disease(ranges, torch.Generator().manual_seed(seed)) == HEALTHY for seed in range(200)} == {True}


def test_dentates_of_ataxia_are_small_and_bright_or_small_and_pale():
    ranges = dataclasses.replace(NOBODY_ILL, ataxia=1.0)
    drawn = [draw_disease(ranges, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert all(0.4 <= one.volume["DN"] <= 0.8 for one in drawn)
    iron = torch.tensor([one.iron["DN"] for one in drawn])
    pale, bright = (iron >= 0.4) & (iron <= 0.7), (iron >= 1.3) & (iron <= 1.9)
    assert (pale | bright).all()
    assert 30 <= int(pale.sum()) <= 70


def test_a_small_nucleus_has_the_volume_of_its_disease(head, points):
    healthy = volumes(head, points, HEALTHY)
    ill = volumes(head, points, Disease(volume={"CN": 0.6, "PUT": 0.6}))
    for label in (11, 12, 13, 14):
        assert ill[label] / healthy[label] == pytest.approx(0.6, abs=0.06)
    assert ill[15] == healthy[15]


def test_iron_of_a_disease_is_that_of_the_nucleus_alone():
    plain, _ = draw_values(ALIKE, torch.Generator().manual_seed(8))
    ill, _ = draw_values(ALIKE, torch.Generator().manual_seed(8), Disease(iron={"DN": 1.5}))
    # chi = 0.0072 iron - 0.02, so that 0.02 more is in proportion to iron.
    assert float(ill[1] + 0.02) == pytest.approx(1.5 * float(plain[1] + 0.02), rel=1e-4)
    assert torch.equal(ill[5:21], plain[5:21])


def test_mineral_lies_in_lumps_of_the_pallidum(points):
    labels = torch.zeros((40, 40, 40), dtype=torch.uint8)
    labels[:, 10:30], labels[:, :10] = 15, 13
    chi = torch.full(labels.shape, 0.1)
    generator = torch.Generator().manual_seed(2)
    changed = calcify(chi, labels, Disease(mineral_ppm=-0.5), spacing_mm=1.0, generator=generator)
    assert torch.equal(changed[labels != 15], chi[labels != 15])
    inside = changed[labels == 15]
    assert 0.02 < float((inside < -0.3).float().mean()) < 0.9
    assert -0.5 <= float(inside.min()) < -0.45
    assert calcify(chi, labels, HEALTHY, spacing_mm=1.0, generator=generator) is chi
