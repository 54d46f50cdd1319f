"""Nipype plugins that run each node in its own process, or submit it as a job."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import format_exception
from typing import Any

from nipype.pipeline import plugins
from nipype.pipeline.plugins.multiproc import MultiProcPlugin

from bids_dgmseg.errors import InputError, raise_if_interrupted
from bids_dgmseg.resources import existing_objects_frozen, keep_freed_memory
from bids_dgmseg.workflow.batch_jobs import SCHEDULERS, SubmitPlugin
from bids_dgmseg.workflow.environment import log_to
from bids_dgmseg.workflow.interfaces import STEPS, StepNode


class WorkersPlugin(MultiProcPlugin):
    """Run nodes in parallel, each in a new process, so that a killed node fails alone and never blocks the run.

    In a shared pool a killed worker takes the others' work with it, and Nipype waits for its result forever. New
    processes come from a server that has loaded the libraries already.

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
        self._context = multiprocessing.get_context("forkserver")

    def run(self, *args: Any, **kwargs: Any) -> None:
        """Run the graph; no process outlives it."""
        try:
            with existing_objects_frozen():  # Nipype collects garbage at every poll, which keeps a whole core busy
                super().run(*args, **kwargs)
        finally:
            for process, _, _ in self._task_obj.values():
                process.kill()
                process.join()

    def _report_progress(self, node: StepNode, status: str) -> None:
        if status != "exception":  # reported by _report_crash, once there is a crash file
            self._report(node, status)

    def _report_crash(self, node: StepNode, result: dict[str, Any] | None = None) -> str:
        node.error = result.get("error") if result else None
        crash_file: str = super()._report_crash(node, result)
        self._report(node, "exception")
        return crash_file

    def _sort_jobs(self, jobids: Sequence[int], scheduler: str | None = None) -> list[int]:
        """Finish scans that have been started before starting others."""
        return sorted(jobids, key=lambda job: (-STEPS.index(self.procs[job].name), job))

    def _submit_job(self, node: StepNode, updatehash: bool = False) -> int:
        self._taskid += 1
        receiver, sender = self._context.Pipe(duplex=False)
        arguments = (sender, node, updatehash, self._taskid, self.plugin_args["logs"])
        process = self._context.Process(target=_work, args=arguments, name=node.fullname)
        process.start()
        sender.close()  # the worker has the only copy now, so that the pipe ends with the worker
        self._task_obj[self._taskid] = (process, receiver, node)
        return int(self._taskid)

    def _get_result(self, taskid: int) -> dict[str, Any] | None:
        raise_if_interrupted()
        process, receiver, node = self._task_obj[taskid]
        alive = process.is_alive()  # asked first: whatever a dead process has sent is in the pipe
        if receiver.poll():
            with contextlib.suppress(EOFError):
                result: dict[str, Any] = receiver.recv()
                _end(process)
                return result
        elif alive:
            return None
        _end(process)
        problem = f"ended without a result (exit code {process.exitcode}); see the log"
        if process.exitcode == -signal.SIGKILL:
            advice = f"lower --nprocs or raise --mem-gb (now {self.memory_gb:g})"
            problem = f"was killed, probably out of memory; {advice}"
        elif process.exitcode < 0:
            problem = f"was terminated by {signal.Signals(-process.exitcode).name}; see the log"
        return _failure(InputError(f"{node.name} {problem}"))

    def _clear_task(self, taskid: int) -> None:
        _, receiver, _ = self._task_obj.pop(taskid)
        receiver.close()

    def _postrun_check(self) -> None:
        pass  # there is no pool


def submitting_plugin(given: SubmitPlugin, status_callback: Callable[[StepNode, str], None]) -> Any:
    """Return one of Nipype's plugins for schedulers, made to keep exceptions and to leave no job behind."""
    base, scheduler = getattr(plugins, f"{given.plugin}Plugin"), SCHEDULERS[given.plugin]

    class Submitting(base):  # type: ignore[misc, valid-type]
        def run(self, *args: Any, **kwargs: Any) -> None:
            # Nipype names jobs by it; containers and --export=NONE have none.
            os.environ.setdefault("LOGNAME", os.environ.get("USER") or f"uid{os.getuid()}")
            try:
                super().run(*args, **kwargs)
            finally:
                if jobs := [str(task) for task, _ in self.pending_tasks]:
                    subprocess.run([scheduler.cancel, *jobs], capture_output=True, check=False)

        def _submit_job(self, node: StepNode, updatehash: bool = False) -> Any:
            options = str(given.plugin_args.get(scheduler.arguments, ""))
            if given.plugin == "SLURM" and not re.search(r"--mem|(^| )-c|--cpus-per-task", options):
                memory_mb = int(1.2 * 1024 * node.mem_gb)  # the estimate, and a fifth for what Python leaves unused
                node.plugin_args = {"sbatch_args": f"--cpus-per-task={node.n_procs} --mem={memory_mb}M"}
            return super()._submit_job(node, updatehash=updatehash)

        def _get_result(self, taskid: Any) -> Any:
            raise_if_interrupted()
            return super()._get_result(taskid)

        def _clean_queue(self, jobid: int, graph: Any, result: dict[str, Any] | None = None) -> Any:
            node = self.procs[jobid]
            node.error = _error_of_job(node.name, result["traceback"]) if result else sys.exc_info()[1]
            return super()._clean_queue(jobid, graph, result=result)

    return Submitting(plugin_args={**given.plugin_args, "status_callback": status_callback})


def _error_of_job(step: str, traceback: str | Sequence[str]) -> Exception:
    """Return the exception of a job from its traceback, which is all that it sends."""
    text = "".join(traceback).strip()
    if "results file does not exist" in text:
        return InputError(f"{step}: its job ended without a result, probably out of memory or time; request more")
    _, found, message = text.rpartition(f"{InputError.__module__}.{InputError.__name__}: ")
    return InputError(message) if found else RuntimeError(text.splitlines()[-1])


def _failure(error: BaseException) -> dict[str, Any]:
    """Return Nipype's result of a failed node, with the exception."""
    return {"result": None, "traceback": format_exception(error), "error": error}


def _end(process: Any) -> None:
    """Wait for a process that has sent its result; kill it if it does not end."""
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


def _work(sender: Connection, node: StepNode, updatehash: bool, taskid: int, logs: Path) -> None:
    """Run one node in this process and send its result."""
    keep_freed_memory()
    os.chdir("/")  # the directory that the run was started from may be gone
    with log_to(logs), contextlib.closing(sender):
        try:
            result = {"result": node.run(updatehash=updatehash), "traceback": None, "error": None}
        except BaseException as error:  # noqa: BLE001 - whatever it is, the run reports it
            result = _failure(error)
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # noqa: BLE001 - the classes of other libraries may not survive pickling
                result["error"] = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(BrokenPipeError):  # the run was interrupted and does not wait
            sender.send({**result, "taskid": taskid})
