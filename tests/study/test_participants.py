"""Tables of participants and sessions: read if they are BIDS, otherwise refused with the first cells."""

import json
import re
from datetime import date

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.participants import read_labelled_table, read_participant_tables

HOW_TO = "write ids as in the folder names"

VISITS = [("01", "1"), ("01", "2")]

TWO_YEARS = 731 / 365.25
"""From 15 October 2019 to 15 October 2021, across the leap day of 2020."""


@pytest.fixture
def read(tmp_path):
    """Read a dataset: its files by name, cells separated by spaces, rows by line breaks."""

    def call(visits=VISITS, **files):
        for name, content in files.items():
            folder = {"sessions": "sub-01", "scans_1": "sub-01/ses-1", "scans_2": "sub-01/ses-2"}.get(name, ".")
            file = {"sessions": "sub-01_sessions", "scans_1": "sub-01_ses-1_scans", "scans_2": "sub-01_ses-2_scans"}
            path = tmp_path / folder / f"{file.get(name, name)}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, dict):
                path.with_suffix(".json").write_text(json.dumps(content))
            else:
                path.write_bytes(content.replace(" ", "\t").encode() if isinstance(content, str) else content)
        return read_participant_tables(tmp_path, visits)

    return call


PLAIN = "participant_id\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.replace("\n", "\r\n").replace("n/a", "").encode(),
        b"participant_id\tage\tsite\n01\t30.5\tA\n02\tn/a\tB\n",
        b"age\tparticipant_id\tsite\n30.5\tsub-01\tA\n\tsub-02\tB\n",
        b"participant_id\tage\tsite\t\nsub-01\t 30.5\tA\t\n\t\t\t\nsub-02\t\tB\t\n\n",
        b'participant_id\tage\tsite\nsub-01\t"30.5"\t"A"\nsub-02\tn/a\tB\n',
    ],
    ids=["plain", "BOM", "Windows", "ids without sub-", "id not first", "empty cells", "quotes"],
)
def test_tables_of_bids_are_read(tmp_path, content):
    (tmp_path / "participants.tsv").write_bytes(content)
    table = read_labelled_table(tmp_path / "participants.tsv", "participant_id").fillna("n/a")
    assert table.to_dict("list") == {"age": ["30.5", "n/a"], "site": ["A", "B"]}
    assert table.index.tolist() == ["01", "02"]


@pytest.mark.parametrize(
    ("content", "problem", "cells"),
    [
        (b"participant_id\tage\nsub-01\t30\tA\n", "not a tab-separated table", "'sub-01', '30', 'A'"),
        (b"participant_id,age\nsub-01,30\n", "expected unique names of columns", "'participant_id,age', 'sub-01,30'"),
        (b"name\tage\nsub-01\t30\n", "expected unique names of columns and participant_id", "'name', 'age', 'sub-01'"),
        (b"participant_id\tage\tage\nsub-01\t30\t31\n", "expected unique names of columns", "'age', 'age'"),
        (b"participant_id\tage\nsub-01\t30\n\t31\n", "participant_id is missing or not unique", "nan"),
        (b"participant_id\tage\nsub-01\t30\n01\t30\n", "participant_id is missing or not unique", "'sub-01', '01'"),
    ],
)
def test_other_tables_are_refused_with_their_cells(tmp_path, content, problem, cells):
    (tmp_path / "participants.tsv").write_bytes(content)
    with pytest.raises(InputError, match=rf"^participants.tsv: {problem}.*; {HOW_TO}") as caught:
        read_labelled_table(tmp_path / "participants.tsv", "participant_id")
    assert cells in str(caught.value)


def test_first_five_cells_are_listed(read):
    rows = "\n".join(f"sub-{number} {number},5" for number in range(1, 8))
    tables, _ = read([(str(number), None) for number in range(1, 8)], participants=f"participant_id age\n{rows}\n")
    with pytest.raises(InputError) as caught:
        tables.ages([(str(number), None) for number in range(1, 8)], "age")
    assert str(caught.value) == (
        "participants.tsv: age is not from 0 to 130 years at the session: '1,5' of sub-1, '2,5' of sub-2, '3,5' of "
        "sub-3, '4,5' of sub-4, '5,5' of sub-5 and 2 more; write ids as in the folder names (sub-01, ses-1), ages as "
        "67.5 or 89+, dates as 2020-10-15T10:12:00, sex as F, M or O, numbers with a decimal point, missing values as "
        "n/a; a spreadsheet exports the table as tab-delimited text (UTF-8)"
    )


def test_participants_without_row_or_scan_are_warnings(read):
    _, warnings = read([("01", None), ("02", None)], participants="participant_id age\nsub-01 30\nsub-9 3\n")
    assert warnings == [
        "participants.tsv: no row for sub-02; their columns are n/a",
        "participants.tsv: no results of sub-9; they are not in the tables",
    ]


def test_session_values_win_with_their_unit(read):
    tables, warnings = read(
        participants="participant_id age sex\nsub-01 30 F\n", sessions="session_id age\nses-1 366\nses-2 n/a\n"
    )
    assert warnings == []
    assert tables.at_visits(VISITS)["age"].tolist() == ["366", "30"]
    assert tables.at_visits(VISITS)["sex"].tolist() == ["F", "F"]
    units = {"age": {"Units": "months"}}
    assert read(sessions=units)[0].ages(VISITS, "age")[0].tolist() == [30.5, 30]


