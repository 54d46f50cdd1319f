from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Empty folder, for modules that do not define another dataset."""
    folder = tmp_path / "ds"
    folder.mkdir()
    return folder


@pytest.fixture
def participants(dataset: Path) -> Callable[..., None]:
    """Return a function that writes participants.tsv, by default of the dataset; cells are separated by spaces."""

    def write(*rows: str, to: Path = dataset) -> None:
        (to / "participants.tsv").write_text("".join("\t".join(row.split()) + "\n" for row in rows))

    return write
