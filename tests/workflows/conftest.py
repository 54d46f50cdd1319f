"""The workflows are scripts: import them as such."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "workflows"


@pytest.fixture
def script(request, monkeypatch) -> ModuleType:
    """The workflow that a module of tests is named after."""
    name = request.module.__name__.rpartition("test_")[2]
    path = next(path for path in (FOLDER / f"{name}.py", FOLDER / name / f"{name}.py") if path.exists())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
