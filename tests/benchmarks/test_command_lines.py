"""Options of the benchmarks, as far as they are checked before anything is segmented or trained."""

import runpy
import sys

import pytest

from tests.benchmarks.conftest import FOLDER

SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_printed(name, monkeypatch, capsys):
    path = str(FOLDER / f"{name}.py")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(path, run_name="__main__")
    assert end.value.code == 0
    assert f"benchmarks/{name}.py" in capsys.readouterr().out
