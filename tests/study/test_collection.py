"""Files between collection and analysis: what is read back is what was collected."""

import pandas as pd
import pytest

from bids_dgmseg.study.cohort import Cohort, load_cohort
from bids_dgmseg.study.collection import CollectedStats, collect_stats, read_cohort
from bids_dgmseg.study.results_folders import find_results_folders

PARTICIPANTS = (
    "participant_id\tage\tgroup\tsite\texcluded\tcode\tnote\tscan",
    'sub-01\t30.1\tHC\tA\tno\t007\t"5"" scar, left"\tx',
    "sub-02\t89+\t-999\tB\tyes\t1e3\tn/a\ty",
)


@pytest.fixture
def collected(output, add_scan, tmp_path) -> tuple[Cohort, CollectedStats]:
    """Scans of two participants, of two reconstructions and a red one; columns with names of the tables' own."""
    for name in ("01_ses-1_rec-x_run-02_seg-dgm16", "01_ses-2_seg-dgm16_desc-rts", "02_seg-dgm16", "02_seg-dcnnet"):
        add_scan(f"sub-{name}")
    red = output / "sub-02" / "anat" / "sub-02_seg-dcnnet_qc.json"
    red.write_text('{"rating": "red", "reasons": "motion"}')
    (tmp_path / "participants.tsv").write_text("\n".join(PARTICIPANTS))
    folders = find_results_folders([output], datasets=[tmp_path])
    (tmp_path / "files").mkdir()
    return load_cohort(folders), collect_stats(folders, tmp_path / "files")


def test_cohort_is_the_same_after_a_round_trip(collected):
    cohort, files = collected
    read = read_cohort(files, measures=["mean_ppm", "volume_mm3"])
    for name in ("keys", "participants", "demographics"):
        pd.testing.assert_frame_equal(getattr(read, name), getattr(cohort, name), check_dtype=False)
    for name in ("strata", "stats_columns", "settings", "warnings", "descriptions", "spellings", "n_outdated"):
        assert getattr(read, name) == getattr(cohort, name), name
    columns = ["scan", "abbreviation", "volume_mm3", "mean_ppm", "excluded"]
    pd.testing.assert_frame_equal(read.stats[columns], cohort.stats[columns], check_dtype=False)
    pd.testing.assert_series_equal(read.qc["excluded"], cohort.qc["excluded"], check_dtype=False)
    entities = ["sub", "ses", "run", "rec", "desc", "seg"]
    pd.testing.assert_frame_equal(read.scans[entities], cohort.scans[entities], check_dtype=False)


def test_only_wanted_measures_are_read(collected):
    _, files = collected
    assert {*read_cohort(files, measures=["mean_ppm", "none"]).stats} == {
        "scan",
        "abbreviation",
        "mean_ppm",
        "excluded",
    }
