import math
from dataclasses import replace

import pytest
import torch

from bids_dgmseg.train.epochs import Row, State
from bids_dgmseg.train.progress import Teller
from bids_dgmseg.train.recipe import Pace
from bids_dgmseg.train.recipes import get_recipe


@pytest.mark.parametrize(
    ("pace", "left"),
    [
        pytest.param(Pace(epochs=4, batch=1, learning_rate=1), "7.0", id="by epochs: an eighth took a minute"),
        pytest.param(Pace(epochs=4, batch=1, learning_rate=1, minutes=3), "2.0", id="by time: one minute of three"),
    ],
)
def test_each_step_shows_the_time_so_far_and_left(tmp_path, pace, left):
    recipe = replace(get_recipe("attunet25d"), pace=pace)
    state = State.start(torch.nn.Conv2d(1, 1, 1), pace)
    state.step, state.seconds = 3, 60.0
    lines: list[str] = []
    tell = Teller("fold_0", recipe, tmp_path, print, lines.append)
    tell.step(state, 6, 0.25)
    state.rows.append(Row(1, 6, 1e-4, 1.0, 1.0, (0.5, 0.75, math.nan)))
    tell.step(state, 6, 0.25)
    start = f"fold_0: epoch 1/4, step 3/6, 1.0 min, {left} left, loss 0.250, Dice "
    assert lines == [f"{start}n/a", f"{start}0.62"]  # 0.625, rounded to even


def test_an_epoch_s_line_rounds_dice_however_small_and_names_the_best(tmp_path):
    recipe = get_recipe("attunet25d")
    state = State.start(torch.nn.Conv2d(1, 1, 1), recipe.pace)
    state.rows.append(Row(1, 6, 1e-4, 1.25227, 1.26503, (0.9137, 1.18532e-05, math.nan)))
    state.best = dict(state.network.state_dict())
    lines: list[str] = []
    Teller("fold_0", recipe, tmp_path, lines.append, print).epoch(state)
    assert lines == ["fold_0: epoch 1, loss 1.2523, validation 1.26503 (best), Dice RN 0.914 SN 0.000 STN n/a"]
    header, row = ((line.split("\t")) for line in (tmp_path / "curve.tsv").read_text().splitlines())
    assert dict(zip(header, row, strict=True))["SN"] == "1.18532e-05"
