"""Participants and sessions: participants.tsv, sessions.tsv and the data dictionaries beside them."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import (
    describe_missing,
    is_broken_symlink,
    is_file_or_unfetched,
    list_folders,
    read_json,
)
from bids_dgmseg.study.dates import DAYS_PER_YEAR, find_days
from bids_dgmseg.study.spreadsheets import Notes, describe_notes, read_labelled_rows, read_labelled_table

Visit = tuple[str, str | None]
"""Labels of participant and session, without ``sub-`` and ``ses-``."""

Dictionary = Mapping[str, Mapping[str, Any]]
"""Column → entry of a BIDS data dictionary."""

_PARTICIPANT_COLUMNS = ("participantid", "participant", "subjectid", "subject", "sub")

_SESSION_COLUMNS = ("sessionid", "session", "ses", "visitid", "visit")


@dataclass(frozen=True)
class ParticipantTables:
    """What a dataset says about its participants and their sessions; text, NaN where missing."""

    participants: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns of participants.tsv by participant label."""
    sessions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns of sessions.tsv by the labels of participant and session."""
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)
    """File name → data dictionary; participants.json first."""
    days: pd.Series = field(default_factory=lambda: _no_times().astype(float))
    """Day of each session with a known date, by the labels of participant and session."""

    @property
    def columns(self) -> list[str]:
        """Columns of participants.tsv, followed by those that only sessions.tsv has."""
        return list(dict.fromkeys([*self.participants.columns, *self.sessions.columns]))

    @property
    def descriptions(self) -> Dictionary:
        """Column → entry of participants.json, otherwise of the dictionaries of the sessions."""
        return {
            name: entry for entries in reversed(list(self.dictionaries.values())) for name, entry in entries.items()
        }

    def at_visits(self, visits: Sequence[Visit]) -> pd.DataFrame:
        """Return one row of values per visit: those of the session, otherwise those of the participant."""
        columns = self.columns
        general = self.participants.reindex(index=[participant for participant, _ in visits], columns=columns)
        own = self._at_sessions(visits)
        return own.where(own.notna(), general.set_axis(own.index)).astype(object)

    def texts(self, column: str) -> set[str]:
        """Return the values of a column, also of participants without a scan."""
        return {
            str(text) for table in (self.participants, self.sessions) for text in table.get(column, ()) if text == text
        }

    def is_session_value(self, visits: Sequence[Visit], column: str) -> pd.Series:
        """Return whether the value of each visit is from sessions.tsv."""
        return self._at_sessions(visits).reindex(columns=[column])[column].notna()

    def dictionary_entry(self, visit: Visit, column: str, *, own: bool) -> tuple[Mapping[str, Any], str]:
        """Return the entry that describes a value, and the name of the file that has it.

        `own` says whether the value is that of the session; its data dictionary is that of sessions.tsv.
        """
        names = [f"sub-{visit[0]}_sessions.json", "sessions.json"] if own else ["participants.json"]
        name = next((name for name in names if column in self.dictionaries.get(name, {})), names[-1])
        return self.dictionaries.get(name, {}).get(column, {}), name

    def is_first_sessions_value(self, visits: Sequence[Visit], column: str) -> pd.Series:
        """Return whether a value holds for the participant's first session rather than for the visit itself.

        It does if it is from participants.tsv, or if two or more sessions with a value all repeat the same one.
        """
        own = self.is_session_value(visits, column)
        if column not in self.sessions:
            return ~own
        values = self.sessions[column].groupby(level=0)
        repeated = (values.count() > 1) & (values.nunique() == 1)
        return ~own | pd.Series([repeated.get(participant, False) for participant, _ in visits], own.index)

    def years_since_first(self, visits: Sequence[Visit]) -> pd.Series:
        """Return the time between a participant's first session and each visit by ``acq_time``; NaN where unknown."""
        years = (self.days - self.days.groupby(level=0).transform("min")) / DAYS_PER_YEAR
        return years.reindex(_index(visits)).set_axis(range(len(visits)))

    def undated_sessions(self, visits: Iterable[Visit]) -> list[tuple[str, str]]:
        """Return the sessions without a known date of the participants who have several, by visits and sessions.tsv."""
        own = {(participant, session) for participant, session in visits if session}
        participants = {participant for participant, _ in own}
        known = own | {session for session in self.sessions.index if session[0] in participants}
        counts = Counter(participant for participant, _ in known)
        return sorted(session for session in known - set(self.days.index) if counts[session[0]] > 1)

    def rename(self, columns: Mapping[str, str]) -> ParticipantTables:
        """Rename columns in all tables and dictionaries: old name → new name."""
        dictionaries = {
            file: {columns.get(name, name): entry for name, entry in entries.items()}
            for file, entries in self.dictionaries.items()
        }
        participants, sessions = (table.rename(columns=columns) for table in (self.participants, self.sessions))
        return replace(self, participants=participants, sessions=sessions, dictionaries=dictionaries)

    def _at_sessions(self, visits: Sequence[Visit]) -> pd.DataFrame:
        sessions = self.sessions if len(self.sessions) else pd.DataFrame(index=_index([]), dtype=object)
        return sessions.reindex(index=_index(visits), columns=self.columns).set_axis(range(len(visits)))


