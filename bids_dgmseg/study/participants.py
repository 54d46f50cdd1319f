"""Participants and sessions of a BIDS dataset: participants.tsv, sessions.tsv, scans.tsv and their data dictionaries.

Tables are BIDS or are refused: text in UTF-8 separated by tabs, ``n/a`` where missing, numeric ages (or ``89+``), dates
in ISO 8601, sexes as BIDS lists them or with ``Levels`` in the data dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import is_file_or_unfetched, list_folders, read_json, read_tsv

Visit = tuple[str, str | None]
"""Labels of participant and session, without ``sub-`` and ``ses-``."""

Dictionary = Mapping[str, Mapping[str, Any]]
"""Column → entry of a BIDS data dictionary."""

AGE, SEX, GROUP, SITE = ("age",), ("sex", "gender"), ("group", "diagnosis"), ("site", "site_id")
"""Names that a column may have, in any case."""

DAYS_PER_YEAR = 365.25

OLDEST_YEARS = 130

_PER_YEAR = {"year": 1.0, "month": 12.0, "week": DAYS_PER_YEAR / 7, "day": DAYS_PER_YEAR}

_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": "O", "other": "O"}

SEX_LEVELS = {"F": "female", "M": "male", "O": "other"}

_PREFIXES = {"participant_id": "sub-", "session_id": "ses-", "filename": ""}
"""Column that identifies the rows → prefix of its values, which may be omitted."""

_HOW_TO = (
    "write ids as in the folder names (sub-01, ses-1), ages as 67.5 or 89+, dates as 2020-10-15T10:12:00, sex as F, M "
    "or O, numbers with a decimal point, missing values as n/a; a spreadsheet exports the table as tab-delimited text "
    "(UTF-8)"
)


def refuse(file: str, problem: str, cells: Sequence[str]) -> InputError:
    """Return the error about a table that is not BIDS, with the first five cells and how to write them."""
    more = f" and {len(cells) - 5} more" if len(cells) > 5 else ""
    return InputError(f"{file}: {problem}: {', '.join(cells[:5])}{more}; {_HOW_TO}")


def find_column(columns: Iterable[Any], names: Sequence[str]) -> str | None:
    """Return the first column that has one of some names, in any case.

    >>> find_column(["sex", "Age"], AGE)
    'Age'
    """
    by_name = {str(column).casefold(): str(column) for column in reversed(list(columns))}
    return next((by_name[name] for name in names if name in by_name), None)


def find_controls(groups: pd.Series, names: Sequence[str]) -> NDArray[np.bool_]:
    """Return which participants are of groups with these names, in any case.

    >>> find_controls(pd.Series(["HC", "PD", None]), ["hc"]).tolist()
    [True, False, False]

    Raises
    ------
    InputError
        If nobody is.
    """
    folded = {name.casefold() for name in names}
    controls = groups.map(lambda group: str(group).casefold(), na_action="ignore").isin(folded).to_numpy(bool)
    if not controls.any():
        shown = ", ".join(sorted(map(str, groups.dropna().unique()))) or "not known; name its column: `group_column`"
        raise InputError(f"`controls` {' '.join(names)}: no included scan belongs to this group (groups: {shown})")
    return controls


def read_numbers(texts: pd.Series, who: pd.Series, *, file: str = "participants.tsv") -> pd.Series:
    """Convert a column to numbers, NaN where missing; `who` are the participants of the values.

    Raises
    ------
    InputError
        If a value is not a number.
    """
    numbers = pd.to_numeric(texts, errors="coerce").astype(float)
    if (wrong := texts.notna() & numbers.isna()).any():
        raise refuse(file, f"{texts.name} is not a number", _name_cells(texts[wrong], who[wrong]))
    return numbers


def _name_cells(values: Iterable[Any], who: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(f"{value!r} of {name}" for value, name in zip(values, who, strict=True)))


def read_labelled_table(path: Path, id_column: str) -> pd.DataFrame:
    """Read a table of text, NaN where missing, whose rows are identified by labels: participants, sessions or files.

    Raises
    ------
    InputError
        If the file is not a table of BIDS, or a label is missing or appears twice.
    """
    try:
        table = read_tsv(path, dtype=str, header=None)
    except InputError as error:
        if isinstance(error.__cause__, ValueError) and not isinstance(error.__cause__, UnicodeDecodeError):
            raise refuse(path.name, "not a tab-separated table", _first_cells(path)) from error
        raise
    table = table.dropna(how="all").dropna(how="all", axis=1).apply(lambda column: column.str.strip())
    header = table.iloc[0].tolist() if len(table) else []
    if id_column not in header or len({*header}) < len(header) or not all(isinstance(name, str) for name in header):
        raise refuse(path.name, f"expected unique names of columns and {id_column}", _first_cells(path))
    table = table.iloc[1:].set_axis(pd.Index(header, dtype=object), axis=1).astype(object)
    ids = table.pop(id_column)
    labels = ids.str.removeprefix(_PREFIXES[id_column])
    if (wrong := labels.isna() | labels.duplicated(keep=False)).any():
        raise refuse(path.name, f"{id_column} is missing or not unique", [repr(label) for label in ids[wrong]])
    labelled: pd.DataFrame = table.set_axis(pd.Index(labels, dtype=object), axis=0)
    return labelled


def _first_cells(path: Path) -> list[str]:
    text = path.read_bytes()[:1000].decode(errors="replace")
    return [repr(cell) for cell in re.split("[\t\r\n]+", text)[:5]]


@dataclass(frozen=True)
class ParticipantTables:
    """What a dataset says about its participants and their sessions; text, NaN where missing."""

    participants: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns of participants.tsv by participant label."""
    sessions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(index=_index([]), dtype=object))
    """Columns of sessions.tsv by the labels of participant and session."""
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)
    """File name → data dictionary; participants.json first."""
    days: pd.Series = field(default_factory=lambda: pd.Series(index=_index([]), dtype=float))
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
        general = self.participants.reindex(index=[participant for participant, _ in visits], columns=self.columns)
        session = self._at_sessions(visits)
        return session.where(session.notna(), general.set_axis(session.index)).astype(object)

    def years_since_first(self, visits: Sequence[Visit]) -> pd.Series:
        """Return the time between a participant's first session and each visit by ``acq_time``; NaN where unknown."""
        years = (self.days - self.days.groupby(level=0).transform("min")) / DAYS_PER_YEAR
        return years.reindex(_index(visits)).set_axis(range(len(visits)))

    def ages(self, visits: Sequence[Visit], column: str | None) -> tuple[pd.Series, list[str]]:
        """Return the age at each visit in years, NaN where unknown, and warnings.

        It is the age of the session, otherwise that of the participant at the first session plus the time since then.

        Raises
        ------
        InputError
            If an age is not a number from 0 to 130 years, or its unit is unknown.
        """
        if column is None:
            return pd.Series(float("nan"), index=range(len(visits))), []
        texts, who = self.at_visits(visits)[column], pd.Series([_name(visit) for visit in visits], dtype=object)
        of_session = self._at_sessions(visits).reindex(columns=[column])[column].notna()
        per_year = [self._per_year(visit[0], column, is_own) for visit, is_own in zip(visits, of_session, strict=True)]
        since = self.years_since_first(visits)
        # dates of birth are withheld above 89 years
        ages = pd.to_numeric(texts.str.removesuffix("+"), errors="coerce") / per_year
        ages += since.where(~of_session).fillna(0)
        wrong = texts.notna() & ~ages.between(0, OLDEST_YEARS)
        if wrong.any():
            file = "sessions.tsv" if of_session[wrong].all() else "participants.tsv"
            problem = f"{column} is not from 0 to {OLDEST_YEARS} years at the session"
            raise refuse(file, problem, _name_cells(texts[wrong], who[wrong]))
        person = pd.Series([f"sub-{participant}" for participant, _ in visits], dtype=object)
        warnings = []
        if (missing := ages.isna()).any():
            warnings.append(
                f"participants.tsv: no {column} of {list_some(set(person[missing]))}; left out of analyses with age"
            )
        n_sessions = who.groupby(person).transform("nunique")
        if (undated := ages.notna() & ~of_session & since.isna() & (n_sessions > 1)).any():
            warnings.append(
                f"sessions.tsv: no acq_time of {list_some(set(who[undated]))}; using the {column} at the first session"
            )
        return ages, warnings

    def sexes(self, visits: Sequence[Visit], column: str) -> pd.Series:
        """Return the sex at each visit as ``F``, ``M`` or ``O``, NaN where missing.

        Raises
        ------
        InputError
            If a value is neither a sex of BIDS nor described as one in ``Levels``.
        """
        levels = self.descriptions.get(column, {}).get("Levels")
        codes = dict(_SEXES)
        for code, level in (levels if isinstance(levels, dict) else {}).items():
            text = level.get("Description") if isinstance(level, dict) else level
            words = re.findall(r"\w+", f"{text}".casefold())
            codes |= {str(code).casefold(): _SEXES[word] for word in words if word in _SEXES}
        texts = self.at_visits(visits)[column]
        sexes = texts.map(lambda text: codes.get(text.casefold()), na_action="ignore").astype(object)
        if (wrong := texts.notna() & sexes.isna()).any():
            who = [_name(visit) for visit, is_wrong in zip(visits, wrong, strict=True) if is_wrong]
            problem = f"{column} is neither F, M, O nor described in Levels of participants.json"
            raise refuse("participants.tsv", problem, _name_cells(texts[wrong], who))
        return sexes.where(sexes.notna())

    def rename(self, columns: Mapping[str, str]) -> ParticipantTables:
        """Rename columns in all tables and dictionaries: old name → new name."""
        dictionaries = {
            file: {columns.get(name, name): entry for name, entry in entries.items()}
            for file, entries in self.dictionaries.items()
        }
        participants, sessions = (table.rename(columns=columns) for table in (self.participants, self.sessions))
        return replace(self, participants=participants, sessions=sessions, dictionaries=dictionaries)

    def _at_sessions(self, visits: Sequence[Visit]) -> pd.DataFrame:
        return self.sessions.reindex(index=_index(visits), columns=self.columns).set_axis(range(len(visits)))

    def _per_year(self, participant: str, column: str, of_session: bool) -> float:
        """Return the number of units of an age per year; years unless the data dictionary has another unit."""
        files = [f"sub-{participant}_sessions.json", "sessions.json"] if of_session else ["participants.json"]
        for file in files:
            if text := self.dictionaries.get(file, {}).get(column, {}).get("Units"):
                units = {*re.findall("|".join(_PER_YEAR), str(text).casefold())}
                if len(units) != 1:
                    raise InputError(f"{file}: Units of {column} is {text!r}; write years, months, weeks or days")
                return _PER_YEAR[units.pop()]
        return 1.0


