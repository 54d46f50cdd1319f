from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
from nipype import Workflow

from bids_dgmseg.errors import InputError
from bids_dgmseg.interfaces import LocalizeNuclei
from bids_dgmseg.interfaces.step import StepNode
from bids_dgmseg.run.plugin import WorkersPlugin, _work


class UnpicklableError(Exception):
    def __init__(self, first: str, two: str) -> None:
        super().__init__(first)


class Calling(StepNode):
    """Node that calls a function."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def run(self, updatehash: bool = False) -> Any:
        return self.function(*self.arguments)


def node_of(function: Callable[..., Any], *arguments: Any, mem_gb: float = 1.0, name: str = "localize") -> Calling:
    node = Calling(LocalizeNuclei(), name=name, mem_gb=mem_gb)
    node.function, node.arguments = function, arguments
    return node


def fail(kind: type[Exception], *arguments: str) -> None:
    raise kind(*arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(node: StepNode, folder: Path) -> dict[str, Any]:
    """Run a node like a worker, in a thread of this process."""
    ours, theirs = Pipe()
    worker = Thread(target=_work, args=(theirs, folder))
    worker.start()
    ours.send((node, False, 7))
    result: dict[str, Any] = ours.recv()
    ours.close()
    worker.join()
    return result


@pytest.fixture(autouse=True)
def _stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a worker leaves the directory that it was started in; return to it afterwards


def test_exception_reaches_the_run_as_object(tmp_path):
    result = work(node_of(fail, InputError, "sub-01_Chimap.nii.gz: all voxels are 0; export it again"), tmp_path)
    assert isinstance(result["error"], InputError)
    assert (result["taskid"], result["result"]) == (7, None)
    assert "all voxels are 0" in "".join(result["traceback"])


def test_unpicklable_exception_is_named(tmp_path):
    error = work(node_of(fail, UnpicklableError, "disk", "full"), tmp_path)["error"]
    assert (type(error), str(error)) == (RuntimeError, "UnpicklableError: disk")


@pytest.fixture
def plugin(tmp_path) -> Iterator[WorkersPlugin]:
    """Plugin for two processes and 3 GB, outside of a run."""
    arguments = {"n_procs": 2, "memory_gb": 3, "logs": tmp_path, "status_callback": lambda node, status: None}
    plugin = WorkersPlugin(arguments)
    yield plugin
    plugin.end_workers()


def run_together(plugin: WorkersPlugin, *nodes: StepNode) -> list[Any]:
    """Run nodes at the same time, as Nipype does; return their results."""
    tasks = [plugin._submit_job(node) for node in nodes]
    results = []
    for task in tasks:
        while (result := plugin._get_result(task)) is None:
            time.sleep(0.01)
        results.append(result["error"] or result["result"])
        plugin._clear_task(task)
    return results


def test_processes_run_one_node_after_another(plugin):
    first = run_together(plugin, node_of(os.getpid), node_of(os.getpid))
    assert len({*first, os.getpid()}) == 3
    assert set(run_together(plugin, node_of(os.getpid), node_of(os.getpid))) == set(first)


def test_killed_node_fails_alone(plugin):
    (died, other) = run_together(plugin, node_of(die), node_of(os.getpid))
    assert "localize was killed, probably out of memory; lower `nprocs` or raise `mem_gb` (now 3)" == str(died)
    assert isinstance(other, int)
    assert other in run_together(plugin, node_of(os.getpid), node_of(os.getpid))


KILLED = """
import time
from pathlib import Path
from bids_dgmseg.run import plugin
plugin.WORKER_MODULES.clear()
print(plugin._Worker(plugin.worker_context(), Path("logs")).process.pid, flush=True)
time.sleep(600)
"""


def test_killed_run_leaves_no_worker():
    with subprocess.Popen([sys.executable, "-c", KILLED], text=True, stdout=subprocess.PIPE) as run:
        assert run.stdout
        worker = psutil.Process(int(run.stdout.readline()))
        run.kill()
    ended_s = time.monotonic() + 100
    with contextlib.suppress(psutil.NoSuchProcess):
        while worker.status() != psutil.STATUS_ZOMBIE:  # which nobody waits for in some containers
            assert time.monotonic() < ended_s
            time.sleep(0.05)


def test_memory_of_the_largest_node_is_planned_for_each(plugin):
    (workflow := Workflow("scans")).add_nodes([node_of(os.getpid, mem_gb=1), node_of(os.getpid, mem_gb=2, name="plot")])
    plugin._prerun_check(workflow._graph)
    assert [node.mem_gb for node in workflow._graph.nodes()] == [2, 2]  # a process may keep what it has once used
