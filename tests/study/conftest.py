"""Results as the participant level writes them, without images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

HEADER = "index\tname\tabbreviation\themisphere\tn_voxels\tvolume_mm3\tmean_ppm\n"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def add_scan(output: Path) -> Callable[..., Path]:
    """Write the table of one scan: DN_L and DN_R with the given volumes and means."""

    def add(
        stem: str,
        *,
        volumes: tuple[str, str] = ("700.5", "710.0"),
        means: tuple[str, str] = ("0.1", "0.12"),
        reference: str | None = "whole brain",
        text: str | None = None,
    ) -> Path:
        parts = stem.split("_")
        folder = output.joinpath(*[part for part in parts if part.startswith(("sub-", "ses-"))], "anat")
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            f"1\tleft dentate nucleus\tDN_L\tL\t700\t{volumes[0]}\t{means[0]}\n",
            f"2\tright dentate nucleus\tDN_R\tR\t710\t{volumes[1]}\t{means[1]}\n",
        ]
        path = folder / f"{stem}_stats.tsv"
        path.write_text(HEADER + "".join(rows) if text is None else text, encoding="utf-8")
        if reference is not None:
            (folder / f"{stem}_qc.json").write_text(json.dumps({"input": {"reference": reference}}))
        return path

    return add
