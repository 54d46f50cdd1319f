import dataclasses
import math

import numpy as np
import pytest
import torch

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import LabelMap
from bids_dgmseg.lab.simulate.ranges import SusceptibilityRanges
from bids_dgmseg.lab.simulate.shapes import RenderedShape, prepare_shapes
from bids_dgmseg.lab.simulate.susceptibility import IntensityPattern, composite, draw_pattern, draw_values, split_hilum

AVERAGE = SusceptibilityRanges(
    mixture=0,
    iron_sd=0,
    odd=0,
    nuclei_gain=(1, 1),
    putamen_gain=(1, 1),
    caudate_gain=(1, 1),
    tissue_gain=(1, 1),
    side_difference=0,
    uniform_striatum=0,
    pale_midbrain=0,
    bright_fluid=0,
)


def values_at(age_years, seed=0, **changes):
    ranges = dataclasses.replace(AVERAGE, age_years=(age_years, age_years), **changes)
    return draw_values(ranges, torch.Generator().manual_seed(seed))[0]


def test_iron_follows_hallgren_and_sourander():
    values = values_at(60.0)
    # 14.62 (1 - exp(-0.04 * 60)) + 0.46 = 13.754 mg/100 g of the putamen; caudate 9.509, pallidum 21.683.
    assert float(values[13]) == pytest.approx(0.0072 * 13.754 - 0.02, abs=1e-5)
    assert float(values[11]) == pytest.approx(0.0072 * 9.509 - 0.02, abs=1e-5)
    assert float(values[15]) == pytest.approx(0.0072 * 21.683 - 0.02, abs=1e-5)


def test_sides_differ_only_as_requested():
    assert torch.equal(values_at(40.0)[11:17:2], values_at(40.0)[12:17:2])
    assert (values_at(40.0, side_difference=0.1)[11:17:2] != values_at(40.0, side_difference=0.1)[12:17:2]).all()


def test_unrelated_values_are_uniform():
    drawn = torch.stack([values_at(60.0, seed, mixture=1.0)[[11, 13, 15]] for seed in range(200)])
    # Uniform from 0 to 0.2: mean 0.1, SD 0.2 / sqrt(12).
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)
    assert drawn.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.1)


def test_accumbens_is_often_but_not_always_like_the_caudate():
    ratios = [float(values[36] / values[11]) for values in (values_at(60.0, seed) for seed in range(200))]
    near = sum(0.5 <= ratio <= 1.1 for ratio in ratios) / len(ratios)
    # Half are drawn so; of the others, with a normal distribution of 0.006 ± 0.030 ppm and 0.048 ppm for the caudate,
    # 0.5 * 0.048 is exceeded by 0.6 SD, 1.1 * 0.048 by 1.57 SD: 0.274 - 0.058 = 0.216.
    assert near == pytest.approx(0.5 + 0.5 * 0.216, abs=0.1)


def test_striatum_midbrain_and_ventricles_can_be_hard_to_see():
    alike, pale, usual = values_at(60.0, uniform_striatum=1), values_at(60.0, pale_midbrain=1), values_at(60.0)
    bright = values_at(60.0, bright_fluid=1)
    assert 0.9 <= float(alike[13] / alike[11]) <= 1.1
    assert 0.85 <= float(alike[36] / alike[11]) <= 1.1
    assert (pale[5:11] < usual[5:11]).all()
    assert torch.equal(pale[11:17], usual[11:17])
    assert 0.7 <= float(bright[23] / bright[11]) <= 1.1


def test_age_covers_its_range():
    ages = [draw_values(SusceptibilityRanges(), torch.Generator().manual_seed(seed))[1] for seed in range(50)]
    assert 10 <= min(ages) < 25
    assert 65 < max(ages) <= 80


def shapes_of(*labels):
    """Cubes of 3 mm with some labels."""
    shapes = []
    for label in labels:
        array = np.full((9, 9, 9), 22, np.uint8)
        array[3:6, 3:6, 3:6] = label
        whole = LabelMap.from_volume(Volume(array, np.eye(4)))
        (shape,) = prepare_shapes(whole, whole.labels).structures
        shapes.append(shape)
    return shapes


def render(structure, depth_mm):
    x, y, z = (slice(0, size) for size in depth_mm.shape)
    return RenderedShape(structure, (x, y, z), depth_mm, torch.zeros(*depth_mm.shape, 3))


def test_border_between_nuclei_is_partial_volume():
    putamen, pallidum = shapes_of(13, 15)
    x = torch.arange(5.0).view(5, 1, 1)
    shapes = [(render(putamen, 2.2 - x), IntensityPattern(0.04)), (render(pallidum, x - 2.2), IntensityPattern(0.12))]
    chi, labels = composite(shapes, torch.full((5, 1, 1), 22, dtype=torch.uint8), torch.zeros(5, 1, 1), voxel_mm=1.0)
    assert labels.flatten().tolist() == [13, 13, 13, 15, 15]
    # Voxel 2 extends from 1.5 to 2.5: 0.7 of it is putamen.
    assert chi.flatten().tolist() == pytest.approx([0.04, 0.04, 0.7 * 0.04 + 0.3 * 0.12, 0.12, 0.12])


