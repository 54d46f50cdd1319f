"""Nipype workflow of a scan, and the run of many, in series or in parallel; failed scans do not stop the others."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Workflow
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import SCANNER_FIELDS, remove_refused, save_refused
from bids_dgmseg.bids.qc_record import with_scan
from bids_dgmseg.bids.resume import mark_outdated
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, InputError, as_options, raise_if_interrupted
from bids_dgmseg.interfaces.base import StepNode
from bids_dgmseg.interfaces.maps import ImplausibleMapError
from bids_dgmseg.io.files import NOT_FETCHED
from bids_dgmseg.io.nifti import format_shape, load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.resources import HAS_FORKSERVER
from bids_dgmseg.run.environment import LOG_NAME
from bids_dgmseg.run.plan import Job
from bids_dgmseg.run.plugin import WorkersPlugin
from bids_dgmseg.run.status import forget_failure, record_failure
from bids_dgmseg.workflows.scan import init_participant_wf
from bids_dgmseg.workflows.steps import MEMORY_GB

# Scans per parallel workflow: Nipype's bookkeeping grows with the square of the number of nodes.
_BATCH = 100

_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT}
_DISK_ERRORS = {errno.EACCES, errno.EROFS}

_LEAST_GB = {
    "reconstruct": 0.6,
    "conform": 1.0,
    "localize": 1.0,
    "align": 1.5,
    "correct": 1.0,
    "measure": 1.5,
    "sample": 1.5,
    "plot": 1.5,
    "normalize": 2.0,
    "save": 1.0,
}
"""Memory planned for steps of small images, libraries included."""

_BYTES_PER_VOXEL = {
    "conform": 24,
    "localize": 40,
    "segment": 60,
    "align": 60,
    "measure": 42,
    "sample": 60,
    "plot": 42,
    "normalize": 42,
    "save": 8,
}
"""Growth of the peak memory of `dgm16` from cubes of 128 to 360 voxels; ``conform`` for values of 8 bytes."""

_LIBRARIES_GB = 0.6

# Libraries report a full disk in many ways; below this number of bytes it is taken for the reason of a crash.
_DISK_FULL_BYTES = 1 << 16


def workflow_name(scan: str) -> str:
    """Return the name of a scan's workflow; Nipype's names have no plus sign, which BIDS labels may have.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def build_workflow(job: Job, *, mem_gb: Mapping[str, float]) -> Workflow:
    """Build the workflow of a scan with the options of the run."""
    scan, config = job.scan, job.config
    options, segmentation, reference = config.reconstruction, config.segmentation, config.reference
    workflow = init_participant_wf(
        config.output_dir,
        name=workflow_name(scan.name),
        from_echoes=scan.from_echoes,
        masks=segmentation.masks,
        reconstruction={
            "phase_sign": options.phase_sign,
            "background": options.background,
            "inversion": options.inversion,
            "unwrapping": options.unwrapping,
            "regularization": options.regularization,
            "erosion_mm": options.erosion_mm,
            "save_fields": options.save_fields,
            "accept_implausible": options.accept_implausible,
        },
        n_threads=min(config.resources.omp_nthreads, config.resources.nprocs),
        mem_gb=mem_gb,
        model=job.model.name,
        weights=segmentation.weights,
        label_map=segmentation.label_map,
        device=config.resources.device,
        ensemble=segmentation.ensemble,
        reference=reference.kind,
        reference_structure=reference.structure,
        needs_reference_mask=reference.masks is not None,
        bilateral=segmentation.bilateral,
        corrected=job.correction is not None,
        sampled=bool(job.maps),
        longitudinal=bool(job.sessions),
        viewer=segmentation.viewer,
        output_space=segmentation.output_space,
    )
    inputs = {
        "title": scan.name,
        "reference_mask": job.reference_mask,
        "in_correction": job.correction,
        "in_maps": [str(one.path) for one in job.maps.values()],
        "map_names": list(job.maps),
        "map_units": [one.units for one in job.maps.values()],
        "in_exclude": [str(path) for path in job.excluded],
        "in_sessions": [str(one.chi) for one in job.sessions] or None,
        "sessions_metadata": [dict(one.sidecar) for one in job.sessions] or None,
        "position": job.sessions.index(scan) if job.sessions else None,
        "entities": scan.named_entities,
        "sources": scan.uris,
        "together": [one.uri for one in job.sessions if one.name != scan.name],
        "source_file": scan.chi,
        "scanner": {name: scan.sidecar[name] for name in SCANNER_FIELDS if name in scan.sidecar},
        "settings": job.describe_settings(),
        "settings_hash": job.settings_hash,
        "map_settings_hash": job.map_settings_hash,
        **(_describe_echoes(job) if scan.from_echoes else {"in_chi": scan.chi, "metadata": dict(scan.sidecar)}),
    }
    for name, value in inputs.items():
        if value is not None:  # Nipype does not accept None for a file that is not provided
            setattr(workflow.inputs.inputnode, name, str(value) if isinstance(value, Path) else value)
    return workflow


