"""Who was scanned, and when: participants.tsv and sessions.tsv of one dataset, joined."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, is_broken_symlink, is_file_or_unfetched
from bids_dgmseg.io.files import read_json
from bids_dgmseg.stats.frames import DICOM_AGE, PER_YEAR, name_some, to_numbers
from bids_dgmseg.study.participants import MISSING, Participants, read_keyed, read_participants

_SESSION_IDS = ("sessionid", "session", "ses", "visitid", "visit")

_DAYS_A_YEAR = 365.25

Visit = tuple[str, str | None]
"""Labels of participant and session."""

Descriptions = Mapping[str, Mapping[str, Any]]
"""Column → entry of a data dictionary."""


@dataclass(frozen=True)
class People:
    """What is known of each participant and session."""

    participants: Participants = field(default_factory=Participants)
    sessions: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    """Labels of participant and session → values of sessions.tsv that are there."""
    session_columns: tuple[str, ...] = ()
    dictionaries: Mapping[str, Descriptions] = field(default_factory=dict)
    """File name → entries by column; participants.json first."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of participants.tsv, then those that only sessions.tsv has."""
        return tuple(dict.fromkeys([*self.participants.columns, *self.session_columns]))

    @property
    def descriptions(self) -> Descriptions:
        """Column → entry of participants.json, else of the dictionaries of sessions."""
        return dict(ChainMap(*map(dict, self.dictionaries.values())))

    def is_own(self, participant: str, session: str | None, column: str) -> bool:
        """Tell whether one scan's value is of sessions.tsv."""
        return column in self.sessions.get((participant, session or ""), {})

    def is_of_first(self, participant: str, session: str | None, column: str) -> bool:
        """Tell whether one scan's value is that of the first session: the participant's, or one that all repeat.

        All are the rows of sessions.tsv with a value, two or more, scanned or not.
        """
        if not self.is_own(participant, session, column):
            return True
        told = [values[column] for values in self._rows[participant] if column in values]
        return len(told) > 1 and len(set(told)) == 1

    def describe(self, participant: str, session: str | None, column: str) -> tuple[Mapping[str, Any], str]:
        """Find what is told of one scan's value, beside the table that it is from, and the name of that dictionary."""
        own = [f"sub-{participant}_sessions.json", "sessions.json"]
        names = own if self.is_own(participant, session, column) else ["participants.json"]
        name = next((name for name in names if column in self.dictionaries.get(name, {})), names[-1])
        return self.dictionaries.get(name, {}).get(column, {}), name

    def of(self, participant: str, session: str | None) -> dict[str, str]:
        """Look up one scan's values by column; a session's own value wins, ``n/a`` where there is none."""
        known = dict(zip(self.participants.columns, self.participants.values(participant), strict=True))
        return {**dict.fromkeys(self.columns, MISSING), **known, **self.sessions.get((participant, session or ""), {})}

    def rename(self, names: Mapping[str, str]) -> People:
        """Call columns otherwise: old name → new."""
        columns = tuple(names.get(column, column) for column in self.participants.columns)
        sessions = {
            key: {names.get(column, column): value for column, value in values.items()}
            for key, values in self.sessions.items()
        }
        return People(
            replace(self.participants, columns=columns),
            sessions,
            tuple(names.get(column, column) for column in self.session_columns),
            {
                file: {names.get(column, column): entry for column, entry in entries.items()}
                for file, entries in self.dictionaries.items()
            },
        )

    def years_since_first(self, participant: str, session: str | None) -> float | None:
        """Time since the participant's first session, in whole days, by ``acq_time``; None where it is not told."""
        day = self._days.get((participant, session or ""))
        return (day - self._first[participant]).days / _DAYS_A_YEAR if day else None

    @cached_property
    def _rows(self) -> Mapping[str, list[Mapping[str, str]]]:
        """Values of sessions.tsv, participant by participant."""
        rows: dict[str, list[Mapping[str, str]]] = {}
        for (participant, _), values in self.sessions.items():
            rows.setdefault(participant, []).append(values)
        return rows

    @cached_property
    def _days(self) -> Mapping[tuple[str, str], date]:
        days = {key: _read_day(values.get("acq_time", "")) for key, values in self.sessions.items()}
        return {key: day for key, day in days.items() if day}

    @cached_property
    def _first(self) -> Mapping[str, date]:
        first: dict[str, date] = {}
        for (participant, _), day in self._days.items():
            first[participant] = min(day, first.get(participant, day))
        return first


