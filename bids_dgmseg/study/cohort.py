"""All scans of a study, joined with the participants' ages, groups and sites."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.entities import join_entities
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.models.structures import names_of_pairs
from bids_dgmseg.study.participants import AGE, GROUP, SEX, SEX_LEVELS, SITE, find_column
from bids_dgmseg.study.results import RERUN, SCAN_FACTS, FolderResults, ResultsFolder, ResultsSelection, read_folders
from bids_dgmseg.study.review_decisions import WHOLE_SCAN, explain_decisions, match_decisions, read_decisions

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

_ROLES = {"age": AGE, "sex": SEX, "group": GROUP}
"""Property of a participant → usual names of its column."""

_PER_SCAN = ("scans", "keys", "qc", "participants", "demographics")
"""Tables of a `Cohort` with one row per scan and model."""

_OUTDATED, _FAILED, _RED = "out of date", "failed", "rated red"
"""Beginnings of the reasons for leaving out a value; before the last one is the name of what is red."""

VOXEL_RATIO = 1.5
"""Larger ratios of the edges of voxels between scans are reported."""

_SIZE = r"[\d.]+ x [\d.]+ x [\d.]+"

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
    qc: pd.DataFrame
    """Text: ``page``, path of the participant's page from the folder of the group page, ``excluded``: why the scan is
    left out of all statistics (NaN otherwise), and the values of ``_qc.json``."""
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
    warnings: tuple[str, ...]
    decisions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Raters' decisions, see `match_decisions`."""
    n_damaged: int = 0
    """Selected tables that cannot be used; `warnings` name them."""
    n_outdated: int = 0
    """Scans whose results are out of date; `warnings` name them."""

    @property
    def names(self) -> pd.Series:
        """Name of each scan, as its files start, without the model."""
        records = self.scans.drop(columns="seg").to_dict("records")
        names = [join_entities({str(k): v for k, v in record.items() if isinstance(v, str)}) for record in records]
        return pd.Series(names, index=self.scans.index, dtype=object)

    def analysed(self) -> Cohort:
        """Return the scans that enter statistics, renumbered."""
        is_used = self.qc["excluded"].isna()
        row = (is_used.cumsum() - 1).to_numpy()
        stats = self.stats[is_used.to_numpy()[self.stats["scan"]]]
        tables = {name: getattr(self, name)[is_used].reset_index(drop=True) for name in _PER_SCAN}
        stats = stats.assign(scan=row[stats["scan"]]).reset_index(drop=True)
        return replace(self, stats=stats, **tables)


def include_excluded(cohort: Cohort) -> Cohort:
    """Return the cohort with all scans and nuclei in the statistics but those whose results are out of date."""
    scans, nuclei = (
        table.assign(excluded=table["excluded"].where(table["excluded"].str.startswith(_OUTDATED, na=False)))
        for table in (cohort.qc, cohort.stats)
    )
    return replace(cohort, qc=scans, stats=nuclei)


