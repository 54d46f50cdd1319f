"""Ages, times and sexes of the scans of a study, from one or several datasets."""

import json
import math

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection
from tests.run.test_group import add_scan as add_scan_with

DAYS = 365.25
NAN = math.nan


@pytest.fixture
def times(output, add_scan, tmp_path):
    """Ages and years of the scans of sub-01, by its rows of sessions.tsv (age, acq_time)."""

    def load(*rows: tuple[str, str], age: str = "n/a", measured=None, selected=()):
        (tmp_path / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{age}\n")
        lines = [f"ses-{number}\t{its_age}\t{time}" for number, (its_age, time) in enumerate(rows, 1)]
        (tmp_path / "sub-01").mkdir()
        (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("\n".join(["session_id\tage\tacq_time", *lines]))
        for number in measured or range(1, len(rows) + 1):
            add_scan(f"sub-01_ses-{number}_seg-dgm16")
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)], selection=ResultsSelection(sessions=selected))
        return cohort.demographics["age"].tolist(), cohort.demographics["years"].tolist()

    return load


@pytest.mark.parametrize(
    ("rows", "scans", "ages"),
    [
        ([("63.5", "2023-05-02"), ("65.1", "2024-12-10")], {"selected": ("2",)}, [65.1]),
        ([("63.5", "2023-05-02"), ("65.1", "2024-12-10")], {"measured": (2,)}, [65.1]),
        ([("n/a", "2023-05-02"), ("n/a", "2025-05-02")], {"measured": (2,)}, [63.5 + 731 / DAYS]),
        ([("n/a", "2023-05-02"), ("n/a", "2025-05-02"), ("67.5", "2027-05-02")], {}, [63.5, 63.5 + 731 / DAYS, 67.5]),
    ],
)
def test_age_does_not_depend_on_other_scans(times, rows, scans, ages):
    assert times(*rows, age="63.5", **scans)[0] == pytest.approx(ages)


@pytest.mark.parametrize(
    ("sessions", "years"),
    [
        ([("60", "2023-01-01"), ("n/a", "2025-01-01")], [0, 731 / DAYS]),  # time, where an age is missing
        ([("60", "2023-01-01"), ("62", "n/a")], [60, 62]),  # age, where a time is missing
        ([("63", "2023-01-01"), ("64", "2023-04-01")], [0, 90 / DAYS]),  # time before whole years of age
        (  # the one of more sessions, the rest missing
            [("n/a", "2021-01-01"), ("60", "2023-01-01"), ("62", "2025-01-01"), ("64", "n/a"), ("66", "n/a")],
            [NAN, 60, 62, 64, 66],
        ),
        ([("63.5", "1925-01-01T10:12:00"), ("65.1", "1925-01-01T09:40:00")], [63.5, 65.1]),  # dates were removed
    ],
)
def test_times_of_a_participant_share_one_axis(times, sessions, years):
    assert times(*sessions)[1] == pytest.approx(years, nan_ok=True)


def test_each_folder_has_its_own_codes_of_sex_and_names_of_columns(tmp_path):
    folders = []
    for name, codes, group in (("bern", "01", "group"), ("graz", "12", "diagnosis")):
        rows = [f"participant_id\tsex\t{group}"]
        for number, code in enumerate(codes, 1):
            add_scan_with(tmp_path / name / "out", f"sub-0{number}", {"DN_L": (700.0, 0.1)})
            rows.append(f"sub-0{number}\t{code}\tHC")
        (tmp_path / name / "participants.tsv").write_text("\n".join(rows))
        levels = dict(zip(codes, ("male", "female"), strict=True))
        (tmp_path / name / "participants.json").write_text(json.dumps({"sex": {"Levels": levels}}))
        folders.append(ResultsFolder(tmp_path / name / "out", name, tmp_path / name))
    cohort = load_cohort(folders)
    assert cohort.demographics["sex"].tolist() == ["M", "F", "M", "F"]
    assert cohort.participants["sex"].tolist() == ["M", "F", "M", "F"]
    assert cohort.descriptions["sex"]["Levels"] == {"F": "female", "M": "male", "O": "other"}
    assert cohort.demographics["group"].tolist() == ["HC"] * 4
    assert cohort.demographics["site"].tolist() == ["bern", "bern", "graz", "graz"]
    assert cohort.demographics["participant_id"].nunique() == 4
    assert "sub-01, sub-02: in several datasets; treated as different participants" in cohort.warnings


def test_results_of_none_of_the_participants_are_an_error(output, add_scan, tmp_path):
    add_scan("sub-01_seg-dgm16")
    (tmp_path / "participants.tsv").write_text("participant_id\nsub-1\n")
    with pytest.raises(InputError, match=r"^participants.tsv: none of its ids \(sub-1\) has results \(found sub-01\)"):
        load_cohort([ResultsFolder(output, "out", tmp_path)])