def read_participant_tables(
    root: Path | None, visits: Sequence[Visit], *, all_scans: bool = True
) -> tuple[ParticipantTables, list[str]]:
    """Read participants.tsv, and the sessions.tsv and dates of the participants of some visits.

    Warnings are about participants without a row and, if the visits are those of `all_scans`, without a scan.

    Raises
    ------
    InputError
        If a table is not BIDS.
    """
    if root is None:
        return ParticipantTables(), []
    labels = sorted({participant for participant, _ in visits})
    participants, warnings = pd.DataFrame(), []
    if (root / "participants.tsv").is_file():
        participants = read_labelled_table(root / "participants.tsv", "participant_id")
        if unknown := [f"sub-{label}" for label in labels if label not in participants.index]:
            warnings.append(f"participants.tsv: no row for {list_some(unknown)}; their columns are n/a")
        if all_scans and (others := [f"sub-{label}" for label in participants.index if label not in labels]):
            warnings.append(f"participants.tsv: no results of {list_some(others)}; they are not in the tables")
    parts = {}
    for label in sorted({participant for participant, session in visits if session}):
        path = root / f"sub-{label}" / f"sub-{label}_sessions.tsv"
        if is_file_or_unfetched(path):
            parts[label] = read_labelled_table(path, "session_id")
    tables = ParticipantTables(participants)
    if parts:
        sessions = pd.concat(parts)
        missing = [_name(visit) for visit in visits if visit[0] in parts and visit not in sessions.index]
        if missing:
            warnings.append(f"sessions.tsv: no row for {list_some(set(missing))}; using the participant's columns")
        tables = replace(tables, sessions=sessions)
    files = [root / "participants.json", root / "sessions.json"]
    files += [root / f"sub-{label}" / f"sub-{label}_sessions.json" for label in parts]
    dictionaries = {path.name: _read_dictionary(path) for path in files if is_file_or_unfetched(path)}
    return replace(tables, dictionaries=dictionaries, days=_read_days(root, tables.sessions, visits)), warnings


