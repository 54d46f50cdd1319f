"""Run the workflows of many scans, in series or in parallel; failed scans do not stop the others."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from nipype import Workflow
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import remove_refused, save_refused
from bids_dgmseg.bids.scan_results import with_scan
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, InputError, as_options, raise_if_interrupted
from bids_dgmseg.interfaces.reconstruct_qsm import ImplausibleMapError
from bids_dgmseg.interfaces.step import StepNode, read_report
from bids_dgmseg.models.registry import Model
from bids_dgmseg.resources import HAS_FORKSERVER
from bids_dgmseg.run.environment import LOG_NAME
from bids_dgmseg.run.plan import Job
from bids_dgmseg.run.plugin import WorkersPlugin
from bids_dgmseg.run.records import forget_failure, record_failure
from bids_dgmseg.run.scan_workflows import (
    build_sessions_workflow,
    build_workflow,
    folder_name,
    plan_memory,
    workflow_name,
)

# Scans per parallel workflow: Nipype's bookkeeping grows with the square of the number of nodes.
_BATCH = 100

_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT}
_DISK_ERRORS = {errno.EACCES, errno.EROFS}

# Libraries report a full disk in many ways; below this number of bytes it is taken for the reason of a crash.
_DISK_FULL_BYTES = 1 << 16


class ScanRunner:
    """Processing of the scans of one call of the program.

    `work` has a folder per scan, which is removed when the scan is done; `logs` gets the log and crash files per scan.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        model: Model,
        work: Path,
        logs: Path,
        progress: RunProgress,
        known_warnings: Collection[str] = (),
        on_end: Callable[[ScanRunner, Scan], None] = lambda run, scan: None,
    ) -> None:
        self._config, self._model = config, model
        self._work, self._logs, self._progress = work, logs, progress
        self._known_warnings = known_warnings
        self._on_end = on_end
        self.done: set[str] = set()
        """Names of scans."""
        self.failed: dict[str, str] = {}
        """Names of scans → reason in one line."""
        self._jobs: dict[str, list[Job]] = {}
        """Name of a workflow → the scans that it is for."""

    def execute(self, jobs: Sequence[Job]) -> None:
        """Process scans and fill `done` and `failed`."""
        in_series = self._config.resources.nprocs == 1 or not HAS_FORKSERVER
        # The first batch is small: to build a hundred workflows takes longer than to index a large dataset.
        start, size = 0, 1 if in_series else self._config.resources.nprocs
        by_folder: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            by_folder[folder_name(job)].append(job)
        groups = list(by_folder.values())
        while start < len(groups):
            batch = [job for group in groups[start : start + size] for job in group]
            self._jobs = {folder_name(group[0]): group for group in groups[start : start + size]}
            for job in batch:
                name = workflow_name(job.scan.name)
                self._jobs |= {name: [job], f"{name}_reconstruct": [job]}
            stopped_by: Exception | None = None
            workflows = [workflow for group in groups[start : start + size] if (workflow := self._build(group))]
            start, size = start + size, 1 if in_series else _BATCH
            if workflows:
                try:
                    if in_series:
                        workflows[0].run(plugin=LinearPlugin({"status_callback": self._follow}))
                    else:
                        workflow = Workflow(name=self._work.name, base_dir=str(self._work.parent))
                        workflow.add_nodes(workflows)
                        workflow.run(plugin=self._make_plugin())
                except Exception as error:  # noqa: BLE001 - Nipype raises that of any node, after running the others
                    stopped_by = error
            raise_if_interrupted()
            for group in self._jobs.values():
                self._fail_together(group)
            for scan in [job.scan.name for job in batch if job.scan.name not in self.done | self.failed.keys()]:
                self._fail(scan, f"Nipype stopped ({' '.join(str(stopped_by).split())}); see {self._logs / LOG_NAME}")

    def _make_plugin(self) -> WorkersPlugin:
        resources = self._config.resources
        arguments = {"n_procs": resources.nprocs, "memory_gb": resources.mem_gb, "logs": self._logs}
        return WorkersPlugin({"status_callback": self._follow, **arguments})

    def _build(self, jobs: Sequence[Job]) -> Workflow | None:
        """Build the workflow of a scan, or of sessions that are labelled together.

        None if a scan cannot be processed, which is reported.
        """
        mem_gb = {job.scan.name: planned for job in jobs if (planned := self._prepare(job))}
        self._fail_together(jobs)
        if all(job.scan.name in self.failed for job in jobs):
            return None
        if jobs[0].sessions:
            workflow = build_sessions_workflow(jobs, mem_gb=mem_gb)
        else:
            workflow = build_workflow(jobs[0], mem_gb=mem_gb[jobs[0].scan.name])
        workflow.base_dir = str(self._work)
        for name in workflow.list_node_names():
            scans = next((found for part in name.split(".") if (found := self._jobs.get(part))), jobs)
            crashes = self._logs / scans[0].scan.name
            workflow.get_node(name).config = {"execution": {"crashdump_dir": str(crashes)}}
        return workflow

    def _prepare(self, job: Job) -> dict[str, float] | None:
        """Return the memory that is planned for each step of a scan; None if it cannot be processed: reported."""
        scan, config = job.scan, self._config
        if scan.from_echoes:
            remove_refused(config.output_dir, scan, self._model)
        problem = job.problem
        if problem and not (job.edited and job.sessions):
            self._fail(scan.name, problem)
            return None
        try:
            inversion, limit_gb = config.reconstruction.inversion, config.resources.mem_gb
            return plan_memory(scan, self._model, inversion=inversion, limit_gb=limit_gb)
        except InputError as error:
            problem = problem or str(error)
            return None
        finally:
            if problem:
                self._fail(scan.name, problem)

    def _fail_together(self, jobs: Sequence[Job]) -> None:
        """Report that sessions cannot be labelled because one that is labelled with them failed.

        One whose results are edited still has its map.
        """
        failed = [one.scan.name for one in jobs if one.scan.name in self.failed and not one.edited]
        ended = self.done | self.failed.keys()
        for job in [one for one in jobs if failed and one.scan.name not in ended]:
            reason = f"not labelled, because {failed[0]} of the same participant failed"
            self._fail(job.scan.name, f"{reason}; correct or remove it, or run without `longitudinal`")

    def _follow(self, node: StepNode, status: str) -> None:
        """Report the progress of nodes; Nipype calls this with ``start``, ``end`` or ``exception``."""
        parts = reversed(node.fullname.split("."))  # a scan is inside the workflow of its participant
        for job in next(self._jobs[part] for part in parts if part in self._jobs):
            self._follow_scan(job, node, status)

    def _follow_scan(self, job: Job, node: StepNode, status: str) -> None:
        scan = job.scan.name
        # Nipype also reports "end" for steps that it skips after a failure, and for interrupted ones.
        if scan in self.failed or isinstance(node.error, KeyboardInterrupt):
            return
        if status == "start":
            self._progress.start(scan, node.name)
        elif status == "exception":
            raise_if_interrupted()  # libraries may raise another exception in its place
            self._fail(scan, self._describe_error(job, node.name, node.error))
        else:
            report = read_report(getattr(node.result.outputs, "out_report", None))
            if node.name == "localize":
                about = report["input"]
                text = f"{scan}: {about['units']} (from {about['units_from']}), reference {about['reference']}"
                self._progress.info(text)
            for warning in report.get("warnings", ()):
                if warning not in self._known_warnings:
                    self._progress.warn(with_scan(scan, warning))
            if node.name == "save":
                self.done.add(scan)
                folder = Path(node.output_dir()).parent
                if job.sessions and all(one.scan.name in self.done for one in self._jobs[folder_name(job)]):
                    folder = folder.parent
                shutil.rmtree(folder, ignore_errors=True)
                forget_failure(self._config.output_dir, scan, self._model.name)
                self._progress.finish(scan)
                self._on_end(self, job.scan)

    def _fail(self, scan: str, message: str) -> None:
        message = as_options(message)
        self.failed[scan] = with_scan(scan, message)
        self._progress.fail(scan, self.failed[scan])
        (job,) = self._jobs[workflow_name(scan)]
        record_failure(self._config.output_dir, scan, self._model.name, message)
        self._on_end(self, job.scan)

    def _describe_error(self, job: Job, step: str, error: BaseException | None) -> str:
        """Describe in one line why a step failed."""
        scan = job.scan
        if isinstance(error, ImplausibleMapError):
            record = {**error.report, "Warnings": error.warnings}
            save_refused(self._config.output_dir, scan, self._model, figure=error.figure, record=record)
            remedy = "correct the brain mask" if job.brain_mask else "provide a brain mask with `brain_masks`"
            return (
                f"the reconstructed map of {scan.name} is not usable: {'; '.join(error.problems)}; look at its images "
                f"in sub-{scan.participant}.html, {remedy}, or use `accept_implausible_maps`"
            )
        if isinstance(error, InputError) and step == "localize" and scan.from_echoes:
            _, _, reason = str(error).rpartition("_Chimap.nii.gz: ")  # the user has no such map and no such sidecar
            reason = reason.partition("; ")[0]
            return (
                f"the reconstructed map of {scan.name} is not usable: {reason}; check EchoTime, MagneticFieldStrength "
                f"and the values of {scan.chi.name}"
            )
        if isinstance(error, InputError):
            return str(error)
        if isinstance(error, OSError) and error.errno in _FULL_ERRORS:
            # The error of a write names no file, and what was written in part may have been removed.
            return f"{step}: {self._describe_full(self._config.output_dir if step == 'save' else self._work.parent)}"
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            where = f": {error.filename}" if error.filename else ""
            return f"{step}: {error.strerror}{where}; {DISK_ADVICE}"
        for folder in (self._config.output_dir, self._work.parent):
            with contextlib.suppress(OSError):
                if shutil.disk_usage(folder).free < _DISK_FULL_BYTES:
                    return f"{step}: {self._describe_full(folder)}"
        crashes = sorted((self._logs / scan.name).glob("crash-*"), key=lambda path: path.stat().st_mtime)
        details = crashes[-1] if crashes else self._logs / LOG_NAME
        text = " ".join(str(error).split())
        reason = "" if error is None else f" ({type(error).__name__}{': ' * bool(text)}{text})"
        return f"{step} crashed{reason}; see {details}"

    def _describe_full(self, folder: Path) -> str:
        if folder == self._work.parent:
            return f"no space left in {folder}, the folder for intermediate files; free some or choose another with -w"
        return f"no space left in {folder}; free some space"
