"""The participant level: plan the run, process the scans, write the pages.

Modules that load Nipype, NumPy or torch are imported inside functions, because the environment must be set before.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from collections.abc import Collection
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import validate
from bids_dgmseg.bids.derivatives import AUTOMATIC, contents_of_page
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.output_dataset import VIEWERS, write_citation, write_dataset_files
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK, list_some, raise_if_interrupted
from bids_dgmseg.io.files import read_optional_json, remove_temporary_files, value_of
from bids_dgmseg.resources import HAS_FORKSERVER, keep_freed_memory
from bids_dgmseg.run.environment import configure_nipype, limit_library_threads, log_to, run_folder, worker_context
from bids_dgmseg.run.plan import Plan, plan_run

if TYPE_CHECKING:
    from bids_dgmseg.run.runner import ScanRunner


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
    if HAS_FORKSERVER and config.resources.nprocs > 1 and not control.dry_run:
        worker_context()  # its server loads the libraries while the dataset is indexed
    plan = plan_run(config)
    if control.dry_run:
        return _print_plan(plan, config.output_dir)
    with run_folder(control.work_dir) as work:
        code = _run_scans(config, plan, work) or (FAILED if plan.misplaced else OK)
        if not control.skip_bids_validation and plan.jobs and (summary := validate(plan.inputs.root, work)):
            RunProgress(0).warn(f"bids_dgmseg: warning: {summary}")
        return code


def _run_scans(config: RunConfig, plan: Plan, work: Path) -> int:
    from bids_dgmseg.run.runner import ScanRunner, folder_name

    logs = config.output_dir / "logs" / f"{datetime.now():%Y%m%d-%H%M%S}-{work.name.rpartition('-')[2]}"
    logs.mkdir(parents=True)
    _remove_temporary_files(config.output_dir, plan)
    progress = RunProgress(len(plan.jobs))
    with log_to(logs), progress:
        configure_nipype()
        write_dataset_files(config.output_dir, plan.inputs, plan.scans, plan.model)
        for warning in plan.warnings:
            progress.warn(warning)
        pages = _Pages(config, plan, progress)
        run = ScanRunner(
            config, plan, progress, lambda run, scan: pages.update(run, scan.participant), work=work, logs=logs
        )
        if config.resources.nprocs > 1:
            importlib.import_module("bids_dgmseg.report.scan_page")  # while the workers load their libraries
        try:
            run.execute(plan.jobs)
        except KeyboardInterrupt:
            for folder in _folders_of_participants(config.output_dir, plan):
                remove_temporary_files(folder, min_age_s=0)  # of processes that were killed while they wrote
            raise
        finally:
            kept = {folder_name(job) for job in plan.jobs if job.scan.name in run.failed}
            for folder in work.glob("[!.]*"):
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
            write_citation(config.output_dir, plan.scans, plan.model)
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
    """Print what the run would do with each scan, and why."""
    progress, model = RunProgress(0), plan.model.name
    jobs = {job.scan.name: job for job in plan.jobs}
    n_processed = 0
    for scan in plan.scans:
        if (job := jobs.get(scan.name)) is None:
            progress.info(f"{scan.name}: up to date, would be skipped (use `force` to process it again)")
        elif problem := job.problem:
            progress.info(f"{scan.name}: would fail: {problem}")
        else:
            n_processed += 1
            source = (
                f"reconstruct a map from {scan.uri} … and segment it" if scan.from_echoes else f"segment {scan.uri}"
            )
            progress.info(f"{scan.name}: would {source} with {model}: {job.reason}")
    for warning in plan.warnings:
        progress.warn(warning)
    progress.info(f"{n_processed} of {len(plan.scans)} scan(s) would be segmented into {output_dir}")
    return OK


class _Pages:
    """The pages of the participants, each written when the last of its scans is done or has failed."""

    def __init__(self, config: RunConfig, plan: Plan, progress: RunProgress) -> None:
        self._config, self._progress, self._model = config, progress, plan.model.name
        by_participant = groupby(plan.scans, key=lambda scan: scan.participant)  # they are sorted
        self._scans = {participant: [scan.name for scan in scans] for participant, scans in by_participant}
        self._planned = {job.scan.name for job in plan.jobs}
        self._written: set[str] = set()
        self.complete = True
        """All pages could be written."""

    def update(self, run: ScanRunner, participant: str) -> None:
        """Write the page of a participant if none of its scans is to be processed any more."""
        if self._planned.intersection(self._scans[participant]) <= run.done | run.failed.keys():
            self._write(run, participant)

    def write_others(self, run: ScanRunner) -> None:
        """Write the pages of participants that were not processed to the end, if they are missing or outdated."""
        for participant in [label for label in self._scans if label not in self._written]:
            raise_if_interrupted()
            page = self._page(participant)
            has_results = any(page.with_suffix("").rglob("*_qc.json"))
            is_current = page.is_file() and contents_of_page(page) in page.read_text(encoding="utf-8", errors="replace")
            if run.failed.keys() & set(self._scans[participant]) or (has_results and not is_current):
                self._write(run, participant)

    def _page(self, participant: str) -> Path:
        return self._config.output_dir / f"sub-{participant}.html"

    def _write(self, run: ScanRunner, participant: str) -> None:
        from bids_dgmseg.report.scan_page import write_participant_page

        names = self._scans[participant]
        failures = {(name, self._model): run.failed[name] for name in names if name in run.failed}
        try:
            write_participant_page(
                self._config.output_dir,
                participant,
                failures=list(dict.fromkeys(failures.values())),
                outdated=failures.keys(),
            )
        except Exception as error:  # noqa: BLE001 - the scans are done: one page must not keep the others from being written
            self._progress.warn(f"sub-{participant}: cannot write the page ({error}); please report this as a bug")
            self.complete = False
        else:
            if not self._written and len(self._scans) > 1:
                self._progress.info(f"first page: {self._page(participant)}; open it in a browser")
        self._written.add(participant)


def _remove_temporary_files(output_dir: Path, plan: Plan) -> None:
    """Remove what killed runs have left beside the results that this run will write."""
    top = (output_dir, *(output_dir / name for name in ("logs", "figures", VIEWERS)))
    for folder in (*top, *_folders_of_participants(output_dir, plan)):
        remove_temporary_files(folder)


def _folders_of_participants(output_dir: Path, plan: Plan) -> list[Path]:
    participants = sorted({f"sub-{job.scan.participant}" for job in plan.jobs})
    roots = [dataset / name for dataset in (output_dir, output_dir / AUTOMATIC) for name in participants]
    return [Path(folder) for root in roots for folder, _, _ in os.walk(root)]


def _describe_red_scans(output_dir: Path, plan: Plan, failed: Collection[str]) -> str:
    """Return a warning that names the scans rated red, of this run and of earlier ones, with the first reason."""
    records = {
        scan.name: read_optional_json(output_path(output_dir, scan, "qc", ".json", seg=plan.model.name))
        for scan in plan.scans
        if scan.name not in failed
    }
    reasons = {name: value_of(qc, "reasons", list) for name, qc in records.items() if qc.get("rating") == "red"}
    red = [f"{name} ({next(iter(lines), '')})" for name, lines in reasons.items()]
    return f"{len(red)} of {len(plan.scans)} scan(s) rated red: {list_some(red)}; check before use" if red else ""


def _print_summary(n_scans: int, run: ScanRunner, logs: Path, progress: RunProgress) -> None:
    n_kept = n_scans - len(run.done) - len(run.failed)
    if run.failed:
        progress.warn(
            f"{len(run.failed)} of {n_scans} scan(s) failed: {', '.join(sorted(run.failed))}; see {logs}, then run the "
            "same command again; completed scans are kept"
        )
    elif run.done:
        earlier = f", {n_kept} unchanged since an earlier run" if n_kept else ""
        progress.info(f"{len(run.done)} of {n_scans} scan(s) done{earlier}; see {logs.parent.parent}/sub-*.html")
    else:
        progress.info(f"all {n_scans} scan(s) are up to date; use `force` to process them again")
