"""Nipype workflow of a scan, and the run of many, in series or in parallel; failed scans do not stop the others."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Node, Workflow
from nipype.interfaces.utility import IdentityInterface
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import MAP_SIDECAR
from bids_dgmseg.bids.fingerprints import mark_outdated
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, InputError, raise_if_interrupted
from bids_dgmseg.io.nifti import format_shape, load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.workflow.batch_jobs import read_plugin_file
from bids_dgmseg.workflow.environment import LOG_NAME
from bids_dgmseg.workflow.interfaces import STEPS, Measure, Prepare, Reconstruct, Save, Segment, Step, StepNode
from bids_dgmseg.workflow.participant import Job
from bids_dgmseg.workflow.plugin import WorkersPlugin, submitting_plugin
from bids_dgmseg.workflow.qc_record import with_scan
from bids_dgmseg.workflow.status import forget_failure, record_failure

# Scans per parallel workflow: Nipype's bookkeeping grows with the square of the number of nodes.
_BATCH = 100

_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT}
_DISK_ERRORS = {errno.EACCES, errno.EROFS}

_LEAST_GB = {"reconstruct": 0.6, "prepare": 1.0, "measure": 1.5, "save": 1.0}
"""Memory planned for steps of small images, libraries included."""

_BYTES_PER_VOXEL = {"prepare": 24, "segment": 60, "measure": 42, "save": 8}
"""Growth of the peak memory of `dgm16` from cubes of 128 to 360 voxels; ``prepare`` for values of 8 bytes."""

_LIBRARIES_GB = 0.6

# Libraries report a full disk in many ways; below this number of bytes it is taken for the reason of a crash.
_DISK_FULL_BYTES = 1 << 16


def workflow_name(scan: str) -> str:
    """Return the name of a scan's workflow; Nipype's names have no plus sign, which BIDS labels may have.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def init_scan_wf(job: Job) -> Workflow:
    """Build the workflow of a scan, from one susceptibility map, or the echoes to reconstruct it from, to derivatives.

    Inputs
    ------
    in_chi
        The scan's susceptibility map, in any orientation, in ppm or ppb; set to ``scan.chi`` or to the output of
        ``reconstruct``.

    Outputs
    -------
    out_dseg
        Labels on the grid of ``in_chi``, indices of structures.tsv.
    out_probseg
        Probabilities on the same grid, one volume per nucleus.
    out_stats
        Tab-separated table, one row per nucleus.
    out_files
        The derivatives in the output directory.
    """
    scan = job.scan
    inputs = Node(IdentityInterface(fields=["in_chi"]), name="inputs")
    outputs = Node(IdentityInterface(fields=["out_dseg", "out_probseg", "out_stats", "out_files"]), name="outputs")
    *reconstruct, prepare, segment, measure, save = _steps(job)
    workflow = Workflow(name=workflow_name(scan.name))
    if not reconstruct:
        inputs.inputs.in_chi = str(scan.chi)
    for node in reconstruct:
        workflow.connect(node, "out_chi", inputs, "in_chi")
        workflow.connect(node, "out_chi", save, "in_chi")
        workflow.connect(node, "out_r2star", measure, "in_r2star")
        workflow.connect(node, "out_r2star", save, "in_r2star")
        workflow.connect(node, "out_figure", save, "in_reconstruction_figure")
        workflow.connect(node, "out_report", save, "in_reconstructed")
        workflow.connect(node, "out_report", measure, "in_reconstructed")
        workflow.connect(node, "out_fingerprint", prepare, "in_reconstruction")
        workflow.connect(node, "out_fingerprint", save, "in_reconstruction")
    workflow.connect(
        [
            (inputs, prepare, [("in_chi", "in_chi")]),
            (prepare, segment, [("out_chi", "in_chi")]),
            (prepare, measure, [("out_chi", "in_chi"), ("out_report", "in_report")]),
            (prepare, save, [("out_report", "in_prepared"), ("out_fingerprint", "in_fingerprint")]),
            (segment, measure, [(f"out_{name}", f"in_{name}") for name in ("dseg", "block", "box", "seen", "regions")]),
            (segment, save, [(f"out_{name}", f"in_{name}") for name in ("dseg", "probseg", "box", "regions")]),
            (segment, outputs, [("out_dseg", "out_dseg"), ("out_probseg", "out_probseg")]),
            (measure, save, [("out_stats", "in_stats"), ("out_figures", "in_figures"), ("out_report", "in_measured")]),
            (measure, outputs, [("out_stats", "out_stats")]),
            (save, outputs, [("out_files", "out_files")]),
        ]
    )
    return workflow


