"""Dates as spreadsheets write them, scans.tsv, ages against dates; expected values are counted by hand."""

import math
from datetime import date

import pandas as pd
import pytest

from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.dates import parse_days
from bids_dgmseg.study.results_folders import ResultsFolder

DAY = date(2020, 10, 15).toordinal()


@pytest.mark.parametrize(
    ("texts", "days", "name"),
    [
        (["2020-10-15T10:12:00.5Z", "2020-10-16"], [DAY, DAY + 1], ""),
        (["15.10.2020", "16.10.2020 10:12"], [DAY, DAY + 1], "day.month.year"),
        (["2020/10/15", "2020.10.16"], [DAY, DAY + 1], "year/month/day"),
        (["10/15/2020", "10/5/2020"], [DAY, DAY - 10], "month/day/year"),  # one tells the order of all
        (["15/10/2020", "5/10/2020"], [DAY, DAY - 10], "day/month/year"),
        (["10/5/2020", "10/6/2020"], [math.nan] * 2, ""),  # either order
        (["10/15/2020", "15/10/2020"], [math.nan] * 2, ""),  # neither order
        (["44119", "2020-10-16"], [math.nan, DAY + 1], ""),
        (["2020-13-15", "Oct 2020", "15.10.20"], [math.nan] * 3, ""),
    ],
)
def test_dates_are_read_if_they_have_one_meaning(texts, days, name):
    found, formats = parse_days(pd.Series(texts))
    assert found.tolist() == pytest.approx(days, nan_ok=True)
    assert set(formats) == {name}


