"""Analysis of a study from its collected files: the group tables and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.output_dataset import check_writable, write_merged_dataset_files
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import DISK_ADVICE, as_options
from bids_dgmseg.io.files import read_json
from bids_dgmseg.report.group_data import read_group_data
from bids_dgmseg.report.group_page import TABLES, write_group_page
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.collection import CollectedStats, read_cohort, read_scan_tables
from bids_dgmseg.study.saved_models import check_fits, check_targets, save_fits
from bids_dgmseg.study.study import VOLUME, build_study
from bids_dgmseg.study.tabular_files import list_empty_tables, write_tables


@dataclass(frozen=True, kw_only=True)
class GroupReport:
    """What `analyse_group` has written."""

    tables: tuple[Path, ...]
    """Tables, each with a data dictionary beside it (``.json``)."""
    page: Path | None
    """None if it cannot be written."""
    reference_group: str
    """Group that the others are compared with, and why; empty unless there are several groups."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """Why tables are empty."""


def analyse_group(
    files: CollectedStats,
    out_dir: Path,
    *,
    options: GroupOptions,
    warnings: Sequence[str] = (),
    n_missing: int = 0,
    nprocs: int = 1,
) -> GroupReport:
    """Analyse a study and write its tables, ``group_*.tsv`` with ``group_*.json``, and the page ``group.html``.

    A folder other than the results folder that the data are from also gets a ``dataset_description.json``, if it has
    none.

    Parameters
    ----------
    files : CollectedStats
        From `collect_stats`.
    out_dir : Path
        Derivative dataset, created if it does not exist. Nothing is written if an option does not fit the data.
    options : GroupOptions
        Of which the columns, ``merge`` and ``include_failed`` are those of `collect_stats`.
    warnings : sequence of str
        Further warnings, to be shown on the page.
    n_missing : int
        Scans of the study without results.
    nprocs : int
        With 2 or more, a second process renders figures for print.

    Raises
    ------
    InputError
        If an option does not fit the data, or a table cannot be written.
    """
    content = read_json(files.cohort)
    cohort = read_cohort(files, measures=[*options.measures, VOLUME])
    study = build_study(cohort, options)
    check_writable(out_dir)
    check_targets(options)
    tables, analysis_warnings = run_analyses(study)
    check_fits(tables, options)
    folders = [Path(folder) for folder in content["folders"]]
    folders = [Path(folder) for folder in content["folders"]]
    paths = write_tables(out_dir, [*read_scan_tables(files), *tables], keys=study.cohort.keys, settings=study.settings)
    if folders != [out_dir]:
        write_merged_dataset_files(out_dir, folders)
    save_fits(tables, study)
    known = [*warnings, *cohort.warnings, *analysis_warnings]
    notes = list_empty_tables(tables, analysis_warnings)
    several = bool(study.reference) and cohort.demographics["group"].nunique() > 1
    reference = f"{study.reference} ({study.reference_from})" if several else ""
    n_failed = n_missing + cohort.n_damaged
    del cohort, study, tables  # the page reads the written ones, and large studies fill the memory
    page, problems = _write_page(out_dir, known, n_failed)
    return GroupReport(
        tables=tuple(paths[::2]),
        page=page,
        reference_group=reference,
        warnings=(*known, *problems),
        notes=tuple(notes),
    )


def _write_page(out_dir: Path, warnings: Sequence[str], n_failed: int) -> tuple[Path | None, list[str]]:
    """Write the page; a failure is a warning."""
    try:
        data = read_group_data(out_dir, names=TABLES)
        return write_group_page(data, out_dir, warnings=list(map(as_options, warnings)), n_failed=n_failed), []
    except Exception as error:  # noqa: BLE001 - whatever it is, the tables are complete and the user must know
        what_to_do = DISK_ADVICE if isinstance(error, OSError) else "please report this as a bug"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, [f"group.html: cannot be written ({reason}); the tables are complete; {what_to_do}"]
