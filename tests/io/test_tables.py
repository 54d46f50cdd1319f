from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.tables import format_tsv, read_tsv, write_tsv


def test_missing_values_are_written_as_na(tmp_path):
    table = pd.DataFrame({"name": ["a", None], "value": [0.123456789, np.nan], "n": [1, 2]})
    write_tsv(table, tmp_path / "t.tsv", float_format="%.4g")
    assert (tmp_path / "t.tsv").read_text() == "name\tvalue\tn\na\t0.1235\t1\nn/a\tn/a\t2\n"


def test_floats_survive_a_round_trip(tmp_path):
    table = pd.DataFrame({"value": [1 / 3, np.nan, -0.0]})
    pd.testing.assert_frame_equal(read_tsv(write_tsv(table, tmp_path / "t.tsv")), table)
    assert format_tsv(table) == "value\n0.3333333333333333\nn/a\n-0.0\n"


def test_only_na_and_empty_cells_are_missing(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbfname\tn\nNA\t1\nn/a\t2\n\t3\nnull\t4\n")
    table = read_tsv(tmp_path / "t.tsv")
    assert table["name"].isna().tolist() == [False, True, True, False]
    assert table["n"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"t.tsv: no such file; check the path$"),
        (b"/annex/objects/MD5E-s1--a.tsv", r"^t.tsv: content not fetched \(the file is only a pointer\); fetch"),
        (b"", r"^t.tsv: not a tab-separated table \(No columns to parse from file\); fix the file$"),
        (b"name\nJ\xfcrg\n", r"^t.tsv: not a tab-separated table \(.*codec can't decode byte.*\); fix the file$"),
        (b"a\n1\n1\t2\n", r"^t.tsv: not a tab-separated table \(.*Expected 1 fields in line 3, saw 2.*\); fix"),
    ],
    ids=["missing", "pointer", "empty", "encoding", "too many cells"],
)
def test_unreadable_table_is_rejected(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tsv(tmp_path / "t.tsv")
