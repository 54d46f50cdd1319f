import math
import re

import pytest
import torch

from bids_dgmseg import __version__
from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.core import State, StepResult
from bids_dgmseg.lab.train.log import EpochLog, StepLog, write_record
from bids_dgmseg.lab.train.schedule import Pace, StepSchedule

NAN = math.nan
CLASSES = ("RN", "SN", "STN")


class Result(StepResult):
    """A step whose Dice is given."""

    def __init__(self, dice, loss=1.0, epoch_steps=None, seconds_left=90.0):
        super().__init__(loss, torch.zeros(()), torch.zeros(()), epoch_steps, seconds_left)
        vars(self)["given"] = torch.tensor(dice)

    @property
    def dice(self):
        return vars(self)["given"]


def state_of(schedule):
    return State.start(torch.nn.Conv2d(1, 1, 1), schedule)


def first_column(path):
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]


def take(log, state, *steps, dice=(0.5,)):
    for step in steps:
        state.step, state.seconds = step, 30.0 * step
        log.step(state, Result(dice))


def test_resumed_curve_continues_from_the_checkpoint(tmp_path, lines):
    path, schedule = tmp_path / "curve.tsv", StepSchedule(steps=9)
    log, state = StepLog(path, ["CN_L"], lines, every=2), state_of(schedule)
    log.start(state)
    take(log, state, 1, 2, 3, 4)
    state.save(tmp_path / "checkpoint.pt")
    take(log, state, 5, 6)
    assert first_column(path) == ["step", "2", "4", "6"]
    again, resumed = StepLog(path, ["CN_L"], lines, every=2), state_of(schedule)
    resumed.load(tmp_path / "checkpoint.pt")
    again.start(resumed)
    assert first_column(path) == ["step", "2", "4"]
    take(again, resumed, 5, 6, 7, 8)
    assert first_column(path) == ["step", "2", "4", "6", "8"]
    assert len(lines.lines) == 5


def test_row_of_a_resumed_training_averages_all_its_steps(tmp_path, lines):
    path, schedule = tmp_path / "curve.tsv", StepSchedule(steps=9)
    log, state = StepLog(path, ["CN_L"], lines, every=3), state_of(schedule)
    log.start(state)
    take(log, state, 1, 2, dice=(0.2,))
    state.save(tmp_path / "checkpoint.pt")
    again, resumed = StepLog(path, ["CN_L"], lines, every=3), state_of(schedule)
    resumed.load(tmp_path / "checkpoint.pt")
    again.start(resumed)
    take(again, resumed, 3, dice=(0.8,))
    assert path.read_text(encoding="utf-8").splitlines()[-1] == "3\t90\t1.0000\t0.400"


def test_each_step_updates_the_status(tmp_path, lines):
    log, state = StepLog(tmp_path / "curve.tsv", ["CN_L", "CN_R"], lines, every=2, steps=5), state_of(StepSchedule(5))
    for step, dice in ((1, (NAN, NAN)), (2, (0.5, NAN)), (3, (0.5, 0.7))):
        take(log, state, step, dice=dice)
    assert lines.status == [
        "step 1/5, 0.5 min, 1.5 left, loss 1.000, Dice n/a",
        "step 2/5, 1.0 min, 1.5 left, loss 1.000, Dice 0.50",
        "step 3/5, 1.5 min, 1.5 left, loss 1.000, Dice 0.60",
    ]
    assert [line.partition(",")[0] for line in lines.lines] == ["step 2"]
    row = (tmp_path / "curve.tsv").read_text(encoding="utf-8").splitlines()[-1]
    assert row == "2\t60\t1.0000\t0.500\tn/a"


def test_slow_steps_are_reported_every_minute(tmp_path, lines):
    log, state = StepLog(tmp_path / "curve.tsv", ["CN_L"], lines, every=50), state_of(StepSchedule(99))
    log.start(state)
    take(log, state, 1, 2, 3, 4)  # 30 s each
    assert lines.lines == [
        "step 2, 60 s, 1.5 min left, loss 1.000",
        "step 4, 120 s, 1.5 min left, loss 1.000",
    ]