def read_people(
    root: Path | None, scanned: Sequence[Visit], *, chosen: Sequence[Visit] | None = None
) -> tuple[People, list[str]]:
    """Read participants.tsv and the sessions.tsv of all participants with sessions.

    Parameters
    ----------
    root : Path or None
        The dataset they lie in.
    scanned : sequence of (str, str or None)
        Labels of participant and session of each scan.
    chosen : sequence of (str, str or None), optional
        Those of `scanned` that are wanted, by default all; nothing is said of the others.

    Returns
    -------
    people : People
        Empty where there are no such files.
    warnings : list of str
        One line a kind: who is in one place only.

    Raises
    ------
    InputError
        If a table cannot be read or joined.
    """
    if root is None:
        return People(), []
    visits = scanned if chosen is None else chosen
    participants, warnings = Participants(), []
    if (root / "participants.tsv").is_file():
        participants = read_participants(root / "participants.tsv", [label for label, _ in scanned])
        warnings = _unmatched(participants, {label for label, _ in visits}, everyone=chosen is None)
    labels = {participant for participant, _ in visits}
    sessions, columns, lost, absent = _read_sessions(root, [visit for visit in scanned if visit[0] in labels])
    if alone := [f"sub-{visit[0]} ses-{visit[1]}" for visit in lost if visit in visits]:
        warnings.append(f"sessions.tsv: no row for {name_some(alone)}; the participant's own columns are taken")
    if absent:
        warnings.append(
            f"{describe_missing(absent[0])}; until then the participant's own columns are taken"
            + (f" (and {len(absent) - 1} more such files)" if len(absent) > 1 else "")
        )
    paths = [root / "participants.json"] if participants.rows else []
    if columns:
        paths += [
            root / "sessions.json",
            *(root / f"sub-{label}" / f"sub-{label}_sessions.json" for label in sorted(labels)),
        ]
    dictionaries, broken = _read_dictionaries(paths)
    return People(participants, sessions, columns, dictionaries), warnings + broken


def _read_dictionaries(paths: Sequence[Path]) -> tuple[dict[str, Descriptions], list[str]]:
    """Read the data dictionaries that are there, and say which are broken."""
    found: dict[str, Descriptions] = {}
    warnings = []
    for path in filter(is_file_or_unfetched, paths):
        try:
            entries = read_json(path)
        except InputError as error:
            warnings.append(f"{error}; until then units and descriptions of its columns are not known")
            continue
        found[path.name] = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
    return found, warnings


def _read_sessions(
    root: Path, scanned: Iterable[Visit]
) -> tuple[dict[tuple[str, str], dict[str, str]], tuple[str, ...], list[tuple[str, str]], list[Path]]:
    """Values by participant and session, their columns, scanned sessions without a row, files that were not fetched."""
    labels: dict[str, list[str]] = {}
    for participant, session in scanned:
        if session is not None:
            labels.setdefault(participant, []).append(session)
    known: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, None] = {}
    lost, absent = [], []
    for participant, sessions in labels.items():
        path = root / f"sub-{participant}" / f"sub-{participant}_sessions.tsv"
        if is_broken_symlink(path):
            absent.append(path)
        if not path.is_file():
            continue
        header, rows = read_keyed(path, sessions, prefix="ses-", name="session_id", spellings=_SESSION_IDS)
        columns |= dict.fromkeys(header)
        for session, values in rows.items():
            told = {name: value for name, value in zip(header, values, strict=True) if value != MISSING}
            known[participant, session] = told
        lost += [(participant, session) for session in sorted(set(sessions) - set(rows))]
    return known, tuple(columns), lost, absent