@pytest.fixture
def load(output, add_scan, tmp_path):
    """Ages and years of the scans of sub-01, and the warnings, by its sessions.tsv and the dates of its scans.tsv."""

    def load(*sessions: str, age: str = "60", scans: tuple[str, ...] = ()):
        (tmp_path / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{age}\n")
        (tmp_path / "sub-01").mkdir()
        if sessions:
            lines = ["session_id age acq_time", *(f"ses-{number} {row}" for number, row in enumerate(sessions, 1))]
            text = "".join("\t".join(line.split(" ")) + "\n" for line in lines)
            (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text(text)
        for number, time in enumerate(scans, 1):
            folder = tmp_path / "sub-01" / f"ses-{number}"
            folder.mkdir()
            rows = f"func/x.nii.gz\t1990-01-01\nanat/sub-01_ses-{number}_Chimap.nii.gz\t{time}\n"
            (folder / f"sub-01_ses-{number}_scans.tsv").write_text(f"filename\tacq_time\n{rows}")
        for number in range(1, max(len(sessions), len(scans)) + 1):
            add_scan(f"sub-01_ses-{number}_seg-dgm16")
        cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
        return *(cohort.demographics[name].tolist() for name in ("age", "years")), list(cohort.warnings)

    return load


TWO_YEARS = 731 / 365.25
"""From 15 October 2019 to 15 October 2021, across the leap day of 2020."""


def test_dates_of_scans_tsv_give_ages_and_times(load):
    ages, years, warnings = load(scans=("2019-10-15T08:00:00", "2021-10-15"))
    assert ages == pytest.approx([60, 60 + TWO_YEARS])
    assert years == pytest.approx([0, TWO_YEARS])
    assert warnings == []


def test_dates_of_sessions_tsv_come_before_scans_tsv(load):
    ages, _, warnings = load("n/a 2019-10-15", "n/a n/a", scans=("2018-10-15", "2021-10-15"))
    assert ages == pytest.approx([60, 60 + TWO_YEARS])
    assert warnings == [
        "scans.tsv: acq_time of sub-01 ses-1 differs from sessions.tsv by up to 365 days; that of sessions.tsv is used"
    ]


NO_DATE = "the age there is that of the first session, from which on time is counted if it has a date"


@pytest.mark.parametrize(
    ("sessions", "ages", "lines"),
    [
        (
            ("n/a 15.10.2019", "n/a 15.10.2021"),
            [60, 60 + TWO_YEARS],
            [
                "sessions.tsv: acq_time of sub-01 ses-1, sub-01 ses-2 is written like '15.10.2019', read as "
                "day.month.year; BIDS expects 2020-10-15T10:12:00"
            ],
        ),
        (
            ("n/a 2019-10-15", "n/a 5/6/2021"),
            [60, 60],
            [
                "sessions.tsv: acq_time of sub-01 ses-2 is not understood ('5/6/2021'); it counts as missing; write it "
                "like 2020-10-15T10:12:00",
                f"sessions.tsv: no acq_time of sub-01 ses-2; {NO_DATE}",
            ],
        ),
        (("n/a n/a", "n/a 2021-10-15"), [60, 60], [f"sessions.tsv: no acq_time of sub-01 ses-1; {NO_DATE}"]),
        (  # a typing error: 60 + 132 would be 192
            ("n/a 1889-10-15", "n/a 2021-10-15"),
            [60, 60],
            [
                "sessions.tsv and scans.tsv: acq_time of sub-01 spans up to 132.0 years; the dates are not used; "
                "correct them",
                f"sessions.tsv: no acq_time of sub-01 ses-1, sub-01 ses-2; {NO_DATE}",
            ],
        ),
        (
            ("60 n/a", "25 n/a"),
            [60, 25],
            [
                "sessions.tsv: age of sub-01 ses-2 is 25, but 60 by participants.tsv; that of the session is used",
            ],
        ),
        (
            ("60 2019-10-15", "66 2021-10-15"),
            [60, 66],
            [
                "sessions.tsv: ages and acq_time of sub-01 disagree by up to 4.0 years; each is used as it is; correct "
                "one of them"
            ],
        ),
        (
            ("60 2019-10-15", "old 2021-10-15"),
            [60, math.nan],
            ["sub-01_sessions.tsv: age of sub-01 is 'old', not a number; it counts as missing"],
        ),
        (
            ("60 n/a", "600 n/a"),
            [60, math.nan],
            ["sub-01_sessions.tsv: age of sub-01 is 600, not an age in years; treated as missing"],
        ),
        (("60 2019-10-15", "62 2021-10-15"), [60, 62], []),
    ],
)
def test_ages_and_dates_that_disagree_are_reported(load, sessions, ages, lines):
    found, _, warnings = load(*sessions)
    assert found == pytest.approx(ages, nan_ok=True)
    assert [line for line in warnings if "no age of" not in line] == lines


def test_age_beyond_130_with_the_time_since_is_missing(load):
    ages, _, warnings = load("n/a 1999-10-15", "n/a 2021-10-15", age="115")
    assert ages == pytest.approx([115, math.nan], nan_ok=True)
    assert warnings == [
        "sub-01 ses-2: age 137.0 from the age at the first session and acq_time; treated as missing; correct one of "
        "them"
    ]


def test_sessions_may_name_age_differently(load, tmp_path, output):
    load("60 n/a", "62 n/a", age="60")
    path = tmp_path / "sub-01" / "sub-01_sessions.tsv"
    path.write_text(path.read_text().replace("age", "age_at_scan"))
    cohort = load_cohort([ResultsFolder(output, "out", tmp_path)])
    assert cohort.demographics["age"].tolist() == [60, 62]
    assert cohort.warnings == ("sessions.tsv: using its column age_at_scan as age",)


def test_unreadable_scans_tsv_is_a_warning(load, tmp_path, output):
    load(scans=("2019-10-15", "2021-10-15"))
    (tmp_path / "sub-01" / "ses-2" / "sub-01_ses-2_scans.tsv").write_text("name\tacq_time\nx\t2021-10-15\n")
    warnings = load_cohort([ResultsFolder(output, "out", tmp_path)]).warnings
    assert warnings == (
        "sub-01_ses-2_scans.tsv: no column filename (columns: name, acq_time); rename the column of labels; until then "
        "its acq_time is not used",
        f"sessions.tsv: no acq_time of sub-01 ses-2; {NO_DATE}",
    )
