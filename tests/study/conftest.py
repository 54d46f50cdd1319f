"""Results as the participant level writes them, without images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import Study, build_study

NUCLEI = ("DN_L", "DN_R", "GP_L", "GP_R")

SHIFT_PPM = {"A": 0.0, "B": 0.02, "C": -0.015}
"""Of the sites of `write_study`."""

HEADER = "index\tname\tabbreviation\themisphere\tn_voxels\tvolume_mm3\tmean_ppm\n"


def study_of(folder: Path, **options: Any) -> Study:
    """Load the study in a folder, with the susceptibility as its measure."""
    cohort = load_cohort([ResultsFolder(folder, "out", folder)])
    return build_study(cohort, GroupOptions(measures=("mean_ppm",), **options))


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


def people(*groups):
    """List site, age and group of the people of each site, twenty years apart at most."""
    return [(site, 50 + 3.0 * (n % 8), group) for site, n_people, group in groups for n in range(n_people)]


@pytest.fixture
def write_study(tmp_path):
    """Write results and participants of a study; `people` are site, age and group of each."""

    def write(name, people, *, seed=0, sessions=1, nuclei=NUCLEI):
        rng = np.random.default_rng(seed)
        table = ["participant_id\tage\tsex\tgroup\tsite"]
        for number, (site, age, group) in enumerate(people):
            table.append(f"sub-{number:02d}\t{age}\t{'FM'[number % 2]}\t{group}\t{site}")
            personal = rng.normal(0, 0.008)
            for session in range(sessions):
                anat = tmp_path / name / f"sub-{number:02d}" / f"ses-{session}" / "anat"
                anat.mkdir(parents=True)
                means = 0.08 + 0.001 * age + SHIFT_PPM[site] + personal + rng.normal(0, 0.004, len(nuclei))
                rows = [
                    f"{place}\tname\t{label}\tL\t700\t{700 + rng.normal(0, 40)!r}\t{mean!r}\n"
                    for place, (label, mean) in enumerate(zip(nuclei, means.tolist(), strict=True), 1)
                ]
                stem = f"sub-{number:02d}_ses-{session}_seg-dgm16"
                (anat / f"{stem}_stats.tsv").write_text(HEADER + "".join(rows))
        (tmp_path / name / "participants.tsv").write_text("\n".join(table) + "\n")
        return tmp_path / name

    return write
