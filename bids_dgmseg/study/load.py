"""All scans of a study, with what is known of the participants, their ages, groups and sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import name_some
from bids_dgmseg.study.demographics import People, find_unit, read_ages, read_people
from bids_dgmseg.study.participants import MISSING
from bids_dgmseg.study.results import AGAIN, ScanStats, Tables, read_entities, read_scans
from bids_dgmseg.study.selection import Choice

ENTITIES = {
    "sub": "participant_id",
    "ses": "session_id",
    "acq": "acquisition",
    "run": "run",
    "seg": "model",
    "rec": "reconstruction",
    "ce": "ceagent",
    "dir": "direction",
    "res": "resolution",
    "desc": "description",
}
"""Entity of a file name → column of the tables."""

_ALWAYS = ("sub", "ses", "acq", "run", "seg")

_APART = ("reconstruction", "description")

_AGE, _SEX, _GROUP, _SITE = ("age",), ("sex", "gender"), ("group", "diagnosis"), ("site", "site_id")

_FACTS = (_AGE, _SEX, _GROUP, _SITE)

_SEXES = {"f": "F", "female": "F", "woman": "F", "w": "F", "m": "M", "male": "M", "man": "M"}

_MARK = "_dseg.json"
"""The end of the name of what the participant level writes last."""


@dataclass(frozen=True)
class Tree:
    """An output folder of the participant level."""

    path: Path
    name: str
    people: Path | None
    """Dataset with participants.tsv and sessions.tsv."""
    link: str = "."
    """The folder, from the one where the tables go."""


@dataclass(frozen=True)
class Cohort:
    """What the tables are made from; all frames have a row a scan and model, in the order of `scans`."""

    scans: tuple[ScanStats, ...]
    pages: tuple[str, ...]
    """The participants' pages, from the folder where the tables go; ``n/a`` without one."""
    keys: pd.DataFrame
    """Text: entities, ``tree`` where there are several, ``site``."""
    people: pd.DataFrame
    """Text: columns of participants.tsv and sessions.tsv, ``n/a`` where missing."""
    descriptions: Mapping[str, Mapping[str, Any]]
    """Column of `people` → entry of a data dictionary."""
    facts: pd.DataFrame
    """``participant_id``, one for each person; ``age`` and ``years`` (numbers; ``years`` of one person are all since
    the first session, or all ages); ``sex``, ``group``, ``site`` (text); NaN where missing."""
    apart: tuple[str, ...]
    """Columns of `keys` whose values are never pooled: ``model`` and those that tell reconstructions apart."""
    settings: Mapping[str, Any]
    """Where site, group and age were found, for the data dictionaries."""
    spellings: Mapping[str, Sequence[str]]
    """``site``, ``group`` → a line for each value in large and in small letters; `warnings` has them too."""
    warnings: tuple[str, ...]
    n_damaged: int = 0
    """Tables that were wanted and cannot be used; `warnings` name them."""


@dataclass(frozen=True)
class _Part:
    """What one tree has."""

    tree: Tree
    scans: Sequence[ScanStats]
    people: People
    warnings: Sequence[str]
    n_damaged: int


