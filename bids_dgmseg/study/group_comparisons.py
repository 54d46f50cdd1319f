"""Analyses of a study that compare participants: groups, change over time, relations with clinical variables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import levene

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.stats.agreement import adjust_p_values
from bids_dgmseg.stats.group_tests import MIN_GROUP, compare_changes, compare_groups
from bids_dgmseg.stats.regression import correlate
from bids_dgmseg.study.cohort import Cohort
from bids_dgmseg.study.participants import read_numbers
from bids_dgmseg.study.study import (
    Analysis,
    ResultTable,
    Study,
    add_constants,
    covariate_name,
    empty_table,
    is_one_sided,
    not_computed_line,
)

_UNEQUAL = 0.05
"""False discovery rate below which the spread of residuals is unequal."""

_PREFIX = "variable "
"""Start of the names of variables in the study's table, where no column of a participant may replace others."""


def compare_with_reference_group(study: Study) -> Analysis:
    """Compare each group with the reference group by analysis of covariance.

    The tables are ``group_differences``, and ``group_difference_values`` with the values that it compares. A
    participant whose group differs between sessions is left out; for participants scanned at several sites, only scans
    at the first site are used.
    """
    names, column = ("group_differences", "group_difference_values"), study.cohort.settings["GroupColumn"]
    name = names[0]
    groups = study.table["group"].dropna().unique()
    if column is None:
        why = "participants.tsv has no column group or diagnosis; name one with `group_column`"
        return _not_computed(names, study, why)
    if len(groups) < 2 or study.reference is None:
        why = f"{column} is {groups[0]} for all" if len(groups) else f"{column} is not known"
        return _not_computed(names, study, why)
    covariates = tuple(covariate for covariate in study.covariates if covariate != "group")
    table, lines = without_contradictions(study, ("group", *covariates), where=name)
    table, site_lines = first_site_only(table, where=name)
    compared, values = list[pd.DataFrame](), list[pd.DataFrame]()
    try:
        for measure in study.measures:
            fits = compare_groups(table, reference=study.reference, value=measure, by=study.by, covariates=covariates)
            for fitted, parts in zip(fits, (compared, values), strict=True):
                parts.append(add_constants(fitted, measure=measure))
    except InputError as error:
        return _not_computed(names, study, str(error), (*lines, not_computed_line(name, error)))
    rows = add_false_discovery_rates(pd.concat(compared, ignore_index=True))
    points = pd.concat(values, ignore_index=True)
    participants = table.groupby("participant_id", observed=True)[["site", "group"]].first()  # that are known
    warnings = [*lines, *site_lines]
    sizes = participants["site"].value_counts()
    if "site" in covariates and (alone := sizes.index[sizes == 1].tolist()):
        warnings.append(f"{name}.tsv: site {list_some(alone)} has one participant, who is left out of comparisons")
    for note, untested in rows.groupby("note", sort=False):
        if str(note).startswith("group and "):
            shown = "" if len(untested) == len(rows) else f" ({len(untested)} of {len(rows)} rows)"
            warnings.append(f"{name}.tsv: {note}{shown}")
    if rows["p"].isna().all():
        return _not_computed(names, study, "; ".join(rows["note"].unique()[:3]), warnings)
    checks = check_residuals(points.assign(site=points["participant_id"].astype(object).map(participants["site"])))
    facts = {
        "Covariates": list(covariates),
        "NumberOfTests": int(rows["p"].notna().sum()),
        "ParticipantsBySite": {
            site: part["group"].value_counts().to_dict() for site, part in participants.groupby("site")
        },
        "Residuals": list(checks),
    }
    warnings += [f"{name}.tsv: {line}" for line, is_unequal in checks.items() if is_unequal]
    tables = (
        ResultTable(names[0], rows, facts=facts, notes=tuple(warnings)),
        ResultTable(names[1], with_labels(points, study), facts=facts),
    )
    return Analysis(tables, tuple(warnings))


def _not_computed(names: Sequence[str], study: Study, why: str, warnings: Sequence[str] = ()) -> Analysis:
    """Return empty tables with the reason."""
    return Analysis(tuple(empty_table(name, study.by, why) for name in names), tuple(warnings))


