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
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