def load_cohort(
    trees: Sequence[Tree],
    *,
    choice: Choice | None = None,
    site_column: str | None = None,
    group_column: str | None = None,
) -> Cohort:
    """Read the measures of all scans, or of those chosen, and join what is known of the participants.

    Parameters
    ----------
    trees : sequence of Tree
        Output folders; with several, each is a site, unless its participants have a column of sites.
    choice : Choice, optional
        Which scans; by default all.
    site_column, group_column : str, optional
        Columns of participants.tsv or sessions.tsv; by default ``site`` or ``site_id``, and ``group`` or ``diagnosis``.

    Raises
    ------
    InputError
        If there is nothing measured or nothing chosen, a named column does not exist, or a table cannot be read or
        joined.
    """
    choice = choice or Choice()
    given = [names for names, column in ((_SITE, site_column), (_GROUP, group_column)) if column]
    found = [read_scans(tree.path) for tree in trees]
    _check_any(trees, found)
    if choice:
        measured = [scan.entities for tables in found for scan in tables.scans]
        choice.check(measured, where=name_some([tree.name for tree in trees]))
    loaded = [_load_part(tree, tables, choice) for tree, tables in zip(trees, found, strict=True)]
    parts = _align(loaded, [names for names in _FACTS if names not in given])
    scans = [scan for part in parts for scan in part.scans]
    keys, apart = _key_table(parts)
    people = _people_table(parts)
    for column, option in ((site_column, "--site-column"), (group_column, "--group-column")):
        if column is not None and column not in people.columns:
            there = ", ".join(people.columns) or "none"
            raise InputError(f"{option} {column}: no such column in participants.tsv (columns: {there}); correct it")
    site, site_from = _find_sites(parts, people, column=site_column)
    group = group_column or find_column(people.columns, _GROUP)
    facts, warnings = _find_facts(parts, keys, people, group=group)
    facts["site"] = site
    column = site_from.removeprefix("column ")
    where = f"participants.tsv: {column}" if column != site_from else f"{site_from}: site"
    spellings = {
        "site": _spelled_twice(site, where),
        "group": _spelled_twice(facts["group"], f"participants.tsv: {group}"),
    }
    several = len(parts) > 1
    lines = [f"{part.tree.name}: {line}" if several else line for part in parts for line in part.warnings]
    settings = {
        "Trees": {part.tree.name: len(part.scans) for part in parts},
        "SiteFrom": site_from,
        "GroupColumn": group,
        "AgeColumn": find_column(people.columns, _AGE),
        "SexColumn": find_column(people.columns, _SEX),
        **({"Chosen": choice.describe()} if choice else {}),
    }
    descriptions = {name: entry for part in reversed(parts) for name, entry in part.people.descriptions.items()}
    pages = tuple(_link(part.tree, scan) for part in parts for scan in part.scans)
    return Cohort(
        tuple(scans),
        pages,
        keys.assign(site=site.fillna(MISSING)),
        people.drop(columns="site") if site_from == "column site" else people,
        descriptions,
        facts,
        apart,
        settings,
        spellings,
        (
            *lines,
            *_same_people(parts),
            *warnings,
            *spellings["site"],
            *spellings["group"],
            *_mixed_references(scans),
            *_mixed_sources(scans),
        ),
        sum(part.n_damaged for part in parts),
    )


def find_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Find the first column that is called one of some names, in large or small letters."""
    there = {str(column).casefold(): str(column) for column in reversed(list(columns))}
    return next((there[name] for name in names if name in there), None)


def _link(tree: Tree, scan: ScanStats) -> str:
    return (PurePosixPath(tree.link) / scan.page).as_posix() if scan.page else MISSING


def _load_part(tree: Tree, tables: Tables, choice: Choice) -> _Part:
    warnings = []
    for (what, remedy), names in _left_out(tables).items():
        if wanted := [name for name in names if choice.keeps(read_entities(name))]:
            whom = " for them" if remedy.startswith(AGAIN) else ""
            warnings.append(f"{name_some(wanted)}: {what} and left out; {remedy}{whom}")
    scans = [scan for scan in tables.scans if choice.keeps(scan.entities)]
    # all that were measured are told of: a number finds the one label of that value among all
    people, more = read_people(tree.people, _visits(tables.scans), chosen=_visits(scans) if choice else None)
    n_damaged = sum(choice.keeps(read_entities(name)) for name in tables.broken)
    return _Part(tree, scans, people, [*warnings, *more], n_damaged)


def _left_out(tables: Tables) -> dict[tuple[str, str], list[str]]:
    """Names of the tables that are not read, by what they are and what to do."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, error in tables.broken.items():
        kinds.setdefault((error.what, error.remedy), []).append(name)
    if tables.unfinished:
        kinds[f"unfinished ({_MARK} is missing)", AGAIN] = [*tables.unfinished]
    return kinds


