"""The benchmark of drawing maps, as far as it goes without drawing."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "drawing.py"


def test_a_template_that_is_not_there_is_said_in_one_line(main, tmp_path, capsys):
    assert main(["--template", str(tmp_path / "nowhere.nii.gz")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("drawing: error: ")
    assert "nowhere.nii.gz" in said
    assert said.count("\n") == 1


def test_no_maps_are_refused(main, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--maps", "0"])
    assert "argument --maps: '0' is not a" in capsys.readouterr().err
