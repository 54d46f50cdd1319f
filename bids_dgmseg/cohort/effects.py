"""Tables of what age, group and time do to the measures."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.cohort.ageing import AgeingOptions, fit_with_bands
from bids_dgmseg.cohort.compare import GroupOptions, ancova, compare_groups
from bids_dgmseg.cohort.evaluation import COLUMNS, first_places, read_reference
from bids_dgmseg.cohort.longitudinal import change_per_year
from bids_dgmseg.cohort.study import Study
from bids_dgmseg.cohort.writing import GroupTable

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
    return GroupTable(name, pd.concat(parts, ignore_index=True), facts={"AncovaCovariates": list(covariates)},
                      notes=tuple(study.cohort.spellings["group"]))  # fmt: skip


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