def load_cohort(
    folders: Sequence[ResultsFolder], options: GroupOptions | None = None, selection: ResultsSelection | None = None
) -> Cohort:
    """Read the results of all or the selected scans, and join them with what is known about the participants.

    With several folders, each is a site, unless its participants have a column of sites. Of the options,
    `site_column` and `group_column` name columns of participants.tsv or sessions.tsv; by default they are found by
    their usual names. With `include_failed`, scans and nuclei with a red rating are not excluded. `qc` are files with
    raters' decisions, which precede the ratings.

    Raises
    ------
    InputError
        If a file of decisions is not valid or is about other scans, there are no results or none is selected, a named
        column does not exist, or a table cannot be read or joined.
    """
    selection, options = selection or ResultsSelection(), options or GroupOptions()
    columns = {"site_column": options.site_column, "group_column": options.group_column}
    defaults = [names for names, column in zip((SITE, GROUP), columns.values(), strict=True) if not column]
    parts = read_folders(folders, selection, roles=[SEX, AGE, *defaults])
    scans, stats, quality, participants = _concatenate(parts)
    for option, column in columns.items():
        if column is not None and column not in participants.columns:
            shown = ", ".join(participants.columns) or "none"
            raise InputError(
                f"`{option}` {column}: no such column in participants.tsv (columns: {shown}); check the name"
            )
    keys = _key_table(parts, scans)
    names = {name: find_column(participants.columns, usual) for name, usual in _ROLES.items()}
    names["group"] = options.group_column or names["group"]
    demographics, warnings = _find_demographics(parts, keys, participants, names)
    sites, site_from = _find_sites(parts, scans, participants, column=options.site_column)
    descriptions = {name: entry for part in reversed(parts) for name, entry in part.tables.descriptions.items()}
    if sex := names["sex"]:  # one data dictionary describes the codes of all datasets
        participants = participants.assign(**{sex: demographics["sex"]})
        descriptions[sex] = {**descriptions.get(sex, {}), "Levels": SEX_LEVELS}
    cohort = Cohort(
        scans=scans.drop(columns=list(SCAN_FACTS)),
        keys=keys.assign(site=sites.fillna(MISSING)),
        stats=stats,
        qc=pd.concat([scans["page"], quality.drop(columns="excluded", errors="ignore")], axis=1),
        participants=participants.drop(columns="site") if site_from == "column site" else participants,
        descriptions=descriptions,
        demographics=demographics.assign(site=sites),
        strata=("model", *(column for column in RECONSTRUCTION_COLUMNS if column in keys)),
        settings={
            "Datasets": {part.folder.name: part.n_scans for part in parts},
            "SiteFrom": site_from,
            "GroupColumn": names["group"],
            "AgeColumn": names["age"],
            "SexColumn": sex,
            **({"Selected": selection.describe()} if selection else {}),
            **({"QualityControl": [path.name for path in options.qc]} if options.qc else {}),
        },
        warnings=(
            *(f"{part.folder.name}: {line}" if len(parts) > 1 else line for part in parts for line in part.warnings),
            *warnings,
            *_mixed_map_warnings(quality),
        ),
        n_damaged=sum(len(part.damaged) for part in parts),
    )
    by_name = {folder.path: folder.name for folder in folders} if len(folders) > 1 else {}
    labelled = scans[["seg", "labels"]].rename(columns={"seg": "model"})
    labelled = labelled.assign(name=cohort.names, **keys.filter(["dataset"]))
    decisions, lines = match_decisions(read_decisions(options.qc, by_name), labelled, is_selection=bool(selection))
    lines = [*_find_copies(cohort, scans["images"]), *_mixed_origins(cohort, scans["origin"]), *lines]
    cohort = replace(cohort, decisions=decisions, warnings=(*cohort.warnings, *lines))
    return _exclude(cohort, scans["outdated"], include_failed=options.include_failed)


def _concatenate(parts: Sequence[FolderResults]) -> list[pd.DataFrame]:
    """Return the scans of all folders, their rows of ``_stats.tsv``, their ``_qc.json`` and their participants."""
    first = np.cumsum([0, *(len(part.scans) for part in parts[:-1])])  # scans are numbered throughout
    tables = (
        [part.scans for part in parts],
        [part.stats.assign(scan=part.stats["scan"] + n) for part, n in zip(parts, first, strict=True)],
        [part.qc for part in parts],
        [part.tables.at_visits(part.visits) for part in parts],
    )
    return [pd.concat(table, ignore_index=True) for table in tables]


