import dataclasses
import math

import pytest
import torch

from bids_dgmseg.simulate.susceptibility import ValueRanges, draw_values

AVERAGE = ValueRanges(mixture=0, iron_sd=0, odd=0, nuclei_gain=(1, 1), tissue_gain=(1, 1), side_difference=0)


def values_at(age_years, seed=0, **changes):
    ranges = dataclasses.replace(AVERAGE, age_years=(age_years, age_years), **changes)
    return draw_values(ranges, torch.Generator().manual_seed(seed))[0]


def test_iron_follows_age_as_hallgren_and_sourander_found():
    values = values_at(60.0)
    # 14.62 (1 - exp(-0.04 * 60)) + 0.46 = 13.754 mg/100 g of the putamen; caudate 9.509, pallidum 21.683.
    assert float(values[13]) == pytest.approx(0.0072 * 13.754 - 0.02, abs=1e-5)
    assert float(values[11]) == pytest.approx(0.0072 * 9.509 - 0.02, abs=1e-5)
    assert float(values[15]) == pytest.approx(0.0072 * 21.683 - 0.02, abs=1e-5)


def test_the_putamen_brightens_longer_than_the_pallidum():
    young, old = values_at(20.0), values_at(70.0)
    assert float(old[13] / young[13]) > 1.6
    assert float(old[15] / young[15]) < 1.3


def test_sides_are_filled_alike_only_without_a_difference():
    assert torch.equal(values_at(40.0)[11:17:2], values_at(40.0)[12:17:2])
    assert (values_at(40.0, side_difference=0.1)[11:17:2] != values_at(40.0, side_difference=0.1)[12:17:2]).all()


def test_a_mixture_follows_no_age():
    drawn = torch.stack([values_at(60.0, seed, mixture=1.0)[[11, 13, 15]] for seed in range(200)])
    # Uniform from 0 to 0.2: mean 0.1, SD 0.2 / sqrt(12).
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)
    assert drawn.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.1)


def test_age_is_drawn_from_its_range():
    ages = [draw_values(ValueRanges(), torch.Generator().manual_seed(seed))[1] for seed in range(50)]
    assert 10 <= min(ages) < 25
    assert 65 < max(ages) <= 80
