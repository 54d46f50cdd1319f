import torch

from bids_dgmseg.train.curve import Curve
from bids_dgmseg.train.loop import Reached


def steps(path):
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]


def after(step, *, loss=1.0, dice=(0.5,)):
    return Reached(step, loss, torch.tensor(dice), seconds=30.0 * step, left=90.0)


def test_the_curve_of_a_killed_training_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "curve.tsv"
    said: list[str] = []
    first = Curve(path, ["CN_L"], say=said.append, every=2)
    for step in range(1, 7):
        first.add(after(step))
    assert steps(path) == ["step", "2", "4", "6"]
    again = Curve(path, ["CN_L"], say=said.append, every=2, step=4)  # killed after 6, the checkpoint is of 4
    assert steps(path) == ["step", "2", "4"]
    for step in range(5, 9):
        again.add(after(step))
    assert steps(path) == ["step", "2", "4", "6", "8"]
    assert len(said) == 5


def test_each_step_is_shown_and_only_some_are_said(tmp_path):
    said: list[str] = []
    shown: list[str] = []
    nothing = float("nan")
    curve = Curve(tmp_path / "curve.tsv", ["CN_L", "CN_R"], say=said.append, show=shown.append, every=2, steps=5)
    for now in (after(1, dice=(nothing, nothing)), after(2, loss=0.5, dice=(0.5, nothing)), after(3, dice=(0.5, 0.7))):
        curve.add(now)
    assert shown == [
        "step 1/5, 0.5 min, 1.5 left, loss 1.000, Dice n/a",
        "step 2/5, 1.0 min, 1.5 left, loss 0.500, Dice 0.50",
        "step 3/5, 1.5 min, 1.5 left, loss 1.000, Dice 0.60",
    ]
    assert [line.partition(",")[0] for line in said] == ["step 2"]
