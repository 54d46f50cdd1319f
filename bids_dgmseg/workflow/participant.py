"""The participant level: find scans, skip what is done, segment the rest, write the pages.

Modules that load Nipype, NumPy or torch are imported inside functions: the environment must be set before.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.masks import check_reference, find_brain_masks, find_reference_masks
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.bids.skipped import find_left_out
from bids_dgmseg.bids.validation import summarize_validation
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.models.label_map import choose_labels
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.workflow.environment import configure_nipype, log_to, prepare_environment, terminate_as_interrupt
from bids_dgmseg.workflow.jobs import Job
from bids_dgmseg.workflow.output import check_folders, make_run_folder

if TYPE_CHECKING:
    from bids_dgmseg.workflow.runner import Run


def run_participant(config: RunConfig) -> int:
    """Segment and measure the selected scans.

    Parameters
    ----------
    config : RunConfig
        The run's options.

    Returns
    -------
    int
        0 if all scans are done, 1 if some failed or lie in a wrong folder.

    Raises
    ------
    InputError
        If nothing can be begun: no scan, an unknown model, an output directory that must not or cannot be written.
    """
    prepare_environment(config.control.work_dir, n_threads=config.resources.omp_nthreads)
    chosen = replace(get_model(config.segmentation.model or "default"), ensemble=config.segmentation.ensemble)
    if chosen.ensemble and chosen.localizer.kind == "nnunet":
        raise InputError(f"--ensemble: {chosen.name} tells left from right and is not mirrored; leave it out")
    model, notes = choose_labels(chosen, config.segmentation.weights, config.segmentation.label_map)
    check_reference(config.flat(), model)
    misplaced: list[str] = []
    scans = find_scans(config.flat(), echoes=True, misplaced=misplaced)
    notes += [f"{line}; left out until then" for line in misplaced]
    check_folders(config)
    if config.control.dry_run:
        return _tell_plan(config, model, scans, notes)
    if not config.control.skip_bids_validation and (summary := summarize_validation(config.flat())):
        sys.stderr.write(f"bids_dgmseg: warning: {summary}\n")
    work = make_run_folder(config.control.work_dir)
    try:
        with terminate_as_interrupt():
            return _run_scans(config, model, scans, work, notes) or (1 if misplaced else 0)
    finally:
        if not any(work.iterdir()):  # failed scans leave their files for whoever looks into them
            work.rmdir()


def _run_scans(config: RunConfig, model: Model, scans: Sequence[Scan], work: Path, notes: Sequence[str]) -> int:
    from bids_dgmseg.bids.derivatives import write_dataset_files
    from bids_dgmseg.segmentation.segment import check_ready
    from bids_dgmseg.workflow.builder import workflow_name
    from bids_dgmseg.workflow.runner import Run

    jobs = _plan(config, model, scans)
    if jobs:
        notes = [*notes, *check_ready(model, weights=config.segmentation.weights, device=config.resources.device)]
    logs = config.output_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{work.name}"
    logs.mkdir(parents=True)
    progress = RunProgress(len(jobs))
    with log_to(logs, verbose=config.control.verbose > 0), progress:
        configure_nipype(stop_on_first_crash=config.control.stop_on_first_crash)
        write_dataset_files(config.flat(), scans, model)
        for line in [*notes, *_remarks(config, model, scans, jobs)]:
            progress.warn(line)
        run = Run(config=config, model=model, work=work, logs=logs, progress=progress)
        try:
            run.execute(jobs)
        finally:
            _clear(work, keep={workflow_name(scan) for scan in run.failed})
        pages_written = _write_pages(config, model, scans, run, progress)
    if not any(logs.iterdir()):
        logs.rmdir()
    _conclude(scans, run.done, run.failed, logs, progress)
    return 0 if pages_written and len(run.done) == len(jobs) else 1


def _plan(config: RunConfig, model: Model, scans: Sequence[Scan]) -> list[Job]:
    """Choose the scans that have no results, or results from another map, model or option."""
    from bids_dgmseg.bids.derivatives import fingerprint, is_done, map_fingerprint

    masks, brains = find_reference_masks(config.flat(), scans), find_brain_masks(config.flat(), scans)
    jobs = []
    for scan in scans:
        mask, brain = masks.get(scan.name), brains.get(scan.name)
        made = map_fingerprint(scan, config.reconstruction.phase_sign, brain)
        mark = fingerprint(scan, config.flat(), model, reference_mask=mask, reconstruction=made)
        jobs.append(Job(scan, mark, mask, brain, made))
    if config.control.force:
        return jobs
    return [job for job in jobs if not is_done(config.output_dir, job.scan, model.name, job.fingerprint)]


def _remarks(config: RunConfig, model: Model, scans: Sequence[Scan], jobs: Sequence[Job]) -> list[str]:
    """Say what the user should know of the selection, the options and the results that are there."""
    return [*_find_stale(config, model, jobs), *find_left_out(config.flat(), scans), *_idle_options(config, scans)]


def _find_stale(config: RunConfig, model: Model, jobs: Sequence[Job]) -> list[str]:
    """Name results of other models whose map this run replaces by another one of the same echoes."""
    from bids_dgmseg.bids.reconstructed import find_dependent

    stale: dict[str, list[str]] = {}
    for job in jobs:
        made = job.reconstruction
        for other in find_dependent(config.output_dir, job.scan, but_for=made) if made else ():
            if other != model.name:
                stale.setdefault(other, []).append(job.scan.name)
    return [
        f"{list_some(scans)}: results of {other} were made from another map of the echoes, which this run replaces; "
        f"run --model {other} again, with the same --phase-sign and --brain-mask"
        for other, scans in stale.items()
    ]


def _tell_plan(config: RunConfig, model: Model, scans: Sequence[Scan], notes: Sequence[str]) -> int:
    """Say what would be done; what ends a run before its first scan ends this too."""
    jobs = _plan(config, model, scans)
    todo = {job.scan.name for job in jobs}
    # Otherwise nothing can be wrong, and importing torch is slow.
    if jobs and (config.segmentation.weights or config.resources.device == "cuda"):
        from bids_dgmseg.segmentation.segment import check_ready

        notes = [*notes, *check_ready(model, weights=config.segmentation.weights, device=config.resources.device)]
    progress = RunProgress(0)
    for scan in scans:
        if scan.problem:
            progress.info(f"{scan.name}: would fail: {scan.problem}")
        elif scan.name in todo:
            what = f"a map of its echoes, {scan.uri} …," if scan.from_echoes else scan.uri
            progress.info(f"{scan.name}: would segment {what} with {model.name}")
        else:
            progress.info(f"{scan.name}: done before, would be skipped (--force redoes it)")
    for line in [*notes, *_remarks(config, model, scans, jobs)]:
        progress.warn(line)
    todo -= {scan.name for scan in scans if scan.problem}
    progress.info(f"{len(todo)} of {len(scans)} scans would be segmented into {config.output_dir}")
    return 0


def _idle_options(config: RunConfig, scans: Sequence[Scan]) -> list[str]:
    """Say which options are for echoes where no scan has any."""
    given = {
        "--brain-mask": config.reconstruction.brain_masks is not None,
        "--phase-sign": config.reconstruction.phase_sign != "auto",
    }
    if any(scan.from_echoes for scan in scans):
        return []
    return [
        f"{option}: is for maps that are made of echoes; here all are given"
        for option, is_given in given.items()
        if is_given
    ]


def _write_pages(config: RunConfig, model: Model, scans: Sequence[Scan], run: Run, progress: RunProgress) -> bool:
    """Write the page of each participant with new results or failures, or whose page an earlier run did not reach."""
    from bids_dgmseg.report.page import write_page

    complete = True
    touched = {scan.participant for scan in scans if scan.name in run.done or scan.name in run.failed}
    for participant in sorted({scan.participant for scan in scans}):
        if participant not in touched and not _is_page_old(config.output_dir, participant):
            continue
        names = [scan.name for scan in scans if scan.participant == participant]
        failed = [name for name in names if name in run.failed]
        problems, earlier = [run.failed[name] for name in failed], [(name, model.name) for name in failed]
        try:
            write_page(config.output_dir, participant, problems=problems, earlier=earlier)
        except Exception as error:  # noqa: BLE001 - the scans are done: a page must not take the others with it
            progress.warn(f"sub-{participant}: the page could not be written ({error}); report this")
            complete = False
    return complete


def _is_page_old(output_dir: Path, participant: str) -> bool:
    page = output_dir / f"sub-{participant}.html"
    results = [path.stat().st_mtime for path in (output_dir / f"sub-{participant}").rglob("*_qc.json")]
    return bool(results) and (not page.is_file() or page.stat().st_mtime < max(results))


def _conclude(
    scans: Sequence[Scan], done: set[str], failed: Collection[str], logs: Path, progress: RunProgress
) -> None:
    kept = len(scans) - len(done) - len(failed)
    if failed:
        names = ", ".join(sorted(failed))
        progress.warn(
            f"{len(failed)} of {len(scans)} scans failed: {names}; see {logs}, then run the same command again "
            "(finished scans are kept)"
        )
    elif done:
        earlier = f", {kept} unchanged since an earlier run" if kept else ""
        progress.info(f"{len(done)} of {len(scans)} scans done{earlier}; see {logs.parent.parent}/sub-*.html")
    else:
        progress.info(f"all {len(scans)} scans are done and unchanged; --force does them again")


def _clear(work: Path, *, keep: set[str]) -> None:
    """Remove the run's folder but for what failed scans left in it."""
    for folder in work.iterdir():
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
