"""The benchmark of fine-tuning, as far as it goes without learning."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetune.py"


def test_a_dataset_that_is_not_there_is_said_in_one_line(main, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("finetune: error: ")
    assert "nowhere" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("option", ["--minutes", "--steps", "--folds", "--learning-rate"])
def test_no_learning_is_refused(main, option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), option, "0"])
    assert f"argument {option}: '0' is not a" in capsys.readouterr().err
