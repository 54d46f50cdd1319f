import math

import torch

from bids_dgmseg.pipeline.teller import Teller
from bids_dgmseg.training.epochs import Row, State
from bids_dgmseg.training.recipes import get_recipe


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
