"""All scans of a study, joined with the participants' ages, groups and sites."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.tables import MISSING
from bids_dgmseg.study.demographics import AGE, GROUP, SEX, SEXES, SITE, find_age_unit, find_column, read_ages
from bids_dgmseg.study.participants import ParticipantTables, Visit, read_participant_tables
from bids_dgmseg.study.results import RERUN, Results, read_entities, read_results

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

_RECONSTRUCTION = ("reconstruction", "description")
"""Columns that distinguish reconstructions of the same scan."""

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
class Cohort:
    """The data of a study; the tables have one row per scan and model, in the same order, unless stated otherwise."""

    scans: pd.DataFrame
    """BIDS entities by their keys, text, NaN where a file name lacks one."""
    keys: pd.DataFrame
    """First columns of the group tables, text: entities, ``dataset`` if there are several, ``site``."""
    stats: pd.DataFrame
    """Text, one row per scan and nucleus: ``scan`` (row of the other tables) and the columns of ``_stats.tsv``."""
    qc: pd.DataFrame
    """Text: ``page``, path of the participant's page from the folder of the tables, and the values of ``_qc.json``."""
    participants: pd.DataFrame
    """Text: columns of participants.tsv and sessions.tsv, NaN where missing."""
    descriptions: Mapping[str, Mapping[str, Any]]
    """Column of `participants` → entry of a data dictionary."""
    demographics: pd.DataFrame
    """``participant_id``, unique for each person; ``age`` and ``years`` (numbers; ``years`` of one person are all since
    the first session, or all ages); ``sex``, ``group``, ``site`` (text); NaN where missing."""
    strata: tuple[str, ...]
    """Columns of `keys` that are never pooled: ``model`` and those that distinguish reconstructions."""
    settings: Mapping[str, Any]
    """Columns in which site, group and age were found, for the data dictionaries."""
    spellings: Mapping[str, Sequence[str]]
    """``site``, ``group`` → warnings about values that differ only in case; also among `warnings`."""
    warnings: tuple[str, ...]
    n_damaged: int = 0
    """Selected tables that cannot be used; `warnings` name them."""


@dataclass(frozen=True)
class _Part:
    """Selected scans of one folder."""

    folder: ResultsFolder
    results: Results
    tables: ParticipantTables
    warnings: Sequence[str]
    n_damaged: int

    @property
    def visits(self) -> list[Visit]:
        return _visits(self.results)


def load_cohort(
    folders: Sequence[ResultsFolder],
    *,
    selection: ResultsSelection | None = None,
    site_column: str | None = None,
    group_column: str | None = None,
) -> Cohort:
    """Read the results of all or the selected scans, and join them with what is known about the participants.

    Parameters
    ----------
    folders : sequence of ResultsFolder
        With several, each is a site, unless its participants have a column of sites.
    selection : ResultsSelection, optional
        Which scans; by default all.
    site_column, group_column : str, optional
        Columns of participants.tsv or sessions.tsv; by default ``site`` or ``site_id``, and ``group`` or ``diagnosis``.

    Raises
    ------
    InputError
        If there are no results or none is selected, a named column does not exist, or a table cannot be read or joined.
    """
    selection = selection or ResultsSelection()
    found = [read_results(folder.path, link=folder.link) for folder in folders]
    _check_any(folders, found)
    if selection:
        records = [record for results in found for record in results.scans.to_dict("records")]
        selection.check(records, where=list_some([folder.name for folder in folders]))
    named = [names for names, column in ((SITE, site_column), (GROUP, group_column)) if column]
    parts = _align_columns(
        [_load_part(folder, results, selection) for folder, results in zip(folders, found, strict=True)],
        [names for names in (AGE, SEX, GROUP, SITE) if names not in named],
    )
    scans = pd.concat([part.results.scans for part in parts], ignore_index=True)
    first = np.cumsum([0, *(len(part.results.scans) for part in parts[:-1])])
    qc = pd.concat([part.results.qc for part in parts], ignore_index=True)
    keys, strata = _key_table(scans)
    if len(parts) > 1:
        keys["dataset"] = [part.folder.name for part in parts for _ in part.visits]
    participants = pd.concat([part.tables.at_visits(part.visits) for part in parts], ignore_index=True)
    for column, option in ((site_column, "--site-column"), (group_column, "--group-column")):
        if column is not None and column not in participants.columns:
            shown = ", ".join(participants.columns) or "none"
            raise InputError(f"{option} {column}: no such column in participants.tsv (columns: {shown}); fix the name")
    site, site_from = _find_sites(parts, scans, participants, column=site_column)
    group = group_column or find_column(participants.columns, GROUP)
    demographics, warnings = _find_demographics(parts, keys, participants, group=group)
    shared_warnings = []
    if shared := _shared_labels(parts):
        shared_warnings = [
            f"{list_some(shared)}: in several datasets; treated as different participants, see column dataset"
        ]
    column = site_from.removeprefix("column ")
    where = f"participants.tsv: {column}" if column != site_from else f"{site_from}: site"
    spellings = {
        "site": _spelling_warnings(site, where),
        "group": _spelling_warnings(demographics["group"], f"participants.tsv: {group}"),
    }
    return Cohort(
        scans=scans.drop(columns=["page", "scanner"]),
        keys=keys.assign(site=site.fillna(MISSING)),
        stats=pd.concat(
            [
                part.results.stats.assign(scan=part.results.stats["scan"] + n)
                for part, n in zip(parts, first, strict=True)
            ],
            ignore_index=True,
        ),
        qc=pd.concat([scans["page"], qc], axis=1),
        participants=participants.drop(columns="site") if site_from == "column site" else participants,
        descriptions={name: entry for part in reversed(parts) for name, entry in part.tables.descriptions.items()},
        demographics=demographics.assign(site=site),
        strata=strata,
        settings={
            "Datasets": {part.folder.name: len(part.results.scans) for part in parts},
            "SiteFrom": site_from,
            "GroupColumn": group,
            "AgeColumn": find_column(participants.columns, AGE),
            "SexColumn": find_column(participants.columns, SEX),
            **({"Selected": selection.describe()} if selection else {}),
        },
        spellings=spellings,
        warnings=(
            *(f"{part.folder.name}: {line}" if len(parts) > 1 else line for part in parts for line in part.warnings),
            *shared_warnings,
            *warnings,
            *spellings["site"],
            *spellings["group"],
            *_mixed_map_warnings(qc),
        ),
        n_damaged=sum(part.n_damaged for part in parts),
    )


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


