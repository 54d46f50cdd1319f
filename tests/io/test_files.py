from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.io.files import (
    MappedArray,
    arrays_folder,
    atomic_write,
    copy_file,
    list_folders,
    read_json,
    read_tsv,
    sole_writer,
    store,
    write_json,
    write_text,
    write_tsv,
)


def test_other_encoding_is_rejected(tmp_path):
    (tmp_path / "a.json").write_bytes('{"Name": "Jürg"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"^a.json: not UTF-8 text \(line 1, character 12: 'ü'\); save it as UTF-8$"):
        read_json(tmp_path / "a.json")


def test_deeply_nested_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match=r"^a.json: too deeply nested; fix the file$"):
        read_json(tmp_path / "a.json")


def test_unfetched_json_is_reported(tmp_path):
    link = tmp_path / "sub-01_Chimap.json"
    link.symlink_to(tmp_path / ".git" / "annex" / "objects" / "MD5E-s12--0.json")
    with pytest.raises(InputError, match=r"^sub-01_Chimap.json: content not fetched \(broken symlink"):
        read_json(link)
    pointer = tmp_path / "sub-02_Chimap.json"
    pointer.write_text("/annex/objects/MD5E-s12--0.json\n")
    with pytest.raises(InputError, match=r"^sub-02_Chimap.json: content not fetched \(the file is only a pointer\)"):
        read_json(pointer)


def test_failed_copy_keeps_the_earlier_file(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    (tmp_path / "final").write_text("old")

    def full(source, target):
        Path(target).write_text("ne")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_file(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "new"]


def test_full_disk_is_one_line_with_the_file(tmp_path, capsys):
    def fill() -> int:
        with atomic_write(tmp_path / "map.nii.gz") as temporary:
            temporary.write_bytes(b"1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write() does, without the name of the file

    assert run_command("dgmseg simulate", fill) == 1
    said = "No space left on device; check the path, its permissions and the free disk space"
    assert capsys.readouterr().err == f"dgmseg simulate: error: {tmp_path}/map.nii.gz: {said}\n"
    assert not list(tmp_path.iterdir())


def test_json_converts_nan_and_numpy_values(tmp_path):
    write_json({"a": float("nan"), "b": np.float32(0.5), "c": (np.int64(1), np.inf), "d": Path("x")}, tmp_path / "x")
    assert json.loads((tmp_path / "x").read_text()) == {"a": "n/a", "b": 0.5, "c": [1, "n/a"], "d": "x"}


def test_byte_order_mark_is_ignored(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"Name": "x"}')
    assert read_json(tmp_path / "a.json") == {"Name": "x"}


def test_parallel_writers_leave_one_whole_file(tmp_path):
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_text(text, tmp_path / "a"), texts))
    assert (tmp_path / "a").read_text().rstrip() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_missing_values_are_written_as_na(tmp_path):
    table = pd.DataFrame({"name": ["a", None, ""], "value": [0.123456789, np.nan, 2], "n": [1, 2, 3]})
    write_tsv(table, tmp_path / "t.tsv", float_format="%.4g")
    assert (tmp_path / "t.tsv").read_text() == "name\tvalue\tn\na\t0.1235\t1\nn/a\tn/a\t2\nn/a\t2\t3\n"


def test_numbers_and_boolean_values_are_formatted(tmp_path):
    table = pd.DataFrame({"n": range(5), "value": [0.5, np.nan, 1 / 3, 2, -1e-9], "ok": [True, False] * 2 + [True]})
    write_tsv(table, tmp_path / "t.tsv", float_format="%.3g")
    rows = "0\t0.5\ttrue\n1\tn/a\tfalse\n2\t0.333\ttrue\n3\t2\tfalse\n4\t-1e-09\ttrue\n"
    assert (tmp_path / "t.tsv").read_text() == f"n\tvalue\tok\n{rows}"