def check_residuals(values: pd.DataFrame) -> dict[str, bool]:
    """Compare the spread of residuals between groups and between sites (Brown-Forsythe), one line per measure.

    The value says whether it differs in a nucleus (false discovery rate over the nuclei below 0.05).
    """
    lines = {}
    for measure, rows in values.astype({"residual": float}).groupby("measure", sort=False):
        texts, unequal = [], list[str]()
        for factor in ("group", "site"):
            records = []
            for nucleus, part in rows.groupby("abbreviation", sort=False, observed=True):
                samples = [sample for _, sample in part.groupby(factor)["residual"] if len(sample) >= MIN_GROUP]
                if len(samples) > 1:
                    spreads = [sample.std() for sample in samples]
                    records.append((str(nucleus), levene(*samples).pvalue, max(spreads) / min(spreads)))
            if records:
                names, p, ratios = map(np.array, zip(*records, strict=True))
                rates = adjust_p_values(p, method="fdr")
                texts.append(f"{factor}s (SD up to {ratios.max():.1f} times, smallest q {rates.min():.2g})")
                unequal += [f"{factor}s in {list_some(names[rates < _UNEQUAL])}"] if (rates < _UNEQUAL).any() else []
        if texts:
            line = f"{measure}: spread of the residuals between {' and '.join(texts)}"
            differs = f": differs between {' and '.join(unequal)}; p and CI allow for it, g uses a mean spread"
            lines[line + (differs if unequal else ": alike")] = bool(unequal)
    return lines


def compare_samples(study: Study, differences: Analysis, everybody: Study) -> Analysis:
    """Compare the differences of a study with those of everybody, also the excluded (``group_sensitivity``)."""
    name, keys = "group_sensitivity", ["measure", *study.by, "reference", "group"]
    shown = ["n_reference", "n_group", "difference", "difference_low", "difference_high", "p"]
    used, all_values = (analysis.tables[0] for analysis in (differences, compare_with_reference_group(everybody)))
    if used.rows.empty or all_values.rows.empty:
        return _not_computed([name], study, f"no differences with and without excluded values: {used.not_computed}")
    others = all_values.rows[[*keys, *shown]].rename(columns={column: f"all_{column}" for column in shown})
    rows = used.rows[[*keys, *shown]].merge(others, on=keys)
    return Analysis((ResultTable(name, rows, facts={"Covariates": used.facts["Covariates"]}),))


def without_contradictions(
    study: Study, columns: Sequence[str], *, where: str, tests: str = "comparisons of groups"
) -> tuple[pd.DataFrame, list[str]]:
    """Return the table without the values of participants who have several of a category, and a warning per column.

    `tests` is what the participants are left out of, for the warnings.
    """
    table, lines = study.table.copy(), []
    for column in columns:
        if column == "site" or pd.api.types.is_numeric_dtype(table[column]):
            continue
        several = table.groupby("participant_id")[column].nunique()
        if names := list(several.index[several > 1]):
            table.loc[table["participant_id"].isin(names), column] = None
            shown = study.cohort.settings[f"{column.capitalize()}Column"] if column in ("group", "sex") else column
            lines.append(
                f"{where}.tsv: {shown} of {list_some(names)} differs between sessions; {len(names)} of {len(several)} "
                f"participant(s) left out of {tests}"
            )
    return table, lines