def _key_table(parts: Sequence[FolderResults], scans: pd.DataFrame) -> pd.DataFrame:
    """Return the entities by column, and the dataset if there are several."""
    entities = dict.fromkeys([*_ALWAYS, *(key for key in scans if key not in SCAN_FACTS)])
    keys = scans.reindex(columns=list(entities)).rename(columns=ENTITY_COLUMNS).astype(object)
    keys["participant_id"] = "sub-" + keys["participant_id"]
    keys["session_id"] = "ses-" + keys["session_id"]
    if len(parts) > 1:
        keys["dataset"] = [part.folder.name for part in parts for _ in part.visits]
    return keys.where(keys.notna(), MISSING)


def _find_sites(
    parts: Sequence[FolderResults], scans: pd.DataFrame, participants: pd.DataFrame, *, column: str | None
) -> tuple[pd.Series, str]:
    """Return the site of each scan, NaN if unknown, and where it was found."""
    column = column or find_column(participants.columns, SITE)
    folders = pd.Series([part.folder.name for part in parts for _ in part.visits], dtype=object)
    if column:
        has_column = [column in part.tables.columns for part in parts for _ in part.visits]
        return participants[column].where(np.array(has_column) | (len(parts) == 1), folders), f"column {column}"
    if len(parts) > 1:
        return folders, "output folder"
    return scans["scanner"], "scanner in the maps' sidecars" if scans["scanner"].notna().any() else "not known"


def _unify_case(groups: pd.Series) -> pd.Series:
    """Replace names that differ in case only by the most frequent of them.

    >>> _unify_case(pd.Series(["hc", "HC", "HC", "PD"])).tolist()
    ['HC', 'HC', 'HC', 'PD']
    """
    names = {name.casefold(): name for name in reversed(groups.value_counts().index)}
    return groups.map(lambda name: names[name.casefold()], na_action="ignore")


def _find_demographics(
    parts: Sequence[FolderResults], keys: pd.DataFrame, participants: pd.DataFrame, names: Mapping[str, str | None]
) -> tuple[pd.DataFrame, list[str]]:
    """Return person, age, time, sex and group of each scan, from the columns with these names.

    A label in several datasets is one person in each.
    """
    age, sex, group = (names[name] for name in _ROLES)
    person = keys["participant_id"]
    warnings = []
    if "dataset" in keys:
        datasets = keys.groupby("participant_id")["dataset"].nunique()
        if shared := sorted(datasets.index[datasets > 1]):
            person = person.where(~person.isin(shared), person + " (" + keys["dataset"] + ")")
            warnings += [f"{list_some(shared)}: in several datasets; treated as different participants"]
    if age is None and len(participants.columns):
        warnings.append(
            f"participants.tsv: no column age (columns: {', '.join(participants.columns)}); age curves and the "
            "adjustment for age are omitted; rename the column with the ages"
        )
    ages, sexes, since_first = [], [], []
    for part in parts:
        columns = part.tables.columns
        part_ages, lines = part.tables.ages(part.visits, age if age in columns else None)
        missing = pd.Series(float("nan"), index=range(len(part.visits)), dtype=object)
        ages.append(part_ages)
        sexes.append(part.tables.sexes(part.visits, sex) if sex and sex in columns else missing)
        since_first.append(part.tables.years_since_first(part.visits))
        warnings += [f"{part.folder.name}: {line}" if len(parts) > 1 else line for line in lines]
    since = pd.concat(since_first, ignore_index=True)
    all_ages = pd.concat(ages, ignore_index=True)
    # one time axis per person, the one with more distinct times: the two must not be subtracted from each other
    n_days, n_ages = (times.groupby(person).transform("nunique") for times in (since, all_ages))
    facts = {
        "participant_id": person,
        "age": all_ages,
        "years": since.where(n_days >= n_ages, all_ages),
        "sex": pd.concat(sexes, ignore_index=True),
        "group": _unify_case(participants[group]) if group else pd.Series(float("nan"), index=keys.index, dtype=object),
    }
    return pd.DataFrame(facts), warnings


