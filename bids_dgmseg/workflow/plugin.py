"""Nipype's MultiProc with a process of its own for every node."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nipype import Node
from nipype.pipeline.plugins.multiproc import MultiProcPlugin, run_node

from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.workflow.builder import STEPS
from bids_dgmseg.workflow.environment import ignore_interrupts, log_to

_PRELOAD = ("bids_dgmseg.workflow.interfaces", "torch")


class WorkersPlugin(MultiProcPlugin):
    """Run nodes in parallel, each in a new process, so that one that is killed fails alone and never hangs the run.

    In a shared pool a killed worker takes the others' work with it, and Nipype waits for its answer for ever. New
    processes come from a server that has the libraries loaded already.

    Parameters
    ----------
    plugin_args : dict
        Those of MultiProc, and ``logs``: the folder that the log is written to.
    """

    def __init__(self, plugin_args: dict[str, Any]) -> None:
        super().__init__({**plugin_args, "mp_context": "forkserver", "raise_insufficient": False})
        self.pool.shutdown()
        self._report: Callable[[Node, str], None] = plugin_args["status_callback"]
        self._status_callback: Callable[[Node, str], None] = self._report_progress
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOAD))
        with ignore_interrupts():  # Ctrl-C reaches every process of a terminal; the run itself ends the others
            forkserver.ensure_running()

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the graph, and leave no process behind whatever happens."""
        gc.freeze()  # Nipype collects garbage at every poll: with torch loaded that kept a whole core busy
        try:
            super().run(*args, **kwargs)
        finally:
            gc.unfreeze()
            for process, _, _ in self._task_obj.values():
                process.kill()
                process.join()

    def _report_progress(self, node: Node, status: str) -> None:
        if status != "exception":  # told by _report_crash, when there is a crash file to look into
            self._report(node, status)

    def _report_crash(self, node: Node, result: dict[str, Any] | None = None) -> str:
        crash_file: str = super()._report_crash(node, result)
        self._report(node, "exception")
        return crash_file

    def _sort_jobs(self, jobids: Sequence[int], scheduler: str | None = None) -> list[int]:
        """Finish scans that are begun before others are."""
        return sorted(jobids, key=lambda job: (-STEPS.index(self.procs[job].name), job))

    def _submit_job(self, node: Node, updatehash: bool = False) -> int:
        self._taskid += 1
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (sender, node, updatehash, self._taskid, self.plugin_args["logs"])
        process = self._context.Process(target=_work, args=arguments, name=node.fullname)
        process.start()
        sender.close()  # the worker's copy is the only one now: its end is the worker's end
        self._task_obj[self._taskid] = (process, receiver, node)
        return int(self._taskid)

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        process, receiver, node = self._task_obj[taskid]
        alive = process.is_alive()  # asked first: what a dead process has said is in the pipe
        if not receiver.poll():
            if alive:
                return None
            return self._mourn(process, node)
        try:
            result: dict[str, Any] = receiver.recv()
        except EOFError:
            return self._mourn(process, node)
        _end(process)
        return result

    def _mourn(self, process: Any, node: Node) -> dict[str, Any]:
        _end(process)
        step = node.name
        if process.exitcode == -signal.SIGKILL:
            limit = f"{self.memory_gb:g}"
            why = f"{step} was killed, probably for memory; lower --nprocs or raise --mem-gb (now {limit})"
        elif process.exitcode < 0:
            why = f"{step} was ended by {signal.Signals(-process.exitcode).name}; see the log"
        else:
            why = f"{step} ended without a result (exit code {process.exitcode}); see the log"
        return {"result": None, "traceback": [f"bids_dgmseg.errors.InputError: {why}\n"]}

    def _clear_task(self, taskid: int) -> None:
        _, receiver, _ = self._task_obj.pop(taskid)
        receiver.close()

    def _postrun_check(self) -> None:
        pass  # there is no pool


def _end(process: Any) -> None:
    """Wait for a process that has nothing more to say; one that lingers is killed."""
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _work(sender: Connection, node: Node, updatehash: bool, taskid: int, logs: Path) -> None:
    """Run one node in this process and send its result."""
    keep_freed_memory()
    os.chdir("/")  # the directory the run was started from may be gone
    with log_to(logs), contextlib.closing(sender):
        result = run_node(node, updatehash, taskid)
        with contextlib.suppress(BrokenPipeError):  # the run was interrupted: nobody waits for it
            sender.send(result)