def first_site_only(table: pd.DataFrame, *, where: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the scans at each participant's first site, and a warning if there are others."""
    first = table.sort_values("years", kind="stable").groupby("participant_id")["site"].first()
    moved = table["site"].notna() & (table["site"] != table["participant_id"].astype(object).map(first))
    if not moved.any():
        return table, []
    names = table["participant_id"][moved].unique()
    line = f"{where}.tsv: scanned at several sites: {list_some(names)}; only the scans at the first site are used"
    return table[~moved], [line]


def estimate_changes(study: Study) -> Analysis:
    """Estimate and compare changes per year of participants with several sessions (``group_change``)."""
    name, demographics = "group_change", study.cohort.demographics
    if not (demographics.groupby("participant_id")["years"].nunique() > 1).any():
        several = demographics["participant_id"].duplicated().any()
        why = "no times; add age or acq_time to sub-X_sessions.tsv" if several else "no participant has two sessions"
        return _not_computed([name], study, f"no participant was scanned at two known times ({why})")
    table, notes = without_contradictions(study, ("group",), where=name)  # warnings of group_differences.tsv
    parts, warnings = [], []
    for measure in study.measures:
        try:
            changes = compare_changes(table, time="years", value=measure, by=study.by, reference=study.reference)
        except InputError as error:
            warnings.append(not_computed_line(name, error))
            continue
        parts.append(add_constants(changes, measure=measure))
    several_sites = demographics.groupby("participant_id")["site"].nunique() > 1
    if moved := list(several_sites.index[several_sites]):
        warnings.append(
            f"{name}.tsv: the site ({study.cohort.settings['SiteFrom']}) of {list_some(moved)} changes between "
            f"sessions; {len(moved)} participant(s) left out, as a change contains the difference between the sites"
        )
    if not parts:
        return _not_computed([name], study, warnings[0], warnings)
    rows = add_false_discovery_rates(pd.concat(parts, ignore_index=True))
    facts = {"NumberOfTests": int(rows[["p", "p_difference"]].notna().sum().sum())}
    return Analysis((ResultTable(name, rows, facts=facts, notes=(*notes, *warnings)),), tuple(warnings))


def find_variables(cohort: Cohort, names: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Return the clinical variables of each scan as numbers, one column per name, and warnings.

    Raises
    ------
    InputError
        If a column does not exist or has no numbers.
    """
    variables: dict[str, pd.Series[float]] = {}
    warnings: list[str] = []
    for name in names:
        if name not in cohort.participants:
            shown = ", ".join(cohort.participants.columns) or "none"
            raise InputError(
                f"`correlate` {name}: no such column in participants.tsv (columns: {shown}); check the name"
            )
        if name == cohort.settings["AgeColumn"]:
            numbers = cohort.demographics["age"]
        else:
            numbers = read_numbers(cohort.participants[name], cohort.demographics["participant_id"])
        if numbers.notna().sum() == 0:
            raise InputError(f"`correlate` {name}: no numeric values; name a column of numbers")
        if numbers.nunique() < 2:
            warnings.append(f"`correlate` {name}: constant ({numbers.dropna().iloc[0]:g}); not analysed")
            continue
        variables[f"{_PREFIX}{name}"] = numbers
    return pd.DataFrame(variables, index=cohort.demographics.index), warnings


def relate_to_variables(study: Study) -> Analysis:
    """Relate the measures to the clinical variables (``group_correlations``, ``group_correlation_values``)."""
    names = ("group_correlations", "group_correlation_values")
    variables = [str(column) for column in study.table if str(column).startswith(_PREFIX)]
    if not variables:
        why = "no clinical variable that varies was named: `correlate`"
        return _not_computed(names, study, why)
    covariates = tuple(name for name in study.covariates if name not in (*variables, "group"))
    if study.table["group"].nunique() > 1:  # otherwise a relation may be the difference between the groups
        covariates = (*covariates, "group")
    table, lines = without_contradictions(study, covariates, where=names[0], tests="the correlations")
    table, site_lines = first_site_only(table, where=names[0])
    groups = table.groupby("participant_id", observed=True)["group"].first()
    relations, values = [], []
    for measure in study.measures:
        for variable in variables:
            name = variable.removeprefix(_PREFIX)
            others = [covariate for covariate in covariates if covariate != covariate_name(study.cohort, name)]
            fits, points = correlate(table, variable=variable, value=measure, by=study.by, covariates=others)
            fits["note"] = fits["note"].str.replace(variable, name, regex=False)
            if not fits["n"].any():
                lines.append(f"{names[0]}.tsv: {fits['note'].iloc[0]}")
            relations.append(add_constants(fits, measure=measure, variable=name))
            points.insert(len(study.by) + 1, "group", points["participant_id"].map(groups))
            values.append(add_constants(points, measure=measure, variable=name))
    warnings = tuple(dict.fromkeys([*lines, *site_lines]))
    rows = add_false_discovery_rates(pd.concat(relations, ignore_index=True))
    if rows["p"].isna().all():
        return _not_computed(names, study, "; ".join(rows["note"].unique()[:3]), warnings)
    facts = {"Covariates": list(covariates), "NumberOfTests": int(rows["p"].notna().sum())}
    tables = (
        ResultTable(names[0], rows, facts=facts, notes=warnings),
        ResultTable(names[1], with_labels(pd.concat(values, ignore_index=True), study), facts=facts),
    )
    return Analysis(tables, warnings)


def with_labels(rows: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Replace the names of persons by labels and, with several datasets, their dataset."""
    keys = study.cohort.keys.filter(["participant_id", "dataset"])
    keys = keys.set_index(study.cohort.demographics["participant_id"])
    keys = keys[~keys.index.duplicated()]
    person = rows["participant_id"].astype(object)
    rows = rows.assign(participant_id=person.map(keys["participant_id"]))
    if "dataset" in keys:
        rows.insert(list(rows.columns).index("participant_id") + 1, "dataset", person.map(keys["dataset"]))
    return rows


def add_false_discovery_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """Insert a column of false discovery rates after each column of p values, over all rows of the table.

    Structures of both sides, which repeat those of single sides, are apart.
    """
    keys = [is_one_sided(rows)]
    result = rows.copy()
    for name in [str(name) for name in rows if "p" in str(name).split("_")]:
        rates = rows[name].astype(float).groupby(keys, sort=False, dropna=False)
        place = list(result.columns).index(name) + 1
        result.insert(
            place,
            "_".join("q" if part == "p" else part for part in name.split("_")),
            rates.transform(adjust_p_values, method="fdr"),
        )
    return result
