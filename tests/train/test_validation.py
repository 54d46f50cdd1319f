import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from bids_dgmseg.train.core import State
from bids_dgmseg.train.schedule import StepSchedule
from bids_dgmseg.train.simulated import FIRST_FIXED_MAP, FixedMaps


class Ramps(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Inputs 0, 1, 2, …, 9 in a row; class 1 is where the input is above 4, or 5 in maps of odd number."""

    def __init__(self):
        self.drawn = []

    def __getitem__(self, index):
        self.drawn.append(index)
        values = torch.arange(10.0).reshape(1, 1, 1, 10)
        return values, (values[0] > 4 + index % 2).byte()


class Above(nn.Module):
    """Class 1 where the input is above the only parameter, class 2 nowhere."""

    def __init__(self, limit=4.5):
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(limit))

    def forward(self, x):
        return torch.cat([torch.zeros_like(x), x - self.limit, torch.full_like(x, -99.0)], dim=1)


@pytest.fixture
def maps():
    return Ramps()


@pytest.fixture
def fixed(maps, tmp_path, lines):
    """Returns a validation and its state after some steps and minutes."""

    def make(*, n_maps=2, step=0, minutes=0.0):
        state = State.start(Above(), StepSchedule(steps=99))
        state.step, state.seconds = step, 60 * minutes
        options = {"path": tmp_path / "v.tsv", "classes": ["A", "B"], "device": torch.device("cpu"), "log": lines}
        return FixedMaps(maps, state, n_maps=n_maps, every_minutes=10, **options), state

    return make


def measure(check, state, *steps):
    for step in steps:
        state.step = step
        check.measure()


def rows(tmp_path):
    return [line.split("\t") for line in (tmp_path / "v.tsv").read_text(encoding="utf-8").splitlines()]


def test_averaged_weights_are_measured(fixed, tmp_path, lines):
    check, state = fixed()
    measure(check, state, 3)  # found 5 of 5, then 5 of which 4 are true: 1 and 8 / 9; class B is in no map
    state.average["limit"].copy_(torch.tensor(7.5))  # found 2 of 5 and 2 of 4: 4 / 7 and 4 / 6
    measure(check, state, 5)
    header, first, second = rows(tmp_path)
    assert header == ["step", "A", "B"]
    assert first == ["3", f"{(1 + 8 / 9) / 2:.4f}", "n/a"]
    assert second[:2] == ["5", f"{(4 / 7 + 4 / 6) / 2:.4f}"]
    assert lines.lines[0] == "step 3, Dice 0.944 on 2 simulated validation maps"


def test_maps_are_simulated_once(fixed, maps):
    measure(*fixed(), 1, 2)
    assert maps.drawn == [FIRST_FIXED_MAP, FIRST_FIXED_MAP + 1]


@pytest.mark.parametrize(
    ("step", "start", "minutes", "measured"),
    [(0, 0, (4, 9, 11, 15, 20, 22), ["3", "6"]), (50, 30, (31, 39, 41), ["53"])],
    ids=["new", "resumed"],
)
def test_measurements_are_minutes_apart(fixed, tmp_path, step, start, minutes, measured):
    check, state = fixed(step=step, minutes=start)
    for number, minute in enumerate(minutes, start=1):
        state.step, state.seconds = step + number, 60.0 * minute
        check.step()
    check.measure()
    assert [row[0] for row in rows(tmp_path)] == ["step", *measured]


def test_resumed_table_keeps_earlier_rows(fixed, tmp_path):
    measure(*fixed(), 2, 4, 6)
    measure(*fixed(step=4), 5)
    assert [row[0] for row in rows(tmp_path)] == ["step", "2", "4", "5"]


def test_no_maps_give_no_table(fixed, tmp_path):
    measure(*fixed(n_maps=0), 3)
    assert not (tmp_path / "v.tsv").exists()
