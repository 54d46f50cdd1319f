"""Tables of what age, group and time do to the measures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.ageing import AgeingOptions, fit_with_bands
from bids_dgmseg.stats.combat import N_SITE, Harmonized, harmonize
from bids_dgmseg.stats.group_tests import GroupOptions, ancova, compare_groups
from bids_dgmseg.stats.longitudinal import change_per_year
from bids_dgmseg.study.reference_labels import COLUMNS, first_places, read_reference
from bids_dgmseg.study.study import Study
from bids_dgmseg.study.writing import GroupTable

_SUBSET = "with_reference"

_SEED = 1
"""Of the bootstrap: the same tables give the same limits."""


def ageing_tables(study: Study) -> list[GroupTable]:
    """Fit curves over age to the measures of the predicted and, where there are any, of the reference labels.

    Returns
    -------
    list of GroupTable
        ``group_ageing``, ``group_ageing_curves``.
    """
    names = ("group_ageing", "group_ageing_curves")
    if study.table["age"].isna().all():
        why = "no ages; add a column age to participants.tsv or sessions.tsv"
        return [_empty(name, study, why) for name in names]
    sources = [("predicted", "all", study.table, tuple(study.measures))]
    if study.options.evaluation:
        sources += _with_reference(study, study.options.evaluation)
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for labels, scans, table, measures in sources:
        for measure in measures:
            options = AgeingOptions(value=measure, by=study.by, n_replicates=study.options.n_bootstrap)
            fitted = fit_with_bands(table, options=options, rng=np.random.default_rng(_SEED))
            for found, rows in zip(fitted, parts, strict=True):
                rows.append(_in_front(found, measure=measure, labels=labels, scans=scans))
    return [GroupTable(name, pd.concat(rows, ignore_index=True)) for name, rows in zip(names, parts, strict=True)]


def _with_reference(study: Study, evaluation: Path) -> list[tuple[str, str, pd.DataFrame, tuple[str, ...]]]:
    """Measures of the reference labels, and those of the models on the same scans and nuclei."""
    reference, warnings = read_reference(evaluation, study.cohort)
    study.warnings += warnings
    measures = tuple(measure for measure in study.options.measures if measure in COLUMNS)
    keys = ["scan", *study.cohort.apart, "participant_id", "age"]
    about = study.table.drop_duplicates("scan")[keys]
    table = reference.merge(about, on="scan").assign(model=lambda rows: rows["reference"])
    # one scan has a row a model: these are found again by the first of them and the nucleus
    first = first_places(study.cohort)[study.table["scan"].to_numpy()]
    shared = table[["scan", "abbreviation"]].drop_duplicates().rename(columns={"scan": "first"})
    predicted = study.table.assign(first=first).merge(shared, on=["first", "abbreviation"])
    return [("reference", _SUBSET, table, measures), ("predicted", _SUBSET, predicted, measures)]


def difference_table(study: Study) -> GroupTable:
    """Compare each group with the reference group, plainly and at equal covariates."""
    name, column = "group_differences", study.cohort.settings["GroupColumn"]
    groups = study.cohort.facts["group"].dropna().unique()
    if column is None:
        return _empty(name, study, "participants.tsv has no column group or diagnosis; name one with --group-column")
    if len(groups) < 2 or study.reference is None:
        return _empty(name, study, f"{column} is {groups[0]} for all" if len(groups) else f"{column} is not known")
    covariates = tuple(covariate for covariate in study.covariates if covariate != column)
    parts = []
    for measure in study.measures:
        options = GroupOptions(reference=study.reference, value=measure, by=study.by, covariates=covariates)
        found = study.attempt(name, partial(_compare, study.table, options))
        if found is not None:
            parts.append(_in_front(found, measure=measure))
    if not parts:
        return _empty(name, study, study.warnings[-1])
    return GroupTable(
        name,
        pd.concat(parts, ignore_index=True),
        facts={"AncovaCovariates": list(covariates)},
        notes=tuple(study.cohort.spellings["group"]),
    )


def _compare(table: pd.DataFrame, options: GroupOptions) -> pd.DataFrame:
    """Both comparisons side by side."""
    keys = [*options.by, "reference", "group"]
    plain = compare_groups(table, options=options)
    if not options.covariates:
        return plain
    adjusted = ancova(table, options=options)
    renamed = {column: f"ancova_{column}" for column in adjusted.columns if column not in keys}
    return plain.merge(adjusted.rename(columns=renamed), on=keys, how="left", validate="1:1")


def change_tables(study: Study) -> list[GroupTable]:
    """Change per year of participants with several sessions, and over them.

    Returns
    -------
    list of GroupTable
        ``group_longitudinal``, ``group_changes``.
    """
    names = ("group_longitudinal", "group_changes")
    times = study.cohort.facts.groupby("participant_id")["years"].nunique()
    if not (times > 1).any():
        several = study.cohort.facts["participant_id"].duplicated().any()
        why = "no times; add age or acq_time to sub-X_sessions.tsv" if several else "nobody has two sessions"
        return [_empty(name, study, f"nobody was scanned at two known times ({why})") for name in names]
    people = study.cohort.keys.filter(["participant_id", "tree"]).set_index(study.cohort.facts["participant_id"])
    people = people[~people.index.duplicated()]
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for measure in study.measures:
        change = study.attempt(
            names[0], partial(change_per_year, study.table, time="years", value=measure, by=study.by)
        )
        if change is None:
            continue
        parts[0].append(_in_front(change.summary, measure=measure))
        several = change.participants[change.participants["n_scans"] + change.participants["n_missing"] > 1]
        parts[1].append(_in_front(several, measure=measure))
    if not parts[0]:
        return [_empty(name, study, study.warnings[-1]) for name in names]
    summary, changes = (pd.concat(rows, ignore_index=True) for rows in parts)
    person = changes["participant_id"]
    if "tree" in people:
        changes.insert(list(changes.columns).index("participant_id") + 1, "tree", person.map(people["tree"]))
    changes["participant_id"] = person.map(people["participant_id"])
    return [GroupTable(names[0], summary), GroupTable(names[1], changes)]


def _in_front(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """Say in the first columns what a table is about."""
    return table.assign(**values)[[*values, *table.columns]]


def _empty(name: str, study: Study, why: str) -> GroupTable:
    return GroupTable(name, pd.DataFrame(columns=["measure", *study.by]), not_computed=why)


_NAMES = ("group_harmonized", "group_site_variance", "group_site_effects")

_LONG = ("scan", "abbreviation", "measure", "raw", "harmonized")

_VARIANCE = (
    "abbreviation",
    "n",
    "site_variance_before",
    "site_variance_after",
    "reduction",
    "p_site_before",
    "p_site_after",
)

_EFFECTS = ("site", "abbreviation", "n", "n_unused", "shift", "scale", "shift_bayes", "scale_bayes", "note")


def harmonized_tables(study: Study) -> list[GroupTable]:
    """Harmonize each measure of each model over the sites, and give the study the harmonized measures.

    Returns
    -------
    list of GroupTable
        ``group_harmonized``, ``group_site_variance`` and ``group_site_effects``; empty, with the reason, where nothing
        can be harmonized.
    """
    front = ("measure", *study.cohort.apart)
    columns = dict(zip(_NAMES, (_LONG, (*front, *_VARIANCE), (*front, *_EFFECTS)), strict=True))
    sites = study.cohort.facts["site"].value_counts().sort_index()
    facts: dict[str, Any] = {"Sites": sites.to_dict(), "ScansWithoutSite": len(study.cohort.scans) - int(sites.sum())}
    if len(sites) < 2:
        why = _too_few(sites, facts["ScansWithoutSite"])
        return [
            GroupTable(name, pd.DataFrame(columns=there), facts=facts, not_computed=why)
            for name, there in columns.items()
        ]
    covariates = _kept(study)
    before = len(study.warnings)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in _NAMES}
    for measure in study.options.measures:
        for key, done, rows in _harmonize_all(study, measure, covariates):
            known = {"measure": measure, **key}
            for name, found in zip(_NAMES, (rows, done.variance, done.sites), strict=True):
                named = found.rename(columns={"nucleus": "abbreviation"})
                parts[name].append(named.assign(**known)[[*columns[name]]])
    notes = tuple(dict.fromkeys(study.warnings[before:]))
    study.warnings[before:] = notes
    why = "" if parts[_NAMES[0]] else "; ".join(note for note in notes if "not computed" in note)
    spellings = study.cohort.spellings
    doubts = [line for factor in ("site", *covariates) for line in spellings.get(factor, ())]
    facts |= {"Method": "ComBat with empirical Bayes", "CovariatesKept": covariates}
    return [
        GroupTable(
            name,
            pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns[name]),
            facts=facts,
            notes=(*doubts, *notes),
            not_computed=why,
        )
        for name, found in parts.items()
    ]


def _too_few(sites: pd.Series, n_without: int) -> str:
    """Say why nothing is harmonized."""
    if not len(sites):
        return "no site is known; name its column: --site-column"
    without = f"; {n_without} {'scan' if n_without == 1 else 'scans'} without one" if n_without else ""
    return f"one site only ({sites.index[0]}){without}"


def _kept(study: Study) -> list[str]:
    """Covariates whose part stays; without the user's own, the group is one."""
    several = study.options.covariates is None and study.cohort.facts["group"].nunique() > 1
    return [*study.covariates, *(["group"] if several and "group" not in study.covariates else [])]


