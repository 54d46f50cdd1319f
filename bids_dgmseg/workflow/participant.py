"""The participant level: plan the run, process the scans, write the pages.

Modules that load Nipype, NumPy or torch are imported inside functions, because the environment must be set before.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import summarize_validation
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK
from bids_dgmseg.models.registry import Model
from bids_dgmseg.workflow.environment import configure_nipype, log_to, prepare_environment, terminate_as_interrupt
from bids_dgmseg.workflow.plan import Plan, make_run_folder, plan_run

if TYPE_CHECKING:
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
    control = config.control
    prepare_environment(control.work_dir, n_threads=config.resources.omp_nthreads)
    plan = plan_run(config)
    if control.dry_run:
        return _print_plan(plan, config.output_dir)
    if not control.skip_bids_validation and (summary := summarize_validation(plan.inputs.root, control.work_dir)):
        RunProgress(0).warn(f"bids_dgmseg: warning: {summary}")
    work = make_run_folder(control.work_dir)
    try:
        with terminate_as_interrupt():
            return _run_scans(config, plan, work) or (FAILED if plan.misplaced else OK)
    finally:
        if not any(work.iterdir()):  # failed scans leave their files for inspection
            work.rmdir()


def _run_scans(config: RunConfig, plan: Plan, work: Path) -> int:
    from bids_dgmseg.bids.output_dataset import write_dataset_files
    from bids_dgmseg.workflow.builder import workflow_name
    from bids_dgmseg.workflow.runner import Run

    logs = config.output_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{work.name}"
    logs.mkdir(parents=True)
    progress = RunProgress(len(plan.jobs))
    with log_to(logs, verbose=config.control.verbose > 0), progress:
        configure_nipype(stop_on_first_crash=config.control.stop_on_first_crash)
        shipped_weights = config.segmentation.weights is None
        write_dataset_files(
            config.output_dir,
            plan.inputs,
            plan.scans,
            plan.model,
            reference=config.reference,
            shipped_weights=shipped_weights,
        )
        for warning in plan.warnings:
            progress.warn(warning)
        run = Run(config=config, model=plan.model, work=work, logs=logs, progress=progress)
        try:
            run.execute(plan.jobs)
        finally:
            kept = {workflow_name(scan) for scan in run.failed}
            for folder in work.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
        pages_written = _write_pages(config.output_dir, plan.model, plan.scans, run, progress)
    if not any(logs.iterdir()):
        logs.rmdir()
    _print_summary(len(plan.scans), run, logs, progress)
    return OK if pages_written and len(run.done) == len(plan.jobs) else FAILED


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
    progress.info(f"{len(to_do)} of {len(plan.scans)} scans would be segmented into {output_dir}")
    return OK


def _write_pages(output_dir: Path, model: Model, scans: Sequence[Scan], run: Run, progress: RunProgress) -> bool:
    """Write the page of each participant with new results or failures, or whose page is missing or outdated."""
    from bids_dgmseg.report.scan_page import write_participant_page

    complete = True
    for participant in sorted({scan.participant for scan in scans}):
        names = [scan.name for scan in scans if scan.participant == participant]
        failed = [name for name in names if name in run.failed]
        page = output_dir / f"sub-{participant}.html"
        results = [path.stat().st_mtime for path in page.with_suffix("").rglob("*_qc.json")]
        outdated = bool(results) and (not page.is_file() or page.stat().st_mtime < max(results))
        if not (failed or outdated) and run.done.isdisjoint(names):
            continue
        problems, earlier = [run.failed[name] for name in failed], [(name, model.name) for name in failed]
        try:
            write_participant_page(output_dir, participant, failures=problems, outdated=earlier)
        except Exception as error:  # noqa: BLE001 - the scans are done: one page must not keep the others from being written
            progress.warn(f"sub-{participant}: cannot write the page ({error}); please report this as a bug")
            complete = False
    return complete


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