def _unmatched(participants: Participants, scanned: set[str], *, everyone: bool) -> list[str]:
    """One warning for participants without a row, and with everyone's scans one for rows without a scan."""
    warnings = []
    if alone := sorted(scanned - set(participants.rows)):
        warnings.append(f"participants.tsv: no row for {name_some(alone, 'sub-')}; their columns are n/a")
    if everyone and (absent := sorted(set(participants.rows) - scanned)):
        warnings.append(f"participants.tsv: no measures of {name_some(absent, 'sub-')}; they are not in the tables")
    return warnings


def _read_day(text: str) -> date | None:
    try:
        return datetime.fromisoformat(text).date()
    except ValueError:
        return None


YEARS = "years"

_SPELLED = {
    "year": YEARS,
    "yr": YEARS,
    "yrs": YEARS,
    "y": YEARS,
    "a": YEARS,
    "month": "months",
    "mo": "months",
    "mos": "months",
    "mon": "months",
    "week": "weeks",
    "wk": "weeks",
    "wks": "weeks",
    "day": "days",
    "d": "days",
    **{unit: unit for unit in PER_YEAR},
}

_OLDEST = 130


def find_unit(description: Mapping[str, Any], column: str, *, source: str) -> tuple[str, str]:
    """Find the unit of a column of ages by its entry in the data dictionary beside the table.

    Parameters
    ----------
    description : mapping
        The entry, which may be empty; BIDS has ages in years.
    column, source : str
        Name of the column and of the dictionary, for the line.

    Returns
    -------
    unit : str
        A key of `PER_YEAR`.
    line : str
        What to tell the user; empty for years.

    Examples
    --------
    >>> find_unit({"Units": "Months"}, "age", source="participants.json")
    ('months', 'participants.json: age is in months; age_years has it in years')
    """
    text = str(description.get("Units") or "").strip()
    folded = text.casefold()
    if folded in ("", "n/a"):
        return YEARS, ""
    # a letter alone is a unit only where it stands alone
    words = [folded] if folded in _SPELLED else [word for word in re.findall("[a-z]+", folded) if len(word) > 1]
    named = {_SPELLED[word] for word in words if word in _SPELLED}
    if len(named) != 1:
        known = ", ".join(PER_YEAR)
        return YEARS, f"{source}: Units of {column} are {text!r}, none of {known}; taken as years, correct it"
    (unit,) = named
    return unit, "" if unit == YEARS else f"{source}: {column} is in {unit}; age_years has it in years"


def read_ages(people: pd.DataFrame, column: str, units: pd.Series) -> tuple[pd.Series, list[str]]:
    """Read ages in years, and a line for each that is no age.

    Parameters
    ----------
    people : DataFrame
        Text, a row a scan, with ``participant_id``.
    column : str
        The ages.
    units : Series of str
        Key of `PER_YEAR` for each row; a value with a unit of its own, as DICOM writes it (``018M``), keeps that.

    Returns
    -------
    ages : Series of float
        NaN where there is none.
    warnings : list of str
        One line each.
    """
    numbers, warnings = to_numbers(people, column)
    own = people[column].astype(str).str.strip().str.fullmatch(DICOM_AGE.pattern)
    ages = numbers / units.map(PER_YEAR).astype(float).mask(own, 1.0)
    odd = (ages < 0) | (ages > _OLDEST)
    shown = numbers.map("{:g}".format) + units.where(units != YEARS, "").map(lambda unit: f" {unit}" if unit else "")
    lines = [
        f"participants.tsv: {column} of {who} is {age}, no age in years; it counts as missing"
        for who, age in dict.fromkeys(zip(people["participant_id"][odd], shown[odd], strict=True))
    ]
    ages = ages.mask(odd)
    if n_lost := int(people["participant_id"][ages.isna()].nunique()):
        lost = list(dict.fromkeys(people["participant_id"][ages.isna()]))
        lines.append(
            f"participants.tsv: no age of {name_some(lost)}; {n_lost} of "
            f"{people['participant_id'].nunique()} are left out where age matters"
        )
    return ages, [*warnings, *lines]
