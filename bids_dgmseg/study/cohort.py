"""All scans of a study, joined with the participants' ages, groups and sites."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.bids.resume import GONE
from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.models.structures import bilateral_names
from bids_dgmseg.study.ages import describe_age_column, find_ages
from bids_dgmseg.study.demographics import (
    AGE,
    GROUP,
    MISSING_CODES,
    SEX,
    SITE,
    find_column,
    read_categories,
    read_sexes,
)
from bids_dgmseg.study.qc_decisions import Verdicts, apply_decisions, check_scans, read_decisions
from bids_dgmseg.study.results_folders import FolderScans, ResultsFolder, ResultsSelection, read_folders
from bids_dgmseg.study.stats_files import RERUN

ENTITY_COLUMNS = {
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

RECONSTRUCTION_COLUMNS = ("reconstruction", "description")
"""Columns that distinguish reconstructions of the same scan, which are never pooled."""

_FACTS = ("page", "scanner", "outdated")
"""Columns of the scans of a folder that are not entities."""

_PER_SCAN = ("scans", "keys", "qc", "participants", "demographics")
"""Tables of a `Cohort` with one row per scan and model."""

MAX_NAMES = 10
"""Excluded scans named in a warning."""


@dataclass(frozen=True)
class Cohort:
    """The data of a study; the tables have one row per scan and model, in the same order, unless stated otherwise."""

    scans: pd.DataFrame
    """BIDS entities by their keys, text, NaN where a file name lacks one."""
    keys: pd.DataFrame
    """First columns of the group tables, text: entities, ``dataset`` if there are several, ``site``."""
    stats: pd.DataFrame
    """Text, one row per scan and nucleus: ``scan`` (row of the other tables, an integer), columns of `read_stats` and
    ``excluded``: why the scan or this nucleus is left out of all statistics, NaN otherwise."""
    stats_columns: tuple[str, ...]
    """All columns of the ``_stats.tsv``, of which `stats` may have only some."""
    qc: pd.DataFrame
    """Text: ``page``, path of the participant's page from the folder of the tables, ``excluded``: why the scan is left
    out of all statistics (NaN otherwise), and the values of ``_qc.json``."""
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
    """``site``, ``group`` → warnings about values that differ only in a separator; also among `warnings`."""
    warnings: tuple[str, ...]
    decisions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Raters' decisions, see `read_decisions`."""
    n_damaged: int = 0
    """Selected tables that cannot be used; `warnings` name them."""
    n_outdated: int = 0
    """Scans whose results are out of date; `warnings` name them."""

    def analysed(self) -> Cohort:
        """Return the scans that enter statistics, renumbered."""
        chosen = self.qc["excluded"].isna()
        row = (chosen.cumsum() - 1).to_numpy()
        stats = self.stats[chosen.to_numpy()[self.stats["scan"]]]
        tables = {name: getattr(self, name)[chosen].reset_index(drop=True) for name in _PER_SCAN}
        stats = stats.assign(scan=row[stats["scan"]]).reset_index(drop=True)
        return replace(self, stats=stats, **tables)


