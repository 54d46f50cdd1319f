import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bids_dgmseg.train.loop import Reached
from bids_dgmseg.train.validation import FIRST_MAP, Validation


class Steps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Inputs 0, 1, 2, …, 9 in a row; class 1 is where the input is above 4, or 5 in a map of odd number."""

    def __init__(self):
        self.drawn = []

    def __getitem__(self, index):
        self.drawn.append(index)
        values = torch.arange(10.0).reshape(1, 1, 1, 10)
        return values, (values[0] > 4 + index % 2).byte()


class Above(nn.Module):
    """Class 1 where the input is above the only parameter, class 2 nowhere."""

    def __init__(self):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x - self.limit, torch.full_like(x, -99.0)], dim=1)


@pytest.fixture
def maps():
    return Steps()


def validation(maps, tmp_path, average, *, n_maps=2, said=None, **options):
    return Validation(
        maps,
        n_maps=n_maps,
        network=Above(),
        average=average,
        path=tmp_path / "v.tsv",
        classes=["A", "B"],
        device=torch.device("cpu"),
        say=(said if said is not None else []).append,
        **options,
    )


def rows(tmp_path):
    return [line.split("\t") for line in (tmp_path / "v.tsv").read_text(encoding="utf-8").splitlines()]


def after(step, minutes):
    return Reached(step, 1.0, torch.tensor([0.5, 0.5]), seconds=60.0 * minutes, left=0.0)


def test_the_averaged_weights_are_tried_as_they_are_at_that_step(maps, tmp_path):
    average = {"limit": torch.tensor(4.5)}
    said: list[str] = []
    check = validation(maps, tmp_path, average, said=said)
    # Found 5 of 5, then 5 where 4 are true: 1 and 8 / 9. Class B is in no map.
    check.measure(3)
    average["limit"].copy_(torch.tensor(7.5))  # found 2 of 5 and 2 of 4: 4 / 7 and 4 / 6
    check.measure(5)
    header, first, second = rows(tmp_path)
    assert header == ["step", "A", "B"]
    assert first[:2] == ["3", f"{(1 + 8 / 9) / 2:.4f}"]
    assert second[:2] == ["5", f"{(4 / 7 + 4 / 6) / 2:.4f}"]
    assert math.isnan(float(first[2]))
    assert said[0] == "step 3, Dice 0.944 on 2 simulated maps not learned from"


def test_the_maps_are_drawn_once(maps, tmp_path):
    check = validation(maps, tmp_path, {"limit": torch.tensor(4.5)})
    check.measure(1)
    check.measure(2)
    assert maps.drawn == [FIRST_MAP, FIRST_MAP + 1]


def test_it_is_done_every_some_minutes_and_once_a_step(maps, tmp_path):
    check = validation(maps, tmp_path, {"limit": torch.tensor(4.5)}, every_minutes=10)
    for step, minutes in enumerate((4, 9, 11, 15, 20, 22), start=1):
        check.add(after(step, minutes))
    check.measure(6)
    assert [row[0] for row in rows(tmp_path)] == ["step", "3", "6"]


def test_a_training_that_goes_on_waits_as_long_as_one_that_begins(maps, tmp_path):
    check = validation(maps, tmp_path, {"limit": torch.tensor(4.5)}, step=50, seconds=60.0 * 30, every_minutes=10)
    for step, minutes in enumerate((31, 39, 41), start=51):
        check.add(after(step, minutes))
    assert [row[0] for row in rows(tmp_path)] == ["step", "53"]


def test_a_training_that_goes_on_keeps_what_lies_before(maps, tmp_path):
    average = {"limit": torch.tensor(4.5)}
    first = validation(maps, tmp_path, average)
    for step in (2, 4, 6):
        first.measure(step)
    validation(maps, tmp_path, average, step=4).measure(5)
    assert [row[0] for row in rows(tmp_path)] == ["step", "2", "4", "5"]


def test_without_maps_there_is_no_table(maps, tmp_path):
    validation(maps, tmp_path, {"limit": torch.tensor(4.5)}, n_maps=0).measure(3)
    assert not (tmp_path / "v.tsv").exists()