def _describe_echoes(job: Job) -> dict[str, Any]:
    """Return the inputs of a reconstruction."""
    scan = job.scan
    parts = list(scan.echoes[0].parts)
    fields = ("in_phase", "in_magnitude")[: len(parts)]
    return {
        "parts": parts,
        **{field: [str(echo.parts[part]) for echo in scan.echoes] for field, part in zip(fields, parts, strict=True)},
        "echo_times_s": [echo.time_s for echo in scan.echoes],
        "field_strength_t": float(scan.sidecar["MagneticFieldStrength"]),
        "phase_units": [echo.units for echo in scan.echoes],
        "in_mask": job.brain_mask,
    }


def plan_memory(scan: Scan, model: Model, *, inversion: str, limit_gb: float) -> dict[str, float]:
    """Estimate the peak memory of each step in GB from the header of the map, or of the first echo.

    If the header cannot be read, the step itself reports why.

    Raises
    ------
    InputError
        If a step needs more than the limit because of the size of the image.
    """
    least = {**MEMORY_GB, **_LEAST_GB, "segment": model.memory_gb}
    try:
        image = load_image(scan.chi)
    except InputError:
        return least
    if len(image.shape) < 3:
        return least
    shape = image.shape[:3]
    needed = {step: _LIBRARIES_GB + n * math.prod(shape) / 1e9 for step, n in _BYTES_PER_VOXEL.items()}
    if scan.echoes:
        from bids_dgmseg.qsm.reconstruct import estimate_memory_gb  # with torch

        sizes_mm = voxel_sizes(image.affine).tolist()
        needed["reconstruct"] = estimate_memory_gb(shape, sizes_mm, n_echoes=len(scan.echoes), inversion=inversion)
    too_large = {step: gb for step, gb in needed.items() if gb > max(limit_gb, least[step])}
    if too_large:
        step, gb = max(too_large.items(), key=lambda item: item[1])
        raise InputError(
            f"{scan.chi.name}: {step} needs about {gb:.1f} GB of memory for {format_shape(shape)} voxels, `mem_gb` is "
            f"{limit_gb:g}; raise `mem_gb`, or crop or resample the image"
        )
    return least | {step: max(gb, least[step]) for step, gb in needed.items()}


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
        on_start: Callable[[], None] = lambda: None,
        on_end: Callable[[ScanRunner, Scan], None] = lambda run, scan: None,
    ) -> None:
        self._config, self._model = config, model
        self._work, self._logs, self._progress = work, logs, progress
        self._known_warnings = known_warnings
        self._on_start, self._on_end = on_start, on_end
        self.done: set[str] = set()
        """Names of scans."""
        self.failed: dict[str, str] = {}
        """Names of scans → reason in one line."""
        self._jobs: dict[str, Job] = {}

    def execute(self, jobs: Sequence[Job]) -> None:
        """Process scans and fill `done` and `failed`."""
        stop = self._config.control.stop_on_first_crash
        in_series = self._config.resources.nprocs == 1 or not HAS_FORKSERVER
        # The first batch is small: to build a hundred workflows takes longer than to index a large dataset.
        start, size = 0, 1 if in_series else self._config.resources.nprocs
        while start < len(jobs):
            batch = jobs[start : start + size]
            start, size = start + size, 1 if in_series else _BATCH
            self._jobs = {workflow_name(job.scan.name): job for job in batch}
            stopped_by: Exception | None = None
            workflows = [workflow for job in batch if (workflow := self._build(job))]
            if workflows and not (self.failed and stop):
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
            if self.failed and stop:
                return
            for scan in [job.scan.name for job in batch if job.scan.name not in self.done | self.failed.keys()]:
                self._fail(scan, f"Nipype stopped ({' '.join(str(stopped_by).split())}); see {self._logs / LOG_NAME}")

    def _make_plugin(self) -> WorkersPlugin:
        resources = self._config.resources
        arguments = {"n_procs": resources.nprocs, "memory_gb": resources.mem_gb, "logs": self._logs}
        return WorkersPlugin({"status_callback": self._follow, **arguments})

    def _build(self, job: Job) -> Workflow | None:
        """Build the workflow of a scan; None if the scan cannot be processed, which is reported."""
        scan, config = job.scan, self._config
        if scan.from_echoes:
            remove_refused(config.output_dir, scan, self._model)
        if job.problem:
            self._fail(scan.name, job.problem)
            return None
        try:
            inversion, limit_gb = config.reconstruction.inversion, config.resources.mem_gb
            mem_gb = plan_memory(scan, self._model, inversion=inversion, limit_gb=limit_gb)
        except InputError as error:
            self._fail(scan.name, str(error))
            return None
        workflow = build_workflow(job, mem_gb=mem_gb)
        workflow.base_dir = str(self._work)
        for name in workflow.list_node_names():
            workflow.get_node(name).config = {"execution": {"crashdump_dir": str(self._logs / scan.name)}}
        return workflow

    def _follow(self, node: StepNode, status: str) -> None:
        """Report the progress of nodes; Nipype calls this with ``start``, ``end`` or ``exception``."""
        job = next(self._jobs[part] for part in node.fullname.split(".") if part in self._jobs)
        scan = job.scan.name
        # Nipype also reports "end" for steps that it skips after a failure, and for interrupted ones.
        if scan in self.failed or isinstance(node.error, KeyboardInterrupt):
            return
        if status == "start":
            self._progress.start(scan, node.name)
            self._on_start()
        elif status == "exception":
            raise_if_interrupted()  # libraries may raise another exception in its place
            self._fail(scan, self._describe_error(job, node.name, node.error))
        else:
            outputs = node.result.outputs
            if node.name == "conform":
                source, reference = outputs.report["units_from"], outputs.reference
                self._progress.info(f"{scan}: {outputs.units} (from {source}), reference {reference}")
            for warning in getattr(outputs, "warnings", ()):
                if warning not in self._known_warnings:
                    self._progress.warn(with_scan(scan, warning))
            if node.name == "save":
                shutil.rmtree(Path(node.output_dir()).parent, ignore_errors=True)
                forget_failure(self._config.output_dir, scan, self._model.name)
                self.done.add(scan)
                self._progress.finish(scan)
                self._on_end(self, job.scan)

    def _fail(self, scan: str, message: str) -> None:
        message = as_options(message)
        self.failed[scan] = with_scan(scan, message)
        self._progress.fail(scan, self.failed[scan])
        job = self._jobs[workflow_name(scan)]
        output_dir, model = self._config.output_dir, self._model.name
        record_failure(output_dir, scan, model, message)
        is_unknown = NOT_FETCHED in (job.scan.problem or "")  # metadata that are not fetched may be unchanged
        if (
            not is_unknown
            and not job.edited
            and mark_outdated(output_dir, job.scan, model, job.fingerprint, failure=message)
        ):
            self._progress.warn(
                f"{scan}: the results of {model} in {output_dir.name} are from an earlier run and out of date; the "
                "group level leaves them out until this scan succeeds"
            )
        self._on_end(self, job.scan)

    def _describe_error(self, job: Job, step: str, error: BaseException | None) -> str:
        """Describe in one line why a step failed."""
        scan = job.scan
        if isinstance(error, ImplausibleMapError):
            record = {**error.report, "Warnings": error.warnings}
            save_refused(self._config.output_dir, scan, self._model, figure=error.figure, record=record)
            remedy = "correct the brain mask" if job.brain_mask else "provide a brain mask with `brain_mask`"
            return (
                f"the reconstructed map of {scan.name} is not usable: {'; '.join(error.problems)}; look at its images "
                f"in sub-{scan.participant}.html, {remedy}, or use `accept_implausible_maps`"
            )
        if isinstance(error, InputError) and step == "conform" and scan.from_echoes:
            reason = str(error).partition(": ")[2].partition("; ")[0]  # the user has no such map and no such sidecar
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
