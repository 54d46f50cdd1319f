from __future__ import annotations

from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from bids_dgmseg.errors import InputError
from bids_dgmseg.workflow.interfaces import Prepare, StepNode
from bids_dgmseg.workflow.runner import _work


class UnpicklableError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


class Failing(StepNode):
    """Node that raises a given exception."""

    exception: Exception

    def run(self, updatehash: bool = False) -> Any:
        raise self.exception


def run_failing(exception: Exception, folder: Path) -> Any:
    node = Failing(Prepare(), name="prepare")
    node.exception = exception
    receiver, sender = Pipe(duplex=False)
    _work(sender, node, False, 7, folder)
    return receiver.recv()


@pytest.fixture(autouse=True)
def _stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a worker leaves the directory that it was started in; return to it afterwards


def test_interrupted_run_leaves_workers_silent(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(StepNode, "run", lambda node, updatehash: None)
    receiver, sender = Pipe(duplex=False)
    receiver.close()
    _work(sender, StepNode(Prepare(), name="prepare"), False, 1, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_exception_reaches_the_run_as_object(tmp_path):
    result = run_failing(InputError("sub-01_Chimap.nii.gz: all voxels are 0; export it again"), tmp_path)
    assert isinstance(result["error"], InputError)
    assert (result["taskid"], result["result"]) == (7, None)
    assert "all voxels are 0" in "".join(result["traceback"])


def test_unpicklable_exception_is_named(tmp_path):
    error = run_failing(UnpicklableError("disk", "full"), tmp_path)["error"]
    assert (type(error), str(error)) == (RuntimeError, "UnpicklableError: disk")