def _load_part(folder: ResultsFolder, results: Results, selection: ResultsSelection) -> _Part:
    warnings = []
    for (problem, remedy), names in _left_out(results).items():
        if selected := [name for name in names if selection.includes(read_entities(name))]:
            them = " for them" if remedy.startswith(RERUN) else ""
            warnings.append(f"{list_some(selected)}: {problem} and left out; {remedy}{them}")
    n_damaged = sum(selection.includes(read_entities(name)) for name in results.damaged)
    mask = [selection.includes(record) for record in results.scans.to_dict("records")]
    chosen = _select(results, pd.Series(mask, dtype=bool))
    # labels are matched among all scans with results: an id such as 3 may stand for sub-03 or for sub-3
    tables, more = read_participant_tables(
        folder.dataset, _visits(results), selected=_visits(chosen) if selection else None
    )
    return _Part(folder, chosen, tables, [*warnings, *more], n_damaged)


def _select(results: Results, mask: pd.Series) -> Results:
    """Return the results of some scans, which are numbered anew."""
    new_row = mask.cumsum() - 1
    stats = results.stats[mask.to_numpy()[results.stats["scan"]]] if len(mask) else results.stats
    return replace(
        results,
        scans=results.scans[mask].reset_index(drop=True),
        qc=results.qc[mask].reset_index(drop=True),
        stats=stats.assign(scan=new_row.to_numpy()[stats["scan"]]),
    )


def _left_out(results: Results) -> dict[tuple[str, str], list[str]]:
    """Names of the tables that are not used, by problem and remedy."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, error in results.damaged.items():
        names[error.problem, error.remedy].append(name)
    if results.unfinished:
        names["unfinished (_dseg.json is missing)", RERUN] += results.unfinished
    return names


def _check_any(folders: Sequence[ResultsFolder], found: Sequence[Results]) -> None:
    if any(len(results.scans) for results in found):
        return
    for folder, results in zip(folders, found, strict=True):
        for (problem, remedy), names in _left_out(results).items():
            raise InputError(f"{folder.path.name}: all tables are {problem} ({names[0]}); {remedy}")
    where = ", ".join(folder.path.name for folder in folders)
    raise InputError(f"{where}: no *_stats.tsv found; run the participant level first")


def _visits(results: Results) -> list[Visit]:
    sessions = results.scans.get("ses", pd.Series(index=results.scans.index, dtype=object))
    return [
        (participant, None if pd.isna(session) else session)
        for participant, session in zip(results.scans.get("sub", ()), sessions, strict=True)
    ]


def _align_columns(parts: Sequence[_Part], roles: Iterable[Sequence[str]]) -> list[_Part]:
    """Name each folder's columns of age, sex, group and site as the first folder with one does."""
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


