import torch

from bids_dgmseg.training.curve import Curve


def steps(path):
    return [line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_curve_of_a_killed_training_goes_on_from_its_checkpoint(tmp_path):
    path = tmp_path / "curve.tsv"
    said: list[str] = []
    first = Curve(path, ["CN_L"], say=said.append, every=2)
    for step in range(6):
        first.add(step, 1.0, torch.tensor([0.5]))
    assert steps(path) == ["step", "2", "4", "6"]
    again = Curve(path, ["CN_L"], say=said.append, every=2, step=4)  # killed after 6, the checkpoint is of 4
    assert steps(path) == ["step", "2", "4"]
    for step in range(4, 8):
        again.add(step, 1.0, torch.tensor([0.5]))
    assert steps(path) == ["step", "2", "4", "6", "8"]
    assert len(said) == 5
