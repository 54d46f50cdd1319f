"""Run the workflows of many scans, in series or in parallel; one that fails leaves the others alone."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nipype import Node, Workflow
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import output_path
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.models.registry import Model
from bids_dgmseg.workflow.builder import STEPS, init_scan_wf, workflow_name
from bids_dgmseg.workflow.environment import LOG_NAME
from bids_dgmseg.workflow.files import about, read_json
from bids_dgmseg.workflow.jobs import Job
from bids_dgmseg.workflow.plugin import WorkersPlugin

_BATCH = 100  # scans in one parallel workflow: Nipype's bookkeeping grows with the square of the nodes

_REFUSED_BY_DISK = re.compile(
    rf"^\s*\w*Error: \[Errno (?:{errno.ENOSPC}|{errno.EDQUOT}|{errno.EACCES}|{errno.EROFS})\] (.*)$", re.MULTILINE
)

_REASON = re.compile(r"^\s*([\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)
"""Nipype writes more below it."""

_LEAST_FREE = 1 << 16
"""Bytes; a file that tells of a full disk finds no room there itself."""

_REFUSAL = re.compile(r"^\s*bids_dgmseg\.errors\.InputError: (.*)$", re.MULTILINE)


class Run:
    """The scans of one call of the program.

    Parameters
    ----------
    config : RunConfig
        The run's options.
    model : Model
        The registry entry that segments.
    work : path
        Folder of this run alone; a scan's part of it is removed when the scan is done.
    logs : path
        Folder of this run alone for the log and, by scan, crash files.
    progress : RunProgress
        What the user sees.
    """

    def __init__(self, *, config: RunConfig, model: Model, work: Path, logs: Path, progress: RunProgress) -> None:
        self._config, self._model = config, model
        self._work, self._logs, self._progress = work, logs, progress
        self.done: set[str] = set()
        """Names of scans."""
        self.failed: dict[str, str] = {}
        """Names of scans, and why: one line each."""
        self._jobs: dict[str, Job] = {}

    def execute(self, jobs: Sequence[Job]) -> None:
        """Segment scans, and tell which are done and which failed."""
        size = 1 if self._config.resources.nprocs == 1 else _BATCH
        for first in range(0, len(jobs), size):
            if self.failed and self._config.control.stop_on_first_crash:
                return
            self._execute_batch(jobs[first : first + size])

    def fail(self, scan: str, message: str) -> None:
        """Say that a scan failed, and go on."""
        self.failed[scan] = about(scan, message)
        self._progress.fail(scan, self.failed[scan])
        earlier = output_path(
            self._config.output_dir, self._jobs[workflow_name(scan)].scan, "stats", ".tsv", seg=self._model.name
        )
        if earlier.is_file():
            self._progress.warn(f"{scan}: {earlier.name} and what lies beside it are of an earlier run; remove them")

    def _execute_batch(self, jobs: Sequence[Job]) -> None:
        self._jobs = {workflow_name(job.scan.name): job for job in jobs}
        workflows = [self._build(job) for job in jobs]
        error: Exception | None = None
        try:
            if self._config.resources.nprocs == 1:
                (workflow,) = workflows
                workflow.run(plugin=LinearPlugin({"status_callback": self._watch}))
            else:
                workflow = Workflow(name=self._work.name, base_dir=str(self._work.parent))
                workflow.add_nodes(workflows)
                workflow.run(
                    plugin=WorkersPlugin(
                        {
                            "status_callback": self._watch,
                            "n_procs": self._config.resources.nprocs,
                            "memory_gb": self._config.resources.mem_gb,
                            "logs": self._logs,
                        }
                    )
                )
        except Exception as caught:  # noqa: BLE001 - Nipype raises what any node raised, after running the others
            error = caught
        stopped = bool(self.failed) and self._config.control.stop_on_first_crash
        for job in jobs:
            if job.scan.name not in self.done | self.failed.keys() and not stopped:
                self.fail(job.scan.name, f"Nipype stopped ({error}); see {self._logs / LOG_NAME}")

    def _build(self, job: Job) -> Workflow:
        workflow = init_scan_wf(
            config=self._config,
            model=self._model,
            scan=job.scan,
            fingerprint=job.fingerprint,
            reference_mask=job.reference_mask,
            brain_mask=job.brain_mask,
            reconstruction=job.reconstruction,
        )
        workflow.base_dir = str(self._work)
        for step in set(STEPS) & set(workflow.list_node_names()):
            crashes = {"crashdump_dir": str(self._logs / job.scan.name)}
            workflow.get_node(step).config = {"execution": crashes}
        return workflow

    def _watch(self, node: Node, status: str) -> None:
        """Follow the nodes: called by Nipype with ``start``, ``end`` or ``exception``."""
        scan = self._jobs[node.fullname.split(".")[-2]].scan.name
        if scan in self.failed:  # Nipype also says "end" of steps that it leaves out
            return
        if status == "start":
            self._progress.start(scan, node.name)
        elif status == "exception":
            crash = self._find_crash(scan)
            if crash and crash.read_text(encoding="utf-8", errors="replace").rstrip().endswith("KeyboardInterrupt"):
                raise KeyboardInterrupt  # Nipype takes it for an error of the step, and would go on
            self.fail(scan, self._explain(node.name, crash))
        else:
            self._tell(scan, Path(node.output_dir()))
            if node.name == "save":
                shutil.rmtree(Path(node.output_dir()).parent, ignore_errors=True)
                self.done.add(scan)
                self._progress.finish(scan)

    def _tell(self, scan: str, folder: Path) -> None:
        """Say aloud what a step has found out."""
        if not (folder / "report.json").is_file():
            return
        report: dict[str, Any] = read_json(folder / "report.json")
        if "units" in report:
            understood = f"{report['units']} (from {report['units_from']}), reference {report['reference']}"
            self._progress.info(f"{scan}: {understood}")
        for warning in report["warnings"]:
            self._progress.warn(about(scan, warning))

    def _find_crash(self, scan: str) -> Path | None:
        """Find what Nipype last wrote about a failed step."""
        files = sorted((self._logs / scan).glob("crash-*"), key=lambda path: path.stat().st_mtime)
        return files[-1] if files else None

    def _explain(self, step: str, crash: Path | None) -> str:
        """Say in one line why a step failed, from Nipype's crash file."""
        if crash is None:
            return f"{step} crashed; see {self._logs / LOG_NAME}"
        text = crash.read_text(encoding="utf-8", errors="replace")
        if refusals := _REFUSAL.findall(text):
            return str(refusals[-1])
        if refused := _REFUSED_BY_DISK.findall(text):
            return f"{step}: {refused[-1]}; check the path, its permissions and the room on its disk"
        if full := [folder for folder in (self._config.output_dir, self._work) if _is_full(folder)]:
            return f"{step}: no space left on the disk of {full[0]}; make room there"
        reasons = _REASON.findall(text) or [line.strip() for line in text.splitlines() if line.strip()]
        return f"{step} crashed ({reasons[-1] if reasons else 'no reason given'}); see {crash}"


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LEAST_FREE
    except OSError:
        return False
