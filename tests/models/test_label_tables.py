"""Label tables: color tables read back by the rules of each viewer's documentation, BIDS tables, label maps."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.label_tables import Label, format_color_tables, match_name, read_label_table
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES

TABLES = format_color_tables(STRUCTURES)


@pytest.mark.parametrize("name", ["freesurfer.txt", "slicer.ctbl", "itksnap.txt"])
def test_color_tables_are_read_back(name, tmp_path):
    (tmp_path / name).write_bytes(TABLES[name])
    rows = [Label(row.index, row.abbreviation, row.abbreviation, row.color) for row in STRUCTURES]
    assert read_label_table(tmp_path / name) == rows


def test_columns_of_viewers():
    first = STRUCTURES[0]
    rgb = [int(first.color[start : start + 2], 16) for start in (1, 3, 5)]
    lines = {name: content.decode().splitlines() for name, content in TABLES.items() if name != "mricrogl.lut"}
    texts = [str(value) for value in rgb]
    assert lines["freesurfer.txt"][1].split() == [str(first.index), first.abbreviation, *texts, "0"]  # transparency
    assert lines["slicer.ctbl"][:2] == ["# Color table file slicer.ctbl", f"# {len(STRUCTURES) + 1} values"]
    assert lines["slicer.ctbl"][3].split() == [str(first.index), first.abbreviation, *texts, "255"]  # opacity
    assert lines["itksnap.txt"][1].split() == [str(first.index), *texts, "1", "1", "1", f'"{first.abbreviation}"']
    index, *fractions, name = lines["fsleyes.lut"][0].split()
    assert (index, name) == (str(first.index), first.abbreviation)
    assert [float(value) for value in fractions] == pytest.approx(np.array(rgb) / 255, abs=1e-5)
    content = TABLES["mricrogl.lut"]
    assert len(content) == 768
    assert [content[first.index + offset] for offset in (0, 256, 512)] == rgb
    assert content[0] == content[256] == content[512] == 0


def test_missing_values_of_a_bids_table(tmp_path):
    path = tmp_path / "dseg.tsv"
    path.write_text(
        "\ufeffindex\tname\tabbreviation\tcolor\n0\tbackground\tn/a\tn/a\n1\tlesion\tn/a\tn/a\n2\tn/a\tn/a\tFF0000\n"
        "3\tx\tNA\t#00ff00\n",
        encoding="utf-8",
    )
    expected = [
        Label(1, "lesion", "lesion", "#888888"),
        Label(2, "2", "2", "#ff0000"),
        Label(3, "x", "NA", "#00ff00"),  # a nucleus, not a missing value
    ]
    assert read_label_table(path) == expected
    assert read_label_table(pd.DataFrame({"index": [7.0], "name": ["x"]})) == [Label(7, "x", "x")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("hello world\n", "no column index; expected index and name, or a table of FreeSurfer, ITK-SNAP or 3D Slicer"),
        ("index\tcolor\n1\t#ff0000\n", "no column name"),
        ("1 a 0 0 0 0\n1 b 0 0 0 0\n", "1 is listed twice; keep one row per label"),
        ("index\tname\none\ta\n", "index one, expected integers"),
        ("index\tname\n0\tbackground\n", "no labels found"),
    ],
)
def test_unusable_tables(content, problem, tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"^table\.txt: {problem}"):
        read_label_table(path)


def test_names_of_freesurfer_match():
    names = {row.index: row.name for row in read_label_table("freesurfer")}
    expected = {row.abbreviation for row in ALL_STRUCTURES if row.freesurfer in names}
    assert {"NAC_L", "NAC_R", "THA_L", "SN_R"} < expected
    assert {match_name(names[row.freesurfer]) for row in ALL_STRUCTURES if row.freesurfer in names} == expected
    assert match_name("Right-Thalamus-Proper") == "THA_R"  # until FreeSurfer 6


def test_names_of_suit_and_mricloud_are_matched():
    assert [match_name(row.name) for row in read_label_table("suit")] == ["DN_L", "DN_R", "IN_L", "IN_R"]
    assert [row.index for row in read_label_table("suit")] == [29, 30, 31, 32]
    names = "Caud_L Put_R GP_L RedNc_R Snigra_L NucAccumbens_R Thal_L"
    assert [match_name(name) for name in names.split()] == "CN_L PUT_R GP_L RN_R SN_L NAC_R THA_L".split()
    assert match_name("CerebellumGM_L") is None
