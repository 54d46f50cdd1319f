"""Run the workflows of many scans, in series or in parallel; a scan that fails does not stop the others."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from nipype import Workflow
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import output_path
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, InputError
from bids_dgmseg.models.registry import Model
from bids_dgmseg.workflow.builder import STEPS, init_scan_wf, workflow_name
from bids_dgmseg.workflow.environment import LOG_NAME
from bids_dgmseg.workflow.interfaces import StepNode
from bids_dgmseg.workflow.plan import Job
from bids_dgmseg.workflow.plugin import WorkersPlugin
from bids_dgmseg.workflow.qc_record import StepReport, with_scan

# Scans per parallel workflow: Nipype's bookkeeping grows with the square of the number of nodes.
_BATCH = 100

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}

# Libraries report a full disk in many ways; below this number of bytes it is taken for the reason of a crash.
_DISK_FULL_BYTES = 1 << 16


class Run:
    """Processing of the scans of one call of the program.

    Parameters
    ----------
    config : RunConfig
        Options of the run.
    model : Model
        Registry entry.
    work : path
        Working directory of this run; the folder of a scan is removed when the scan is done.
    logs : path
        Folder of this run for the log and, per scan, crash files.
    progress : RunProgress
        Terminal output.
    """

    def __init__(self, *, config: RunConfig, model: Model, work: Path, logs: Path, progress: RunProgress) -> None:
        self._config, self._model = config, model
        self._work, self._logs, self._progress = work, logs, progress
        self.done: set[str] = set()
        """Names of scans."""
        self.failed: dict[str, str] = {}
        """Names of scans → reason in one line."""
        self._jobs: dict[str, Job] = {}

    def execute(self, jobs: Sequence[Job]) -> None:
        """Process scans and fill `done` and `failed`."""
        size = 1 if self._config.resources.nprocs == 1 else _BATCH
        for first in range(0, len(jobs), size):
            if self.failed and self._config.control.stop_on_first_crash:
                return
            self._execute_batch(jobs[first : first + size])

    def _execute_batch(self, jobs: Sequence[Job]) -> None:
        self._jobs = {workflow_name(job.scan.name): job for job in jobs}
        resources = self._config.resources
        stopped_by: Exception | None = None
        try:
            if resources.nprocs == 1:
                self._build(jobs[0]).run(plugin=LinearPlugin({"status_callback": self._follow}))
            else:
                workflow = Workflow(name=self._work.name, base_dir=str(self._work.parent))
                workflow.add_nodes([self._build(job) for job in jobs])
                arguments = {"n_procs": resources.nprocs, "memory_gb": resources.mem_gb, "logs": self._logs}
                workflow.run(plugin=WorkersPlugin({"status_callback": self._follow, **arguments}))
        except Exception as error:  # noqa: BLE001 - Nipype raises the exception of any node, after running the others
            stopped_by = error
        if self.failed and self._config.control.stop_on_first_crash:
            return
        for job in jobs:
            if job.scan.name not in self.done | self.failed.keys():
                self._fail(job.scan.name, f"Nipype stopped ({stopped_by}); see {self._logs / LOG_NAME}")

    def _build(self, job: Job) -> Workflow:
        workflow = init_scan_wf(job, self._model, self._config)
        workflow.base_dir = str(self._work)
        for step in set(STEPS) & set(workflow.list_node_names()):
            workflow.get_node(step).config = {"execution": {"crashdump_dir": str(self._logs / job.scan.name)}}
        return workflow

    def _follow(self, node: StepNode, status: str) -> None:
        """Report the progress of nodes; Nipype calls this with ``start``, ``end`` or ``exception``."""
        scan = self._jobs[node.fullname.split(".")[-2]].scan.name
        # Nipype also reports "end" for steps that it skips after a failure, and for interrupted ones.
        if scan in self.failed or isinstance(node.error, KeyboardInterrupt):
            return
        if status == "start":
            self._progress.start(scan, node.name)
        elif status == "exception":
            self._fail(scan, self._describe_error(scan, node.name, node.error))
        else:
            self._print_report(scan, getattr(node.result.outputs, "out_report", None))
            if node.name == "save":
                shutil.rmtree(Path(node.output_dir()).parent, ignore_errors=True)
                self.done.add(scan)
                self._progress.finish(scan)

    def _print_report(self, scan: str, report: StepReport | None) -> None:
        if report is None:
            return
        if "units" in report.values:
            units, source, reference = (report.values[key] for key in ("units", "units_from", "reference"))
            self._progress.info(f"{scan}: {units} (from {source}), reference {reference}")
        for warning in report.warnings:
            self._progress.warn(with_scan(scan, warning))

    def _fail(self, scan: str, message: str) -> None:
        self.failed[scan] = with_scan(scan, message)
        self._progress.fail(scan, self.failed[scan])
        job = self._jobs[workflow_name(scan)]
        earlier = output_path(self._config.output_dir, job.scan, "stats", ".tsv", seg=self._model.name)
        if earlier.is_file():
            self._progress.warn(
                f"{scan}: {earlier.name} and the other results of {self._model.name} are left over from an earlier "
                "run and may be out of date; delete them"
            )

    def _describe_error(self, scan: str, step: str, error: BaseException | None) -> str:
        """Describe in one line why a step failed."""
        if isinstance(error, InputError):
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            where = f": {error.filename}" if error.filename else ""
            return f"{step}: {error.strerror}{where}; {DISK_ADVICE}"
        for folder in (self._config.output_dir, self._work):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free < _DISK_FULL_BYTES:
                    return f"{step}: no space left on the disk of {folder}; free some space"
        crashes = sorted((self._logs / scan).glob("crash-*"), key=lambda path: path.stat().st_mtime)
        details = crashes[-1] if crashes else self._logs / LOG_NAME
        text = " ".join(str(error).split())
        reason = "" if error is None else f" ({type(error).__name__}{': ' * bool(text)}{text})"
        return f"{step} crashed{reason}; see {details}"