def _steps(job: Job) -> list[StepNode]:
    """Return the nodes of `STEPS`, not yet connected; the first only for a scan with echoes."""
    scan, model, config = job.scan, job.model, job.config
    resources, segmentation = config.resources, config.segmentation
    threads = min(resources.omp_nthreads, resources.nprocs)

    def node(step: type[Step], *, n_procs: int = 1, **inputs: Any) -> StepNode:
        # Nipype does not accept None for a file that is not given.
        given = {name: str(one) if isinstance(one, Path) else one for name, one in inputs.items() if one is not None}
        name = step.__name__.lower()
        return StepNode(step(**given), name=name, n_procs=n_procs, mem_gb=planned_gb[name])

    planned_gb, problem = _plan_memory(
        scan, model, inversion=config.reconstruction.inversion, limit_gb=resources.mem_gb
    )
    sidecar = dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar)
    nodes = [
        node(Prepare, job=job, sidecar=sidecar, problem=problem),
        node(
            Segment,
            n_procs=threads,
            model=model,
            device=resources.device,
            n_threads=resources.omp_nthreads,
            weights=segmentation.weights,
        ),
        node(
            Measure,
            model=model,
            reference=config.reference,
            reference_mask=job.reference_mask,
            title=scan.name,
            viewer=segmentation.viewer,
            bilateral=segmentation.bilateral,
        ),
        node(Save, job=job),
    ]
    if scan.from_echoes:
        nodes.insert(0, node(Reconstruct, n_procs=threads, job=job, problem=problem, n_threads=threads))
    return nodes


def _plan_memory(scan: Scan, model: Model, *, inversion: str, limit_gb: float) -> tuple[dict[str, float], str]:
    """Estimate the peak memory of each step in GB from the header of the map, or of the first echo.

    Also returns why the scan cannot be processed: its own problem, or a step that needs more than the limit because of
    the size of the image; empty if it can. If the header cannot be read, the step itself reports why.
    """
    least = {**_LEAST_GB, "segment": model.memory_gb}
    try:
        image = load_image(scan.chi)
    except InputError:
        image = None
    if image is None or len(image.shape) < 3:
        return least, scan.problem or ""
    shape = image.shape[:3]
    needed = {step: _LIBRARIES_GB + n * math.prod(shape) / 1e9 for step, n in _BYTES_PER_VOXEL.items()}
    if scan.echoes:
        from bids_dgmseg.qsm.reconstruct import estimate_memory_gb  # with torch

        sizes_mm = voxel_sizes(image.affine).tolist()
        needed["reconstruct"] = estimate_memory_gb(shape, sizes_mm, n_echoes=len(scan.echoes), inversion=inversion)
    problem = scan.problem or ""
    too_large = {step: gb for step, gb in needed.items() if gb > max(limit_gb, least[step])}
    if too_large and not problem:
        step, gb = max(too_large.items(), key=lambda one: one[1])
        problem = (
            f"{scan.chi.name}: {step} needs about {gb:.1f} GB of memory for {format_shape(shape)} voxels, --mem-gb is "
            f"{limit_gb:g}; raise --mem-gb, or crop or resample the image"
        )
    planned = {step: max(gb, least[step]) for step, gb in needed.items()}
    return {**least, **planned}, problem


