"""Group level: tables of all scans, their statistics and the page, from the outputs of the participant level."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import linked_datasets, open_inputs
from bids_dgmseg.bids.derivatives import output_path
from bids_dgmseg.bids.fingerprints import find_changed
from bids_dgmseg.bids.output_dataset import write_merged_dataset_files
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import DISK_ADVICE, FAILED, OK, InputError, count, list_some
from bids_dgmseg.io.files import describe_missing, is_broken_symlink, is_file_or_unfetched, url_to_path
from bids_dgmseg.io.locks import remove_temporary_files
from bids_dgmseg.resources import existing_objects_frozen
from bids_dgmseg.workflow.environment import check_folders, limit_library_threads, run_folder

if TYPE_CHECKING:
    from bids_dgmseg.study.cohort import Cohort
    from bids_dgmseg.study.results_folders import ResultsFolder


def run_group(config: RunConfig) -> int:
    """Write the tables and the page of all scans in the output directory and the folders merged with it.

    Of the input dataset only participants.tsv, sessions.tsv and scans.tsv are read, if it has them. Nothing is written
    before all results are read, nor in a dry run.

    Returns
    -------
    int
        0 if all tables of the participant level were used, 1 if damaged ones or results that are out of date were
        left out, or the page could not be written.

    Raises
    ------
    InputError
        If there are no results, a table of participants cannot be used, an option does not fit the data, or the output
        directory belongs to another program.
    """
    limit_library_threads(1)  # more only wait for each other: the matrices have few columns
    from bids_dgmseg.study.analyses import run_analyses
    from bids_dgmseg.study.cohort import load_cohort
    from bids_dgmseg.study.results_folders import ResultsSelection
    from bids_dgmseg.study.study import build_study
    from bids_dgmseg.study.tabular_files import list_empty_tables, scan_tables, write_tables

    if not config.bids_dir.is_dir():
        raise InputError(f"{config.bids_dir}: no such folder; pass the root directory of the BIDS dataset")
    folders = find_folders(config)
    warnings = _check_participants(folders, config)
    scans: list[Scan] = []
    if folders[0].path == config.output_dir:
        with contextlib.suppress(InputError):  # without maps and echoes in the dataset, they are in unknown derivatives
            inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
            scans = find_scans(inputs, echoes=True)
        changed = [name for scan in scans for name in find_changed(config.output_dir, scan)]
        why = dict.fromkeys(changed, "the images of the scan have changed since")
        folders[0] = replace(folders[0], outdated=why)
    models = (config.segmentation.model,) if config.segmentation.model else ()
    selection = ResultsSelection(config.selection.participants, config.selection.sessions, models)
    cohort = load_cohort(
        folders,
        selection=selection,
        site_column=config.group.site_column,
        group_column=config.group.group_column,
        age_column=config.group.age_column,
        include_failed=config.group.include_failed,
    )
    n_missing, missing_warnings = _list_missing(config, scans, set(cohort.keys["model"]))
    warnings += missing_warnings
    study = build_study(cohort, config.group)
    check_folders(config)
    progress = RunProgress(0)
    if study.reference and cohort.demographics["group"].nunique() > 1:
        progress.info(f"reference group: {study.reference} ({study.reference_from})")
    if config.control.dry_run:
        _print_plan(config, cohort, [*warnings, *cohort.warnings, *study.warnings], progress)
        return OK
    remove_temporary_files(config.output_dir)
    with existing_objects_frozen(), run_folder(config.control.work_dir):
        tables, analysis_warnings = run_analyses(study)
        all_tables = [*scan_tables(cohort), *tables]
        paths = write_tables(config.output_dir, all_tables, keys=study.cohort.keys, settings=study.settings)
        if config.group.merge:
            write_merged_dataset_files(config.output_dir, [folder.path for folder in folders])
        warnings += [*cohort.warnings, *analysis_warnings]
        for warning in warnings:
            progress.warn(warning)
        for line in (*map(str, paths[::2]), *list_empty_tables(tables, analysis_warnings)):
            progress.info(line)
        n_damaged, n_outdated = cohort.n_damaged, cohort.n_outdated
        del cohort, study, tables, all_tables  # the page reads the written ones, and large studies fill the memory
        written = _write_page(config.output_dir, warnings, n_missing + n_damaged, progress)
    return OK if written and not n_damaged and not n_outdated else FAILED


def _print_plan(config: RunConfig, cohort: Cohort, warnings: Sequence[str], progress: RunProgress) -> None:
    for warning in warnings:
        progress.warn(warning)
    for name, n_scans in cohort.settings["Datasets"].items():
        progress.info(f"{name}: {count(n_scans, 'scan')} would be used")
    progress.info(f"group tables of {count(len(cohort.scans), 'scan')} would be written to {config.output_dir}")


def _write_page(output_dir: Path, warnings: Sequence[str], n_failed: int, progress: RunProgress) -> bool:
    """Write the page; a failure is reported."""
    try:
        from bids_dgmseg.report.group_page import write_group_page

        with existing_objects_frozen():  # and the libraries of the page
            page = write_group_page(output_dir, warnings=warnings, n_failed=n_failed)
        progress.info(str(page))
    except Exception as error:  # noqa: BLE001 - whatever it is, the tables are complete and the user must know
        what_to_do = DISK_ADVICE if isinstance(error, OSError) else "please report this as a bug"
        progress.warn(
            f"group.html: cannot be written ({type(error).__name__}: {' '.join(str(error).split())}); the tables are "
            f"complete; {what_to_do}"
        )
        return False
    return True


def _check_participants(folders: Sequence[ResultsFolder], config: RunConfig) -> list[str]:
    """Return warnings about folders whose participants are unknown."""
    warnings = []
    for folder in folders:
        name = config.bids_dir.name if len(folders) == 1 else folder.name
        table = folder.dataset / "participants.tsv" if folder.dataset else None
        if table is None or not is_file_or_unfetched(table):
            warnings.append(f"{name}: no participants.tsv; the tables have no columns from it")
        elif is_broken_symlink(table):
            warnings.append(f"{name}: {describe_missing(table)}; until then the tables have no columns from it")
    return warnings


def _list_missing(config: RunConfig, scans: Sequence[Scan], models: Iterable[str]) -> tuple[int, list[str]]:
    """Count the scans of the input dataset without results of any of the models, and warn of them."""
    models = sorted(models)
    missing = [
        scan.name
        for scan in scans
        if not any(output_path(config.output_dir, scan, "stats", ".tsv", seg=model).is_file() for model in models)
    ]
    if not missing:
        return 0, []
    have = "1 has" if len(missing) == 1 else f"{len(missing)} have"
    return len(missing), [
        f"{config.bids_dir.name}: of {len(scans)} scans {have} no results: {list_some(missing)}; run the participant "
        "level to include them"
    ]


def find_folders(config: RunConfig) -> list[ResultsFolder]:
    """Find the output folders to read, each with the dataset that describes its participants.

    For a merged folder this is the folder itself if it has a participants.tsv, otherwise a dataset among its
    ``DatasetLinks``, otherwise the one around its ``derivatives``, otherwise the input dataset.

    Raises
    ------
    InputError
        If a folder does not exist or has no results.
    """
    from bids_dgmseg.study.results_folders import ResultsFolder, has_results, name_folders

    output = config.output_dir
    if not config.group.merge:
        if not output.is_dir():
            raise InputError(f"{output}: no such folder; run the participant level first")
        return [ResultsFolder(output, output.name, config.bids_dir)]
    # a symbolic link is the folder that it points to, so that its participants count once
    by_target = {path.resolve(): path for path in (*reversed(config.group.merge), output)}
    merged = [path for path in dict.fromkeys(config.group.merge) if by_target[path.resolve()] == path != output]
    for path in merged:
        if not path.is_dir() or not has_results(path):
            problem = "no *_stats.tsv found" if path.is_dir() else "no such folder"
            raise InputError(f"--merge {path}: {problem}; pass output folders of the participant level")
    own = [output] if output.is_dir() and has_results(output) else []
    paths = [*own, *merged]
    folders = []
    for path, name in zip(paths, name_folders(paths), strict=True):
        linked = [Path(os.path.normpath(url_to_path(link, path))) for link in linked_datasets(path).values()]
        around = [path.parent.parent] if path.parent.name == "derivatives" else []
        candidates = [] if path in own else [path, *linked, *around]
        described = (root for root in candidates if is_file_or_unfetched(root / "participants.tsv"))
        link = Path(os.path.relpath(path, output)).as_posix()
        folders.append(ResultsFolder(path, name, next(described, config.bids_dir), link=link))
    return folders
