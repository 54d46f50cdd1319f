from pathlib import Path

import pytest


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """An empty folder, for modules without datasets of their own."""
    folder = tmp_path / "ds"
    folder.mkdir()
    return folder
