"""Group level: plan, and run the workflow that collects and analyses the outputs of the participant level."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from bids_dgmseg.bids.dataset import find_raw_datasets, open_inputs
from bids_dgmseg.bids.entities import output_path
from bids_dgmseg.bids.scans import Scan, find_scans
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import FAILED, OK, InputError, count, list_some, raise_if_interrupted
from bids_dgmseg.io.files import (
    describe_missing,
    is_broken_symlink,
    is_file_or_unfetched,
    remove_temporary_files,
)
from bids_dgmseg.models.registry import MODELS
from bids_dgmseg.run.environment import configure_nipype, limit_library_threads, log_to, run_folder
from bids_dgmseg.run.plan import check_folders

if TYPE_CHECKING:
    from bids_dgmseg.study.results import ResultsFolder


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What a run reads, known before any results are read."""

    folders: Sequence[ResultsFolder]
    n_missing: int = 0
    """Scans of the input dataset without results."""
    warnings: Sequence[str] = ()


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
    plan = plan_group(config)
    progress = RunProgress(0)
    if config.control.dry_run:
        _print_plan(config, plan, progress)
        return OK
    outputs = _run_workflow(config, plan)
    if outputs["out_reference_group"]:
        progress.info(f"reference group: {outputs['out_reference_group']}")
    for warning in outputs["out_warnings"]:
        progress.warn(warning)
    pages = [outputs["out_page"]] if "out_page" in outputs else []
    for line in (*outputs["out_tables"], *outputs["out_notes"], *pages):
        progress.info(line)
    return OK if pages and not outputs["out_n_unusable"] else FAILED


def plan_group(config: RunConfig) -> GroupPlan:
    """Find the folders to read, and scans of the input dataset without results.

    Raises
    ------
    InputError
        If a folder does not exist or has no results.
    """
    from bids_dgmseg.study.results import find_dataset, find_results_folders

    output = config.output_dir
    paths = _find_paths(config)
    scans, warnings = _find_scans(config) if paths[0] == output else ([], [])
    roots = [config.bids_dir, *find_raw_datasets(config.bids_dir)]  # others than the first if it is a study
    dataset = next((root for root in roots if is_file_or_unfetched(root / "participants.tsv")), config.bids_dir)
    datasets = [dataset if path == output else find_dataset(path) or dataset for path in paths]
    folders = find_results_folders(paths, datasets=datasets, tables_dir=output)
    n_missing, missing = _list_missing(config, scans)
    return GroupPlan(
        folders=folders,
        n_missing=n_missing,
        warnings=[*_check_participants(folders, config), *warnings, *missing],
    )


def _find_scans(config: RunConfig) -> tuple[list[Scan], list[str]]:
    """Find the scans of the input dataset, and warn if they cannot be distinguished.

    Without maps and echoes in the dataset, they are in derivatives that the group level need not know.
    """
    try:
        inputs = open_inputs(config.bids_dir, config.selection, output_dir=config.output_dir)
    except InputError:
        return [], []
    try:
        return find_scans(inputs, echoes=True, misplaced=[]), []
    except InputError as error:
        with contextlib.suppress(InputError):
            if any(paths for source in inputs.sources for paths in source.images.values()):
                return [], [f"scans without results are not listed: {error}"]
        return [], []


def _find_paths(config: RunConfig) -> list[Path]:
    """Return the output folders to read, that of this run first; one with several names counts once."""
    from bids_dgmseg.study.results import has_results

    output = config.output_dir
    if not config.group.merge:
        if not output.is_dir():
            raise InputError(f"{output}: no such folder; run the participant level first")
        return [output]
    # a symbolic link is the folder that it points to, so that its participants count once
    by_target = {path.resolve(): path for path in (*reversed(config.group.merge), output)}
    merged = [path for path in dict.fromkeys(config.group.merge) if by_target[path.resolve()] == path != output]
    for path in merged:
        if not path.is_dir() or not has_results(path):
            problem = "no *_stats.tsv found" if path.is_dir() else "no such folder"
            raise InputError(f"`merge` {path}: {problem}; pass output folders of the participant level")
    return [*([output] if output.is_dir() and has_results(output) else []), *merged]


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


