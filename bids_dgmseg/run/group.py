"""Group level: find the results of the participant level, and analyse them."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from bids_dgmseg.bids.dataset import find_raw_datasets, open_inputs
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK, InputError, list_some
from bids_dgmseg.io.files import describe_missing, is_broken_symlink, is_file_or_unfetched, remove_temporary_files
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.run.environment import limit_library_threads, log_to, run_folder
from bids_dgmseg.run.plan import check_folders

if TYPE_CHECKING:
    from bids_dgmseg.study.results import ResultsFolder, ResultsSelection


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
    if not config.bids_dir.is_dir():
        raise InputError(f"{config.bids_dir}: no such folder; pass the root directory of the BIDS dataset")
    from bids_dgmseg.study.results import ResultsSelection

    models = (config.segmentation.model,) if config.segmentation.model else ()
    selection = ResultsSelection(config.selection.participants, config.selection.sessions, models)
    folders = _find_folders(config)
    n_missing, warnings = _list_missing(config, models) if folders[0].path == config.output_dir else (0, [])
    warnings = [*_check_participants(folders, config), *warnings]
    check_folders(replace(config, control=replace(config.control, dry_run=True)))  # it is created after reading
    if config.control.dry_run:
        return _print_plan(config, folders, selection, warnings)
    return analyse_folders(config, folders, selection, warnings, n_missing=n_missing)


def analyse_folders(
    config: RunConfig,
    folders: Sequence[ResultsFolder],
    selection: ResultsSelection | None = None,
    warnings: Sequence[str] = (),
    *,
    n_missing: int = 0,
) -> int:
    """Write tables and page of the results in some folders, print what was written, and return the exit code."""
    remove_temporary_files(config.output_dir)
    with run_folder(config.control.work_dir) as folder:
        (work := folder / "group").mkdir()
        try:
            with log_to(work):
                from bids_dgmseg.report.group_page import analyse_group

                report = analyse_group(
                    folders,
                    config.output_dir,
                    options=config.group,
                    selection=selection,
                    warnings=warnings,
                    n_missing=n_missing,
                )
        finally:
            shutil.rmtree(work, ignore_errors=True)
    progress = RunProgress(0)
    if report.reference_group:
        progress.info(f"reference group: {report.reference_group}")
    for warning in report.warnings:
        progress.warn(warning)
    for line in (*report.tables, *report.notes, *([report.page] if report.page else [])):
        progress.info(str(line))
    return OK if report.page and not report.n_unusable else FAILED


def _find_folders(config: RunConfig) -> Sequence[ResultsFolder]:
    """Find the output folders to read, that of this run first, with the datasets of their participants.

    Raises
    ------
    InputError
        If a folder does not exist or has no results.
    """
    from bids_dgmseg.study.results import find_dataset, find_results_folders, has_results

    output, paths = config.output_dir, [config.output_dir]
    if not config.group.merge and not output.is_dir():
        raise InputError(f"{output}: no such folder; run the participant level first")
    if config.group.merge:
        # a symbolic link is the folder that it points to, so that its participants count once
        by_target = {path.resolve(): path for path in (*reversed(config.group.merge), output)}
        merged = [path for path in dict.fromkeys(config.group.merge) if by_target[path.resolve()] == path != output]
        for path in merged:
            if not path.is_dir() or not has_results(path):
                problem = "no *_stats.tsv found" if path.is_dir() else "no such folder"
                raise InputError(f"`merge` {path}: {problem}; pass output folders of the participant level")
        paths = [*([output] if output.is_dir() and has_results(output) else []), *merged]
    roots = [config.bids_dir, *find_raw_datasets(config.bids_dir)]  # others than the first if it is a study
    dataset = next((root for root in roots if is_file_or_unfetched(root / "participants.tsv")), config.bids_dir)
    datasets = [dataset if path == output else find_dataset(path) or dataset for path in paths]
    return find_results_folders(paths, datasets=datasets, tables_dir=output)


def _check_participants(folders: Sequence[ResultsFolder], config: RunConfig) -> list[str]:
    """Return warnings about folders whose participants are unknown."""
    warnings = []
    for folder in folders:
        name = config.bids_dir.name if len(folders) == 1 else folder.name
        table = folder.dataset / "participants.tsv" if folder.dataset else None
        if table is None or not is_file_or_unfetched(table):
            warnings.append(f"{name}: no participants.tsv; demographics will be missing from the tables")
        elif is_broken_symlink(table):
            warnings.append(f"{name}: {describe_missing(table)}; until then demographics are missing from the tables")
    return warnings


def _list_missing(config: RunConfig, models: Sequence[str]) -> tuple[int, list[str]]:
    """Count the scans of the input dataset without results of any of the models, and warn of them.

    Without maps and echoes in the dataset, they are in derivatives that the group level need not know.
    """
    scans = []
    with contextlib.suppress(InputError):
        inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
        scans = find_scans(inputs, echoes=True, misplaced=[])
    missing = [
        scan.name
        for scan in scans
        if not any(
            output_path(config.output_dir, scan, "stats", ".tsv", seg=model).is_file() for model in models or MODELS
        )
    ]
    if not missing:
        return 0, []
    return len(missing), [
        f"{config.bids_dir.name}: {len(missing)} of {len(scans)} scan(s) without results: {list_some(missing)}; run "
        "the participant level to include them"
    ]


def _print_plan(
    config: RunConfig, folders: Sequence[ResultsFolder], selection: ResultsSelection, warnings: Sequence[str]
) -> int:
    """Read the results and check the options without writing anything."""
    from bids_dgmseg.study.analyses import load_norms
    from bids_dgmseg.study.group_comparisons import find_variables
    from bids_dgmseg.study.harmonization import load_harmonization
    from bids_dgmseg.study.study import load_study

    cohort, study = load_study(folders, config.group, selection)
    _, variable_warnings = find_variables(study.cohort, config.group.correlate)
    if config.group.harmonization_apply:
        load_harmonization(study)
    if config.group.norms:
        load_norms(study)
    progress = RunProgress(0)
    if study.reference and cohort.demographics["group"].nunique() > 1:
        progress.info(f"reference group: {study.reference} ({study.reference_from})")
    for warning in (*warnings, *cohort.warnings, *study.warnings, *variable_warnings):
        progress.warn(warning)
    for name, n_scans in cohort.settings["Datasets"].items():
        progress.info(f"{name}: {n_scans} scan(s) would be used")
    n_scans = sum(cohort.settings["Datasets"].values())
    progress.info(f"group tables of {n_scans} scan(s) would be written to {config.output_dir}")
    return OK