def load_cohort(
    folders: Sequence[ResultsFolder],
    *,
    selection: ResultsSelection | None = None,
    site_column: str | None = None,
    group_column: str | None = None,
    age_column: str | None = None,
    include_failed: bool = False,
    qc: Sequence[Path] = (),
) -> Cohort:
    """Read the results of all or the selected scans, and join them with what is known about the participants.

    With several folders, each is a site, unless its participants have a column of sites. `site_column`, `group_column`
    and `age_column` name columns of participants.tsv or sessions.tsv; by default they are found by their usual names.
    With `include_failed`, scans and nuclei with a red rating are not excluded. `qc` are files with raters' decisions,
    which precede the ratings.

    Raises
    ------
    InputError
        If a file of decisions is not valid or is about other scans, there are no results or none is selected, a named
        column does not exist, or a table cannot be read or joined.
    """
    names_of = {folder.path: folder.name for folder in folders} if len(folders) > 1 else {}
    decisions, files = read_decisions(qc, names_of), [path.name for path in qc]
    selection = selection or ResultsSelection()
    site_column, group_column, age_column = (
        column and unicodedata.normalize("NFC", column) for column in (site_column, group_column, age_column)
    )
    options = {"site_column": site_column, "group_column": group_column, "age_column": age_column}
    named = [names for names, column in zip((SITE, GROUP, AGE), options.values(), strict=True) if column]
    parts = read_folders(folders, selection, roles=[names for names in (AGE, SEX, GROUP, SITE) if names not in named])
    scans, stats, quality, participants = _concatenate(parts)
    keys = _key_table(parts, scans)
    for option, column in options.items():
        if column is not None and column not in participants.columns:
            shown = ", ".join(participants.columns) or "none"
            raise InputError(
                f"`{option}` {column}: no such column in participants.tsv (columns: {shown}); fix the name"
            )
    group = group_column or find_column(participants.columns, GROUP)
    age = age_column or find_column(participants.columns, AGE)
    demographics, warnings = _find_demographics(parts, keys, participants, group=group, age=age)
    if age_column is None:
        warnings += describe_age_column(participants.columns, age)
    site, site_from, site_warnings = _find_sites(
        parts, scans, participants, column=site_column, who=demographics["participant_id"]
    )
    demographics = demographics.assign(site=site)
    spellings = _spelling_warnings(demographics, site_from=site_from, group=group)
    sex = find_column(participants.columns, SEX)
    descriptions = {name: entry for part in reversed(parts) for name, entry in part.tables.descriptions.items()}
    if sex and (levels := _levels_of_all(parts, sex)[1:])[0]:
        known, differ = levels
        if differ:  # one data dictionary cannot describe them
            participants = participants.assign(**{sex: demographics["sex"].fillna(participants[sex])})
            known = {"F": "female", "M": "male", "O": "other"}
        descriptions[sex] = {**descriptions[sex], "Levels": known}
    cohort = Cohort(
        scans=scans.drop(columns=list(_FACTS)),
        keys=keys.assign(site=site.fillna(MISSING)),
        stats=stats,
        stats_columns=tuple(str(column) for column in stats if column != "scan"),
        qc=pd.concat([scans["page"], quality.drop(columns="excluded", errors="ignore")], axis=1),
        participants=participants.drop(columns="site") if site_from == "column site" else participants,
        descriptions=descriptions,
        demographics=demographics,
        strata=("model", *(column for column in RECONSTRUCTION_COLUMNS if column in keys)),
        settings={
            "Datasets": {part.folder.name: part.results.n_scans for part in parts},
            "SiteFrom": site_from,
            "GroupColumn": group,
            "AgeColumn": age,
            "SexColumn": sex,
            **({"Selected": selection.describe()} if selection else {}),
        },
        spellings=spellings,
        warnings=(
            *(f"{part.folder.name}: {line}" if len(parts) > 1 else line for part in parts for line in part.warnings),
            *warnings,
            *site_warnings,
            *(line for lines in spellings.values() for line in lines),
            *_mixed_map_warnings(quality),
        ),
        n_damaged=sum(part.n_damaged for part in parts),
    )
    if files:
        if not selection:  # decisions on scans that are not selected are not wrong
            check_scans(decisions, _named_scans(cohort), where=list_some(files))
        cohort = replace(cohort, decisions=decisions, settings={**cohort.settings, "QualityControl": files})
    return _exclude(cohort, scans["outdated"], include_failed=include_failed)


def scan_names(cohort: Cohort) -> list[str]:
    """Return the name of each scan, without the model."""
    records = cohort.scans.drop(columns="seg").to_dict("records")
    return [join_entities({str(k): v for k, v in record.items() if isinstance(v, str)}) for record in records]


def _concatenate(parts: Sequence[FolderScans]) -> list[pd.DataFrame]:
    """Return the scans of all folders, their rows of ``_stats.tsv``, their ``_qc.json`` and their participants."""
    first = np.cumsum([0, *(len(part.results.scans) for part in parts[:-1])])  # scans are numbered throughout
    tables = (
        [part.results.scans for part in parts],
        [part.results.stats.assign(scan=part.results.stats["scan"] + n) for part, n in zip(parts, first, strict=True)],
        [part.results.qc for part in parts],
        [part.tables.at_visits(part.results.visits) for part in parts],
    )
    return [pd.concat(table, ignore_index=True) for table in tables]


