import math
from pathlib import Path

import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.core import Pace, Run, State, StepResult, StepSchedule
from bids_dgmseg.lab.train.frame import TrainingLog, TrainingRequest, write_record
from bids_dgmseg.lab.train.losses import DiceCrossEntropyLoss
from bids_dgmseg.models.registry import get_model

NAN = math.nan


class Result(StepResult):
    """A step whose Dice is given."""

    def __init__(self, dice, epoch_steps=None):
        super().__init__(1.0, torch.zeros(()), torch.zeros(()), epoch_steps, 90.0)
        vars(self)["given"] = torch.tensor(dice)

    @property
    def dice(self):
        return vars(self)["given"]


def start(folder, lines, *classes, schedule=StepSchedule(steps=999)):  # noqa: B008 - frozen
    run = Run(schedule, DiceCrossEntropyLoss(), folder / "checkpoint.pt", classes)
    return TrainingLog(run, lines, "fold_0"), State.start(torch.nn.Conv2d(1, 1, 1), schedule)


def take(log, state, *steps, dice=(0.5,), seconds=1.0):
    for step in steps:
        state.step, state.seconds = step, seconds * step
        log.step(state, Result(dice))


def test_row_of_a_resumed_training_averages_all_its_steps(tmp_path, lines):
    log, state = start(tmp_path, lines, "CN_L")
    take(log, state, *range(1, 61), dice=(0.2,))
    state.save(tmp_path / "checkpoint.pt")
    take(log, state, *range(61, 101), dice=(0.5,))
    again, resumed = start(tmp_path, lines, "CN_L")
    resumed.load(tmp_path / "checkpoint.pt")
    take(again, resumed, *range(61, 101), dice=(0.8,))
    table = (tmp_path / "curve.tsv").read_text(encoding="utf-8").splitlines()
    assert table == ["step\tseconds\tloss\tCN_L", "50\t50\t1\t0.2", f"100\t100\t1\t{(10 * 0.2 + 40 * 0.8) / 50:.6g}"]


def test_each_step_updates_the_status(tmp_path, lines):
    log, state = start(tmp_path, lines, "CN_L", "CN_R")
    for step, dice in ((1, (NAN, NAN)), (2, (0.5, NAN)), (3, (0.5, 0.7))):
        take(log, state, step, dice=dice, seconds=30.0)
    expected = [
        "fold_0: step 1, 0.5 min, 1.5 left, loss 1.000, Dice n/a",
        "fold_0: step 2, 1.0 min, 1.5 left, loss 1.000, Dice 0.50",
        "fold_0: step 3, 1.5 min, 1.5 left, loss 1.000, Dice 0.60",
    ]
    assert lines.status == expected
    assert lines.lines == expected[1:2]  # every minute


def test_epochs_are_logged_and_drawn(tmp_path, lines):
    log, state = start(tmp_path, lines, "RN", "SN", schedule=Pace(epochs=4, batch=1, learning_rate=1))
    state.step, state.seconds = 3, 30.0
    log.step(state, Result((), 6))
    row = {"epoch": 1, "steps": 6, "learning_rate": 1e-4, "loss": 1.25227, "validation_loss": 1.26503}
    state.rows.append({**row, "RN": 0.9137, "SN": NAN})
    state.best = dict(state.network.state_dict())
    log.epoch(state)
    log.finish(state)
    assert lines.status == ["fold_0: epoch 1, step 3/6, 0.5 min, 1.5 left, loss 1.000, Dice n/a"]
    assert lines.lines == [
        "fold_0: epoch 1, learning_rate 0.0001, loss 1.25227, validation_loss 1.26503, RN 0.9137, best so far",
        "fold_0: 0.5 min of training, keeping the weights of epoch 1",
    ]
    assert (tmp_path / "curve.tsv").read_text().splitlines()[1].split("\t")[-1] == "n/a"
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def request(out: Path, **options) -> TrainingRequest:
    return TrainingRequest(model=get_model("dcnnet"), out=out, **options)


def test_record_of_a_different_training_is_refused(tmp_path):
    write_record(request(tmp_path), {"folds": (1, 2)}, length={"epochs": 1})
    write_record(request(tmp_path, seed=2), {"folds": (1, 2)})  # nothing was trained yet
    (tmp_path / "fold_0.safetensors").touch()
    write_record(request(tmp_path, seed=2), {"folds": [1, 2]}, length={"epochs": 2})
    with pytest.raises(InputError, match=r"already contains a run with different settings \(seed\); choose a new OUT"):
        write_record(request(tmp_path), {"folds": [1, 2]})