class ScanRunner:
    """Processing of the scans of one call of the program.

    `work` has a folder per scan, which is removed when the scan is done; `logs` gets the log and crash files per scan.
    """

    def __init__(self, *, config: RunConfig, model: Model, work: Path, logs: Path, progress: RunProgress) -> None:
        self._config, self._model = config, model
        self._work, self._logs, self._progress = work, logs, progress
        self.done: set[str] = set()
        """Names of scans."""
        self.failed: dict[str, str] = {}
        """Names of scans → reason in one line."""
        self.on_start: Callable[[], None] = lambda: None
        """Called when a step has started."""
        self.on_end: Callable[[Scan], None] = lambda scan: None
        """Called when a scan is done or has failed."""
        self._jobs: dict[str, Job] = {}

    def execute(self, jobs: Sequence[Job]) -> None:
        """Process scans and fill `done` and `failed`."""
        control = self._config.control
        stop, in_series = control.stop_on_first_crash, self._config.resources.nprocs == 1 and not control.plugin_file
        size = 1 if in_series else _BATCH
        for first in range(0, len(jobs), size):
            batch = jobs[first : first + size]
            self._jobs = {workflow_name(job.scan.name): job for job in batch}
            stopped_by: Exception | None = None
            try:
                if in_series:
                    self._build(batch[0]).run(plugin=LinearPlugin({"status_callback": self._follow}))
                else:
                    workflow = Workflow(name=self._work.name, base_dir=str(self._work.parent))
                    workflow.add_nodes([self._build(job) for job in batch])
                    workflow.run(plugin=self._choose_plugin())
            except Exception as error:  # noqa: BLE001 - Nipype raises the exception of any node, after running the others
                stopped_by = error
            raise_if_interrupted()
            if not (self.failed and stop):
                for scan in [job.scan.name for job in batch if job.scan.name not in self.done | self.failed.keys()]:
                    self._fail(
                        scan, f"Nipype stopped ({' '.join(str(stopped_by).split())}); see {self._logs / LOG_NAME}"
                    )
            if self.failed and stop:
                return

    def _choose_plugin(self) -> Any:
        if self._config.control.plugin_file:
            return submitting_plugin(read_plugin_file(self._config.control), self._follow)
        resources = self._config.resources
        arguments = {"n_procs": resources.nprocs, "memory_gb": resources.mem_gb, "logs": self._logs}
        return WorkersPlugin({"status_callback": self._follow, **arguments})

    def _build(self, job: Job) -> Workflow:
        workflow = init_scan_wf(job)
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
            self.on_start()
        elif status == "exception":
            raise_if_interrupted()  # libraries may raise another exception in its place
            self._fail(scan, self._describe_error(scan, node.name, node.error))
        else:
            report = getattr(node.result.outputs, "out_report", None)
            if report and "units" in report.values:
                units, source, reference = (report.values[key] for key in ("units", "units_from", "reference"))
                self._progress.info(f"{scan}: {units} (from {source}), reference {reference}")
            for warning in report.warnings if report else ():
                self._progress.warn(with_scan(scan, warning))
            if node.name == "save":
                shutil.rmtree(Path(node.output_dir()).parent, ignore_errors=True)
                forget_failure(self._config.output_dir, scan, self._model.name)
                self.done.add(scan)
                self._progress.finish(scan)
                self.on_end(self._jobs[workflow_name(scan)].scan)

    def _fail(self, scan: str, message: str) -> None:
        self.failed[scan] = with_scan(scan, message)
        self._progress.fail(scan, self.failed[scan])
        job = self._jobs[workflow_name(scan)]
        output_dir, model = self._config.output_dir, self._model.name
        record_failure(output_dir, scan, model, message)
        if mark_outdated(output_dir, job.scan, model, job.fingerprint, failure=message):
            self._progress.warn(
                f"{scan}: the results of {model} in {output_dir.name} are from an earlier run and out of date; the "
                "group level leaves them out until this scan succeeds"
            )
        self.on_end(job.scan)

    def _describe_error(self, scan: str, step: str, error: BaseException | None) -> str:
        """Describe in one line why a step failed."""
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
        crashes = sorted((self._logs / scan).glob("crash-*"), key=lambda path: path.stat().st_mtime)
        details = crashes[-1] if crashes else self._logs / LOG_NAME
        text = " ".join(str(error).split())
        reason = "" if error is None else f" ({type(error).__name__}{': ' * bool(text)}{text})"
        return f"{step} crashed{reason}; see {details}"

    def _describe_full(self, folder: Path) -> str:
        if folder == self._work.parent:
            return f"no space left in {folder}, the folder for intermediate files; free some or choose another with -w"
        return f"no space left in {folder}; free some space"
