"""The training loop on a pair of cubes, in steps and in epochs."""

from dataclasses import replace

import msgspec
import pytest
import torch
from torch import nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.core import Pace, Position, Run, State, StepSchedule, read_checkpoint, train, validate
from bids_dgmseg.lab.train.losses import DiceCrossEntropyLoss
from bids_dgmseg.lab.train.patches import Case, WindowSamples
from bids_dgmseg.lab.train.recipe import Augmentation, Recipe, Sampling
from tests.lab.train.recipe_trainings import read

SCHEDULE = StepSchedule(steps=6, warmup_steps=2, learning_rate=5e-3)


PACE = Pace(epochs=4, batch=2, learning_rate=0.05)
RECIPE = Recipe(
    classes={"CN": ("CN",)},
    loss=DiceCrossEntropyLoss(),
    pace=PACE,
    augmentation=Augmentation(shift=1),
    sampling=Sampling((4, 4, 4), (4, 4, 4), "labels", normalization="ppm", normalized="region"),
)


class Tiny(nn.Module):
    """A convolution with dropout, which must not depend on where a training was interrupted."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 2, 1)

    def forward(self, x):
        return self.outer(nn.functional.dropout(self.inner(x).relu(), 0.3, self.training))


@pytest.fixture
def cubes():
    """A bright cube in noise: eight samples, four batches per epoch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros((8, 8, 8), dtype=torch.uint8)
    labels[2:6, 2:6, 2:6] = 1
    chi = labels.float() + 0.3 * torch.randn(labels.shape, generator=generator)
    return WindowSamples([Case("one", chi, labels, (slice(0, 8),) * 3)], RECIPE, seed=3, augment=True)


def start(schedule=PACE):
    torch.manual_seed(0)
    return State.start(Tiny(), schedule)


def run_in(folder, schedule=PACE, **options):
    return Run(schedule, RECIPE.loss, folder / "checkpoint.pt", ("CN",), **{"checkpoint_minutes": 0, **options})


def train_epochs(samples, folder, *, pace=PACE, stop=None, state=None, validated=True, **options):
    """Train; `stop` is the (epoch, step) of an interruption."""
    state = state or start(pace)

    def interrupt(state, result):
        if (state.epoch, state.step) == stop:
            raise KeyboardInterrupt

    validation = samples if validated else None
    train(state, samples, run_in(folder, pace, **options), validation=validation, report=interrupt)
    return state


@pytest.mark.parametrize(
    ("schedule", "stops"), [(PACE, [(0, 3), (2, 1)]), (SCHEDULE, [(0, 2), (0, 5)])], ids=["epochs", "steps"]
)
def test_interrupted_training_gives_the_same_result(cubes, tmp_path, schedule, stops):
    whole = train_epochs(cubes, tmp_path / "whole", pace=schedule)
    again = start(schedule)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            train_epochs(cubes, tmp_path, pace=schedule, state=again, stop=stop)
        torch.manual_seed(9)
        again = State.start(Tiny(), schedule)
        again.load(tmp_path / "checkpoint.pt")
        assert 0 < 4 * again.epoch + again.step < 4 * stop[0] + stop[1]
    train_epochs(cubes, tmp_path, pace=schedule, state=again)
    assert again.rows == whole.rows
    for name, value in whole.weights.items():
        assert torch.equal(again.weights[name], value)


def test_time_limit_ends_a_call(cubes, tmp_path):
    state = start(SCHEDULE)
    train(state, cubes, run_in(tmp_path, SCHEDULE, minutes=0))
    assert (state.step, SCHEDULE.finished(state)) == (1, False)
    train(state, cubes, run_in(tmp_path, SCHEDULE, minutes=5))
    assert (state.step, SCHEDULE.finished(state)) == (6, True)