def _key_table(scans: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Entities by column, and the columns that are never pooled."""
    entities = [*dict.fromkeys([*_ALWAYS, *(key for key in scans if key not in ("page", "scanner"))])]
    keys = scans.reindex(columns=entities).rename(columns=ENTITIES).astype(object)
    keys["participant_id"] = "sub-" + keys["participant_id"]
    keys["session_id"] = "ses-" + keys["session_id"]
    keys = keys.where(keys.notna(), MISSING)
    return keys, ("model", *(column for column in _RECONSTRUCTION if column in keys))


def _find_sites(
    parts: Sequence[_Part], scans: pd.DataFrame, participants: pd.DataFrame, *, column: str | None
) -> tuple[pd.Series, str]:
    """Return the site of each scan, NaN if unknown, and where it was found."""
    named = column or find_column(participants.columns, SITE)
    sites: list[Any] = []
    for part in parts:
        rows = slice(len(sites), len(sites) + len(part.results.scans))
        if named and (column or named in part.tables.columns):
            sites += participants[named].iloc[rows].tolist()
        elif len(parts) > 1:
            sites += [part.folder.name] * len(part.results.scans)
        else:
            sites += scans["scanner"].iloc[rows].tolist()
    series = pd.Series(sites, index=participants.index, dtype=object)
    if named:
        return series, f"column {named}"
    if len(parts) > 1:
        return series, "output folder"
    return series, "scanner in the maps' sidecars" if series.notna().any() else "not known"


def _find_demographics(
    parts: Sequence[_Part], keys: pd.DataFrame, participants: pd.DataFrame, *, group: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Person, age, time, sex and group of each scan."""
    person = keys["participant_id"]
    if "dataset" in keys:
        person = person.where(~person.isin(_shared_labels(parts)), person + " (" + keys["dataset"] + ")")
    missing = pd.Series(float("nan"), index=keys.index, dtype=object)
    sex = find_column(participants.columns, SEX)
    sexes = participants[sex] if sex else missing
    since_first = pd.concat([part.tables.years_since_first(part.visits) for part in parts], ignore_index=True)
    ages, warnings = _find_ages(parts, participants.assign(participant_id=person), since_first)
    # one time axis per person, the one with more distinct times: the two must not be subtracted from each other
    n_days, n_ages = (times.groupby(person).transform("nunique") for times in (since_first, ages))
    facts = {
        "participant_id": person,
        "age": ages,
        "years": since_first.where(n_days >= n_ages, ages),
        "sex": sexes.map(lambda text: SEXES.get(text.casefold(), text), na_action="ignore"),
        "group": participants[group] if group else missing,
    }
    return pd.DataFrame(facts), warnings


def _find_ages(
    parts: Sequence[_Part], participants: pd.DataFrame, since_first: pd.Series
) -> tuple[pd.Series, list[str]]:
    """Ages at the scans in years; an age at the first session grows with the time since."""
    column = find_column(participants.columns, AGE)
    if column is None:
        return pd.Series(float("nan"), index=participants.index), []
    units: list[str] = []
    warnings: list[str] = []
    for part in parts:
        own = part.tables.is_session_value(part.visits, column)
        for visit, is_own in zip(part.visits, own, strict=True):
            entry, source = part.tables.dictionary_entry(visit, column, own=is_own)
            unit, warning = find_age_unit(entry, column, source=source)
            units.append(unit)
            if warning:
                warnings.append(f"{part.folder.name}: {warning}" if len(parts) > 1 else warning)
    ages, lines = read_ages(participants, column, pd.Series(units, index=participants.index, dtype=object))
    at_first = [part.tables.is_first_sessions_value(part.visits, column) for part in parts]
    ages += since_first.where(pd.concat(at_first, ignore_index=True)).fillna(0)
    return ages, [*dict.fromkeys(warnings), *lines]


def _shared_labels(parts: Sequence[_Part]) -> list[str]:
    counts = Counter(label for part in parts for label in {f"sub-{participant}" for participant, _ in part.visits})
    return sorted(label for label, count in counts.items() if count > 1)


def _spelling_warnings(values: pd.Series, where: str) -> list[str]:
    """Warn about values that differ only in case."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for value in values.dropna().unique():
        spellings[str(value).casefold()].add(str(value))
    return [
        f"{where} is spelled {' and '.join(map(repr, sorted(same)))}, which count as different; use one spelling"
        for same in spellings.values()
        if len(same) > 1
    ]


def _mixed_map_warnings(qc: pd.DataFrame) -> list[str]:
    """Warn if maps are not comparable: different reference regions, or some reconstructed here and others not."""
    values = qc.reindex(columns=["input_reference", "input_reconstructed_from"])
    values = values.where(values != MISSING)
    warnings = []
    counts = Counter(values["input_reference"].dropna())
    if len(counts) > 1:
        shown = ", ".join(f"{reference} ({count})" for reference, count in counts.most_common())
        warnings.append(
            f"group_susceptibility.tsv: reference regions differ: {shown}; use one reference region before comparing"
        )
    n_here = int(values["input_reconstructed_from"].notna().sum())
    if n_here not in (0, len(qc)):
        warnings.append(
            f"group_susceptibility.tsv: {n_here} of {len(qc)} maps were reconstructed here from multi-echo GRE, the "
            "others were given; reconstruct all in the same way before comparing"
        )
    return warnings