def _exclude(cohort: Cohort, why_outdated: pd.Series, *, include_failed: bool) -> Cohort:
    """State why scans, and why nuclei of other scans, are left out of all statistics, in columns and in warnings.

    The first rule that applies decides: results that are out of date; raters, who fail or pass; a red rating. Both
    sides of a nucleus are left out if one is.
    """
    qc, stats = cohort.qc, cohort.stats
    verdicts = explain_decisions(cohort.decisions)

    def by_raters(scans: Iterable[Any], nuclei: Iterable[Any], index: pd.Index) -> pd.Series:
        return pd.Series([verdicts.get(key, np.nan) for key in zip(scans, nuclei, strict=True)], index, dtype=object)

    scan_rules = [
        (f"{_OUTDATED}: " + why_outdated.astype(object)).where(why_outdated.notna()),
        by_raters(range(len(qc)), [WHOLE_SCAN] * len(qc), qc.index),
        *([] if include_failed else [_explain_red(qc, "scan")]),
    ]
    excluded = _first_reason(scan_rules)
    of_scan = excluded.iloc[stats["scan"]].set_axis(stats.index)
    rules = [by_raters(stats["scan"], stats["abbreviation"], stats.index)]
    rules += [] if include_failed else [_explain_red(stats, "nucleus")]
    of_nucleus = _join_sides(stats, _first_reason(rules))
    is_single = ~stats["abbreviation"].isin(names_of_pairs(stats["abbreviation"].unique()))
    others = of_nucleus[is_single & of_scan.isna()]
    warnings = []
    for reason, remedy in ((_OUTDATED, f"; {RERUN} for them"), (_FAILED, ""), (_RED, "; see their pages")):
        left_out = "left out of all statistics (column excluded)"
        if (mask := excluded.str.match(f"(scan )?{reason}", na=False).to_numpy(bool)).any():
            names = list_some(_full_names(cohort)[mask], most=MAX_NAMES)
            warnings.append(f"group_qc.tsv: {mask.sum()} of {len(qc)} scans {reason}: {names}; {left_out}{remedy}")
        if n := int(others.str.match(f"(nucleus )?{reason}", na=False).sum()):
            warnings.append(f"group_stats.tsv: {n} of {len(others)} nuclei of the other scans {reason}; {left_out}")
    quality = qc.copy()
    quality.insert(1, "excluded", excluded)  # after the page
    return replace(
        cohort,
        stats=stats.assign(excluded=of_scan.where(of_scan.notna(), of_nucleus)),
        qc=quality,
        settings={
            **cohort.settings,
            "ExcludedScans": int(excluded.notna().sum()),
            "ExcludedNuclei": int(others.notna().sum()),
            "IncludeFailed": include_failed,
        },
        warnings=(*cohort.warnings, *warnings),
        n_outdated=int(why_outdated.notna().sum()),
    )


def _first_reason(rules: Sequence[pd.Series]) -> pd.Series:
    """Return the first reason of each row, NaN if there is none; empty text ends the search."""
    reason = rules[0]
    for rule in rules[1:]:
        reason = reason.where(reason.notna(), rule)
    return reason.where(reason != "").astype(object)


def _explain_red(table: pd.DataFrame, what: str) -> pd.Series:
    """Return why each scan or nucleus has a red rating, NaN for other ratings."""
    ratings = table.reindex(columns=["rating", "reasons"]).astype(object)
    reasons = ratings["reasons"].where(ratings["reasons"].notna(), MISSING).astype(object)
    return (f"{what} {_RED}: " + reasons).where(ratings["rating"] == "red")


def _join_sides(stats: pd.DataFrame, reasons: pd.Series) -> pd.Series:
    """Return the reasons with those of both sides together, which are left out with either side."""
    single = dict(zip(zip(stats["scan"], stats["abbreviation"], strict=True), reasons, strict=True))
    joined = [
        single[scan, f"{name}_R" if pd.isna(single[scan, f"{name}_L"]) else f"{name}_L"]
        if (scan, f"{name}_L") in single and (scan, f"{name}_R") in single
        else reason
        for (scan, name), reason in single.items()
    ]
    return pd.Series(joined, reasons.index, dtype=object)