def _key_table(parts: Sequence[FolderScans], scans: pd.DataFrame) -> pd.DataFrame:
    """Return the entities by column, and the dataset if there are several."""
    entities = dict.fromkeys([*_ALWAYS, *(key for key in scans if key not in _FACTS)])
    keys = scans.reindex(columns=list(entities)).rename(columns=ENTITY_COLUMNS).astype(object)
    keys["participant_id"] = "sub-" + keys["participant_id"]
    keys["session_id"] = "ses-" + keys["session_id"]
    if len(parts) > 1:
        keys["dataset"] = [part.folder.name for part in parts for _ in part.results.visits]
    return keys.where(keys.notna(), MISSING)


def _find_sites(
    parts: Sequence[FolderScans], scans: pd.DataFrame, participants: pd.DataFrame, *, column: str | None, who: pd.Series
) -> tuple[pd.Series, str, list[str]]:
    """Return the site of each scan, NaN if unknown, where it was found, and warnings; `who` are the participants."""
    named = column or find_column(participants.columns, SITE)
    folders = pd.Series([part.folder.name for part in parts for _ in part.results.visits], dtype=object)
    if named:
        has_column = [bool(column) or named in part.tables.columns for part in parts for _ in part.results.visits]
        given = participants[named].where(np.array(has_column) | (len(parts) == 1), folders)
        sites, lines = read_categories(given, who, where=f"{_table_with(parts, named)}: {named}")
        return sites, f"column {named}", lines
    if len(parts) > 1:
        return folders, "output folder", []
    known = scans["scanner"].notna().any()
    return scans["scanner"], "scanner in the maps' sidecars" if known else "not known", []


def _find_demographics(
    parts: Sequence[FolderScans], keys: pd.DataFrame, participants: pd.DataFrame, *, group: str | None, age: str | None
) -> tuple[pd.DataFrame, list[str]]:
    """Return person, age, time, sex and group of each scan; a label in several datasets is one person in each."""
    person = keys["participant_id"]
    warnings = []
    if "dataset" in keys:
        datasets = keys.groupby("participant_id")["dataset"].nunique()
        if shared := sorted(datasets.index[datasets > 1]):
            person = person.where(~person.isin(shared), person + " (" + keys["dataset"] + ")")
            shown = list_some(shared)
            warnings = [f"{shown}: in several datasets; treated as different participants, see column dataset"]
    missing = pd.Series(float("nan"), index=keys.index, dtype=object)
    sexes, groups = missing, missing
    if sex := find_column(participants.columns, SEX):
        sexes, lines = _read_sexes_of_all(parts, participants[sex], person)
        warnings += lines
    if group:  # "none" may be the absence of a diagnosis
        where = f"{_table_with(parts, group)}: {group}"
        groups, lines = read_categories(participants[group], person, where=where, missing=MISSING_CODES)
        warnings += lines
    since_first = pd.concat([part.tables.years_since_first(part.results.visits) for part in parts], ignore_index=True)
    ages, age_warnings = find_ages(parts, participants.assign(participant_id=person), since_first, column=age)
    # one time axis per person, the one with more distinct times: the two must not be subtracted from each other
    n_days, n_ages = (times.groupby(person).transform("nunique") for times in (since_first, ages))
    facts = {
        "participant_id": person,
        "age": ages,
        "years": since_first.where(n_days >= n_ages, ages),
        "sex": sexes,
        "group": groups,
    }
    return pd.DataFrame(facts), [*warnings, *age_warnings]


def _read_sexes_of_all(
    parts: Sequence[FolderScans], values: pd.Series, person: pd.Series
) -> tuple[pd.Series, list[str]]:
    """Read the sexes of all folders; each by its own data dictionary if a code has several meanings."""
    column = str(values.name)
    where = f"{_table_with(parts, column)}: {column}"
    levels, known, differ = _levels_of_all(parts, column)
    if not differ:
        stated = {text for part in parts for text in part.tables.texts(column)}
        return read_sexes(values, person, known, where=where, stated=stated)
    start, sexes, warnings = 0, [], []
    for part, own in zip(parts, levels, strict=True):
        rows = slice(start, start := start + len(part.results.visits))
        found, lines = read_sexes(values.iloc[rows], person.iloc[rows], own, where=f"{part.folder.name}/{where}")
        sexes.append(found)
        warnings += lines
    return pd.concat(sexes), warnings


