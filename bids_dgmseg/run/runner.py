"""Run the workflows of many scans, in series or in parallel; failed scans do not stop the others."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nibabel.affines import voxel_sizes
from nipype import Workflow
from nipype.interfaces.utility import Merge
from nipype.pipeline.plugins import LinearPlugin

from bids_dgmseg.bids.derivatives import (
    ACQUISITION_FIELDS,
    MAP_SIDECAR,
    SCANNER_FIELDS,
    Provenance,
    map_paths,
    remove_refused,
    save_refused,
    with_scan,
)
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import SHIPPED_WEIGHTS, RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, FULL_ERRORS, InputError, raise_if_interrupted
from bids_dgmseg.interfaces.label_nuclei import AlignSessions
from bids_dgmseg.interfaces.reconstruct_qsm import ImplausibleMapError
from bids_dgmseg.interfaces.step import StepNode, read_report
from bids_dgmseg.io.nifti import format_shape, load_image
from bids_dgmseg.models.registry import Model
from bids_dgmseg.resources import HAS_FORKSERVER
from bids_dgmseg.run.environment import LOG_NAME
from bids_dgmseg.run.plan import Job, Plan, list_options
from bids_dgmseg.run.plugin import WorkersPlugin
from bids_dgmseg.workflows.build import (
    MEMORY_GB,
    RECONSTRUCTED,
    init_participant_wf,
    init_reconstruct_wf,
    step_node,
)

# Scans per parallel workflow: Nipype's bookkeeping grows with the square of the number of nodes.
_BATCH = 100

_DISK_ERRORS = {errno.EACCES, errno.EROFS}

# Libraries report a full disk in many ways; below this number of bytes it is taken for the reason of a crash.
_DISK_FULL_BYTES = 1 << 16


_BYTES_PER_VOXEL = {"localize": 40, "segment": 60, "align": 60, "measure": 60, "plot": 42, "save": 16}
"""Growth of the peak memory of `dgm16` from cubes of 128 to 360 voxels."""

_LIBRARIES_GB, _SMALLEST_GB = 0.6, 1.5
"""Memory of the libraries, and the least that is planned for a step."""


def workflow_name(scan: str) -> str:
    """Return the name of a scan's workflow; Nipype's names have no plus sign, which BIDS labels may have.

    >>> workflow_name("sub-a+b_acq-x")
    'sub-a-plus-b_acq-x'
    """
    return scan.replace("+", "-plus-")


def folder_name(job: Job) -> str:
    """Return the name of the folder for the intermediate files of a scan, or of the sessions labelled with it."""
    return f"{workflow_name(job.sessions[0].scan.name)}_sessions" if job.sessions else workflow_name(job.scan.name)


def build_sessions_workflow(jobs: Sequence[Job], *, mem_gb: Mapping[str, Mapping[str, float]]) -> Workflow:
    """Build the workflow of the sessions of a participant that are labelled together.

    Sessions without a job are labelled already, and their maps exist. Sessions with edited results contribute only
    their map. `mem_gb` has the memory of each step by scan.
    """
    job, sessions, to_process = jobs[0], jobs[0].sessions, {job.scan.name: job for job in jobs}
    network: dict[str, Any] = {
        "model": job.model.name,
        "weights": job.config.segmentation.weights,
        "device": job.config.resources.device,
        "n_threads": _count_threads(job),
    }
    largest_gb = {step: max(planned[step] for planned in mem_gb.values()) for step in MEMORY_GB}
    align = step_node(AlignSessions(), "align", largest_gb, network["n_threads"], **network)
    align.inputs.names = [_name_map(session) for session in sessions]
    align.inputs.metadata = [
        dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar) for scan in (job.scan for job in sessions)
    ]
    collect = step_node(Merge(len(sessions)), "collect", largest_gb)
    workflow = Workflow(name=folder_name(job))
    workflow.connect(collect, "out", align, "in_sessions")
    for number, session in enumerate(sessions):
        scan, reconstruct = session.scan, None
        if scan.from_echoes and scan.name in to_process:
            name = f"{workflow_name(scan.name)}_reconstruct"
            options: dict[str, Any] = {"n_threads": _count_threads(session), "mem_gb": mem_gb[scan.name]}
            reconstruct = init_reconstruct_wf(session.config.reconstruction, name=name, **options)
            _set_inputs(reconstruct, _describe_echoes(session))
            workflow.connect(reconstruct, "outputnode.chi", collect, f"in{number + 1}")
        else:
            path = map_paths(session.config.output_dir, scan)[0] if scan.from_echoes else scan.chi
            setattr(collect.inputs, f"in{number + 1}", str(path))
        to_label = to_process.get(scan.name)
        if to_label and not to_label.is_edited:
            labelled = build_workflow(to_label, mem_gb=mem_gb[scan.name])
            workflow.connect(align, ("out_sessions", _take, number), labelled, "inputnode.in_session")
            if reconstruct:
                fields = [(f"outputnode.{output}", f"inputnode.{field}") for output, field in RECONSTRUCTED.items()]
                workflow.connect([(reconstruct, labelled, fields)])
    return workflow


def _take(paths, number):  # type: ignore[no-untyped-def]  # Nipype runs its source text, without this module's names
    """Return one of several files."""
    return paths[number]


def build_workflow(job: Job, *, mem_gb: Mapping[str, float]) -> Workflow:
    """Build the workflow of a scan with the options of the run."""
    scan, config = job.scan, job.config
    is_reconstructed_here = scan.from_echoes and not job.sessions
    workflow = init_participant_wf(
        config.output_dir,
        replace(config.segmentation, model=job.model.name),
        config.reference,
        config.reconstruction if is_reconstructed_here else None,
        name=workflow_name(scan.name),
        device=config.resources.device,
        n_threads=_count_threads(job),
        mem_gb=mem_gb,
    )
    provenance = Provenance(
        sources=scan.uris,
        scanner={name: value for name, value in scan.sidecar.items() if name in (*SCANNER_FIELDS, *ACQUISITION_FIELDS)},
        settings=_describe_settings(job),
        made_from=job.made_from.describe(),
    )
    inputs = {
        "title": scan.name,
        "metadata": dict(MAP_SIDECAR if scan.from_echoes else scan.sidecar),
        "reference_mask": job.reference_mask,
        "in_correction": job.correction,
        "in_lesion_masks": [str(path) for path in job.excluded] or None,
        "in_maps": [str(row.path) for row in job.maps.values()] or None,
        "map_names": list(job.maps) or None,
        "map_units": [row.units for row in job.maps.values()] or None,
        "age": job.age,
        "entities": scan.named_entities,
        "provenance": asdict(provenance),
    }
    if is_reconstructed_here:
        inputs |= _describe_echoes(job)
    elif not scan.from_echoes:
        inputs["in_chi"] = scan.chi
    _set_inputs(workflow, inputs)
    return workflow


def _describe_settings(job: Job) -> dict[str, Any]:
    """Return the options that the QC record shows."""
    config, weights = job.config, job.config.segmentation.weights
    return {
        "model": job.model.name,
        "weights": weights.name if weights else SHIPPED_WEIGHTS,
        "device": config.resources.device,
        "threads": config.resources.omp_nthreads,
        **{name: value.name if isinstance(value, Path) else value for name, value in list_options(job).items()},
        **({"correction": job.correction.name} if job.correction else {}),
        **({"longitudinal": [session.scan.name for session in job.sessions]} if job.sessions else {}),
    }


def _name_map(job: Job) -> str:
    """Return the file name of a map, with the name of the scan if it lacks that: reconstructed ones, those of SEPIA."""
    name = job.scan.chi.name
    is_named = name.startswith(job.scan.name) and not job.scan.from_echoes
    return name if is_named else map_paths(job.config.output_dir, job.scan)[0].name


def _set_inputs(workflow: Workflow, inputs: Mapping[str, Any]) -> None:
    inputnode = workflow.inputs.inputnode  # slow: Nipype builds them anew each time
    for name, value in inputs.items():
        if value is not None:  # Nipype does not accept None for a file that is not provided
            setattr(inputnode, name, str(value) if isinstance(value, Path) else value)


def _count_threads(job: Job) -> int:
    return min(job.config.resources.omp_nthreads, job.config.resources.nprocs)


def _describe_echoes(job: Job) -> dict[str, Any]:
    """Return the inputs of a reconstruction."""
    from bids_dgmseg.qsm.field import field_strength_t  # imports torch

    scan = job.scan
    parts = list(scan.echoes[0].parts)
    fields = ("in_phase", "in_magnitude")[: len(parts)]
    return {
        "title": scan.name,
        "parts": parts,
        **{field: [str(echo.parts[part]) for echo in scan.echoes] for field, part in zip(fields, parts, strict=True)},
        "echo_times_s": [echo.time_s for echo in scan.echoes],
        "field_strength_t": field_strength_t(
            float(scan.sidecar["MagneticFieldStrength"]), scan.sidecar.get("ImagingFrequency")
        ),
        "phase_units": [echo.units for echo in scan.echoes],
        "acquisition_type": str(scan.sidecar.get("MRAcquisitionType", "")),
        "in_mask": job.brain_mask,
    }


def plan_memory(scan: Scan, model: Model, *, limit_gb: float) -> dict[str, float]:
    """Estimate the peak memory of each step in GB from the header of the map, or of the first echo.

    If the header cannot be read, the step itself reports why.

    Raises
    ------
    InputError
        If a step needs more than the limit because of the size of the image.
    """
    networks = {"segment": model.memory_gb, "align": model.memory_gb}
    least = {**dict.fromkeys(MEMORY_GB, _SMALLEST_GB), **networks, "reconstruct": _LIBRARIES_GB}
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
        needed["reconstruct"] = estimate_memory_gb(shape, sizes_mm, n_echoes=len(scan.echoes))
    if too_large := {step: gb for step, gb in needed.items() if gb > max(limit_gb, least[step])}:
        step = max(too_large, key=lambda name: too_large[name])
        raise InputError(
            f"{scan.chi.name}: {step} needs about {too_large[step]:.1f} GB of memory for {format_shape(shape)} voxels, "
            f"`mem_gb` is {limit_gb:g}; raise `mem_gb`, or crop or resample the image"
        )
    return least | {step: max(gb, least[step]) for step, gb in needed.items()}


class ScanRunner:
    """Processing of the scans of one call of the program.

    `work` has a folder per scan, which is removed when the scan is done; `logs` gets the log and crash files per scan.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        progress: RunProgress,
        on_end: Callable[[ScanRunner, Scan], None],
        *,
        work: Path,
        logs: Path,
    ) -> None:
        self._config, self._model, self._known_warnings = config, plan.model, plan.warnings
        self._work, self._logs, self._progress, self._on_end = work, logs, progress, on_end
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
            scans = next((self._jobs[part] for part in name.split(".") if part in self._jobs), jobs)
            crashes = self._logs / scans[0].scan.name
            workflow.get_node(name).config = {"execution": {"crashdump_dir": str(crashes)}}
        return workflow

    def _prepare(self, job: Job) -> dict[str, float] | None:
        """Return the memory that is planned for each step of a scan; None if it cannot be processed: reported."""
        scan, config = job.scan, self._config
        if scan.from_echoes:
            remove_refused(config.output_dir, scan, self._model)
        planned, problem = None, job.problem
        if not problem or (job.is_edited and job.sessions):  # whose map the other sessions need
            try:
                planned = plan_memory(scan, self._model, limit_gb=config.resources.mem_gb)
            except InputError as error:
                problem = problem or str(error)
        if problem:
            self._fail(scan.name, problem)
        return planned

    def _fail_together(self, jobs: Sequence[Job]) -> None:
        """Report that sessions cannot be labelled because one that is labelled with them failed.

        One whose results are edited still has its map.
        """
        failed = [job.scan.name for job in jobs if job.scan.name in self.failed and not job.is_edited]
        ended = self.done | self.failed.keys()
        for job in [job for job in jobs if failed and job.scan.name not in ended]:
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
                if job.sessions and all(other.scan.name in self.done for other in self._jobs[folder_name(job)]):
                    folder = folder.parent
                shutil.rmtree(folder, ignore_errors=True)
                self._progress.finish(scan)
                self._on_end(self, job.scan)

    def _fail(self, scan: str, message: str) -> None:
        self.failed[scan] = with_scan(scan, message)
        self._progress.fail(scan, self.failed[scan])
        (job,) = self._jobs[workflow_name(scan)]
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
        if isinstance(error, InputError):
            return str(error)
        is_saved, code = step == "save", error.errno if isinstance(error, OSError) else 0
        folder = self._config.output_dir if is_saved else self._work.parent
        with contextlib.suppress(OSError):  # libraries report a full disk in many ways
            if code in FULL_ERRORS or shutil.disk_usage(folder).free < _DISK_FULL_BYTES:
                return f"{step}: no space left in {folder}; free some" + " or choose another folder with -w" * (
                    not is_saved
                )
        if isinstance(error, OSError) and code in _DISK_ERRORS:
            where = f": {error.filename}" if error.filename else ""
            return f"{step}: {error.strerror}{where}; {DISK_ADVICE}"
        crashes = sorted((self._logs / scan.name).glob("crash-*"), key=lambda path: path.stat().st_mtime)
        details = crashes[-1] if crashes else self._logs / LOG_NAME
        text = " ".join(str(error).split())
        reason = "" if error is None else f" ({type(error).__name__}{': ' * bool(text)}{text})"
        return f"{step} crashed{reason}; see {details}"
