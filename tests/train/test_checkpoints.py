import pytest
import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.train import core
from bids_dgmseg.train.core import read_checkpoint, write_checkpoint
from bids_dgmseg.train.log import write_record


@pytest.fixture
def path(tmp_path):
    return tmp_path / "segmenter_checkpoint.pt"


@pytest.fixture
def state():
    return {"network": {"w": torch.arange(20_000.0)}, "step": 7}


def names(path):
    return sorted(file.name for file in path.parent.iterdir())


def test_small_checkpoint_is_one_file(path, state):
    write_checkpoint(state, path)
    assert names(path) == ["segmenter_checkpoint.pt"]
    assert read_checkpoint(path)["step"] == 7


def test_large_checkpoint_is_split(path, state, monkeypatch):
    monkeypatch.setattr(core, "LARGEST_BYTES", 30_000)  # 80,000 bytes of numbers and some frame
    write_checkpoint(state, path)
    assert len(names(path)) == 4
    assert all(file.stat().st_size <= 30_000 for file in path.parent.iterdir())
    assert torch.equal(read_checkpoint(path)["network"]["w"], state["network"]["w"])


def test_earlier_parts_are_removed(path, state, monkeypatch):
    monkeypatch.setattr(core, "LARGEST_BYTES", 30_000)
    write_checkpoint(state, path)
    before = names(path)
    write_checkpoint({**state, "step": 8}, path)
    assert set(names(path)) & set(before) == {"segmenter_checkpoint.pt"}
    assert read_checkpoint(path)["step"] == 8


def test_missing_part_is_refused(path, state, monkeypatch):
    monkeypatch.setattr(core, "LARGEST_BYTES", 30_000)
    write_checkpoint(state, path)
    (part,) = path.parent.glob("*.2of3")
    part.unlink()
    with pytest.raises(InputError, match=r"^segmenter_checkpoint\.pt: its part .*2of3 is missing; copy the whole"):
        read_checkpoint(path)


def test_damaged_part_is_refused(path, state, monkeypatch):
    monkeypatch.setattr(core, "LARGEST_BYTES", 30_000)
    write_checkpoint(state, path)
    (part,) = path.parent.glob("*.2of3")
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(InputError, match=r"its parts are damaged; copy the whole folder again"):
        read_checkpoint(path)


def test_plain_torch_file_is_read(path, state):
    torch.save(state, path)
    assert read_checkpoint(path)["step"] == 7


def test_record_of_a_different_training_is_refused(tmp_path):
    write_record(tmp_path, {"seed": 1, "folds": (1, 2)}, begun=False, length={"epochs": 1})
    write_record(tmp_path, {"seed": 1, "folds": [1, 2]}, begun=True, length={"epochs": 2})
    with pytest.raises(InputError, match=r"contains a different training \(differs in seed\); choose a new OUT"):
        write_record(tmp_path, {"seed": 2, "folds": [1, 2]}, begun=True)
    write_record(tmp_path, {"seed": 2, "folds": [1, 2]}, begun=False)
