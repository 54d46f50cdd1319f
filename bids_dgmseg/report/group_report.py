"""Group level: analysis of the results of many scans, the group tables and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.output_dataset import check_writable, write_merged_dataset_files
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import DISK_ADVICE, as_options
from bids_dgmseg.report.group_data import GroupData, collect_group_data
from bids_dgmseg.report.group_page import write_group_page
from bids_dgmseg.study.analyses import run_analyses
from bids_dgmseg.study.results import ResultsFolder, ResultsSelection
from bids_dgmseg.study.saved_models import check_fits, check_targets, save_fits
from bids_dgmseg.study.study import load_study
from bids_dgmseg.study.tabular_files import FOLDER, list_empty_tables, scan_tables, with_keys, write_tables

PAGE = "group.html"


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
    """Why tables are not written."""
    n_unusable: int
    """Damaged tables and scans whose results are out of date."""


def analyse_group(
    folders: Sequence[ResultsFolder],
    out_dir: Path,
    *,
    options: GroupOptions,
    selection: ResultsSelection | None = None,
    warnings: Sequence[str] = (),
    n_missing: int = 0,
) -> GroupReport:
    """Analyse a study; write its tables, ``group/group_*.tsv`` with their ``.json``, and the page ``group.html``.

    An output folder that is not the only folder of results also gets a ``dataset_description.json``, if it has none.

    Parameters
    ----------
    folders : sequence of ResultsFolder
        Output folders of the participant level, see `find_results_folders`.
    out_dir : Path
        Derivative dataset, created if it does not exist. Nothing is written if an option does not fit the data.
    options : GroupOptions
    selection : ResultsSelection, optional
        Scans to use; by default all.
    warnings : sequence of str
        Further warnings, to be shown on the page.
    n_missing : int
        Scans of the study without results.

    Raises
    ------
    InputError
        If there are no results, an option does not fit the data, or a table cannot be read or written.
    """
    cohort, study = load_study(folders, options, selection)
    check_writable(out_dir)
    check_targets(options)
    results, analysis_warnings = run_analyses(study)
    check_fits(results, options)
    measures = scan_tables(cohort)
    tables = [*(with_keys(table, cohort.keys) for table in measures)]
    tables += [with_keys(table, study.cohort.keys) for table in results]
    paths = write_tables(out_dir / FOLDER, tables, settings=study.settings)
    (out_dir / PAGE).unlink(missing_ok=True)  # of earlier tables
    if [folder.path for folder in folders] != [out_dir]:
        write_merged_dataset_files(out_dir, [folder.path for folder in folders])
    save_fits(results, study)
    lines = [*warnings, *cohort.warnings, *analysis_warnings]
    data = collect_group_data(cohort, study.cohort, results, study.settings)
    page, problems = _write_page(data, out_dir, lines, n_missing + cohort.n_damaged)
    several = bool(study.reference) and cohort.demographics["group"].nunique() > 1
    return GroupReport(
        tables=tuple(paths),
        page=page,
        reference_group=f"{study.reference} ({study.reference_from})" if several else "",
        warnings=(*lines, *problems),
        notes=tuple(list_empty_tables(results, analysis_warnings)),
        n_unusable=cohort.n_damaged + cohort.n_outdated,
    )


def _write_page(
    data: GroupData, out_dir: Path, warnings: Sequence[str], n_failed: int
) -> tuple[Path | None, list[str]]:
    """Write the page; a failure is a warning."""
    try:
        lines = list(map(as_options, warnings))
        return write_group_page(data, out_dir, warnings=lines, n_failed=n_failed), []
    except Exception as error:  # noqa: BLE001 - whatever it is, the tables are complete and the user must know
        what_to_do = DISK_ADVICE if isinstance(error, OSError) else "please report this as a bug"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, [f"group.html: cannot be written ({reason}); the tables are complete; {what_to_do}"]
