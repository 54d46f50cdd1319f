"""Color tables, read back by the rules of each viewer's documentation."""

from __future__ import annotations

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.color_tables import LabelColor, format_color_tables, read_color_table
from bids_dgmseg.models.structures import STRUCTURES

TABLES = format_color_tables(STRUCTURES)
EXPECTED = [LabelColor(one.index, one.abbreviation, one.color) for one in STRUCTURES]


def color_of(red: int, green: int, blue: int) -> str:
    """Return ``#rrggbb``."""
    return f"#{red:02x}{green:02x}{blue:02x}"


def data_lines(name: str) -> list[list[str]]:
    """Return the fields of the lines of a text table that are not comments."""
    lines = TABLES[name].decode().splitlines()
    return [line.split() for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("name", ["freesurfer.txt", "slicer.ctbl"])
def test_number_name_and_bytes(name):
    background, *rows = data_lines(name)
    assert background[0] == "0"
    assert [LabelColor(int(row[0]), row[1], color_of(*map(int, row[2:5]))) for row in rows] == EXPECTED
    assert {row[5] for row in rows} == {"0" if name == "freesurfer.txt" else "255"}  # transparency; opacity
    assert {len(row) for row in rows} == {6}


def test_slicer_header():
    assert TABLES["slicer.ctbl"].startswith(b"# Color table file")
    assert f"# {len(STRUCTURES) + 1} values".encode() in TABLES["slicer.ctbl"]


def test_itksnap():
    _, *rows = data_lines("itksnap.txt")
    found = [LabelColor(int(row[0]), row[7].strip('"'), color_of(*map(int, row[1:4]))) for row in rows]
    assert found == EXPECTED
    assert {tuple(row[4:7]) for row in rows} == {("1", "1", "1")}


def test_fsleyes():
    rows = data_lines("fsleyes.lut")
    found = [
        LabelColor(int(row[0]), row[4], color_of(*(round(255 * float(value)) for value in row[1:4]))) for row in rows
    ]
    assert found == EXPECTED


def test_mricrogl():
    content = TABLES["mricrogl.lut"]
    assert len(content) == 768
    for one in STRUCTURES:
        assert color_of(content[one.index], content[256 + one.index], content[512 + one.index]) == one.color
    assert content[0] == content[256] == content[512] == 0


@pytest.mark.parametrize("name", ["freesurfer.txt", "itksnap.txt", "slicer.ctbl", "fsleyes.lut"])
def test_tables_are_read_back(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(TABLES[name])
    assert read_color_table(path) == EXPECTED


def test_names_with_spaces(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text('    7   255    0    0        1  1  1    "red nucleus, left"\n', encoding="utf-8")
    assert read_color_table(path) == [LabelColor(7, "red nucleus, left", "#ff0000")]


def test_missing_values_of_a_bids_table(tmp_path):
    path = tmp_path / "dseg.tsv"
    path.write_text(
        "index\tname\tabbreviation\tcolor\n1\tlesion\tn/a\tn/a\n2\tn/a\tn/a\tFF0000\n3\tx\tX\t#00ff00\n",
        encoding="utf-8",
    )
    gray, red, green = "#888888", "#ff0000", "#00ff00"
    assert read_color_table(path) == [LabelColor(1, "lesion", gray), LabelColor(2, "2", red), LabelColor(3, "X", green)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no labels found"),
        ("hello world\n", "no labels found"),
        ("1 a 0 0 0 0\n1 b 0 0 0 0\n", "1 is listed twice"),
        ("index\tname\n0\tbackground\n", "no labels found"),
    ],
)
def test_unusable_tables(content, problem, tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"table\.txt: {problem}"):
        read_color_table(path)
