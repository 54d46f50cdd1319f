import errno
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import MappedArray, arrays_folder, sole_writer, store


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