def read_participant_tables(
    root: Path | None, scanned: Sequence[Visit], *, selected: Sequence[Visit] | None = None
) -> tuple[ParticipantTables, list[str]]:
    """Read participants.tsv and the sessions.tsv of every participant with sessions, from the dataset `root`.

    `scanned` are participant and session of each scan, `selected` those to warn about; by default all. Warnings are
    about participants without a row or without a scan, unfetched files and broken dictionaries.

    Raises
    ------
    InputError
        If a table cannot be read or joined.
    """
    if root is None:
        return ParticipantTables(), []
    visits = scanned if selected is None else selected
    labels = {participant for participant, _ in visits}
    participants, warnings = pd.DataFrame(), []
    if (root / "participants.tsv").is_file():
        participants, notes = _read_participants(root / "participants.tsv", [label for label, _ in scanned])
        warnings += describe_notes([notes], where="participants.tsv")
        if unknown := [f"sub-{label}" for label in labels - set(participants.index)]:
            warnings.append(f"participants.tsv: no row for {list_some(unknown)}; their columns are n/a")
        if selected is None and (others := [f"sub-{label}" for label in set(participants.index) - labels]):
            warnings.append(f"participants.tsv: no results of {list_some(others)}; they are not in the tables")
    sessions, session_warnings = _read_sessions(root, [visit for visit in scanned if visit[0] in labels], visits)
    scan_times, time_warnings = _read_scan_times(root, {label for label, session in visits if session})
    own_times = sessions["acq_time"].dropna() if "acq_time" in sessions else _no_times()
    days, day_warnings = find_days({"sessions.tsv": own_times, "scans.tsv": scan_times})
    session_warnings += [*time_warnings, *day_warnings]
    paths = [root / "participants.json"] if len(participants) else []
    if len(sessions.columns):
        own = (root / f"sub-{label}" / f"sub-{label}_sessions.json" for label in sorted(labels))
        paths += [root / "sessions.json", *own]
    dictionaries = {}
    for path in filter(is_file_or_unfetched, paths):
        try:
            entries = read_json(path)
        except InputError as error:
            session_warnings.append(f"{error}; until then units and descriptions of its columns are unknown")
            continue
        dictionaries[path.name] = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return ParticipantTables(participants, sessions, dictionaries, days), warnings + session_warnings


