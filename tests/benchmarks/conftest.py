"""The benchmarks are scripts: import them as such, with their folder on the path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """Import a benchmark by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module
