"""The benchmark of accuracy, as far as it goes without a network."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"


@pytest.mark.parametrize(
    "options",
    [
        ["--simulated", "nowhere"],
        ["--real", "nowhere"],
        ["--maps", "1", "--template", "nowhere"],
        ["--template", "nowhere"],
        ["--model", "nowhere"],
    ],
)
def test_what_is_not_there_is_said_in_one_line_before_anything_is_segmented(main, options, capsys):
    assert main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("accuracy: error: ")
    assert "nowhere" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