def _read_sessions(root: Path, scanned: Iterable[Visit], visits: Sequence[Visit]) -> tuple[pd.DataFrame, list[str]]:
    """Read the sessions.tsv of each scanned participant; warnings are about `visits` only."""
    labels: dict[str, list[str]] = defaultdict(list)
    for participant, session in scanned:
        if session is not None:
            labels[participant].append(session)
    columns: dict[str, None] = {}
    records: dict[Visit, dict[str, str | float]] = {}
    without_row, notes, problems = [], [], []
    for participant, sessions in labels.items():
        path = root / f"sub-{participant}" / f"sub-{participant}_sessions.tsv"
        if is_broken_symlink(path):
            problems.append(f"{describe_missing(path)}; until then the participant's own columns are used")
        if not path.is_file():
            continue
        try:
            names, rows, unusual = read_labelled_rows(
                path, sessions, prefix="ses-", id_column="session_id", spellings=_SESSION_COLUMNS
            )
        except InputError as error:
            problems.append(f"{error}; until then the participant's own columns are used")
            continue
        notes.append({kind: [f"sub-{participant}: {text}" for text in texts] for kind, texts in unusual.items()})
        columns |= dict.fromkeys(names)
        records |= {(participant, session): dict(zip(names, row, strict=True)) for session, row in rows.items()}
        missing = sorted(set(sessions) - set(rows))
        without_row += [f"sub-{participant} ses-{session}" for session in missing if (participant, session) in visits]
    warnings = describe_notes(notes, where="sessions.tsv")
    if without_row:
        warnings.append(f"sessions.tsv: no row for {list_some(without_row)}; using the participant's own columns")
    # one table for all participants: one each takes most of the time
    table = pd.DataFrame([*records.values()], index=_index([*records]), columns=[*columns], dtype=object)
    return table if notes else pd.DataFrame(), warnings + _first_of(problems)


def _read_scan_times(root: Path, participants: Iterable[str]) -> tuple[pd.Series, list[str]]:
    """Read ``acq_time`` of the scans.tsv of participants with several sessions: of the scans in ``anat``, if any."""
    times, problems = {}, []
    for participant in sorted(participants):
        folders: list[Path] = []
        with contextlib.suppress(PermissionError):
            folders = sorted(list_folders(root / f"sub-{participant}", "ses-"))
        paths = [folder / f"sub-{participant}_{folder.name}_scans.tsv" for folder in folders if len(folders) > 1]
        for path in filter(is_file_or_unfetched, paths):
            try:
                table, _ = read_labelled_table(path, [], prefix="", id_column="filename", spellings=("filename",))
            except InputError as error:
                problems.append(f"{error}; until then its acq_time is not used")
                continue
            known = table["acq_time"].dropna() if "acq_time" in table else _no_times()
            of_anat = known[[str(name).startswith("anat/") for name in known.index]]
            if len(known):
                times[participant, path.parent.name.removeprefix("ses-")] = of_anat if len(of_anat) else known
    return pd.concat(times) if times else _no_times(), _first_of(problems)


def _first_of(problems: Sequence[str]) -> list[str]:
    """Return one warning about files with problems: that of the first, and the number of others."""
    more = f" (and {len(problems) - 1} more such files)" if len(problems) > 1 else ""
    return [f"{problems[0]}{more}"] if problems else []


def _no_times() -> pd.Series:
    return pd.Series(index=_index([]), dtype=object)


def read_participants(path: Path, labels: Iterable[str]) -> pd.DataFrame:
    """Read participants.tsv, tolerating common variants written by hand and by spreadsheets.

    Tabs, semicolons or commas separate the columns. A byte order mark, spaces around values, ids without
    ``sub-`` and ids that lost their leading zeros to a spreadsheet are accepted, and so are ids that differ from a
    single label in case, spaces or punctuation (``SUB_01``). Text is normalized to NFC, so that names with
    accents compare equal.

    Parameters
    ----------
    path : Path
    labels : iterable of str
        Labels of the participants that have scans, without ``sub-``.

    Returns
    -------
    DataFrame
        Text by participant label, NaN where missing; participants with scans are named by the label of their scans.

    Raises
    ------
    InputError
        If there is no id column, a row is longer than the header, or a participant has two rows.
    """
    return _read_participants(path, labels)[0]


def _read_participants(path: Path, labels: Iterable[str]) -> tuple[pd.DataFrame, Notes]:
    return read_labelled_table(path, labels, prefix="sub-", id_column="participant_id", spellings=_PARTICIPANT_COLUMNS)


def _index(visits: Sequence[Visit]) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([[visit[0] for visit in visits], [visit[1] or "" for visit in visits]])
