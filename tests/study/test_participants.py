import re
from pathlib import Path

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.participants import read_participant_tables, read_participants


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "participants.tsv"
    path.write_bytes(text.encode(encoding))
    return path


def read(path: Path, labels: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Columns, and values by label, ``n/a`` where missing."""
    table = read_participants(path, labels)
    return list(table.columns), dict(zip(table.index, table.fillna("n/a").to_numpy().tolist(), strict=True))


PLAIN = "participant_id\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n"
VARIANTS = {
    "Windows, empty cell": "participant_id\tage\tsite\r\nsub-01\t30.5\tA\r\nsub-02\t\tB\r\n",
    "commas": "participant_id,age,site\nsub-01,30.5,A\nsub-02,,B\n",
    "semicolons and decimal commas": "participant_id;age;site\nsub-01;30,5;A\nsub-02;;B\n",
    "spaces around values": "participant_id\tage\tsite\n sub-01 \t 30.5\tA \nsub-02\tNaN\tB\n",
    "lost zeros": "participant_id\tage\tsite\n1\t30.5\tA\n2\tn/a\tB\n",
    "ids as decimal numbers": "participant_id\tage\tsite\n1.0\t30.5\tA\n2.0\tn/a\tB\n",
    "another name of the column": "Subject ID\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n",
    "not the first column": "age\tparticipant_id\tsite\n30.5\tsub-01\tA\n\tsub-02\tB\n",
    "empty cells": "participant_id\tage\tsite\t\nsub-01\t30.5\tA\t\t\n\nsub-02\t\tB\n\t\t\n",
    "quotes": 'participant_id,age,site\n"sub-01","30.5","A"\n"sub-02",,"B"\n',
}


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *(pytest.param(PLAIN, encoding, id=encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16")),
        *(pytest.param(text, "utf-8", id=name) for name, text in VARIANTS.items()),
    ],
)
def test_common_variants_of_tables_are_read(tmp_path, text, encoding):
    table = read(write(tmp_path, text, encoding), ["01", "02"])
    assert table == (["age", "site"], {"01": ["30.5", "A"], "02": ["n/a", "B"]})


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        (
            'participant_id\tnote\tage\r\nsub-01\t"left\nside"\t30\r\nsub-02\t\t40\r\n',
            ["note", "age"],
            {"01": ["left side", "30"], "02": ["n/a", "40"]},
        ),
        (
            'participant_id,note,age\nsub-01,"left, ""then""\n\nright",30\nsub-02,,40\n',
            ["note", "age"],
            {"01": ['left, "then" right', "30"], "02": ["n/a", "40"]},
        ),
        ('participant_id\tnote\tage\nsub-01\t5" scar\t30\n', ["note", "age"], {"01": ['5" scar', "30"]}),  # inches
        *(
            (
                f"participant_id\tnote\tage\nsub-01\t{cell}\t30\nsub-02\t{after}\t40\n",
                ["note", "age"],
                {"01": [note, "30"], "02": [after, "40"]},
            )
            for cell, note, after in (
                ('"a, b"', "a, b", "c"),
                ('"a ""b"""', 'a "b"', "c"),
            )
        ),
        ("participant_id\ta (b, c, d, e)\nsub-01\t1,5\n", ["a (b, c, d, e)"], {"01": ["1,5"]}),  # more commas than tabs
    ],
)
def test_quoted_cells_are_split_as_spreadsheets_do(tmp_path, text, columns, rows):
    assert read(write(tmp_path, text), ["01", "02"]) == (columns, rows)


def test_line_numbers_count_line_breaks_in_cells(tmp_path):
    text = 'participant_id\tnote\nsub-01\t"a\nb"\nsub-02\tx\ty\n'
    with pytest.raises(InputError, match="line 4 has 3 values, expected 2"):
        read_participants(write(tmp_path, text), ["01", "02"])


SPELLINGS = [("SUB-01", "01"), ("sub_01", "01"), ("sub01", "01"), ("Sub 1", "01"), ("AB-02", "ab02"), ("10", "10")]


@pytest.mark.parametrize(
    ("text", "labels", "rows"),
    [
        ("participant_id\tage\tsite\nsub-01\t30\n", ["01"], {"01": ["30", "n/a"]}),
        ("participant_id\nsub-01\n", ["01"], {"01": []}),
        ("participant_id\tage\n1\t30\n01\t40\n", ["1", "01"], {"1": ["30"], "01": ["40"]}),
        ("participant_id\tage\n1\t30\n", ["01", "001"], {"1": ["30"]}),  # the number of two labels
        ("participant_id\tage\n1.0\t30\n1.5\t40\n", ["10", "15", "01"], {"01": ["30"], "1.5": ["40"]}),
        *((f"participant_id\tage\n{text}\t30\n", ["01", "ab02"], {label: ["30"]}) for text, label in SPELLINGS),
        ("participant_id\tage\nsub-AB\t30\n", ["ab", "Ab"], {"AB": ["30"]}),  # either
    ],
)
def test_rows_are_matched_with_labels(tmp_path, text, labels, rows):
    assert read(write(tmp_path, text), labels)[1] == rows


