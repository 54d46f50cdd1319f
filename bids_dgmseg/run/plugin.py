"""Nipype plugin that runs nodes in parallel processes."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from traceback import format_exception
from typing import Any

from nipype.pipeline.plugins.multiproc import MultiProcPlugin

from bids_dgmseg.errors import InputError, raise_if_interrupted
from bids_dgmseg.interfaces.step import StepNode
from bids_dgmseg.resources import end_with_parent, keep_freed_memory
from bids_dgmseg.run.environment import WORKER_MODULES, log_to, worker_context
from bids_dgmseg.workflows.build import MEMORY_GB


class WorkersPlugin(MultiProcPlugin):
    """Run nodes in parallel, one at a time per process, so that a killed node fails alone and never blocks the run.

    In a shared pool a killed worker takes the others' work with it, and Nipype waits for its result forever. New
    processes come from a server that has loaded the libraries already. They run further nodes, for which they keep the
    memory of the former ones: in a new process, half of the time of `segment` is spent on getting it from the system.

    Parameters
    ----------
    plugin_args : dict
        Those of MultiProc, and ``logs``: the folder of the log.
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__({**plugin_args, "mp_context": "forkserver", "raise_insufficient": False})
        self.pool.shutdown()
        self._report: Callable[[StepNode, str], None] = plugin_args["status_callback"]
        self._status_callback: Callable[[StepNode, str], None] = self._report_progress
        self._context = worker_context()
        self._idle: list[_Worker] = []

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the graph; no process outlives it."""
        try:
            super().run(*args, **kwargs)
        finally:
            self.end_workers()

    def end_workers(self) -> None:
        """Kill all processes, whatever they are doing."""
        for worker in [*self._idle, *self._task_obj.values()]:
            worker.process.kill()
            worker.end()

    def _report_progress(self, node: StepNode, status: str) -> None:
        if status == "end":  # the others are reported when a process has started, and once there is a crash file
            self._report(node, status)

    def _report_crash(self, node: StepNode, result: dict[str, Any] | None = None) -> str:
        node.error = result.get("error") if result else None
        crash_file: str = super()._report_crash(node, result)
        self._report(node, "exception")
        return crash_file

    def _sort_jobs(self, jobids: Sequence[int], scheduler: str | None = None) -> list[int]:
        """Finish scans that have been started before starting others."""
        steps = [*MEMORY_GB]
        return sorted(jobids, key=lambda job: (-steps.index(self.procs[job].name), job))

    def _prerun_check(self, graph: Any) -> None:
        largest_gb = max(node.mem_gb for node in graph.nodes())
        for node in graph.nodes():
            node._mem_gb = largest_gb  # its process may keep as much of a former node
        super()._prerun_check(graph)

    def _submit_job(self, node: StepNode, updatehash: bool = False) -> int:
        self._taskid += 1
        task = (node, updatehash, self._taskid)
        worker = self._take_worker()
        while not worker.start(task):
            worker.end()  # it was killed while it was idle
            worker = self._take_worker()
        self._task_obj[self._taskid] = worker
        self._report(node, "start")
        return int(self._taskid)

    def _take_worker(self) -> _Worker:
        return self._idle.pop() if self._idle else _Worker(self._context, self.plugin_args["logs"])

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        """Start the nodes that are ready, then wait for a result, or a little for an interrupt."""
        super()._send_procs_to_workers(updatehash=updatehash, graph=graph)
        if self._task_obj:  # else the next nodes are ready
            wait([worker.connection for worker in self._task_obj.values()], timeout=_WAIT_S)

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        raise_if_interrupted()
        worker: _Worker = self._task_obj[taskid]
        alive = worker.process.is_alive()  # asked first: whatever a dead process has sent is in the pipe
        if worker.connection.poll():
            with contextlib.suppress(EOFError, ConnectionError):
                result: dict[str, Any] = worker.connection.recv()
                return result
        elif alive:
            return None
        code = worker.end()
        problem = f"ended without a result (exit code {code}); see the log"
        if code == -signal.SIGKILL:
            advice = f"lower `nprocs` or raise `mem_gb` (now {self.memory_gb:g})"
            problem = f"was killed, probably out of memory; {advice}"
        elif code < 0:
            problem = f"was terminated by {signal.Signals(-code).name}; see the log"
        return _failure(InputError(f"{worker.node.name} {problem}"))

    def _clear_task(self, taskid: int) -> None:
        worker: _Worker = self._task_obj.pop(taskid)
        if worker.n_nodes < _NODES_PER_WORKER and worker.process.is_alive():
            self._idle.append(worker)
        else:
            worker.end()

    def _postrun_check(self) -> None:
        pass  # there is no pool


_WAIT_S = 0.2

_NODES_PER_WORKER = 50
"""After these, a process is replaced: the memory of a long-lived one may become fragmented."""


class _Worker:
    """A process that runs one node after another."""

    node: StepNode
    """The node that it runs, or ran last."""

    def __init__(self, context: Any, logs: Path) -> None:
        self.connection, other = context.Pipe()
        # The server may be older than the run, whose private folder its variables do not name.
        self.process = context.Process(target=_work, args=(other, logs, dict(os.environ), WORKER_MODULES))
        self.process.start()
        other.close()  # the process has the only copy now, so that the pipe ends with the process
        self.n_nodes = 0

    def start(self, task: tuple[StepNode, bool, int]) -> bool:
        """Run a node; return whether the process exists."""
        try:
            self.connection.send(task)
        except ConnectionError:
            return False
        self.node = task[0]
        self.n_nodes += 1
        return True

    def end(self) -> int:
        """Close the pipe, which ends an idle process; kill it if it does not end. Return its exit code."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return int(self.process.exitcode or 0)


def _failure(error: BaseException) -> dict[str, Any]:
    """Return Nipype's result of a failed node, with the exception."""
    return {"result": None, "traceback": format_exception(error), "error": error}


def _work(
    connection: Connection, logs: Path, variables: Mapping[str, str] | None = None, modules: Sequence[str] = ()
) -> None:
    """Run the nodes that arrive in this process and send their results, until the other end is closed."""
    end_with_parent()  # after SIGKILL of the run, it would go on with its node, in a folder that the next run removes
    keep_freed_memory()
    os.environ.update(variables or {})
    for module in modules:  # the server has loaded them, unless a module could only be found by the run
        importlib.import_module(module)
    os.chdir("/")  # the directory that the run was started from may be gone
    with log_to(logs), contextlib.closing(connection), contextlib.suppress(EOFError, ConnectionError):
        while True:
            node, updatehash, taskid = connection.recv()
            try:
                result = {"result": node.run(updatehash=updatehash), "traceback": None, "error": None}
            except BaseException as error:  # noqa: BLE001 - whatever it is, the run reports it
                result = _failure(error)
                try:
                    pickle.loads(pickle.dumps(error))
                except Exception:  # noqa: BLE001 - the classes of other libraries may not survive pickling
                    result["error"] = RuntimeError(f"{type(error).__name__}: {error}")
            connection.send({**result, "taskid": taskid})
            del node, result  # and with them arrays, before the next node arrives