def _levels_of_all(
    parts: Sequence[FolderScans], column: str
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any], bool]:
    """Return a column's ``Levels`` in each data dictionary and together, and whether a code has several meanings."""
    stated = [part.tables.descriptions.get(column, {}).get("Levels") for part in parts]
    levels: list[Mapping[str, Any]] = [part if isinstance(part, dict) else {} for part in stated]
    known = {code: level for part in levels for code, level in part.items()}
    return levels, known, any(known[code] != level for part in levels for code, level in part.items())


def _table_with(parts: Sequence[FolderScans], column: str) -> str:
    """Return the name of the table that has a column."""
    return "participants.tsv" if any(column in part.tables.participants for part in parts) else "sessions.tsv"


def _spelling_warnings(demographics: pd.DataFrame, *, site_from: str, group: str | None) -> dict[str, list[str]]:
    """Return warnings about sites and groups that only a space, hyphen or underscore distinguishes, as A1 and A-1."""
    column = site_from.removeprefix("column ")
    where = {
        "site": f"{site_from}: site" if column == site_from else f"participants.tsv: {column}",
        "group": f"participants.tsv: {group}",
    }
    separators = r"(?<=[^\W_])[\s_-]+(?=[^\W_])"  # within a name: PD- and PD are different
    warnings: dict[str, list[str]] = {}
    for name, place in where.items():
        values = pd.Series(demographics[name].dropna().unique(), dtype=object).astype(str)
        warnings[name] = [
            f"{place} is spelled {' and '.join(map(repr, sorted(same)))}, which count as different; use one spelling"
            for _, same in values.groupby(values.str.casefold().str.replace(separators, "", regex=True), sort=False)
            if len(same) > 1
        ]
    return warnings


def _exclude(cohort: Cohort, why_outdated: pd.Series, *, include_failed: bool) -> Cohort:
    """State why scans, and why nuclei of other scans, are left out of all statistics, in columns and in warnings.

    Results that are out of date are not those of the current map; a red rating means that a value is not usable. A
    nucleus of an excluded scan has the reason of the scan.
    """
    qc, stats = cohort.qc, cohort.stats
    why, why_row = (_explain_red(table, what) for table, what in ((qc, "scan"), (stats, "nucleus")))
    outdated = why_outdated.notna().to_numpy()
    red, red_row = why.notna().to_numpy() & ~outdated, why_row.notna().to_numpy()
    excluded = why.mask(red & include_failed).mask(outdated, "out of date: " + why_outdated).rename("excluded")
    decisions = cohort.decisions if len(cohort.decisions) else read_decisions([])
    verdicts = apply_decisions(decisions, _named_scans(cohort), stats)
    is_failed = verdicts.failed_scans.notna()
    excluded = excluded.mask(verdicts.passed_scans & ~outdated).mask(is_failed & ~outdated, verdicts.failed_scans)
    red = red & ~(is_failed | verdicts.passed_scans).to_numpy()
    of_scan = excluded.iloc[stats["scan"]].set_axis(stats.index)
    own = why_row.mask(red_row & include_failed).mask(verdicts.passed_rows)
    own = own.mask(verdicts.failed_rows.notna(), verdicts.failed_rows)
    red_row = red_row & ~(verdicts.failed_rows.notna() | verdicts.passed_rows).to_numpy()
    excluded_row = of_scan.where(of_scan.notna(), own)
    left_out = "left out of all statistics (column excluded)"
    warnings = []
    gone = why_outdated.str.startswith(GONE, na=False).to_numpy(bool)
    if (changed := outdated & ~gone).any():
        which = f"results of {changed.sum()} of {len(qc)} scans out of date: {_list_names(cohort, changed)}"
        warnings.append(f"group_qc.tsv: {which}; {left_out}; {RERUN} for them")
    if gone.any():
        which = f"results of {gone.sum()} of {len(qc)} scans whose image was renamed or removed"
        names = _list_names(cohort, gone)
        warnings.append(f"group_qc.tsv: {which}: {names}; {left_out}; delete them, or restore the image")
    if red.any():
        what = "used, as `include_failed` asks" if include_failed else left_out
        names = _list_names(cohort, red)
        warnings.append(f"group_qc.tsv: {red.sum()} of {len(qc)} scans rated red: {names}; {what}; see their pages")
    sided = ~stats["abbreviation"].isin(bilateral_names(stats["abbreviation"].unique())).to_numpy()
    others = ~(red | outdated)[stats["scan"]] & sided
    if (n_rows := int((red_row & others).sum())) and not include_failed:
        warnings.append(
            f"group_stats.tsv: {n_rows} of {others.sum()} nuclei of the other scans rated red; their values count as "
            "missing in all statistics (column excluded)"
        )
    warnings += _describe_decisions(cohort, verdicts, outdated)
    qc = qc.copy()
    qc.insert(1, "excluded", excluded)  # after the page
    return replace(
        cohort,
        stats=stats.assign(excluded=excluded_row),
        qc=qc,
        settings={
            **cohort.settings,
            "ExcludedScans": int(excluded.notna().sum()),
            "ExcludedNuclei": int((excluded_row.notna() & of_scan.isna() & sided).sum()),
            "IncludeFailed": include_failed,
        },
        warnings=(*cohort.warnings, *warnings),
        n_outdated=int(outdated.sum()),
    )


