"""The benchmark of the ratings, as far as it goes without a network."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "flags.py"


@pytest.mark.parametrize("options", [["--template", "nowhere"], ["--again", "nowhere"], ["--model", "nowhere"]])
def test_what_is_not_there_is_said_in_one_line(main, options, capsys):
    assert main(options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("flags: error: ")
    assert "nowhere" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
