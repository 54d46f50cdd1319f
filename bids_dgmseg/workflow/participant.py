"""The participant level: plan the run, process the scans, write the pages.

Modules that load Nipype, NumPy or torch are imported inside functions, because the environment must be set before.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import BackgroundValidator, Inputs, open_inputs
from bids_dgmseg.bids.derivatives import hash_sources, models_using_map, output_path
from bids_dgmseg.bids.fingerprints import (
    fingerprint,
    hash_unless_older,
    hash_weights,
    is_done,
    map_fingerprint,
)
from bids_dgmseg.bids.output_dataset import write_dataset_files
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped
from bids_dgmseg.bids.segmentations import check_reference, find_brain_masks, find_reference_masks
from bids_dgmseg.config import ReconstructionOptions, RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK, InputError, count, list_some, raise_if_interrupted
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.io.locks import remove_temporary_files
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.registry import MODELS, Model, check_shipped_weights, get_model, weights_folder
from bids_dgmseg.resources import keep_freed_memory
from bids_dgmseg.workflow.batch_jobs import read_plugin_file
from bids_dgmseg.workflow.environment import (
    check_folders,
    configure_nipype,
    limit_library_threads,
    log_to,
    run_folder,
    worker_servers,
)

if TYPE_CHECKING:
    from bids_dgmseg.workflow.runner import ScanRunner


@dataclass(frozen=True)
class Job:
    """A scan to be processed."""

    scan: Scan
    model: Model
    config: RunConfig
    weights: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the weights."""
    reference_mask: Path | None = None
    """The user's mask of the reference region."""
    brain_mask: Path | None = None
    """The user's brain mask, if the map is to be reconstructed."""

    def hash_map(self, sources: str = "") -> str:
        """Hash everything that a reconstructed map depends on; empty if the scan has a map.

        The images are read unless their hash is given, and so they are for `fingerprint`: a run does that when it needs
        to, not for all scans before the first.
        """
        return map_fingerprint(self.scan, self.config.reconstruction, self.brain_mask, sources=sources)

    def fingerprint(self, reconstruction: str = "", *, quick: bool = False) -> str:
        """Hash everything that the results depend on.

        `reconstruction` is from `hash_map`; with `quick`, images that are older than their results are not read.
        """
        sources = ""
        if not reconstruction:
            results = output_path(self.config.output_dir, self.scan, "dseg", ".json", seg=self.model.name)
            sources = hash_unless_older(self.scan, results) if quick else hash_sources(self.scan)
        return fingerprint(
            self.scan,
            self.model,
            self.config.segmentation,
            self.config.reference,
            weights=self.weights,
            reference_mask=self.reference_mask,
            reconstruction=reconstruction or self.hash_map(sources),
            sources=sources,
        )


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first scan."""

    inputs: Inputs
    model: Model
    scans: tuple[Scan, ...]
    jobs: tuple[Job, ...]
    """Scans without results, or with results of another map, model or option."""
    warnings: tuple[str, ...]
    misplaced: bool
    """Whether files in the wrong folder were ignored."""


def plan_run(config: RunConfig, *, quick: bool = False) -> Plan:
    """Check the options and directories, and find the scans to process; `InputError` if the run cannot start.

    Writes nothing, except that the output directory is created unless this is a dry run. With `quick`, images that are
    older than their results are taken for unchanged without reading them, and weights and device are not checked.
    """
    segmentation, device = config.segmentation, config.resources.device
    chosen = replace(get_model(segmentation.model or "default"), ensemble=segmentation.ensemble)
    if chosen.ensemble and chosen.localizer.kind == "nnunet":
        raise InputError(
            f"--ensemble: not supported by {chosen.name}, whose labels are side-specific, so that mirrored images "
            "cannot be averaged; omit it"
        )
    model, warnings = choose_labels(chosen, segmentation.weights, segmentation.label_map)
    check_reference(config.reference, model)
    if config.control.plugin_file:
        read_plugin_file(config.control)
    inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
    misplaced: list[str] = []
    scans = find_scans(inputs, echoes=True, misplaced=misplaced)
    check_folders(config)
    jobs = _find_jobs(config, model, scans, quick=quick)
    warnings = [*warnings, *(f"{line}; ignored" for line in misplaced)]
    must_load = bool(segmentation.weights) or device == "cuda" or not weights_folder(model).is_dir()
    if jobs and not quick and model.weights and not must_load:
        check_shipped_weights(model)  # not loaded, because importing torch would delay the first scan by seconds
        if model.localizer.guard:
            check_shipped_weights(MODELS[model.localizer.guard])
    elif jobs and not quick and (must_load or not config.control.dry_run):
        from bids_dgmseg.segmentation.segment import check_ready

        warnings += check_ready(model, weights=segmentation.weights, device=device)
    warnings += _find_outdated_results(config.output_dir, model, jobs)
    warnings += find_skipped(inputs, scans)
    if not any(scan.from_echoes for scan in scans):
        given = {
            "--brain-mask": config.reconstruction.brain_masks is not None,
            "--phase-sign": config.reconstruction.phase_sign != "auto",
            "--unwrapping": config.reconstruction.unwrapping != ReconstructionOptions.unwrapping,
            "--background": config.reconstruction.background != ReconstructionOptions.background,
            "--inversion": config.reconstruction.inversion != ReconstructionOptions.inversion,
            "--accept-implausible-maps": config.reconstruction.accept_implausible,
        }
        warnings += [
            f"{option} has no effect: every selected scan already has a chi map"
            for option, is_given in given.items()
            if is_given
        ]
    return Plan(inputs, model, tuple(scans), tuple(jobs), tuple(warnings), bool(misplaced))


def _find_jobs(config: RunConfig, model: Model, scans: Sequence[Scan], *, quick: bool) -> list[Job]:
    """List the scans without results, or with results of other images or options."""
    masks = find_reference_masks(config.reference.masks, scans)
    brains = find_brain_masks(config.reconstruction.brain_masks, scans)
    weights = hash_weights(config.segmentation.weights, model)
    jobs = [Job(scan, model, config, weights, masks.get(scan.name), brains.get(scan.name)) for scan in scans]
    if config.control.force:
        return jobs

    def must_run(job: Job) -> bool:
        # Images are read only if there are results to compare with, so that a new study starts at once.
        has_results = output_path(config.output_dir, job.scan, "dseg", ".json", seg=model.name).is_file()
        return not (has_results and is_done(config.output_dir, job.scan, model.name, job.fingerprint(quick=quick)))

    with ThreadPoolExecutor(config.resources.nprocs) as pool:
        return [job for job, wanted in zip(jobs, pool.map(must_run, jobs), strict=True) if wanted]


def _find_outdated_results(output_dir: Path, model: Model, jobs: Sequence[Job]) -> list[str]:
    """Return warnings about results of other models whose reconstructed map this run replaces."""
    outdated: dict[str, list[str]] = {}
    for job in jobs:
        if job.scan.from_echoes and models_using_map(output_dir, job.scan):
            for other in models_using_map(output_dir, job.scan, other_than=job.hash_map()):
                if other != model.name:
                    outdated.setdefault(other, []).append(job.scan.name)
    return [
        f"{list_some(scans)}: results of {other} belong to another reconstruction, which this run replaces; run "
        f"--model {other} again with the same reconstruction options"
        for other, scans in outdated.items()
    ]


def run_participant(config: RunConfig) -> int:
    """Segment and measure the selected scans.

    Returns
    -------
    int
        0 if all scans are done, 1 if some failed or lie in the wrong folder.

    Raises
    ------
    InputError
        If the run cannot start: no scans, an unknown model, an output directory that cannot be used.
    """
    control = config.control
    keep_freed_memory()
    limit_library_threads(config.resources.omp_nthreads)
    plan = plan_run(config)
    if control.dry_run:
        return _print_plan(plan, config.output_dir)
    parallel = plan.jobs and config.resources.nprocs > 1 and not control.plugin_file
    with (
        run_folder(control.work_dir) as work,
        worker_servers(viewer=config.segmentation.viewer) if parallel else contextlib.nullcontext(),
    ):
        validated = None if control.skip_bids_validation else plan.inputs.root
        with BackgroundValidator(validated, work) as validator:
            code = _run_scans(config, plan, work, on_start=validator.start) or (FAILED if plan.misplaced else OK)
            if summary := validator.summarize():
                RunProgress(0).warn(f"bids_dgmseg: warning: {summary}")
        return code


def _run_scans(config: RunConfig, plan: Plan, work: Path, *, on_start: Callable[[], None]) -> int:
    from bids_dgmseg.workflow.runner import ScanRunner, workflow_name
    from bids_dgmseg.workflow.status import record_run

    logs = config.output_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{work.name.rpartition('-')[2]}"
    logs.mkdir(parents=True)
    _remove_temporary_files(config.output_dir, plan)
    progress = RunProgress(len(plan.jobs))
    with log_to(logs, verbose=config.control.verbose > 0), progress:
        # Each poll of a scheduler asks for every job; workers are waited for by `WorkersPlugin`.
        poll_s = 2.0 if config.control.plugin_file else 0.0
        configure_nipype(stop_on_first_crash=config.control.stop_on_first_crash, poll_s=poll_s)
        record_run(config)
        shipped_weights = config.segmentation.weights is None
        write_dataset_files(
            config.output_dir,
            plan.inputs,
            plan.scans,
            plan.model,
            reference=config.reference,
            shipped_weights=shipped_weights,
            reconstruction=config.reconstruction,
        )
        for warning in plan.warnings:
            progress.warn(warning)
        run = ScanRunner(config=config, model=plan.model, work=work, logs=logs, progress=progress)
        pages = _Pages(config.output_dir, plan, progress)
        if config.resources.nprocs > 1:
            importlib.import_module("bids_dgmseg.report.scan_page")  # while the workers load their libraries
        run.on_start = on_start
        run.on_end = lambda scan: pages.update(run, scan.participant)
        try:
            run.execute(plan.jobs)
        except KeyboardInterrupt:
            _remove_temporary_files(config.output_dir, plan)  # of processes that were killed while they wrote
            raise
        finally:
            kept = {workflow_name(scan) for scan in run.failed}
            for folder in work.glob("[!.]*"):
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
        pages.write_others(run)
        if warning := _describe_red_scans(config.output_dir, plan, run.failed):
            logging.getLogger("bids_dgmseg").warning(warning)
    if not any(logs.iterdir()):
        logs.rmdir()
    _print_summary(len(plan.scans), run, logs, progress)
    if warning:
        progress.warn(warning)
    return OK if pages.complete and len(run.done) == len(plan.jobs) else FAILED


def _print_plan(plan: Plan, output_dir: Path) -> int:
    """Print what the run would do."""
    progress, to_do, model = RunProgress(0), {job.scan.name for job in plan.jobs}, plan.model.name
    for scan in plan.scans:
        if scan.problem:
            progress.info(f"{scan.name}: would fail: {scan.problem}")
        elif scan.name not in to_do:
            progress.info(f"{scan.name}: up to date, would be skipped (use --force to process it again)")
        elif scan.from_echoes:
            progress.info(f"{scan.name}: would reconstruct a map from {scan.uri} … and segment it with {model}")
        else:
            progress.info(f"{scan.name}: would segment {scan.uri} with {model}")
    for warning in plan.warnings:
        progress.warn(warning)
    to_do -= {scan.name for scan in plan.scans if scan.problem}
    plural = "" if len(plan.scans) == 1 else "s"
    progress.info(f"{len(to_do)} of {len(plan.scans)} scan{plural} would be segmented into {output_dir}")
    return OK


class _Pages:
    """The pages of the participants, each written when the last of its scans is done or has failed."""

    def __init__(self, output_dir: Path, plan: Plan, progress: RunProgress) -> None:
        self._output_dir, self._model, self._progress = output_dir, plan.model.name, progress
        by_participant = groupby(plan.scans, key=lambda scan: scan.participant)  # they are sorted
        self._scans = {participant: [scan.name for scan in scans] for participant, scans in by_participant}
        self._planned = {job.scan.name for job in plan.jobs}
        self._written: set[str] = set()
        self.complete = True
        """Whether all pages could be written."""

    def update(self, run: ScanRunner, participant: str) -> None:
        """Write the page of a participant if none of its scans is to be processed any more."""
        ended = run.done | run.failed.keys()
        if self._planned.intersection(self._scans[participant]) <= ended:
            self._write(run, participant)

    def write_others(self, run: ScanRunner) -> None:
        """Write the pages that have new results of an ended run, or that are missing or outdated."""
        for participant in [one for one in self._scans if one not in self._written]:
            raise_if_interrupted()
            page = self._output_dir / f"sub-{participant}.html"
            results = [path.stat().st_mtime for path in page.with_suffix("").rglob("*_qc.json")]
            outdated = bool(results) and (not page.is_file() or page.stat().st_mtime < max(results))
            if outdated or not (run.done | run.failed.keys()).isdisjoint(self._scans[participant]):
                self._write(run, participant)

    def _write(self, run: ScanRunner, participant: str) -> None:
        from bids_dgmseg.report.scan_page import write_participant_page

        failed = [name for name in self._scans[participant] if name in run.failed]
        problems, earlier = [run.failed[name] for name in failed], [(name, self._model) for name in failed]
        try:
            write_participant_page(self._output_dir, participant, failures=problems, outdated=earlier)
        except Exception as error:  # noqa: BLE001 - the scans are done: one page must not keep the others from being written
            self._progress.warn(f"sub-{participant}: cannot write the page ({error}); please report this as a bug")
            self.complete = False
        self._written.add(participant)


def _remove_temporary_files(output_dir: Path, plan: Plan) -> None:
    """Remove what killed runs have left beside the results that this run will write."""
    participants = {f"sub-{job.scan.participant}" for job in plan.jobs}
    for root in (output_dir, output_dir / "logs", output_dir / "figures"):
        remove_temporary_files(root)
    for name in sorted(participants):
        for folder, _, _ in os.walk(output_dir / name):
            remove_temporary_files(Path(folder))


def _describe_red_scans(output_dir: Path, plan: Plan, failed: Collection[str]) -> str:
    """Return a warning that names the scans rated red, of this run and of earlier ones, with the first reason."""
    records = {
        scan.name: read_optional_json(output_path(output_dir, scan, "qc", ".json", seg=plan.model.name))
        for scan in plan.scans
        if scan.name not in failed
    }
    red = [f"{name} ({next(iter(one['reasons']), '')})" for name, one in records.items() if one.get("rating") == "red"]
    if not red:
        return ""
    return (
        f"{len(red)} of {count(len(plan.scans), 'scan')} {'is' if len(red) == 1 else 'are'} rated red: "
        f"{list_some(red)}; check {'it' if len(red) == 1 else 'them'} before use"
    )


def _print_summary(n_scans: int, run: ScanRunner, logs: Path, progress: RunProgress) -> None:
    kept, scans = n_scans - len(run.done) - len(run.failed), "scan" if n_scans == 1 else "scans"
    if run.failed:
        progress.warn(
            f"{len(run.failed)} of {n_scans} {scans} failed: {', '.join(sorted(run.failed))}; see {logs}, then run the "
            "same command again (finished scans are kept)"
        )
    elif run.done:
        earlier = f", {kept} unchanged since an earlier run" if kept else ""
        progress.info(f"{len(run.done)} of {n_scans} {scans} done{earlier}; see {logs.parent.parent}/sub-*.html")
    else:
        every, them = ("the only scan is", "it") if n_scans == 1 else (f"all {n_scans} scans are", "them")
        progress.info(f"{every} up to date; use --force to process {them} again")