def _harmonize_all(
    study: Study, measure: str, covariates: Sequence[str]
) -> list[tuple[dict[str, Any], Harmonized, pd.DataFrame]]:
    """Harmonize one measure of each model; the study's table gets the harmonized column."""
    column = np.full(len(study.table), np.nan)
    results = []
    for key, rows in study.apart():
        part = study.name_part(key)
        work = partial(_harmonize, study, rows, measure, covariates, part=part)
        done = study.attempt(_NAMES[0], work, part=part)
        if done is None:
            continue
        place = (done.values.index.get_indexer(rows["scan"]), done.values.columns.get_indexer(rows["abbreviation"]))
        harmonized = done.values.to_numpy()[place]
        column[rows.index.to_numpy()] = harmonized
        both = rows[["scan", "abbreviation"]].assign(measure=measure, raw=rows[measure], harmonized=harmonized)
        results.append((key, done, both))
    if results:
        study.table[f"{measure}_harmonized"] = column
        study.measures.append(f"{measure}_harmonized")
    return results


def _harmonize(study: Study, rows: pd.DataFrame, measure: str, covariates: Sequence[str], *, part: str) -> Harmonized:
    """Lay one model's values out and harmonize the sites that have enough scans."""
    wide = rows.pivot(index="scan", columns="abbreviation", values=measure)[rows["abbreviation"].unique()]
    about = rows.drop_duplicates("scan").set_index("scan").loc[wide.index]
    kept = about[[name for name in covariates if about[name].nunique() > 1]]
    usable = kept.notna().all(axis=1) & about["site"].notna()
    counts = about["site"][usable].value_counts()
    few = [site for site in about["site"].dropna().unique() if counts.get(site, 0) < N_SITE]
    where = f"{_NAMES[0]}.tsv: {part}: " if part else f"{_NAMES[0]}.tsv: "
    study.warnings += [
        f"{where}site {site} has too few usable scans ({counts.get(site, 0)}, harmonizing needs {N_SITE}); "
        "its values are not harmonized"
        for site in sorted(few, key=str)
    ]
    if n_lost := int((~usable).sum()):
        lacking = " or ".join(["site", *kept.columns])
        study.warnings.append(f"{where}{n_lost} scans lack {lacking}; their values are not harmonized")
    if (counts >= N_SITE).sum() < 2:
        raise InputError(f"fewer than two sites have {N_SITE} usable scans")
    return harmonize(wide, site=about["site"].where(~about["site"].isin(few)), covariates=kept)