def epoch_row(epoch, *dice):
    means = {"epoch": epoch, "steps": 6, "learning_rate": 1e-4, "loss": 1.25227, "validation_loss": 1.26503}
    return {**means, **dict(zip(CLASSES, dice, strict=True))}


def test_epoch_status_shows_the_last_dice(tmp_path, lines):
    pace = Pace(epochs=4, batch=1, learning_rate=1)
    log, state = EpochLog("fold_0", CLASSES, pace, tmp_path, lines), state_of(pace)
    state.step, state.seconds = 3, 60.0
    log.step(state, Result((), 0.25, 6, 420.0))
    state.rows.append(epoch_row(1, 0.5, 0.75, NAN))
    log.step(state, Result((), 0.25, 6, 420.0))
    start = "fold_0: epoch 1/4, step 3/6, 1.0 min, 7.0 left, loss 0.250, Dice "
    assert lines.status == [f"{start}n/a", f"{start}0.62"]  # 0.625, rounded to even


def test_epoch_line_marks_the_best(tmp_path, lines):
    pace = Pace(epochs=4, batch=1, learning_rate=1)
    state = state_of(pace)
    state.rows.append(epoch_row(1, 0.9137, 1.18532e-05, NAN))
    state.best = dict(state.network.state_dict())
    EpochLog("fold_0", CLASSES, pace, tmp_path, lines).epoch(state)
    assert lines.lines == ["fold_0: epoch 1, loss 1.2523, validation 1.26503 (best), Dice RN 0.914 SN 0.000 STN n/a"]
    header, row = (line.split("\t") for line in (tmp_path / "curve.tsv").read_text().splitlines())
    assert dict(zip(header, row, strict=True))["SN"] == "1.18532e-05"


@pytest.mark.parametrize(
    ("best", "kept"), [({}, "the last weights"), ({"w": torch.zeros(1)}, "the weights of epoch 1")]
)
def test_end_tells_which_weights_are_kept(tmp_path, lines, best, kept):
    pace = Pace(epochs=2, batch=1, learning_rate=1)
    state = state_of(pace)
    state.rows, state.best, state.stale = [epoch_row(1, 0.5, 0.5, 0.5), epoch_row(2, 0.5, 0.5, 0.5)], best, 1
    EpochLog("fold_0", CLASSES, pace, tmp_path, lines).finish(state)
    assert lines.lines == [f"fold_0: finished after 2 epochs and 0.0 min, keeping {kept}"]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_record_of_a_different_training_is_refused(tmp_path):
    write_record(tmp_path, {"seed": 1, "folds": (1, 2)}, begun=False, length={"epochs": 1})
    write_record(tmp_path, {"seed": 1, "folds": [1, 2]}, begun=True, length={"epochs": 2})
    with pytest.raises(InputError, match=r"contains a different training \(differs in seed\); choose a new OUT"):
        write_record(tmp_path, {"seed": 2, "folds": [1, 2]}, begun=True)
    write_record(tmp_path, {"seed": 2, "folds": [1, 2]}, begun=False)


def test_different_recipe_is_refused_by_its_values(tmp_path):
    write_record(tmp_path, {"recipe": {"sampling": {"step": (5, 5)}, "loss": "dice"}}, begun=False)
    recipe = {"sampling": {"step": [9, 9], "padding": True}, "loss": "dice"}  # padding: of a later version
    differing = "recipe.sampling.step: [5, 5] before, [9, 9] now, recipe.sampling.padding: null before, true now"
    with pytest.raises(InputError, match=re.escape(f"(differs in {differing}); choose a new OUT") + "$"):
        write_record(tmp_path, {"recipe": recipe}, begun=True)
    path = tmp_path / "training.json"
    path.write_text(path.read_text().replace(f'"version": "{__version__}"', '"version": "0.0.9"'))
    with pytest.raises(InputError, match=r"choose a new OUT, or resume it with version 0\.0\.9 \(this is "):
        write_record(tmp_path, {"recipe": recipe}, begun=True)
