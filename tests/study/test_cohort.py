"""Ages and times of sessions, sites by scanner."""

import json
import math
import shutil

import pytest

from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.qc_fields import name_scanner
from bids_dgmseg.study.results_folders import ResultsFolder, ResultsSelection
from tests.run.test_group import add_scan

DAYS = 365.25
NAN = math.nan


@pytest.fixture
def times(output, add_scan, tmp_path):
    """Ages and years of the scans of sub-01, by its rows of sessions.tsv (age, acq_time)."""

    def load(*rows: tuple[str, str], age: str = "n/a", measured=None, selected=()):
        (tmp_path / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{age}\n")
        lines = [f"ses-{number}\t{own}\t{time}" for number, (own, time) in enumerate(rows, 1)]
        (tmp_path / "sub-01").mkdir()
        (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("\n".join(["session_id\tage\tacq_time", *lines]))
        for number in measured or range(1, len(rows) + 1):
            add_scan(f"sub-01_ses-{number}_seg-dgm16")
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)], selection=ResultsSelection(sessions=selected))
        return cohort.demographics["age"].tolist(), cohort.demographics["years"].tolist()

    return load


OWN = ("63.5", "2023-05-02T10:12:00"), ("65.1", "2024-12-10T09:40:00")


@pytest.mark.parametrize(
    ("scans", "ages"), [({}, [63.5, 65.1]), ({"selected": ("2",)}, [65.1]), ({"measured": (2,)}, [65.1])]
)
def test_session_age_does_not_depend_on_other_sessions(times, scans, ages):
    rows = ("63.5", "2023-05-02T10:12:00"), ("65.1", "2024-12-10T09:40:00")
    assert times(*rows, **scans)[0] == pytest.approx(ages)


LATER, LAST = 63.5 + 731 / DAYS, 63.5 + 1461 / DAYS
"""Ages 731 and 1461 days after the first session, on the same day of 2025 and 2027."""


@pytest.mark.parametrize(
    ("own_ages", "measured", "ages"),
    [
        (("n/a", "n/a", "67.5"), None, [63.5, LATER, 67.5]),  # beside a session's own age
        (("63.5", "63.5", "n/a"), None, [63.5, LATER, LAST]),  # repeated by the sessions that have one
        (("63.5", "63.5"), (2,), [LATER]),  # repeated, one session measured
        (("n/a", "65.5"), (2,), [65.5]),  # of one session only
    ],
)
def test_age_at_first_session_grows_with_time(times, own_ages, measured, ages):
    sessions = zip(own_ages, ("2023-05-02", "2025-05-02", "2027-05-02"), strict=False)
    assert times(*sessions, age="63.5", measured=measured)[0] == pytest.approx(ages)


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


def test_codes_of_sex_do_not_depend_on_the_selection(output, add_scan, tmp_path):
    """Saved norms for codes 1 and 2 have no score for a sex that counts as missing."""
    for label in "12":
        add_scan(f"sub-{label}_seg-dgm16")
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-1\t1\nsub-2\t2\nsub-3\tn/a\nsub-4\t-9\n")
    for selected, sexes in ((), ["1", "2"]), (("2",), ["2"]):
        selection = ResultsSelection(participants=selected)
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)], selection=selection)
        assert cohort.demographics["sex"].tolist() == sexes


def test_codes_of_sex_are_described_for_all_datasets(output, add_scan, tmp_path):
    add_scan("sub-1_seg-dgm16")
    shutil.copytree(output, tmp_path / "graz")
    for name, sex, about in (("out", "F", {"Description": "sex"}), ("graz", "2", {"Levels": {"2": "female"}})):
        (tmp_path / name / "participants.tsv").write_text(f"participant_id\tsex\nsub-1\t{sex}\n")
        (tmp_path / name / "participants.json").write_text(json.dumps({"sex": about}))
    paths = [output, tmp_path / "graz"]
    cohort = load_cohort([ResultsFolder(path, path.name, path) for path in paths])
    assert cohort.demographics["sex"].tolist() == ["F", "F"]
    assert cohort.descriptions["sex"] == {"Description": "sex", "Levels": {"2": "female"}}  # by which the page reads it


def test_session_without_a_date_has_no_time(times):
    ages, years = times(("n/a", "2023-01-01"), ("n/a", "2025-01-01"), ("n/a", "n/a"), age="60")
    assert ages == pytest.approx([60, 60 + 731 / DAYS, 60])
    assert years == pytest.approx([0, 731 / DAYS, NAN], nan_ok=True)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"InstitutionName": "Z\u00fcrich\n\tHospital ", "Manufacturer": "GE\t"}, "Z\u00fcrich Hospital GE"),
        ({"Manufacturer": ["a"], "ManufacturersModelName": "Prisma", "InstitutionName": True}, "Prisma"),
        ({"Manufacturer": "Siemens", "DeviceSerialNumber": 45153}, "Siemens 45153"),
        ({"Manufacturer": " \n"}, None),
        ({"MagneticFieldStrength": "2.89"}, None),
        ({"InstitutionName": "Bern", "MagneticFieldStrength": "2.89"}, "Bern 3T"),
        ({"InstitutionName": "Zu\u0308rich"}, "Z\u00fcrich"),  # NFC
        ({"Manufacturer": "Siemens", "MagneticFieldStrength": [3]}, "Siemens"),
    ],
)
def test_scanner_name_uses_text_and_numbers_only(fields, name):
    assert name_scanner(fields) == name


def test_each_folder_has_its_own_codes_of_sex(tmp_path):
    folders = []
    for name, codes, levels in (("bern", "01", "male female"), ("graz", "12", "male female")):
        add_scan(tmp_path / name / "out", "sub-01", {"DN_L": (700.0, 0.1)})
        add_scan(tmp_path / name / "out", "sub-02", {"DN_L": (700.0, 0.1)})
        rows = [f"sub-0{number}\t{code}" for number, code in enumerate(codes, 1)]
        (tmp_path / name / "participants.tsv").write_text("\n".join(["participant_id\tsex", *rows]))
        described = {"sex": {"Levels": dict(zip(codes, levels.split(), strict=True))}}
        (tmp_path / name / "participants.json").write_text(json.dumps(described))
        folders.append(ResultsFolder(tmp_path / name / "out", name, tmp_path / name))
    cohort = load_cohort(folders, selection=ResultsSelection())
    assert cohort.demographics["sex"].tolist() == ["M", "F", "M", "F"]
    # 1 is female in one folder, male in the other: the tables, which have one data dictionary, cannot have the codes
    assert cohort.participants["sex"].tolist() == ["M", "F", "M", "F"]
    assert cohort.descriptions["sex"]["Levels"] == {"F": "female", "M": "male", "O": "other"}
