"""Scans and sites whose nuclei all differ, in a study."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import build_study
from tests.study.conftest import HEADER


@pytest.fixture
def add_people(add_scan):
    """Write people whose nuclei differ by 5 %."""

    def add(numbers: range, *, doubled: int | None = None, factor: float = 1.0) -> None:
        for number in numbers:
            rng = np.random.default_rng(number)
            rows = []
            for one in STRUCTURES:
                mean = (0.04 + 0.01 * one.index) * (1 + 0.05 * rng.standard_normal()) * factor
                volume = 100 * one.index * (1 + 0.05 * rng.standard_normal())
                scale = 2 if number == doubled else 1
                rows.append(
                    f"{one.index}\t{one.name}\t{one.abbreviation}\t{one.hemisphere}\t9\t{scale * volume}\t{mean}\n"
                )
            add_scan(f"sub-{number:02d}_seg-dgm16", text=HEADER + "".join(rows))

    return add


def analyse(output):
    cohort = load_cohort([ResultsFolder(output, "out", output.parent)])
    tables, warnings = run_analyses(build_study(cohort, GroupOptions()))
    (table,) = (one for one in tables if one.name == "group_scan_outliers")
    return table, [line for line in warnings if line.startswith("group_scan_outliers.tsv")]


def test_scan_with_doubled_volumes_is_named(output, add_people):
    add_people(range(1, 11), doubled=3)
    table, lines = analyse(output)
    assert table.facts["NumberOfOutliers"] == 1
    found = table.rows[table.rows["outlier"]]
    assert found[["measure", "n_nuclei"]].to_numpy().tolist() == [["volume_mm3", 16]]
    assert found["ratio"].iloc[0] == pytest.approx(2, rel=0.05)
    ratio = f"ratio {found['ratio'].iloc[0]:.2f}"
    assert lines == [
        "group_scan_outliers.tsv: volume_mm3 of all nuclei differs from the other scans of the site in sub-03 "
        f"({ratio}); check the voxel sizes of these maps"
    ]


def test_sites_are_named_with_their_model(output, add_people):
    add_people(range(1, 7))
    add_people(range(7, 13), factor=2)
    for path in list(output.rglob("*_seg-dgm16_stats.tsv")):
        shutil.copy(path, path.with_name(path.name.replace("dgm16", "other")))
    rows = "".join(f"sub-{number:02d}\t{'north' if number < 7 else 'south'}\n" for number in range(1, 13))
    (output.parent / "participants.tsv").write_text(f"participant_id\tsite\n{rows}", encoding="utf-8")
    (line,) = analyse(output)[1]
    names = re.findall(r"(\w+ \w+) \(ratio", line)
    assert names == ["north dgm16", "north other", "south dgm16", "south other"]


def test_site_with_another_scale_is_named(output, add_people):
    add_people(range(1, 7))
    add_people(range(7, 13), factor=2)
    rows = "".join(f"sub-{number:02d}\t{'north' if number < 7 else 'south'}\n" for number in range(1, 13))
    (output.parent / "participants.tsv").write_text(f"participant_id\tsite\n{rows}", encoding="utf-8")
    table, (line,) = analyse(output)
    assert not table.rows["outlier"].any()
    assert re.fullmatch(
        r"group_scan_outliers.tsv: mean_ppm of all nuclei differs between sites in "
        r"north \(ratio 0.\d\d, shift \S+ ppm\), south \(ratio [12].\d\d, shift \S+ ppm\); "
        r"check the scale and the reference of these maps",
        line,
    )
    ratios = {one["site"]: one["ratio"] for one in table.facts["Sites"] if one["measure"] == "mean_ppm"}
    assert ratios == pytest.approx({"north": 0.5, "south": 2}, rel=0.05)
