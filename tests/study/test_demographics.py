"""Data dictionaries beside participants.tsv and sessions.tsv."""

import json

import pytest

from bids_dgmseg.study.demographics import read_people


@pytest.fixture
def root(tmp_path):
    """A participant with two sessions, whose ages are in the table of sessions."""
    (tmp_path / "participants.tsv").write_text("participant_id\tsex\nsub-01\tF\n")
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t366\nses-2\t378\n")
    return tmp_path


VISITS = (("01", "1"), ("01", "2"))


def test_descriptions_are_taken_from_all_dictionaries(root):
    (root / "participants.json").write_text('{"sex": {"Description": "Sex"}, "broken": 1}')
    (root / "sessions.json").write_text('{"age": {"Units": "months"}, "sex": {"Description": "at that time"}}')
    people, warnings = read_people(root, VISITS)
    assert people.descriptions == {"sex": {"Description": "Sex"}, "age": {"Units": "months"}}
    assert people.describe("01", "1", "sex") == ({"Description": "Sex"}, "participants.json")
    assert people.describe("01", "1", "age") == ({"Units": "months"}, "sessions.json")
    assert warnings == []


def test_a_dictionary_beside_the_table_of_one_participant_is_read(root):
    (root / "sub-01" / "sub-01_sessions.json").write_text('{"age": {"Units": "months"}}')
    people, _ = read_people(root, VISITS)
    assert people.descriptions == {"age": {"Units": "months"}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "invalid JSON (line 1, column 2); fix the file"),
        (
            "/annex/objects/MD5E-s20--d41d8cd98f00b204e9800998ecf8427e.json",
            "content not fetched (the file is only a pointer); fetch it first "
            "(datalad get, git annex get or git lfs pull)",
        ),
    ],
)
def test_a_dictionary_that_cannot_be_read_is_told(root, text, problem):
    (root / "participants.json").write_text(text)
    people, warnings = read_people(root, VISITS)
    assert people.descriptions == {}
    assert warnings == [f"participants.json: {problem}; until then units and descriptions of its columns are not known"]


def test_a_dictionary_without_its_table_is_not_read(tmp_path):
    (tmp_path / "participants.json").write_text(json.dumps({"age": {"Units": "months"}}))
    assert read_people(tmp_path, VISITS)[0].descriptions == {}


def test_a_value_is_in_the_unit_of_the_table_that_it_is_from(root):
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    (root / "participants.json").write_text('{"age": {"Units": "years"}}')
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t366\nses-2\tn/a\n")
    (root / "sub-01" / "sub-01_sessions.json").write_text('{"age": {"Units": "months"}}')
    (root / "sessions.json").write_text('{"age": {"Units": "weeks"}}')
    people, _ = read_people(root, VISITS)
    assert people.of("01", "1")["age"] == "366"
    assert people.describe("01", "1", "age") == ({"Units": "months"}, "sub-01_sessions.json")
    assert people.of("01", "2")["age"] == "30"
    assert people.describe("01", "2", "age") == ({"Units": "years"}, "participants.json")
