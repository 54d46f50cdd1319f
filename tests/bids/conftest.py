"""A BIDS dataset of empty files, which is all that finding scans looks at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that lays out a dataset: its name, then its empty files."""

    def lay(name: str, *empty: str, kind: str = "raw") -> Path:
        root = tmp_path / name
        root.mkdir(parents=True)
        description = {"Name": name, "BIDSVersion": "1.10.0", "DatasetType": kind}
        (root / "dataset_description.json").write_text(json.dumps(description))
        for relative in empty:
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return lay
