from pathlib import Path

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.participants import read_participants


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "participants.tsv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        pytest.param("participant_id\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n", "utf-8", id="as BIDS has it"),
        pytest.param("participant_id\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n", "utf-8-sig", id="byte order mark"),
        pytest.param("participant_id\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n", "utf-16", id="UTF-16"),
        pytest.param(
            "participant_id\tage\tsite\r\nsub-01\t30.5\tA\r\nsub-02\t\tB\r\n", "utf-8", id="Windows, empty cell"
        ),
        pytest.param("participant_id,age,site\nsub-01,30.5,A\nsub-02,,B\n", "utf-8", id="commas"),
        pytest.param(
            "participant_id;age;site\nsub-01;30,5;A\nsub-02;;B\n", "utf-8", id="semicolons and decimal commas"
        ),
        pytest.param("participant_id  age site\nsub-01  30.5  A\nsub-02 n/a B\n", "utf-8", id="blanks"),
        pytest.param("participant_id\tage\tsite\n sub-01 \t 30.5\tA \nsub-02\tNaN\tB\n", "utf-8", id="blanks around"),
        pytest.param("participant_id\tage\tsite\n01\t30.5\tA\n02\tNA\tB\n", "utf-8", id="without sub-"),
        pytest.param("participant_id\tage\tsite\n1\t30.5\tA\n2\tn/a\tB\n", "utf-8", id="lost zeros"),
        pytest.param("participant_id\tage\tsite\n1.0\t30.5\tA\n2.0\tn/a\tB\n", "utf-8", id="ids as decimal numbers"),
        pytest.param("participant_id\tage\tsite\nsub-1\t30.5\tA\nsub-2\tn/a\tB\n", "utf-8", id="lost zeros after sub-"),
        pytest.param(
            "Subject ID\tage\tsite\nsub-01\t30.5\tA\nsub-02\tn/a\tB\n", "utf-8", id="another name of the column"
        ),
        pytest.param("age\tparticipant_id\tsite\n30.5\tsub-01\tA\n\tsub-02\tB\n", "utf-8", id="not the first column"),
        pytest.param(
            "participant_id\tage\tsite\t\nsub-01\t30.5\tA\t\t\n\nsub-02\t\tB\n\t\t\n", "utf-8", id="empty cells"
        ),
        pytest.param('participant_id,age,site\n"sub-01","30.5","A"\n"sub-02",,"B"\n', "utf-8", id="quotes"),
    ],
)
def test_tables_are_read_as_people_write_them(tmp_path, text, encoding):
    participants = read_participants(write(tmp_path, text, encoding), ["01", "02"])
    assert participants.columns == ("age", "site")
    assert participants.rows == {"01": ("30.5", "A"), "02": ("n/a", "B")}


def test_quoted_separators_belong_to_the_value(tmp_path):
    participants = read_participants(write(tmp_path, 'participant_id,note\nsub-01,"left, right"\n'), ["01"])
    assert participants.values("01") == ("left, right",)


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        pytest.param(
            'participant_id\tnote\tage\r\nsub-01\t"left\nside"\t30\r\nsub-02\t\t40\r\n',
            ("note", "age"),
            {"01": ("left side", "30"), "02": ("n/a", "40")},
            id="a line break in a quoted cell",
        ),
        pytest.param(
            'participant_id,note,age\nsub-01,"left, ""then""\n\nright",30\nsub-02,,40\n',
            ("note", "age"),
            {"01": ('left, "then" right', "30"), "02": ("n/a", "40")},
            id="commas, quotes, an empty line",
        ),
        pytest.param(
            'participant_id\t"note\n(free)"\tage\nsub-01\tx\t30\n',
            ("note (free)", "age"),
            {"01": ("x", "30")},
            id="a line break in the header",
        ),
        pytest.param(
            'participant_id\tnote\tage\nsub-01\t"left\t30\nsub-02\tx\t40\n',
            ("note", "age"),
            {"01": ('"left', "30"), "02": ("x", "40")},
            id="a quote that nothing closes is a letter",
        ),
        pytest.param(
            'participant_id\tnote\tage\nsub-01\t"left\t30\nsub-02\t"right\t40\n',
            ("note", "age"),
            {"01": ('"left', "30"), "02": ('"right', "40")},
            id="two of them do not close one another",
        ),
        pytest.param(
            'participant_id\tnote\tage\nsub-01\t5" scar\t30\nsub-02\t"5" scar\t40\n',
            ("note", "age"),
            {"01": ('5" scar', "30"), "02": ('"5" scar', "40")},
            id="inches",
        ),
        pytest.param(
            "participant_id\tscore (a, b, c, d)\tage\nsub-01\t1,5\t30\n",
            ("score (a, b, c, d)", "age"),
            {"01": ("1,5", "30")},
            id="more commas than tabs in the header",
        ),
    ],
)
def test_tables_are_cut_where_a_spreadsheet_would(tmp_path, text, columns, rows):
    participants = read_participants(write(tmp_path, text), ["01", "02"])
    assert (participants.columns, participants.rows) == (columns, rows)


