"""The group level: tables of all scans and their statistics, from this program's own outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.derivatives import output_path
from bids_dgmseg.bids.description import linked_datasets
from bids_dgmseg.bids.reconstructed import is_outdated
from bids_dgmseg.bids.scans import find_scans
from bids_dgmseg.bids.top_level import write_merged_dataset_files
from bids_dgmseg.config import RunConfig
from bids_dgmseg.console import RunProgress
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.annex import describe_missing, is_broken_symlink, is_file_or_unfetched
from bids_dgmseg.io.files import url_to_path
from bids_dgmseg.workflow.environment import prepare_environment
from bids_dgmseg.workflow.output import check_folders

if TYPE_CHECKING:
    from bids_dgmseg.study.load import Cohort, Tree


def run_group(config: RunConfig) -> int:
    """Write the tables and the page of all scans in the output directory and in those that are merged with it.

    The input dataset lends its participants.tsv and sessions.tsv, if it has them; its images are not needed. Nothing
    is written before all is read, nor in a dry run.

    Parameters
    ----------
    config : RunConfig
        The run's options.

    Returns
    -------
    int
        0 if all tables of the participant level were gathered, 1 if damaged ones were left out.

    Raises
    ------
    InputError
        If no scan has been measured yet, a table of participants cannot be used, an option does not fit the data, or
        the output directory is none of this program's.
    """
    prepare_environment(config.control.work_dir, n_threads=config.resources.omp_nthreads)
    from bids_dgmseg.study.group_tables import write_group_tables
    from bids_dgmseg.study.load import load_cohort
    from bids_dgmseg.study.selection import Choice
    from bids_dgmseg.study.study import StudyOptions, begin_study

    if not config.bids_dir.is_dir():
        raise InputError(f"{config.bids_dir}: no such folder; give the root folder of the BIDS dataset")
    trees = find_trees(config)
    warnings = [
        line
        for tree in trees
        if (line := _without_people(tree, config.bids_dir.name if len(trees) == 1 else tree.name))
    ]
    options = StudyOptions(
        measures=config.group.measures,
        control_filter=config.group.control_filter,
        covariates=config.group.covariates or None,
        evaluation=config.group.evaluation,
        n_bootstrap=config.group.bootstrap,
    )
    choice = Choice(
        config.selection.participants,
        config.selection.sessions,
        (config.segmentation.model,) if config.segmentation.model else (),
    )
    cohort = load_cohort(
        trees, choice=choice, site_column=config.group.site_column, group_column=config.group.group_column
    )
    if trees[0].path == config.output_dir:
        warnings += find_unlike_input(config, set(cohort.keys["model"]))
    study = begin_study(cohort, options)
    check_folders(config)
    if config.control.dry_run:
        return _tell_plan(config, cohort, [*warnings, *cohort.warnings, *study.warnings])
    from bids_dgmseg.report.group_page import write_group_page

    progress = RunProgress(0)
    tables = write_group_tables(config.output_dir, study)
    if config.group.merge:
        write_merged_dataset_files(config.output_dir, [tree.path for tree in trees])
    warnings += tables.warnings
    page = write_group_page(config.output_dir, warnings=warnings)
    for warning in warnings:
        progress.warn(warning)
    for line in (*map(str, tables.paths[::2]), *tables.notes, str(page)):
        progress.info(line)
    return 1 if cohort.n_damaged else 0


def _without_people(tree: Tree, where: str) -> str:
    """Say why a folder's participants are not known; empty if they are."""
    table = tree.people / "participants.tsv" if tree.people else None
    if table is None or not is_file_or_unfetched(table):
        return f"{where}: no participants.tsv; the tables have no columns from it"
    if is_broken_symlink(table):
        return f"{where}: {describe_missing(table)}; until then the tables have no columns from it"
    return ""


def find_unlike_input(config: RunConfig, models: Iterable[str]) -> list[str]:
    """Say which scans of the input dataset have no results by one of the models, and which have old ones.

    So that those that failed are missed, and reconstructed maps that another run replaced are seen. Empty where the
    dataset has neither maps nor echoes: then maps came from derivatives that are not known here.
    """
    try:
        scans = find_scans(config.flat(), echoes=True)
    except InputError:
        return []
    missing = [
        scan.name
        for scan in scans
        if not any(output_path(config.output_dir, scan, "stats", ".tsv", seg=model).is_file() for model in models)
    ]
    has = "1 has" if len(missing) == 1 else f"{len(missing)} have"
    lines = (
        [
            f"{config.bids_dir.name}: of {len(scans)} scans {has} no results: {list_some(missing)}; run the "
            "participant level for them, if they are wanted"
        ]
        if missing
        else []
    )
    for model in sorted(models):
        if old := [scan.name for scan in scans if is_outdated(config.output_dir, scan, model)]:
            lines.append(
                f"{list_some(old)}: results of {model} were made from another map of the echoes than the one "
                f"beside them; run the participant level with --model {model} again"
            )
    return lines


def _tell_plan(config: RunConfig, cohort: Cohort, warnings: Sequence[str]) -> int:
    """Say what would be gathered, and write nothing."""
    progress = RunProgress(0)
    for warning in warnings:
        progress.warn(warning)
    for name, n_scans in cohort.settings["Trees"].items():
        progress.info(f"{name}: would gather {n_scans} scans")
    progress.info(f"{len(cohort.scans)} scans would be gathered in {config.output_dir}")
    return 0


def find_trees(config: RunConfig) -> list[Tree]:
    """Find the output folders to read, each with the dataset that tells who was scanned.

    A merged folder's participants are those of a participants.tsv in it, else of a dataset that its
    ``DatasetLinks`` name, else of the one around its ``derivatives``, else of the input dataset.

    Raises
    ------
    InputError
        If a folder does not exist or holds no measures.
    """
    from bids_dgmseg.study.load import Tree
    from bids_dgmseg.study.results import has_scans
    from bids_dgmseg.study.sites import name_trees

    output = config.output_dir
    if not config.group.merge:
        if not output.is_dir():
            raise InputError(f"{output}: no such folder; run the participant level first")
        return [Tree(output, output.name, config.bids_dir)]
    # a link is the folder that it leads to: its participants count once
    by_place = {path.resolve(): path for path in (*reversed(config.group.merge), output)}
    merged = [path for path in dict.fromkeys(config.group.merge) if by_place[path.resolve()] == path != output]
    for path in merged:
        if not path.is_dir() or not has_scans(path):
            what = "no *_stats.tsv below" if path.is_dir() else "no such folder"
            raise InputError(f"--merge {path}: {what}; give folders that the participant level wrote")
    own = [output] if output.is_dir() and has_scans(output) else []
    paths = [*own, *merged]
    return [
        Tree(
            path,
            name,
            config.bids_dir if path in own else _people(path, config.bids_dir),
            link=Path(os.path.relpath(path, output)).as_posix(),
        )
        for path, name in zip(paths, name_trees(paths), strict=True)
    ]


def _people(tree: Path, otherwise: Path) -> Path:
    """Find the dataset whose participants.tsv tells of a tree's participants."""
    candidates: Sequence[Path] = [
        tree,
        *_linked(tree),
        *([tree.parent.parent] if tree.parent.name == "derivatives" else []),
    ]
    return next((root for root in candidates if is_file_or_unfetched(root / "participants.tsv")), otherwise)


def _linked(tree: Path) -> list[Path]:
    """List the datasets that a tree says it was made from."""
    return [Path(os.path.normpath(url_to_path(link, tree))) for link in linked_datasets(tree).values()]