def _read_dictionary(path: Path) -> Dictionary:
    return {name: entry for name, entry in read_json(path).items() if isinstance(entry, dict)}


def _read_days(root: Path, sessions: pd.DataFrame, visits: Sequence[Visit]) -> pd.Series:
    """Return the day of each session: ``acq_time`` of sessions.tsv, otherwise the first one of scans.tsv.

    In scans.tsv, scans in ``anat`` come first; it is read of participants with several sessions.
    """
    days: pd.Series = pd.Series(index=_index([]), dtype=float)
    if "acq_time" in sessions:
        days = _to_days(sessions["acq_time"], "sessions.tsv")
    for label in sorted({participant for participant, session in visits if session}):
        folders = sorted(list_folders(root / f"sub-{label}", "ses-"))
        for folder in folders if len(folders) > 1 else ():
            path = folder / f"sub-{label}_{folder.name}_scans.tsv"
            session = (label, folder.name.removeprefix("ses-"))
            if session in days.index or not is_file_or_unfetched(path):
                continue
            table = read_labelled_table(path, "filename")
            times = table["acq_time"].dropna() if "acq_time" in table else pd.Series(dtype=object)
            is_anat = times.index.astype(str).str.startswith("anat/")
            times = times[is_anat] if is_anat.any() else times
            if len(times):
                dates = _to_days(times.set_axis(_index([session] * len(times))), path.name)
                first = pd.Series([dates.min()], index=_index([session]))
                days = pd.concat([days, first])
    return days


def _to_days(times: pd.Series, file: str) -> pd.Series:
    """Convert dates of ISO 8601 to days (ordinals), without missing ones."""

    def to_day(text: str) -> float:
        try:
            return float(datetime.fromisoformat(text).toordinal())
        except ValueError:
            return float("nan")

    times = times.dropna()
    days = times.map(to_day).astype(float)
    if (wrong := days.isna()).any():
        names = [_name(visit) for visit in times.index[wrong.to_numpy()]]
        raise refuse(file, "acq_time is not a date", _name_cells(times[wrong], names))
    return days


def _name(visit: Visit) -> str:
    return f"sub-{visit[0]} ses-{visit[1]}" if visit[1] else f"sub-{visit[0]}"


def _index(visits: Sequence[Visit]) -> pd.MultiIndex:
    return pd.MultiIndex.from_arrays([[visit[0] for visit in visits], [visit[1] or "" for visit in visits]])
