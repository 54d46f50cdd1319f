from dataclasses import replace

import pytest

from bids_dgmseg.lab.train.recipes import get_recipe
from bids_dgmseg.lab.train.schedule import Pace, Position, StepSchedule

GUAN = get_recipe("deepqsmseg").pace


def test_step_rate_warms_up_and_falls():
    schedule = StepSchedule(steps=100, warmup_steps=4, learning_rate=1.0)
    assert [schedule.rate(Position(step=step)) for step in (0, 3)] == [0.25, 1.0]
    assert schedule.rate(Position(step=50)) == pytest.approx(0.505)  # 0.01 + 0.99 / 2, half of the cosine
    assert schedule.rate(Position(step=100)) == pytest.approx(0.01)


def test_step_rate_follows_the_time():
    schedule = StepSchedule(steps=1000, minutes=0.1, warmup_steps=1, learning_rate=1.0)
    assert schedule.rate(Position(step=60, seconds=3.0)) == pytest.approx(0.505)  # half of six seconds


def test_rate_drops_at_each_milestone():
    rates = [GUAN.rate(Position(epoch)) for epoch in (0, 29, 30, 74, 75, 300, 799)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5, 1e-5])


def test_milestones_are_exact_for_any_number_of_epochs():
    for epochs in range(1, 200):  # 15 / 22 * 22 is below 15 in floating point
        pace = Pace(epochs=epochs, batch=1, learning_rate=1.0, milestones=tuple(range(1, epochs)))
        assert [pace.rate(Position(epoch)) for epoch in range(epochs)] == [0.1**epoch for epoch in range(epochs)]


def test_shorter_training_keeps_relative_milestones():
    assert GUAN.shortened(80).milestones == (3, 8, 30)  # a tenth of 30, 75 (7.5, to even) and 300
    assert GUAN.shortened(5).rate(Position()) == GUAN.learning_rate  # 30 of 800 is less than half of one of 5
    timed = Pace(epochs=800, batch=1, learning_rate=1.0, milestones=(400,), minutes=2)
    assert [timed.rate(Position(1, seconds=seconds)) for seconds in (59.0, 60.0)] == [1.0, 0.1]


def test_each_epoch_uses_every_sample_once():
    pace = Pace(epochs=2, batch=2, learning_rate=1.0)
    batches = list(pace.batches(8, Position(), seed=1))
    first, second = ([index % 8 for batch in part for index in batch] for part in (batches[:4], batches[4:]))
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert list(pace.batches(8, Position(step=3), seed=1)) == batches[3:]


def test_steps_use_new_samples():
    schedule = StepSchedule(steps=4, batch=2)
    assert list(schedule.batches(0, Position(step=2), seed=1)) == [[4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("change", "at", "finished"),
    [
        ({}, Position(4), True),
        ({}, Position(3, step=1), False),
        ({"minutes": 1}, Position(1, seconds=60.0), True),
        ({"minutes": 1}, Position(1, step=1, seconds=60.0), False),
        ({"patience": 2}, Position(3, stale=2), True),
    ],
)
def test_training_ends_between_epochs(change, at, finished):
    assert replace(Pace(epochs=4, batch=1, learning_rate=1), **change).finished(at) == finished