@pytest.mark.parametrize(("last", "written"), [("c", "c"), ('c"', '"c"""'), ("c\td", '"c\td"')])
def test_only_special_cells_are_quoted(tmp_path, last, written):
    table = pd.DataFrame({"n": [1, 2], "x": ["a", "e"], "z": [last, None]})
    write_tsv(table, tmp_path / "t.tsv")
    assert (tmp_path / "t.tsv").read_bytes().decode() == f"n\tx\tz\n1\ta\t{written}\n2\te\tn/a\n"


def test_floats_survive_a_round_trip(tmp_path):
    numbers = np.random.default_rng(1).normal(size=1000) * 10.0 ** np.arange(-500, 500).clip(-300, 300)
    path = write_tsv(pd.DataFrame({"value": [1 / 3, np.nan, -0.0, *numbers]}), tmp_path / "t.tsv")
    header, *cells = path.read_text().splitlines()
    assert [header, *cells[:3]] == ["value", "0.3333333333333333", "n/a", "-0.0"]
    assert list(map(float, cells[3:])) == numbers.tolist()


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
        (b"name\nJ\xfcrg\n", r"^t.tsv: not UTF-8 text \(line 2, character 2: 'ü'\); save it as UTF-8$"),
        (b"a\n1\n1\t2\n", r"^t.tsv: not a tab-separated table \(.*Expected 1 fields in line 3, saw 2.*\); fix"),
    ],
    ids=["missing", "pointer", "empty", "encoding", "too many cells"],
)
def test_unreadable_table_is_rejected(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_tsv(tmp_path / "t.tsv")


def test_only_folders_with_the_prefix_are_listed(tmp_path):
    for name in ("ses-1", "ses-2", "anat"):
        (tmp_path / "sub-01" / name).mkdir(parents=True)
    (tmp_path / "sub-01" / "ses-3").touch()
    (tmp_path / "sub-02").touch()
    assert sorted(path.name for path in list_folders(tmp_path / "sub-01", "ses-")) == ["ses-1", "ses-2"]
    assert list_folders(tmp_path / "sub-02", "ses-") == []
    assert list_folders(tmp_path / "sub-03", "ses-") == []


@dataclass(frozen=True)
class Record:
    name: str
    values: Any


class StoredRecord(Record):
    values: Any = MappedArray()


VALUES = np.arange(100_000, dtype=np.float32).reshape(100, 1000)


def test_array_is_read_from_a_file(tmp_path):
    stored = store(Record("one", VALUES), StoredRecord, tmp_path)
    assert stored.name == "one"
    np.testing.assert_array_equal(stored.values, VALUES)
    content = pickle.dumps(stored)
    assert len(content) < 1000  # a process of its own reads the file itself
    np.testing.assert_array_equal(pickle.loads(content).values, VALUES)
    stored.values[0, 0] = 5
    assert stored.values[0, 0] == 0


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    with arrays_folder(tmp_path / "out") as folder:
        for error in (OSError("25000 requested and 120 written"), OSError(errno.EDQUOT, "Disk quota exceeded")):
            monkeypatch.setattr(np, "save", lambda *args, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(InputError, match=r"out: prepared maps cannot be written \([tD].*\); free space, or"):
                store(Record("one", VALUES), StoredRecord, folder)


def test_folder_is_removed_after_an_interrupt(tmp_path):
    def interrupted() -> None:
        with arrays_folder(tmp_path / "out") as folder:
            store(Record("one", VALUES), StoredRecord, folder)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_folders_of_killed_processes_are_removed(tmp_path):
    with arrays_folder(tmp_path) as running:
        killed = running.with_name(f"{running.name[:-8]}killed12")
        killed.mkdir()
        (tmp_path / f".{killed.name}.lock").touch()
        with arrays_folder(tmp_path):
            assert not killed.exists()
            assert running.exists()
    assert not list(tmp_path.iterdir())


def test_folder_of_another_writer_is_rejected(tmp_path):
    with sole_writer(tmp_path / "out"), pytest.raises(InputError, match=r"^out: another process is writing into it"):
        sole_writer(tmp_path / "out").__enter__()
    assert not list(tmp_path.iterdir())
    with sole_writer(tmp_path / "out", "fold_0"), sole_writer(tmp_path / "out", "fold_1"):
        pass
