"""Which scans and nuclei enter the statistics."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder
from bids_dgmseg.study.study import Study, load_study, scan_tables, with_keys

NUCLEI = [f"{nucleus}_{side}" for nucleus in ("DN", "RN", "SN", "PUT", "GP", "CN") for side in "LR"]
SCALES = {"A": 0.5, "B": 0.8, "C": 1.2, "D": 1.6}
"""Factor of the spread of each site."""

WriteStudy = Callable[..., Path]


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Write 25 scans per site whose spread is that of `SCALES`; those of `failed` have ten times their values."""

    def write(*, failed: tuple[int, ...] = (), red_nuclei: tuple[int, ...] = (), n_per_site: int = 25) -> Path:
        rng = np.random.default_rng(1)
        sites = [site for site in SCALES for _ in range(n_per_site)]
        rows = ["participant_id\tsite", *(f"sub-{place:03}\t{site}" for place, site in enumerate(sites))]
        (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
        for place, site in enumerate(sites):
            means = 0.1 + 0.01 * SCALES[site] * rng.normal(size=len(NUCLEI))
            means *= 10 if place in failed else 1
            is_red = [place in red_nuclei and name == "DN_L" for name in NUCLEI]
            means = np.where(is_red, 10 * means, means)
            table = pd.DataFrame({"abbreviation": NUCLEI, "volume_mm3": 700.0 + place, "mean_ppm": means})
            table["rating"] = np.where(is_red, "red", "green")
            table["reasons"] = np.where(is_red, "many components (7 components, above 4)", "")
            folder = tmp_path / "out" / f"sub-{place:03}" / "anat"
            folder.mkdir(parents=True)
            table.to_csv(folder / f"sub-{place:03}_seg-dgm16_stats.tsv", sep="\t", index=False)
            rating = {"rating": "red", "reasons": ["noisy map", "streaks"]} if place in failed else {"rating": "green"}
            (folder / f"sub-{place:03}_seg-dgm16_qc.json").write_text(json.dumps(rating))
        return tmp_path

    return write


def load(root: Path, *, include_failed: bool = False) -> Study:
    options = GroupOptions(measures=("mean_ppm",), include_failed=include_failed)
    return load_study([ResultsFolder(root / "out", "out", root)], options)[1]


def test_red_scans_enter_no_analysis(write_study):
    failed = (0, 30)
    root = write_study(failed=failed, n_per_site=10)
    tables, _ = run_analyses(load(root))
    for place in failed:
        shutil.rmtree(root / "out" / f"sub-{place:03}")
    expected, _ = run_analyses(load(root))
    for table, without in zip(tables, expected, strict=True):
        pd.testing.assert_frame_equal(table.rows, without.rows)


def test_red_scans_are_marked_and_listed(write_study):
    root = write_study(failed=(0, 30), n_per_site=10)
    cohort = load_cohort([ResultsFolder(root / "out", "out", root)])
    for table in scan_tables(cohort):
        excluded = with_keys(table, cohort.keys).rows.set_index("participant_id")["excluded"].dropna()
        assert set(excluded.index) == {"sub-000", "sub-030"}
        assert set(excluded) == {"scan rated red: noisy map; streaks"}
    assert cohort.settings["ExcludedScans"] == 2
    line = "group_qc.tsv: 2 of 40 scans rated red: sub-000, sub-030; left out of all statistics (column excluded)"
    assert [warning for warning in cohort.warnings if warning.startswith(line)]
    used = load(root, include_failed=True).cohort
    assert used.qc["excluded"].isna().all()
    assert len(used.scans) == 40


def test_red_nuclei_are_missing_in_statistics(write_study):
    root = write_study(red_nuclei=(3,), n_per_site=10)
    study = load(root)
    missing = study.table[study.table["mean_ppm"].isna()]
    assert missing[["scan", "abbreviation"]].to_numpy().tolist() == [[3, "DN_L"]]
    cohort = load_cohort([ResultsFolder(root / "out", "out", root)])
    stats = with_keys(scan_tables(cohort)[0], cohort.keys).rows
    (row,) = stats[stats["excluded"].notna()].to_dict("records")
    assert (row["participant_id"], row["abbreviation"]) == ("sub-003", "DN_L")
    assert row["excluded"] == "nucleus rated red: many components (7 components, above 4)"
    assert float(row["mean_ppm"]) > 0.5  # the value stays in the table
    line = "group_stats.tsv: 1 of 480 nuclei of the other scans rated red; left out of all statistics"
    assert [warning for warning in study.cohort.warnings if warning.startswith(line)]
    assert load(root, include_failed=True).table["mean_ppm"].notna().all()


def test_study_of_red_scans_has_empty_statistics(write_study):
    tables, _ = run_analyses(load(write_study(failed=tuple(range(8)), n_per_site=2)))
    assert tables
    assert all(table.rows.empty for table in tables)