def _check_any(trees: Sequence[Tree], found: Sequence[Tables]) -> None:
    """Refuse trees of which no table can be read."""
    if any(tables.scans for tables in found):
        return
    for tree, tables in zip(trees, found, strict=True):
        for (what, remedy), names in _left_out(tables).items():
            raise InputError(f"{tree.path.name}: the tables are {what} ({names[0]}); {remedy}")
    where = ", ".join(tree.path.name for tree in trees)
    raise InputError(f"{where}: no *_stats.tsv below; run the participant level first")


def _visits(scans: Iterable[ScanStats]) -> list[tuple[str, str | None]]:
    """Labels of participant and session of each scan."""
    return [(scan.entities["sub"], scan.entities.get("ses")) for scan in scans]


def _align(parts: Sequence[_Part], facts: Iterable[Sequence[str]]) -> list[_Part]:
    """Call each tree's age, sex, group and site as the first tree with one does, and say so."""
    aligned = list(parts)
    for names in facts:
        found = [find_column(part.people.columns, names) for part in parts]
        first = next(filter(None, found), None)
        for place, own in enumerate(found):
            part = aligned[place]
            if own and first and own != first and first not in part.people.columns:
                line = f"participants.tsv: its column {own} is taken for {first}"
                people = part.people.rename({own: first})
                aligned[place] = replace(part, people=people, warnings=[*part.warnings, line])
    return aligned


def _key_table(parts: Sequence[_Part]) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Entities of all scans by column, and the columns that are never pooled over."""
    scans = [scan for part in parts for scan in part.scans]
    entities = [*dict.fromkeys([*_ALWAYS, *(key for scan in scans for key in scan.entities)])]
    prefix = {"sub": "sub-", "ses": "ses-"}  # as in every BIDS table
    columns = {
        ENTITIES.get(key, key): [
            prefix.get(key, "") + scan.entities[key] if key in scan.entities else MISSING for scan in scans
        ]
        for key in entities
    }
    if len(parts) > 1:
        columns["tree"] = [part.tree.name for part in parts for _ in part.scans]
    apart = ("model", *(column for column in _APART if column in columns))
    return pd.DataFrame(columns, dtype=object), apart


def _people_table(parts: Sequence[_Part]) -> pd.DataFrame:
    """Columns of participants.tsv and sessions.tsv, a row a scan."""
    columns = [*dict.fromkeys(column for part in parts for column in part.people.columns)]
    rows = [part.people.of(scan.entities["sub"], scan.entities.get("ses")) for part in parts for scan in part.scans]
    return pd.DataFrame(
        {column: [row.get(column, MISSING) for row in rows] for column in columns}, index=range(len(rows)), dtype=object
    )


def _find_sites(parts: Sequence[_Part], people: pd.DataFrame, *, column: str | None) -> tuple[pd.Series, str]:
    """Site of each scan, and in words where it was found."""
    named = column or find_column(people.columns, _SITE)
    sites: list[str] = []
    for part in parts:
        place = slice(len(sites), len(sites) + len(part.scans))
        if named and (column or named in part.people.columns):
            sites += people[named].iloc[place].tolist()
        elif len(parts) > 1:
            sites += [part.tree.name] * len(part.scans)
        else:
            sites += [scan.scanner or MISSING for scan in part.scans]
    series = pd.Series(sites, index=people.index, dtype=object)
    if named:
        source = f"column {named}"
    elif len(parts) > 1:
        source = "output folder"
    else:
        source = "scanner in the maps' sidecars" if (series != MISSING).any() else "not known"
    return series.where(series != MISSING), source


def _find_facts(
    parts: Sequence[_Part], keys: pd.DataFrame, people: pd.DataFrame, *, group: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Person, age, time, sex and group of each scan."""
    person = keys["participant_id"]
    if "tree" in keys:
        shared = person.isin(_shared_ids(parts))
        person = person.where(~shared, person + " (" + keys["tree"] + ")")
    people = people.assign(participant_id=person)
    age, warnings = _find_ages(parts, people)
    since = _years_since_first(parts, people)
    sex = find_column(people.columns, _SEX)
    facts = {
        "participant_id": person,
        "age": age,
        "years": _choose_times(since, age, person),
        "sex": _text(people, sex).map(lambda text: _SEXES.get(text.casefold(), text), na_action="ignore"),
        "group": _text(people, group),
    }
    return pd.DataFrame(facts), warnings