TWICE = r"sub-01 appears twice \(lines 2 and 4\); keep one line per participant"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("participant_id\tage\nsub-01\t30\nsub-02\t31\nsub-01\t30\n", TWICE),
        ("participant_id\tage\nsub-01\t30\n1\t30\n", r"sub-01 appears twice \(lines 2 and 3\)"),
        ("name\tage\nsub-01\t30\n", r"no column participant_id \(columns: name, age\)"),
        ("participant_id\tage\nsub-01\t30\tA\n", "line 2 has 3 values, expected 2"),
        ('participant_id\tnote\nsub-01\t"a\nb"\nsub-02\tx\ty\n', "line 4 has 3 values, expected 2"),
        ("participant_id\tage\tage\nsub-01\t30\t31\n", "column 'age' appears twice"),
        ("participant_id\t\tage\nsub-01\tx\t30\n", "column 2 has no name"),
        ("participant_id\tage\nsub-01\t30\n\t31\n", "line 3 has no participant_id"),
        ('participant_id,age\nsub-01,"30\n', "line 2 has a quote that is not closed"),
        ('participant_id\tnote\nsub-01\t"open\nsub-02\tx\n', "line 2 has a quote that is not closed"),
        ("", "the file is empty; write at least the header participant_id"),
    ],
)
def test_tables_that_cannot_be_joined_are_errors(tmp_path, text, message):
    with pytest.raises(InputError, match=f"^participants.tsv: {message}"):
        read_participants(write(tmp_path, text), ["01", "02"])


def test_unreadable_tables_are_errors(tmp_path):
    path = tmp_path / "participants.tsv"
    with pytest.raises(InputError, match=r"^participants.tsv: cannot be read \(No such file or directory\)"):
        read_participants(path, ["01"])
    for content, message in (
        ("participant_id\tsite\nsub-01\tZürich\n".encode("latin-1"), "not UTF-8; save it as UTF-8"),
        (b"/annex/objects/MD5E-s20--d41d8cd98f00b204e9800998ecf8427e.tsv\n", ".*fetch it"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^participants.tsv: {message}"):
            read_participants(path, ["01"])


VISITS = [("01", "1"), ("01", "2")]


@pytest.fixture
def root(tmp_path):
    """A participant with two sessions, whose ages are in sessions.tsv."""
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-01\tF\n")
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t366\nses-2\t378\n")
    return tmp_path


def test_entries_come_from_all_dictionaries(root):
    (root / "participants.json").write_text('{"sex": {"Description": "Sex"}, "broken": 1}')
    (root / "sessions.json").write_text('{"age": {"Units": "months"}, "sex": {"Description": "at that time"}}')
    tables, warnings = read_participant_tables(root, VISITS)
    assert tables.descriptions == {"sex": {"Description": "Sex"}, "age": {"Units": "months"}}
    assert warnings == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "JSON"), ("/annex/objects/MD5E-s20--d41d8cd98f00b204e9800998ecf8427e.json", "fetch it")],
)
def test_unreadable_dictionary_is_a_warning(root, text, problem):
    (root / "participants.json").write_text(text)
    tables, (warning,) = read_participant_tables(root, VISITS)
    assert tables.descriptions == {}
    assert warning.startswith("participants.json: ")
    assert problem in warning
    assert warning.endswith("until then units and descriptions of its columns are unknown")


def test_changed_cells_are_reported_once_per_kind(root):
    rows = ["participant_id\tsex\tcentre\tnote", "SUB_01\tunknown\tZu\u0308rich\tx", "sub-02\t-\tZ\u00fcrich"]
    (root / "participants.tsv").write_text("\n".join(rows), encoding="utf-8")
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t?\nses-2\n")
    tables, warnings = read_participant_tables(root, [*VISITS, ("02", None)])
    assert warnings == [
        "participants.tsv: SUB_01 is sub-01; spell ids like the folders",
        "participants.tsv: fewer values than the header in line 3; the last columns are n/a there",
        "participants.tsv: sex of sub-01 is 'unknown', sex of sub-02 is '-'; read as missing, which BIDS writes n/a",
        "sessions.tsv: fewer values than the header in sub-01: line 3; the last columns are n/a there",
        "sessions.tsv: sub-01: age of ses-1 is '?'; read as missing, which BIDS writes n/a",
    ]
    assert tables.participants["sex"].isna().all()
    assert tables.participants["centre"].tolist() == ["Z\u00fcrich"] * 2  # NFC
    assert tables.sessions["age"].isna().all()


def test_unusable_sessions_table_leaves_other_sessions(root):
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("")
    (root / "sub-02").mkdir(exist_ok=True)
    (root / "sub-02" / "sub-02_sessions.tsv").write_text("session_id\tage\nses-1\t31\n")
    tables, warnings = read_participant_tables(root, [("01", "1"), ("02", "1")])
    assert tables.sessions["age"].to_dict() == {("02", "1"): "31"}
    message = r"^sub-01_sessions.tsv: the file is empty; write .* the header session_id; until then the .* own columns"
    assert any(re.match(message, warning) for warning in warnings)


def test_session_values_win_with_their_dictionary(root):
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    (root / "participants.json").write_text('{"age": {"Units": "years"}}')
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t366\nses-2\tn/a\n")
    (root / "sub-01" / "sub-01_sessions.json").write_text('{"age": {"Units": "months"}}')
    (root / "sessions.json").write_text('{"age": {"Units": "weeks"}}')
    tables, _ = read_participant_tables(root, VISITS)
    assert tables.at_visits(VISITS)["age"].tolist() == ["366", "30"]
    own = zip(VISITS, tables.is_session_value(VISITS, "age"), strict=True)
    assert [tables.dictionary_entry(visit, "age", own=of_session) for visit, of_session in own] == [
        ({"Units": "months"}, "sub-01_sessions.json"),
        ({"Units": "years"}, "participants.json"),
    ]
