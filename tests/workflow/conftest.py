from pathlib import Path

import pytest


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Empty folder, for modules that do not define another dataset."""
    folder = tmp_path / "ds"
    folder.mkdir()
    return folder
