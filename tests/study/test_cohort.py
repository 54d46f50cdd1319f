"""Ages and times of sessions, sites by scanner."""

import math

import pytest

from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.results_folders import ResultsFolder, ResultsSelection, name_scanner

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
    ("scans", "ages"),
    [
        pytest.param({}, [63.5, 65.1], id="all sessions"),
        pytest.param({"selected": ("2",)}, [65.1], id="one selected"),
        pytest.param({"measured": (2,)}, [65.1], id="one measured"),
    ],
)
def test_session_age_does_not_depend_on_other_sessions(times, scans, ages):
    assert times(*OWN, **scans)[0] == pytest.approx(ages)


@pytest.mark.parametrize(
    ("sessions", "measured", "ages"),
    [
        # 731 and 730 days between the years
        pytest.param(
            [("n/a", "2023-05-02"), ("n/a", "2025-05-02"), ("67.5", "2027-05-02")],
            None,
            [63.5, 63.5 + 731 / DAYS, 67.5],
            id="beside a session's own age",
        ),
        pytest.param(
            [("63.5", "2023-05-02"), ("63.5", "2025-05-02"), ("n/a", "2027-05-02")],
            None,
            [63.5, 63.5 + 731 / DAYS, 63.5 + 1461 / DAYS],
            id="repeated by the sessions that have one",
        ),
        pytest.param(
            [("63.5", "2023-05-02"), ("63.5", "2025-05-02")],
            (2,),
            [63.5 + 731 / DAYS],
            id="repeated, one session measured",
        ),
        pytest.param([("n/a", "2023-05-02"), ("65.5", "2025-05-02")], (2,), [65.5], id="of one session only"),
    ],
)
def test_age_at_first_session_grows_with_time(times, sessions, measured, ages):
    assert times(*sessions, age="63.5", measured=measured)[0] == pytest.approx(ages)


@pytest.mark.parametrize(
    ("sessions", "years"),
    [
        pytest.param(
            [("60", "2023-01-01"), ("n/a", "2025-01-01")], [0, 731 / DAYS], id="time, where an age is missing"
        ),
        pytest.param([("60", "2023-01-01"), ("62", "n/a")], [60, 62], id="age, where a time is missing"),
        pytest.param([("63", "2023-01-01"), ("64", "2023-04-01")], [0, 90 / DAYS], id="time before whole years of age"),
        pytest.param(
            [("n/a", "2021-01-01"), ("60", "2023-01-01"), ("62", "2025-01-01"), ("64", "n/a"), ("66", "n/a")],
            [NAN, 60, 62, 64, 66],
            id="the one of more sessions, the rest missing",
        ),
        pytest.param(
            [("63.5", "1925-01-01T10:12:00"), ("65.1", "1925-01-01T09:40:00")],
            [63.5, 65.1],
            id="age, where dates were removed",
        ),
    ],
)
def test_times_of_a_participant_share_one_axis(times, sessions, years):
    assert times(*sessions)[1] == pytest.approx(years, nan_ok=True)


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
        ({"Manufacturer": "Siemens", "MagneticFieldStrength": [3]}, "Siemens"),
    ],
)
def test_scanner_name_uses_text_and_numbers_only(fields, name):
    assert name_scanner(fields) == name