def _list_missing(config: RunConfig, scans: Sequence[Scan]) -> tuple[int, list[str]]:
    """Count the scans of the input dataset without results of any of the models, and warn of them."""
    models = [config.segmentation.model] if config.segmentation.model else list(MODELS)
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


def _print_plan(config: RunConfig, plan: GroupPlan, progress: RunProgress) -> None:
    """Read the results and check the options without writing anything."""
    from bids_dgmseg.study.group_comparisons import find_variables
    from bids_dgmseg.study.harmonization import load_harmonization
    from bids_dgmseg.study.normative import load_norms
    from bids_dgmseg.study.results import ResultsSelection
    from bids_dgmseg.study.study import load_study

    selection = ResultsSelection(config.selection.participants, config.selection.sessions, _models(config))
    cohort, study = load_study(plan.folders, config.group, selection)
    _, variable_warnings = find_variables(study.cohort, config.group.correlate)
    if config.group.harmonization_apply:
        load_harmonization(study)
    if config.group.norms:
        load_norms(study)
    check_folders(config)
    if study.reference and cohort.demographics["group"].nunique() > 1:
        progress.info(f"reference group: {study.reference} ({study.reference_from})")
    for warning in (*plan.warnings, *cohort.warnings, *study.warnings, *variable_warnings):
        progress.warn(warning)
    for name, n_scans in cohort.settings["Datasets"].items():
        progress.info(f"{name}: {count(n_scans, 'scan')} would be used")
    n_scans = sum(cohort.settings["Datasets"].values())
    progress.info(f"group tables of {count(n_scans, 'scan')} would be written to {config.output_dir}")


def _models(config: RunConfig) -> tuple[str, ...]:
    return (config.segmentation.model,) if config.segmentation.model else ()


def _run_workflow(config: RunConfig, plan: GroupPlan) -> Mapping[str, Any]:
    """Run the workflow in this process and return the outputs of its nodes, and the numbers of unusable results.

    An exception of a node is raised as it is; Nipype raises another one, which quotes the traceback.
    """
    unwritten = replace(config, control=replace(config.control, dry_run=True))
    check_folders(unwritten)  # the output directory is created when all results are read
    remove_temporary_files(config.output_dir)
    outputs: dict[str, Any] = {}
    errors: list[BaseException] = []

    def follow(node: Any, status: str) -> None:
        if error := getattr(node.interface, "error", None):
            errors.append(error)
        elif status == "end":
            outputs.update(node.result.outputs.get_traitsfree())

    with run_folder(config.control.work_dir) as folder:
        work = folder / "group"
        work.mkdir()
        configure_nipype(stop_on_first_crash=True)
        try:
            with log_to(work):
                from nipype.pipeline.plugins import LinearPlugin

                from bids_dgmseg.workflows.group_wf import init_group_wf

                workflow = init_group_wf()
                workflow.base_dir = str(work)
                workflow.config["execution"] = {"crashdump_dir": str(work)}
                for name, value in _inputs(config, plan).items():
                    setattr(workflow.inputs.inputnode, name, value)
                workflow.run(plugin=LinearPlugin({"status_callback": follow}))
        except Exception as error:  # noqa: BLE001 - raised again, as the node raised it
            raise_if_interrupted()
            raise (errors[0] if errors else error) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return outputs


def _inputs(config: RunConfig, plan: GroupPlan) -> dict[str, Any]:
    """Return the inputs of the workflow."""
    return {
        "results": [str(folder.path) for folder in plan.folders],
        "datasets": [str(folder.dataset) for folder in plan.folders],
        "out_dir": str(config.output_dir),
        "participant_label": list(config.selection.participants),
        "session_label": list(config.selection.sessions),
        "model": list(_models(config)),
        "options": msgspec.to_builtins(config.group, enc_hook=str),
        "warnings": list(plan.warnings),
        "n_missing": plan.n_missing,
    }
