"""All tables of the group level, written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.study.model_tables import ageing_tables, change_tables, difference_table, harmonized_tables
from bids_dgmseg.study.scan_tables import adjusted_table, asymmetry_table, outlier_table, write_scan_tables
from bids_dgmseg.study.study import Study
from bids_dgmseg.study.writing import GroupTable, write_frame


@dataclass(frozen=True)
class GroupFiles:
    """What was written, and what a user should know about it."""

    paths: tuple[Path, ...]
    """Each table and then its data dictionary."""
    notes: tuple[str, ...]
    """Which tables are empty, one line a reason."""
    warnings: tuple[str, ...]
    """One line each."""


def write_group_tables(folder: Path, study: Study) -> GroupFiles:
    """Make the study's statistics, and write them with the measures of all scans.

    Parameters
    ----------
    folder : Path
        Where to.
    study : Study
        As `begin_study` makes it; adjusting and harmonizing add measures to it.

    Raises
    ------
    InputError
        If a table cannot be written, or an option does not fit the data; then nothing is written.
    """
    cohort = study.cohort
    tables = [
        asymmetry_table(study),
        outlier_table(study),
        adjusted_table(study),
        *harmonized_tables(study),
        *ageing_tables(study),
        difference_table(study),
        *change_tables(study),
    ]
    paths = write_scan_tables(folder, cohort, settings=study.settings)
    for table in tables:
        paths += write_frame(folder, table, keys=cohort.keys, settings=study.settings)
    return GroupFiles(tuple(paths), _say_empty(tables, study.warnings), (*cohort.warnings, *study.warnings))


def _say_empty(tables: Sequence[GroupTable], warnings: Sequence[str]) -> tuple[str, ...]:
    """Say why tables are empty, one line a reason; what is a warning already is not said again."""
    reasons: dict[str, list[str]] = {}
    for table in tables:
        if table.not_computed and not any(table.not_computed in line for line in warnings):
            reasons.setdefault(table.not_computed, []).append(f"{table.name}.tsv")
    return tuple(f"{', '.join(names)}: empty, {why}" for why, names in reasons.items())
