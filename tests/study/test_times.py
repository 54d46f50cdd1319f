"""Ages and times of a participant's sessions, from participants.tsv and sessions.tsv."""

import math

import pytest

from bids_dgmseg.study.load import Tree, load_cohort
from bids_dgmseg.study.selection import Choice

DAYS = 365.25
NAN = math.nan


@pytest.fixture
def times(output, add_scan, tmp_path):
    """Ages and years of the scans of sub-01, by its rows of sessions.tsv (age, acq_time)."""

    def load(*rows: tuple[str, str], age: str = "n/a", measured=None, chosen=()):
        (tmp_path / "participants.tsv").write_text(f"participant_id\tage\nsub-01\t{age}\n")
        lines = [f"ses-{number}\t{own}\t{time}" for number, (own, time) in enumerate(rows, 1)]
        (tmp_path / "sub-01").mkdir()
        (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("\n".join(["session_id\tage\tacq_time", *lines]))
        for number in measured or range(1, len(rows) + 1):
            add_scan(f"sub-01_ses-{number}_seg-dgm16")
        facts = load_cohort([Tree(output, "out", tmp_path)], choice=Choice((), chosen, ())).facts
        return facts["age"].tolist(), facts["years"].tolist()

    return load


OWN = ("63.5", "2023-05-02T10:12:00"), ("65.1", "2024-12-10T09:40:00")


@pytest.mark.parametrize(
    ("scans", "ages"),
    [
        pytest.param({}, [63.5, 65.1], id="all sessions"),
        pytest.param({"chosen": ("2",)}, [65.1], id="one chosen"),
        pytest.param({"measured": (2,)}, [65.1], id="one measured"),
    ],
)
def test_a_sessions_own_age_is_taken_as_it_is_whatever_else_is_loaded(times, scans, ages):
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
        pytest.param([("n/a", "2023-05-02"), ("65.5", "2025-05-02")], (2,), [65.5], id="told by one session alone"),
    ],
)
def test_the_age_of_the_first_session_moves_with_time(times, sessions, measured, ages):
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
            id="age, where days were wiped out",
        ),
    ],
)
def test_times_of_a_person_are_on_one_axis(times, sessions, years):
    assert times(*sessions)[1] == pytest.approx(years, nan_ok=True)


def test_a_session_of_an_unknown_day_has_no_time(times):
    ages, years = times(("n/a", "2023-01-01"), ("n/a", "2025-01-01"), ("n/a", "n/a"), age="60")
    assert ages == pytest.approx([60, 60 + 731 / DAYS, 60])
    assert years == pytest.approx([0, 731 / DAYS, NAN], nan_ok=True)
