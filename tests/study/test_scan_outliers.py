"""Scans and sites whose nuclei all differ, in a study."""

from __future__ import annotations

import numpy as np
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.study.analyses import find_scan_outliers
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import load_study
from tests.study.conftest import HEADER


@pytest.fixture
def add_people(add_scan):
    """Write people whose nuclei differ by 5 %."""

    def add(numbers: range, *, doubled: int | None = None, factor: float = 1.0) -> None:
        for number in numbers:
            rng = np.random.default_rng(number)
            rows = []
            for structure in STRUCTURES:
                mean = (0.04 + 0.01 * structure.index) * (1 + 0.05 * rng.standard_normal()) * factor
                volume = 100 * structure.index * (1 + 0.05 * rng.standard_normal())
                scale = 2 if number == doubled else 1
                facts = (structure.index, structure.name, structure.abbreviation, structure.hemisphere)
                rows.append("\t".join(map(str, (*facts, 9, scale * volume, mean))) + "\n")
            add_scan(f"sub-{number:02d}_seg-dgm16", text=HEADER + "".join(rows))

    return add


def analyse(output):
    _, study = load_study([ResultsFolder(output, "out", output.parent)], GroupOptions())
    analysis = find_scan_outliers(study)
    return analysis.tables[0], list(analysis.warnings)


def test_scan_with_doubled_volumes_is_named(output, add_people):
    add_people(range(1, 11), doubled=3)
    table, lines = analyse(output)
    assert table.facts["NumberOfOutliers"] == 1
    outliers = table.rows[table.rows["outlier"]]
    assert outliers[["measure", "n_nuclei"]].to_numpy().tolist() == [["volume_mm3", 16]]
    assert outliers["ratio"].iloc[0] == pytest.approx(2, rel=0.05)
    ratio = f"ratio {outliers['ratio'].iloc[0]:.2f}"
    assert lines == [
        "group_scan_outliers.tsv: volume_mm3 of all nuclei differs from the other scans of the site in sub-03 "
        f"({ratio}); check the voxel sizes of these maps"
    ]