def test_border_with_background_is_partial_volume():
    x = torch.arange(4.0).view(4, 1, 1)
    shapes = [(render(shapes_of(15)[0], x - 1.75), IntensityPattern(0.12))]
    background = torch.full((4, 1, 1), 22, dtype=torch.uint8)
    chi, labels = composite(shapes, background, torch.full((4, 1, 1), -0.03), voxel_mm=1.0)
    assert labels.flatten().tolist() == [22, 22, 15, 15]
    # The surface lies at 1.75, voxel 2 extends from 1.5 to 2.5.
    assert chi.flatten().tolist() == pytest.approx([-0.03, -0.03, 0.75 * 0.12 - 0.25 * 0.03, 0.12])


def test_pattern_has_wall_and_stripe():
    local = torch.zeros(1, 1, 3, 3)
    local[0, 0, :, 0] = torch.tensor([-3.0, 0.0, 3.0])
    shape = RenderedShape(shapes_of(1)[0], (slice(0, 1),) * 3, torch.tensor([[[0.2, 5.0, 5.0]]]), local)
    wall = IntensityPattern(0.1, core=0.5, wall_mm=1.5).evaluate(shape).flatten()
    assert wall.tolist() == pytest.approx([0.1, 0.05, 0.05])
    stripe = IntensityPattern(0.1, normal=(1.0, 0.0, 0.0), stripe=0.4, stripe_mm=(0.0, 0.5), beyond=0.8)
    # In the centre of the stripe, half of the change beyond it has taken place.
    assert stripe.evaluate(shape).flatten().tolist() == pytest.approx([0.1, 0.1 * 0.4 * 0.9, 0.08], rel=1e-3)


def test_hilum_is_split():
    array = np.zeros((11, 11, 11), np.uint8)
    array[2:9, 2:9, 2:9] = 1
    array[9:, 9:, 9:] = 35
    split = split_hilum(LabelMap.from_volume(Volume(array, np.eye(4)))).labels
    # Depth is 1 mm in the outermost voxels and 2 in the next: a wall of 1.6 mm leaves a cube of 5 voxels.
    assert int((split == 41).sum()) == 5**3
    assert torch.equal(torch.where(split == 41, 1, split), torch.from_numpy(array))


def mean_gradient(label, ageing=0.0):
    """Mean relative change per mm to the right, front and top in 300 draws."""
    (shape,) = shapes_of(label)
    values = torch.full((64,), 0.1)
    values[13:15] = 0.05  # in striata that are alike the putamen has hardly any gradient
    patterns = (draw_pattern(shape, values, ageing, torch.Generator().manual_seed(seed)) for seed in range(300))
    return torch.tensor([pattern.gradient for pattern in patterns]).mean(dim=0)


def test_putamen_is_brighter_behind_and_laterally_on_both_sides():
    left, right = mean_gradient(13), mean_gradient(14)
    # On real maps its posterior third is brighter than its anterior third by 0.87 of the mean, 21 mm behind it. Per mm
    # to the front, the putamen of people lies 0.31 mm further medially and 0.18 mm lower. Slices of 3 mm and voxels at
    # the border lower the difference on maps, by less than half.
    per_mm = float(right @ torch.tensor([-0.31, 1.0, -0.18]))
    assert -2 * 0.87 / 21 < per_mm < -0.87 / 21
    assert float(left[0]) < -0.03
    assert float(right[0]) > 0.03
    assert float(mean_gradient(13, ageing=1.0)[1]) < float(left[1]) - 0.005


def test_pallidum_becomes_brighter_medially_with_age():
    assert float(mean_gradient(16, ageing=1.0)[0]) < float(mean_gradient(16)[0]) - 0.01
    assert float(mean_gradient(15, ageing=1.0)[0]) > float(mean_gradient(15)[0]) + 0.01


def test_nigrosome_is_a_dark_spot_in_the_posterior_nigra():
    (shape,) = shapes_of(8)
    values = torch.full((64,), 0.1)
    patterns = [draw_pattern(shape, values, 0.0, torch.Generator().manual_seed(seed)) for seed in range(300)]
    spots = [pattern for pattern in patterns if pattern.spot != 1]
    # 40 % of 300 are 120 with an SD of 8.5.
    assert len(spots) == pytest.approx(120, abs=30)
    assert all(pattern.spot < 1 and pattern.spot_mm[0] > 0 and pattern.spot_mm[1] < 0 for pattern in spots)
    local = torch.stack(torch.meshgrid(*[torch.arange(-8.0, 9.0)] * 3, indexing="ij"), dim=-1)
    rendered = RenderedShape(shape, (slice(0, 17),) * 3, torch.full((17, 17, 17), 2.0), local)
    drawn = IntensityPattern(0.1, spot_mm=(2.0, -4.0, 0.0), spot_radius_mm=2.0, spot=0.5).evaluate(rendered)
    assert float(drawn[10, 4, 8]) == pytest.approx(0.05)  # its centre
    assert float(drawn[10, 8, 8]) == pytest.approx(0.1)  # 4 mm away