def test_a_row_after_one_with_line_breaks_keeps_its_line_number(tmp_path):
    text = 'participant_id\tnote\nsub-01\t"a\nb"\nsub-02\tx\ty\n'
    with pytest.raises(InputError, match="line 4 has 3 values, expected 2"):
        read_participants(write(tmp_path, text), ["01", "02"])


def test_windows_letters_cut_no_line(tmp_path):
    """Byte 0x85 is an ellipsis to Windows, and the end of a line to latin-1."""
    text = "participant_id\tnote\tage\nsub-01\tZürich \u2026 x\t30\n"
    participants = read_participants(write(tmp_path, text, "cp1252"), ["01"])
    assert participants.values("01") == ("Zürich \u2026 x", "30")


def test_what_windows_has_no_letter_for_is_read_all_the_same(tmp_path):
    (tmp_path / "participants.tsv").write_bytes(b"participant_id\tsite\nsub-01\tZ\xfcrich\x81\n")
    assert read_participants(tmp_path / "participants.tsv", ["01"]).values("01") == ("Zürich\x81",)


def test_a_pointer_in_the_place_of_the_table_is_told(tmp_path):
    path = write(tmp_path, "/annex/objects/MD5E-s20--d41d8cd98f00b204e9800998ecf8427e.tsv\n")
    with pytest.raises(
        InputError, match=r"^participants.tsv: content not fetched \(the file is only a pointer\); fetch it"
    ):
        read_participants(path, ["01"])


def test_letters_of_other_languages_survive_an_old_encoding(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\tsite\nsub-01\tZürich\n", "latin-1"), ["01"])
    assert participants.values("01") == ("Zürich",)


def test_short_lines_end_in_missing_values(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\tage\tsite\nsub-01\t30\n"), ["01"])
    assert participants.values("01") == ("30", "n/a")


def test_a_table_of_ids_alone_has_no_columns(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\nsub-01\n"), ["01"])
    assert (participants.columns, participants.rows) == ((), {"01": ()})


def test_a_participant_that_is_not_in_the_table_has_missing_values(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\tage\nsub-01\t30\n"), ["01", "02"])
    assert participants.values("02") == ("n/a",)


def test_a_label_that_is_there_wins_over_its_number(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\tage\n1\t30\n01\t40\n"), ["1", "01"])
    assert participants.rows == {"1": ("30",), "01": ("40",)}


def test_a_number_that_fits_two_labels_fits_none(tmp_path):
    participants = read_participants(write(tmp_path, "participant_id\tage\n1\t30\n"), ["01", "001"])
    assert participants.rows == {"1": ("30",)}


def test_an_id_of_thousands_of_digits_is_a_text(tmp_path):
    participants = read_participants(write(tmp_path, f"participant_id\tage\n{'9' * 5000}\t30\n"), ["01"])
    assert participants.rows == {"9" * 5000: ("30",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "participant_id\tage\nsub-01\t30\nsub-02\t31\nsub-01\t30\n",
            r"sub-01 appears twice \(lines 2 and 4\); keep one line a participant",
            id="twice",
        ),
        pytest.param(
            "participant_id\tage\nsub-01\t30\n1\t30\n",
            r"sub-01 appears twice \(lines 2 and 3\)",
            id="twice in two spellings",
        ),
        pytest.param("name\tage\nsub-01\t30\n", r"no column participant_id \(columns: name, age\)", id="no ids"),
        pytest.param("participant_id\tage\nsub-01\t30\tA\n", "line 2 has 3 values, expected 2", id="long line"),
        pytest.param("participant_id\tage\tage\nsub-01\t30\t31\n", "column 'age' appears twice", id="column twice"),
        pytest.param("participant_id\t\tage\nsub-01\tx\t30\n", "column 2 has no name", id="column without a name"),
        pytest.param("participant_id\tage\nsub-01\t30\n\t31\n", "line 3 has no participant_id", id="no id"),
        pytest.param("", "is empty; write at least the header participant_id", id="empty"),
    ],
)
def test_what_cannot_be_joined_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=f"^participants.tsv: {message}"):
        read_participants(write(tmp_path, text), ["01", "02"])


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"participants.tsv: cannot be read \(No such file or directory\)"):
        read_participants(tmp_path / "participants.tsv", ["01"])
