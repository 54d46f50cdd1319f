"""Analyses of a study with clinical variables, and mixed models of change."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.ageing import ALL_GROUPS
from bids_dgmseg.stats.clinical import ClinicalOptions, correlate, mixed_changes
from bids_dgmseg.study.cohort import Cohort
from bids_dgmseg.study.group_comparisons import first_site_only, without_contradictions
from bids_dgmseg.study.participants import read_numbers
from bids_dgmseg.study.study import Study, covariate_name
from bids_dgmseg.study.tabular_files import Analysis, ResultTable, add_constants, empty_table

_PREFIX = "variable "
"""Of the columns of the study's table, which no column of a participant may replace."""


def find_variables(cohort: Cohort, names: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the clinical variables of each scan as numbers, one column per name, and warnings.

    Raises
    ------
    InputError
        If a column does not exist or has no numbers.
    """
    found: dict[str, pd.Series[float]] = {}
    warnings: list[str] = []
    for name in names:
        if name not in cohort.participants:
            shown = ", ".join(cohort.participants.columns) or "none"
            raise InputError(f"`correlate` {name}: no such column in participants.tsv (columns: {shown}); fix the name")
        if name == cohort.settings["AgeColumn"]:
            numbers = cohort.demographics["age"]
        else:
            numbers = read_numbers(cohort.participants[name], cohort.demographics["participant_id"])
        if numbers.notna().sum() == 0:
            raise InputError(f"`correlate` {name}: has no value; name a column of numbers")
        if numbers.nunique() < 2:
            warnings.append(f"`correlate` {name}: constant ({numbers.dropna().iloc[0]:g}); not analysed")
            continue
        found[f"{_PREFIX}{name}"] = numbers
    return pd.DataFrame(found, index=cohort.demographics.index), warnings


def relate_to_variables(study: Study) -> Analysis:
    """Relate the measures to the clinical variables (``group_correlations``, ``group_correlation_values``)."""
    names = ("group_correlations", "group_correlation_values")
    variables = [str(column) for column in study.table if str(column).startswith(_PREFIX)]
    if not variables:
        why = "no clinical variable that varies was named: `correlate`"
        return Analysis(tuple(empty_table(name, study.by, why) for name in names))
    covariates = tuple(name for name in study.covariates if name not in variables)
    unnamed = {"group"} - {*covariates}  # the groups are only in notes
    columns = (*covariates, "group")
    table, lines = without_contradictions(study, columns, where=names[0], tests="the correlations", unnamed=unnamed)
    table, site_lines = first_site_only(table, where=names[0])
    relations, values = [], []
    for measure in study.measures:
        for variable in variables:
            name = variable.removeprefix(_PREFIX)
            own = tuple(covariate for covariate in covariates if covariate != covariate_name(study.cohort, name))
            options = ClinicalOptions(variable=variable, value=measure, by=study.by, covariates=own)
            found, points = correlate(table, options=options)
            found["note"] = found["note"].str.replace(variable, name, regex=False)
            relations.append(add_constants(found, measure=measure, variable=name))
            values.append(add_constants(points, measure=measure, variable=name))
    facts = {"CorrelationCovariates": list(covariates)}
    warnings = (*lines, *site_lines)
    tables = (
        ResultTable(names[0], pd.concat(relations, ignore_index=True), facts=facts, notes=warnings),
        ResultTable(names[1], _own_labels(pd.concat(values, ignore_index=True), study), facts=facts),
    )
    return Analysis(tables, warnings)


def _own_labels(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Replace the names of persons by labels and, with several datasets, their dataset."""
    keys = study.cohort.keys.filter(["participant_id", "dataset"])
    keys = keys.set_index(study.cohort.demographics["participant_id"])
    keys = keys[~keys.index.duplicated()]
    person = rows["participant_id"]
    if "dataset" in keys:
        rows.insert(list(rows.columns).index("participant_id") + 1, "dataset", person.map(keys["dataset"]))
    return rows.assign(participant_id=person.map(keys["participant_id"]))


def model_changes(study: Study) -> Analysis:
    """Estimate changes per year of all scans by mixed models (``group_mixed``)."""
    name, demographics = "group_mixed", study.cohort.demographics
    if not (demographics.groupby("participant_id")["years"].nunique() > 1).any():
        return Analysis((empty_table(name, study.by, "no participant was scanned at two known times"),))
    covariates = [covariate for covariate in study.covariates if covariate != "group"]
    # warnings about groups and sites are those of group_differences.tsv and group_longitudinal.tsv
    columns = (*covariates, "group")
    table, lines = without_contradictions(study, columns, where=name, tests="the mixed models", unnamed=("group",))
    table, _ = first_site_only(table, where=name)
    groups = set(table["group"].dropna())
    parts = []
    for measure in study.measures:
        if "_adjusted" in measure:
            continue
        rows = mixed_changes(
            table,
            value=measure,
            by=study.by,
            covariates=covariates,
            group="group" if len(groups) > 1 else None,
            reference=study.reference,
            pooled=ALL_GROUPS if ALL_GROUPS not in groups else f"{ALL_GROUPS} groups",
        )
        parts.append(add_constants(rows, measure=measure))
    rows = pd.concat(parts, ignore_index=True)
    why = "" if len(rows) else "no participant was scanned at two known times at the first site, with all covariates"
    facts = {"MixedCovariates": covariates}
    return Analysis((ResultTable(name, rows, facts, tuple(lines), why),), tuple(lines))
