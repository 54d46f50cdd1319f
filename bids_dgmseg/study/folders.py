"""Output folders of the participant level: their names, the scans to use, and the participants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.study.demographics import find_column
from bids_dgmseg.study.participants import ParticipantTables, Visit, read_participant_tables
from bids_dgmseg.study.results import RERUN, Results, read_entities, read_results

_GENERIC_NAMES = ("bids_dgmseg", "derivatives")


@dataclass(frozen=True)
class ResultsFolder:
    """An output folder of the participant level."""

    path: Path
    name: str
    dataset: Path | None
    """Dataset with its participants.tsv and sessions.tsv."""
    link: str = "."
    """Relative path of the folder from the one of the group tables."""


@dataclass(frozen=True)
class ResultsSelection:
    """Labels of the scans to use; empty means all."""

    participants: tuple[str, ...] = ()
    """Without ``sub-``."""
    sessions: tuple[str, ...] = ()
    """Without ``ses-``."""
    models: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.participants or self.sessions or self.models)

    def includes(self, entities: Mapping[Any, Any]) -> bool:
        """Return whether a scan with these entities is selected."""
        return all(not wanted or entities.get(key) in wanted for key, _, _, wanted in self._criteria())

    def check(self, scans: Sequence[Mapping[Any, Any]], *, where: str) -> None:
        """Check that every label exists and that some scan is selected.

        Raises
        ------
        InputError
            Otherwise; the message lists the existing labels. `where` names the folder.
        """
        for key, prefix, option, wanted in self._criteria():
            known = {str(entities[key]) for entities in scans if not pd.isna(entities.get(key))}
            if unknown := [label for label in wanted if label not in known]:
                some = list_some(f"{prefix}{label}" for label in known) or "none"
                raise InputError(f"{where}: no results of {prefix}{unknown[0]}; check {option} (found {some})")
        if not any(map(self.includes, scans)):
            options = ", ".join(option for _, _, option, wanted in self._criteria() if wanted)
            raise InputError(f"{where}: no scan matches all of {options}; check them")

    def describe(self) -> dict[str, list[str]]:
        """Return the labels by option, for the data dictionaries."""
        return {option.removeprefix("--"): list(wanted) for _, _, option, wanted in self._criteria() if wanted}

    def _criteria(self) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
        """List entity, prefix of its labels, option and labels."""
        return (
            ("sub", "sub-", "--participant-label", self.participants),
            ("ses", "ses-", "--session-label", self.sessions),
            ("seg", "", "--model", self.models),
        )


@dataclass(frozen=True)
class FolderScans:
    """Selected scans of one folder."""

    folder: ResultsFolder
    results: Results
    tables: ParticipantTables
    warnings: Sequence[str]
    n_damaged: int

    @property
    def visits(self) -> list[Visit]:
        """Participant and session of each scan."""
        return self.results.visits


def read_folders(
    folders: Sequence[ResultsFolder], selection: ResultsSelection, *, roles: Iterable[Sequence[str]]
) -> list[FolderScans]:
    """Read the selected scans of all folders.

    Parameters
    ----------
    folders : sequence of ResultsFolder
    selection : ResultsSelection
    roles : iterable of sequence of str
        Names of the columns of age, sex and so on. Each folder's columns are named as in the first folder with one.

    Raises
    ------
    InputError
        If there are no results, none is selected, or a table of participants cannot be read.
    """
    found = [read_results(folder.path, link=folder.link) for folder in folders]
    if not any(len(results.scans) for results in found):
        for folder, results in zip(folders, found, strict=True):
            for (problem, remedy), names in results.left_out.items():
                raise InputError(f"{folder.path.name}: all tables are {problem} ({names[0]}); {remedy}")
        where = ", ".join(folder.path.name for folder in folders)
        raise InputError(f"{where}: no *_stats.tsv found; run the participant level first")
    if selection:
        records = [record for results in found for record in results.scans.to_dict("records")]
        selection.check(records, where=list_some([folder.name for folder in folders]))
    scans = [_select_scans(folder, results, selection) for folder, results in zip(folders, found, strict=True)]
    return _align_columns(scans, roles)


def _select_scans(folder: ResultsFolder, results: Results, selection: ResultsSelection) -> FolderScans:
    warnings = []
    for (problem, remedy), names in results.left_out.items():
        if selected := [name for name in names if selection.includes(read_entities(name))]:
            them = " for them" if remedy.startswith(RERUN) else ""
            warnings.append(f"{list_some(selected)}: {problem} and left out; {remedy}{them}")
    n_damaged = sum(selection.includes(read_entities(name)) for name in results.damaged)
    chosen = results.select([selection.includes(record) for record in results.scans.to_dict("records")])
    # labels are matched among all scans with results: an id such as 3 may stand for sub-03 or for sub-3
    tables, more = read_participant_tables(
        folder.dataset, results.visits, selected=chosen.visits if selection else None
    )
    return FolderScans(folder, chosen, tables, [*warnings, *more], n_damaged)


def _align_columns(parts: Sequence[FolderScans], roles: Iterable[Sequence[str]]) -> list[FolderScans]:
    """Rename the age, sex, group and site columns of each folder as in the first folder that has them."""
    aligned = list(parts)
    for names in roles:
        columns = [find_column(part.tables.columns, names) for part in parts]
        first = next(filter(None, columns), None)
        for place, column in enumerate(columns):
            part = aligned[place]
            if column and first and column != first and first not in part.tables.columns:
                warning = f"participants.tsv: using its column {column} as {first}"
                tables = part.tables.rename({column: first})
                aligned[place] = replace(part, tables=tables, warnings=[*part.warnings, warning])
    return aligned


def name_folders(paths: Sequence[Path]) -> list[str]:
    """Return names of folders that distinguish them, without parts that say nothing, such as ``derivatives``.

    >>> name_folders([Path("/data/bern/derivatives/bids_dgmseg"), Path("/data/graz/derivatives/bids_dgmseg")])
    ['bern', 'graz']
    >>> name_folders([Path("/a/study"), Path("/b/study")])
    ['a/study', 'b/study']
    """
    parts = [[part for part in path.parts[1:] if part not in _GENERIC_NAMES] or [path.name] for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        # a name that is not valid UTF-8 could not be written to a table
        names = ["/".join(part[-depth:]).encode(errors="replace").decode() for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
