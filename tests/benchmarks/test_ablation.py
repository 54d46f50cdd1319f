"""The benchmark of what each ingredient of simulation and training is good for, as far as it goes without learning."""

import math
import runpy
from pathlib import Path

import pandas as pd
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ablation.py"


@pytest.fixture(scope="module")
def script():
    """Its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        return runpy.run_path(str(SCRIPT))


def test_the_rate_of_nnunet_falls_as_a_power_of_what_is_left(script):
    schedule = script["NnunetSchedule"](steps=1000)
    assert schedule.rate(0) == 0.01
    assert schedule.rate(500) == pytest.approx(0.01 * math.exp(0.9 * math.log(0.5)))
    assert schedule.rate(999) == pytest.approx(0.01 * math.exp(0.9 * math.log(0.001)))


def test_cross_entropy_alone_weighs_nuclei_three_times(script):
    probability = torch.tensor([[0.5, 0.25], [0.5, 0.75]])  # of two classes, at two voxels
    logits, labels = probability.log().reshape(1, 2, 2, 1, 1), torch.tensor([0, 1]).reshape(1, 2, 1, 1)
    loss = script["weighted_cross_entropy"](logits, labels)
    assert float(loss) == pytest.approx(-(math.log(0.5) + 3 * math.log(0.75)) / 4)


def test_an_unknown_setting_is_refused(main, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "labels.nii.gz"), str(tmp_path), "--settings", "anything"])
    assert "argument --settings: invalid choice: 'anything'" in capsys.readouterr().err


def test_the_table_has_what_earlier_calls_tried(script, tmp_path):
    view, settings = script["SEGMENTER_VIEW"], script["settings"](script["SEGMENTER_VIEW"])
    for setting, dice in ((settings[8], 0.2), (settings[2], 0.7)):
        setting.folder_in(tmp_path).mkdir()
        row = pd.DataFrame({"abbreviation": ["RN_L"], "dice": [dice], "maps": ["real"], "setting": [setting.name]})
        row.to_csv(setting.folder_in(tmp_path) / "scores.tsv", sep="\t", index=False)
    table = script["all_scores"](tmp_path, view)
    assert table[["setting", "dice"]].to_numpy().tolist() == [["no physics", 0.7], ["SGD, poly", 0.2]]
