from collections.abc import Callable
from pathlib import Path

import pytest

from bids_dgmseg.cli.bids_app import main
from bids_dgmseg.models.registry import MODELS
from tests.conftest import coarse_chi, start_dataset, write_map
from tests.oracle import oracle_model


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


def process(root: Path, *options: str) -> None:
    """Run the app with the oracle on the dataset ``ds`` of a folder, into ``out``."""
    call = [str(root / "ds"), str(root / "out"), "participant", "-w", str(root / "work"), "--model", "oracle"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "oracle", oracle_model())
        assert main([*call, "--nprocs", "1", "--no-viewer", "--skip-bids-validation", *options]) == 0


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a dataset of two scans, ``ds``, and its results, ``out``."""
    root = tmp_path_factory.mktemp("processed")
    start_dataset(root / "ds")
    for scan in ("sub-01", "sub-02"):
        write_map(root / "ds", scan, coarse_chi())
    process(root)
    return root