def _named_scans(cohort: Cohort) -> pd.DataFrame:
    """Return ``name`` and ``model`` of each scan and, if there are several, ``dataset``."""
    names = pd.DataFrame({"name": scan_names(cohort), "model": cohort.scans["seg"].to_numpy()}, dtype=object)
    return names.set_axis(cohort.qc.index).assign(**cohort.keys.filter(items=["dataset"]))


def _describe_decisions(cohort: Cohort, verdicts: Verdicts, outdated: NDArray[np.bool_]) -> list[str]:
    """Return one line each about what raters failed, and about red ratings that they overruled."""
    stats, lines = cohort.stats, []
    sided = ~stats["abbreviation"].isin(bilateral_names(stats["abbreviation"].unique())).to_numpy()
    failed = verdicts.failed_scans.notna().to_numpy() & ~outdated
    left_out = "left out of all statistics (column excluded)"
    if failed.any():
        names = _list_names(cohort, failed)
        lines.append(f"group_qc.tsv: {failed.sum()} of {len(failed)} scans failed by raters: {names}; {left_out}")
    rows = verdicts.failed_rows.notna().to_numpy() & sided & ~(failed | outdated)[stats["scan"]]
    if rows.any():
        counts = stats["abbreviation"][rows].value_counts(sort=False)
        shown = list_some([f"{name} ({n})" for name, n in counts.items()], most=MAX_NAMES)
        what = count(int(rows.sum()), "nucleus").replace("nucleuss", "nuclei")
        lines.append(f"group_stats.tsv: {what} of other scans failed by raters: {shown}; {left_out}")
    red_scans = (cohort.qc.get("rating") == "red") & verdicts.passed_scans if "rating" in cohort.qc else failed[:0]
    red_rows = (stats["rating"] == "red") & verdicts.passed_rows & sided if "rating" in stats else failed[:0]
    if n := int(red_scans.sum()) + int(red_rows.sum()):
        lines.append(f"group_qc.tsv: {count(n, 'red rating')} overruled: a rater passed the scan or nucleus")
    return lines


def _list_names(cohort: Cohort, chosen: NDArray[np.bool_]) -> str:
    """Return the first names of scans, with the model unless it is the same for all, and the dataset."""
    scans = cohort.scans[chosen]
    entities = scans.drop(columns="seg") if scans["seg"].nunique() == 1 else scans
    rows = [{str(key): text for key, text in row.items() if not pd.isna(text)} for row in entities.to_dict("records")]
    of = " (" + cohort.keys["dataset"][chosen] + ")" if "dataset" in cohort.keys else [""] * len(rows)
    return list_some([f"{join_entities(row)}{end}" for row, end in zip(rows, of, strict=True)], most=MAX_NAMES)


def _explain_red(table: pd.DataFrame, what: str) -> pd.Series:
    """Return why each scan or nucleus has a red rating, NaN for other ratings."""
    ratings = table.reindex(columns=["rating", "reasons"]).astype(object)
    reasons = ratings["reasons"].where(ratings["reasons"].notna(), MISSING).astype(object)
    return (f"{what} rated red: " + reasons).where(ratings["rating"] == "red")


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
            "others were provided; reconstruct all in the same way before comparing"
        )
    return warnings