@pytest.mark.parametrize(
    ("steps", "minutes", "call_minutes", "left"),
    [
        pytest.param(4, None, 9, [30, 20, 10, 0], id="by steps: ten seconds each"),
        pytest.param(99, 0.5, 9, [20, 10, 0], id="by time: half a minute in all"),
        pytest.param(99, None, 0.4, [14, 4, 0], id="limited by the call: 24 seconds"),
    ],
)
def test_remaining_time_is_estimated(cubes, tmp_path, steps, minutes, call_minutes, left):
    schedule, seconds = replace(SCHEDULE, steps=steps, minutes=minutes), iter(range(0, 100, 10))
    run = run_in(tmp_path, schedule, minutes=call_minutes, clock=lambda: float(next(seconds)))
    reported = []
    train(start(schedule), cubes, run, report=lambda state, result: reported.append(result.seconds_left))
    assert reported == pytest.approx(left)


def test_resumed_average_stays_on_its_device(tmp_path):
    start(SCHEDULE).save(tmp_path / "checkpoint.pt")
    state = start(SCHEDULE)
    state.average = {name: value.to("meta") for name, value in state.weights.items()}  # stands for a GPU
    state.load(tmp_path / "checkpoint.pt")
    assert {value.device.type for value in state.average.values()} == {"meta"}


def test_worker_draws_the_same_samples_of_many_maps(cubes, tmp_path):
    corner, (case,) = (slice(0, 4),) * 3, cubes.cases
    maps = [
        replace(case, chi=case.chi + number / 130, labels=case.labels.clone(), region=corner) for number in range(130)
    ]
    samples = WindowSamples(maps, RECIPE, seed=3, augment=True)
    pace, losses = msgspec.structs.replace(PACE, epochs=1, batch=26), []
    for workers in (0, 1):
        run = run_in(tmp_path, pace, workers=workers)
        train(start(pace), samples, run, report=lambda state, result: losses.append(result.loss))
    assert losses[:5] == losses[5:]
    assert len(set(losses)) == 5


@pytest.mark.parametrize("size", [0, 1000, -1])
def test_truncated_checkpoint_is_refused(tmp_path, size):
    checkpoint = tmp_path / "checkpoint.pt"
    start().save(checkpoint)
    assert read_checkpoint(checkpoint)["step"] == 0
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(InputError, match=r"checkpoint\.pt: is damaged; copy the whole folder again, or del"):
        read_checkpoint(checkpoint)


def test_best_weights_are_kept_and_patience_ends(cubes, tmp_path):
    pace = msgspec.structs.replace(PACE, epochs=50, learning_rate=3.0, patience=2)  # far too fast
    state = train_epochs(cubes, tmp_path, pace=pace)
    losses = [row["validation_loss"] for row in state.rows]
    assert len(losses) == losses.index(min(losses)) + 3
    assert pace.finished(state)
    network = Tiny()
    network.load_state_dict(state.weights)
    assert validate(network, cubes, run_in(tmp_path, pace))[0] == pytest.approx(min(losses))


def test_non_finite_loss_ends_the_training(cubes, tmp_path):
    broken = start()
    with torch.no_grad():
        broken.network.outer.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan in step 1 of epoch 1"):
        train_epochs(cubes, tmp_path, state=broken)


GUAN = read("deepqsmseg").pace


def test_step_rate_warms_up_and_falls():
    schedule = StepSchedule(steps=100, warmup_steps=4, learning_rate=1.0)
    assert [schedule.rate(Position(step=step)) for step in (0, 3)] == [0.25, 1.0]
    assert schedule.rate(Position(step=50)) == pytest.approx(0.505)  # 0.01 + 0.99 / 2, half of the cosine
    assert schedule.rate(Position(step=100)) == pytest.approx(0.01)


def test_rate_drops_at_each_milestone():
    rates = [GUAN.rate(Position(epoch)) for epoch in (0, 29, 30, 74, 75, 300, 799)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5, 1e-5])


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
    assert Pace(epochs=4, batch=1, learning_rate=1, **change).finished(at) == finished