@pytest.mark.parametrize(
    ("text", "units", "years"),
    [("30", None, 30), ("89+", "years", 89), ("366", "Months", 30.5), ("1461", "d: days", 4), ("n/a", None, None)],
)
def test_ages_are_converted_to_years(read, text, units, years):
    tables, _ = read([("01", None)], participants=f"participant_id age\nsub-01 {text}\n")
    if units:
        tables, _ = read([("01", None)], participants={"age": {"Units": units}})
    ages, warnings = tables.ages([("01", None)], "age")
    assert ages.dropna().tolist() == pytest.approx([years] if years else [])
    assert len(warnings) == (years is None)


@pytest.mark.parametrize("text", ["67y", ">89", "-9", "131"])
def test_other_ages_are_refused(read, text):
    tables, _ = read([("01", None)], participants=f"participant_id age\nsub-01 {text}\n")
    with pytest.raises(InputError, match=f"^participants.tsv: age is not .*: '{re.escape(text)}' of sub-01; {HOW_TO}"):
        tables.ages([("01", None)], "age")


def test_unknown_unit_is_an_error(read):
    read(participants="participant_id age\nsub-01 30\n")
    tables, _ = read(participants={"age": {"Units": "Jahre"}})
    with pytest.raises(InputError, match=r"^participants.json: Units of age is 'Jahre'; write years, months, weeks"):
        tables.ages(VISITS, "age")


AGE_60 = "participant_id age\nsub-01 60\n"


@pytest.mark.parametrize(
    ("files", "ages", "warnings"),
    [
        ({"sessions": "session_id acq_time\nses-1 2019-10-15\nses-2 2021-10-15T08:00:00.5Z"}, [60, 60 + TWO_YEARS], []),
        (
            {
                "scans_1": "filename acq_time\nfunc/x.nii.gz 1990-01-01\nanat/x.nii.gz 2019-10-15",
                "scans_2": "filename acq_time\nanat/x.nii.gz 2021-10-15",
            },
            [60, 60 + TWO_YEARS],
            [],
        ),
        (  # sessions.tsv comes before scans.tsv
            {
                "sessions": "session_id acq_time\nses-1 2019-10-15\nses-2 n/a",
                "scans_1": "filename acq_time\nanat/x.nii.gz 2018-10-15",
                "scans_2": "filename acq_time\nanat/x.nii.gz 2021-10-15",
            },
            [60, 60 + TWO_YEARS],
            [],
        ),
        (
            {"sessions": "session_id acq_time\nses-1 2019-10-15\nses-2 n/a"},
            [60, 60],
            ["sessions.tsv: no acq_time of sub-01 ses-2; using the age at the first session"],
        ),
        ({"sessions": "session_id age acq_time\nses-1 60 2019-10-15\nses-2 62 2021-10-15"}, [60, 62], []),
    ],
    ids=["sessions.tsv", "scans.tsv", "both", "no date", "age of the session"],
)
def test_age_at_first_session_grows_with_time(read, files, ages, warnings):
    tables, lines = read(participants=AGE_60, **files)
    result, more = tables.ages(VISITS, "age")
    assert result.tolist() == pytest.approx(ages)
    assert [*lines, *more] == warnings


def test_years_count_from_the_first_session_even_if_it_is_not_selected(read):
    tables, _ = read([("01", "2")], sessions="session_id acq_time\nses-1 2019-10-15\nses-2 2021-10-15")
    assert tables.years_since_first([("01", "2")]).tolist() == pytest.approx([TWO_YEARS])
    assert tables.days["01", "1"] == date(2019, 10, 15).toordinal()


@pytest.mark.parametrize("text", ["15.10.2020", "10/15/2020", "44119", "2020-13-15"])
def test_other_dates_are_refused(read, text):
    with pytest.raises(InputError, match=rf"^sessions.tsv: acq_time is not a date: '{text}' of sub-01 ses-2; {HOW_TO}"):
        read(sessions=f"session_id acq_time\nses-1 2020-10-15\nses-2 {text}")


@pytest.mark.parametrize(
    ("texts", "levels", "sexes"),
    [
        ("F female m MALE other", {}, "F F M M O"),
        ("1 2 1 2 1", {"1": "male", "2": {"Description": "Female participants"}}, "M F M F M"),
    ],
)
def test_sexes_are_those_of_bids_or_described(read, texts, levels, sexes):
    visits = [(str(place), None) for place in range(5)]
    rows = "\n".join(f"{place} {text}" for place, text in enumerate(texts.split()))
    read(visits, participants=f"participant_id sex\n{rows}\n")
    tables, _ = read(visits, participants={"sex": {"Levels": levels}})
    assert tables.sexes(visits, "sex").tolist() == sexes.split()


def test_unexplained_code_of_sex_is_refused(read):
    tables, _ = read([("01", None)], participants="participant_id sex\nsub-01 1\n")
    with pytest.raises(InputError, match=r"^participants.tsv: sex is neither F, M, O nor described .*: '1' of sub-01"):
        tables.sexes([("01", None)], "sex")