def _full_names(cohort: Cohort) -> pd.Series:
    """Return the names of scans, with the model unless it is the same for all, and the dataset."""
    names = cohort.names
    if cohort.scans["seg"].nunique() > 1:
        names = names + "_seg-" + cohort.scans["seg"]
    return names + " (" + cohort.keys["dataset"] + ")" if "dataset" in cohort.keys else names


def _find_copies(cohort: Cohort, images: pd.Series) -> list[str]:
    """Warn of the same image under several names, by the checksums of the images of each scan.

    Raises
    ------
    InputError
        If all images of a dataset are also those of another one.
    """
    images = (images + cohort.scans["seg"]).dropna()
    if "dataset" in cohort.keys:
        by_dataset = images.groupby(cohort.keys["dataset"]).agg(set).to_dict()
        for (copy, part), (other, whole) in permutations(by_dataset.items(), 2):
            if part <= whole:
                raise InputError(f"`merge`: {copy} duplicates {other} ({len(part)} image(s)); merge only one")
    copies = [" = ".join(names) for _, names in _full_names(cohort)[images.index].groupby(images) if len(names) > 1]
    line = f"group_stats.tsv: the same image under several names: {list_some(copies)}; remove the wrong ones"
    return [line] if copies else []


def _mixed_origins(cohort: Cohort, origins: pd.Series) -> list[str]:
    """Warn, in one line, of results of a model that were made by different versions, weights or options."""
    parts, names = [], cohort.names
    for _, part in origins.dropna().groupby(cohort.scans["seg"]):
        table = pd.DataFrame(part.tolist(), part.index).fillna("not set")
        for what in (str(column) for column in table if table[column].nunique() > 1):
            first, *others = table[what].value_counts().items()
            shown = [f"{value} ({n}: {list_some(names[part.index[table[what] == value]])})" for value, n in others]
            parts.append(f"{what} {first[0]} ({first[1]} scan(s)), {', '.join(shown)}")
    return (
        [f"group_stats.tsv: results were made with different versions or settings: {'; '.join(parts)}; {RERUN} for all"]
        if parts
        else []
    )


def _mixed_map_warnings(qc: pd.DataFrame) -> list[str]:
    """Warn if reference regions or voxel sizes differ, or some maps were reconstructed here and others not."""
    values = qc.reindex(columns=["input_reference", "input_reconstructed_from"])
    values = values.where(values != MISSING)
    warnings = []
    counts = Counter(values["input_reference"].dropna())
    if len(counts) > 1:
        shown = ", ".join(f"{reference} ({count})" for reference, count in counts.most_common())
        warnings.append(
            f"group_susceptibility.tsv: reference regions differ: {shown}; use one reference region before comparing"
        )
    sizes = qc.reindex(columns=["input_voxel_size_mm"])["input_voxel_size_mm"].dropna()
    edges_mm = np.array([sorted(map(float, size.split(" x "))) for size in sizes if re.fullmatch(_SIZE, size)])
    if len(edges_mm) and (edges_mm.max(axis=0) > VOXEL_RATIO * edges_mm.min(axis=0)).any():
        shown = ", ".join(f"{size} mm ({count})" for size, count in sizes.value_counts().head(5).items())
        warnings.append(
            f"group_stats.tsv: voxel sizes differ by more than a factor of {VOXEL_RATIO}: {shown}; partial volume "
            "changes volumes and susceptibilities; compare within a protocol"
        )
    n_here = int(values["input_reconstructed_from"].notna().sum())
    if n_here not in (0, len(qc)):
        warnings.append(
            f"group_susceptibility.tsv: {n_here} of {len(qc)} maps were reconstructed here from multi-echo GRE, the "
            "others were provided; reconstruct all in the same way before comparing"
        )
    return warnings
