"""The participant level: find scans, skip those that are done, process the others, write the pages.

Modules that load Nipype, NumPy or torch are imported inside functions, because the environment must be set before.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import Inputs, open_inputs, summarize_validation
from bids_dgmseg.bids.scans import Scan, find_scans, find_skipped
from bids_dgmseg.bids.segmentations import check_reference
from bids_dgmseg.config import Reconstruction, RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK, InputError
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.workflow.environment import configure_nipype, log_to, prepare_environment, terminate_as_interrupt
from bids_dgmseg.workflow.folders import check_folders, make_run_folder

if TYPE_CHECKING:
    from bids_dgmseg.workflow.jobs import Job
    from bids_dgmseg.workflow.runner import Run


def run_participant(config: RunConfig) -> int:
    """Segment and measure the selected scans.

    Parameters
    ----------
    config : RunConfig
        Options of the run.

    Returns
    -------
    int
        0 if all scans are done, 1 if some failed or lie in the wrong folder.

    Raises
    ------
    InputError
        If the run cannot start: no scans, an unknown model, an output directory that cannot be used.
    """
    prepare_environment(config.control.work_dir, n_threads=config.resources.omp_nthreads)
    segmentation = config.segmentation
    chosen = replace(get_model(segmentation.model or "default"), ensemble=segmentation.ensemble)
    if chosen.ensemble and chosen.localizer.kind == "nnunet":
        raise InputError(
            f"--ensemble: not supported by {chosen.name}, whose labels are side-specific, so that mirrored images "
            "cannot be averaged; omit it"
        )
    model, notes = choose_labels(chosen, segmentation.weights, segmentation.label_map)
    check_reference(config.reference, model)
    misplaced: list[str] = []
    inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
    scans = find_scans(inputs, echoes=True, misplaced=misplaced)
    notes += [f"{line}; ignored" for line in misplaced]
    check_folders(config)
    if config.control.dry_run:
        return _print_plan(config, inputs, model, scans, notes)
    if not config.control.skip_bids_validation and (
        summary := summarize_validation(inputs.root, config.control.work_dir)
    ):
        sys.stderr.write(f"bids_dgmseg: warning: {summary}\n")
    work = make_run_folder(config.control.work_dir)
    try:
        with terminate_as_interrupt():
            return _run_scans(config, inputs, model, scans, work, notes) or (FAILED if misplaced else OK)
    finally:
        if not any(work.iterdir()):  # failed scans leave their files for inspection
            work.rmdir()


def _run_scans(
    config: RunConfig, inputs: Inputs, model: Model, scans: Sequence[Scan], work: Path, notes: Sequence[str]
) -> int:
    from bids_dgmseg.bids.output_dataset import write_dataset_files
    from bids_dgmseg.segmentation.segment import check_ready
    from bids_dgmseg.workflow.builder import workflow_name
    from bids_dgmseg.workflow.jobs import plan_jobs
    from bids_dgmseg.workflow.runner import Run

    jobs = plan_jobs(config, model, scans)
    if jobs:
        notes = [*notes, *check_ready(model, weights=config.segmentation.weights, device=config.resources.device)]
    logs = config.output_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{work.name}"
    logs.mkdir(parents=True)
    progress = RunProgress(len(jobs))
    with log_to(logs, verbose=config.control.verbose > 0), progress:
        configure_nipype(stop_on_first_crash=config.control.stop_on_first_crash)
        write_dataset_files(
            config.output_dir,
            inputs,
            scans,
            model,
            reference=config.reference,
            own_weights=config.segmentation.weights is None,
        )
        for line in [*notes, *_find_warnings(config, inputs, model, scans, jobs)]:
            progress.warn(line)
        run = Run(config=config, model=model, work=work, logs=logs, progress=progress)
        try:
            run.execute(jobs)
        finally:
            kept = {workflow_name(scan) for scan in run.failed}
            for folder in work.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
        pages_written = _write_pages(config.output_dir, model, scans, run, progress)
    if not any(logs.iterdir()):
        logs.rmdir()
    _print_summary(len(scans), run, logs, progress)
    return OK if pages_written and len(run.done) == len(jobs) else FAILED


def _find_warnings(
    config: RunConfig, inputs: Inputs, model: Model, scans: Sequence[Scan], jobs: Sequence[Job]
) -> list[str]:
    """Return warnings about the selection, the options and existing results."""
    from bids_dgmseg.workflow.jobs import find_outdated_results

    warnings = [*find_outdated_results(config.output_dir, model, jobs), *find_skipped(inputs, scans)]
    if not any(scan.from_echoes for scan in scans):
        given, default = config.reconstruction, Reconstruction()
        unused = {
            "--brain-mask": given.brain_masks != default.brain_masks,
            "--phase-sign": given.phase_sign != default.phase_sign,
        }
        warnings += [
            f"{option} has no effect: every selected scan already has a chi map"
            for option, is_given in unused.items()
            if is_given
        ]
    return warnings


def _print_plan(config: RunConfig, inputs: Inputs, model: Model, scans: Sequence[Scan], notes: Sequence[str]) -> int:
    """Print what the run would do; raises the same errors as the run before its first scan."""
    from bids_dgmseg.workflow.jobs import plan_jobs

    jobs = plan_jobs(config, model, scans)
    # Otherwise nothing can be wrong, and importing torch is slow.
    if jobs and (config.segmentation.weights or config.resources.device == "cuda"):
        from bids_dgmseg.segmentation.segment import check_ready

        notes = [*notes, *check_ready(model, weights=config.segmentation.weights, device=config.resources.device)]
    progress, to_do = RunProgress(0), {job.scan.name for job in jobs}
    for scan in scans:
        if scan.problem:
            progress.info(f"{scan.name}: would fail: {scan.problem}")
        elif scan.name not in to_do:
            progress.info(f"{scan.name}: up to date, would be skipped (use --force to process it again)")
        elif scan.from_echoes:
            progress.info(f"{scan.name}: would reconstruct a map from {scan.uri} … and segment it with {model.name}")
        else:
            progress.info(f"{scan.name}: would segment {scan.uri} with {model.name}")
    for line in [*notes, *_find_warnings(config, inputs, model, scans, jobs)]:
        progress.warn(line)
    to_do -= {scan.name for scan in scans if scan.problem}
    progress.info(f"{len(to_do)} of {len(scans)} scans would be segmented into {config.output_dir}")
    return OK


def _write_pages(output_dir: Path, model: Model, scans: Sequence[Scan], run: Run, progress: RunProgress) -> bool:
    """Write the page of each participant with new results or failures, or whose page is missing or outdated."""
    from bids_dgmseg.report.participant import write_participant_page

    complete = True
    for participant in sorted({scan.participant for scan in scans}):
        names = [scan.name for scan in scans if scan.participant == participant]
        failed = [name for name in names if name in run.failed]
        if not failed and run.done.isdisjoint(names) and not _is_page_outdated(output_dir, participant):
            continue
        problems, earlier = [run.failed[name] for name in failed], [(name, model.name) for name in failed]
        try:
            write_participant_page(output_dir, participant, failures=problems, outdated=earlier)
        except Exception as error:  # noqa: BLE001 - the scans are done: one page must not keep the others from being written
            progress.warn(f"sub-{participant}: cannot write the page ({error}); please report this as a bug")
            complete = False
    return complete


def _is_page_outdated(output_dir: Path, participant: str) -> bool:
    page = output_dir / f"sub-{participant}.html"
    results = [path.stat().st_mtime for path in (output_dir / f"sub-{participant}").rglob("*_qc.json")]
    return bool(results) and (not page.is_file() or page.stat().st_mtime < max(results))


def _print_summary(n_scans: int, run: Run, logs: Path, progress: RunProgress) -> None:
    kept = n_scans - len(run.done) - len(run.failed)
    if run.failed:
        progress.warn(
            f"{len(run.failed)} of {n_scans} scans failed: {', '.join(sorted(run.failed))}; see {logs}, then run the "
            "same command again (finished scans are kept)"
        )
    elif run.done:
        earlier = f", {kept} unchanged since an earlier run" if kept else ""
        progress.info(f"{len(run.done)} of {n_scans} scans done{earlier}; see {logs.parent.parent}/sub-*.html")
    else:
        progress.info(f"all {n_scans} scans are up to date; use --force to process them again")