def _years_since_first(parts: Sequence[_Part], people: pd.DataFrame) -> pd.Series:
    since = [
        part.people.years_since_first(scan.entities["sub"], scan.entities.get("ses"))
        for part in parts
        for scan in part.scans
    ]
    return pd.Series(since, index=people.index, dtype=np.float64)


def _choose_times(since: pd.Series, age: pd.Series, person: pd.Series) -> pd.Series:
    """Choose one axis a person, that which tells more times apart: a difference of the two would be none of time."""
    n_days, n_ages = (times.groupby(person).transform("nunique") for times in (since, age))
    return since.where(n_days >= n_ages, age)


def _find_ages(parts: Sequence[_Part], people: pd.DataFrame) -> tuple[pd.Series, list[str]]:
    """Ages at the scans in years, and a line for all that is doubtful about them."""
    column = find_column(people.columns, _AGE)
    if column is None:
        return pd.Series(np.nan, index=people.index), []
    units: list[str] = []
    warnings = []
    for part in parts:
        for scan in part.scans:
            told, source = part.people.describe(scan.entities["sub"], scan.entities.get("ses"), column)
            unit, line = find_unit(told, column, source=source)
            units.append(unit)
            if line:
                warnings.append(f"{part.tree.name}: {line}" if len(parts) > 1 else line)
    ages, lines = read_ages(people, column, pd.Series(units, index=people.index, dtype=object))
    first = [
        part.people.is_of_first(scan.entities["sub"], scan.entities.get("ses"), column)
        for part in parts
        for scan in part.scans
    ]
    ages += _years_since_first(parts, people).where(np.array(first)).fillna(0)
    return ages, [*dict.fromkeys(warnings), *lines]


def _text(people: pd.DataFrame, column: str | None) -> pd.Series:
    """Values of a column, NaN where missing or where there is no such column."""
    values = people[column] if column else pd.Series(MISSING, index=people.index, dtype=object)
    return values.where(values != MISSING)


def _shared_ids(parts: Sequence[_Part]) -> list[str]:
    counts = Counter(name for part in parts for name in {f"sub-{scan.entities['sub']}" for scan in part.scans})
    return sorted(name for name, count in counts.items() if count > 1)


def _same_people(parts: Sequence[_Part]) -> list[str]:
    """Say that a label in two trees is taken for two persons."""
    shared = _shared_ids(parts)
    return (
        [f"{name_some(shared)}: in several output folders; taken for different persons, told apart by tree"]
        if (shared)
        else []
    )


def _spelled_twice(values: pd.Series, where: str) -> list[str]:
    """Say which values differ in large and small letters only; blanks around them were taken off."""
    spellings: dict[str, set[str]] = {}
    for value in values.dropna().unique():
        spellings.setdefault(str(value).casefold(), set()).add(str(value))
    return [
        f"{where} is spelled {' and '.join(map(repr, sorted(same)))}, which count as different; write it in one way"
        for same in spellings.values()
        if len(same) > 1
    ]


def _mixed_references(scans: Sequence[ScanStats]) -> list[str]:
    """Warn where maps are relative to different regions: their susceptibilities have different zeros."""
    counts = Counter(scan.reference for scan in scans if scan.reference)
    if len(counts) < 2:
        return []
    shown = ", ".join(f"{reference} ({count})" for reference, count in counts.most_common())
    return [f"group_susceptibility.tsv: reference regions differ: {shown}; refer the maps to one before comparing"]


def _mixed_sources(scans: Sequence[ScanStats]) -> list[str]:
    """Warn where some maps were made here of echoes: reconstructions shrink susceptibilities, each in its way."""
    made = sum(scan.quality.get("input_reconstructed_from", "n/a") != "n/a" for scan in scans)
    if made in (0, len(scans)):
        return []
    return [
        f"group_susceptibility.tsv: {made} of {len(scans)} maps were made here of echoes, the others given; "
        "reconstruct all in one way before comparing"
    ]
