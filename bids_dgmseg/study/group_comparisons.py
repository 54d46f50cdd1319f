"""Analyses of a study that compare groups: differences from the reference group, change over time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pandas as pd

from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.stats.ageing import change_per_year
from bids_dgmseg.stats.group_tests import GroupOptions, ancova, compare_groups
from bids_dgmseg.study.study import Study
from bids_dgmseg.study.tabular_files import Analysis, ResultTable, add_constants, empty_table, not_computed_line

HARMONIZED = "_harmonized"
"""Ending of the measures after harmonization."""

_UNTESTED = (
    "Welch's t, Mann-Whitney U and Hedges' g are omitted for harmonized values: they count what ComBat estimated from "
    "all participants as known, and 9 to 14 % of studies of 20 participants without a difference had p < 0.05; use the "
    "ancova_ columns (7 to 8 %, raw values 5 %)"
)


def compare_with_reference_group(study: Study) -> Analysis:
    """Compare each group with the reference group, unadjusted and by ANCOVA (``group_differences``).

    A participant whose group differs between sessions is left out; for participants scanned at several sites, only
    scans at the first site are used.
    """
    name, column = "group_differences", study.cohort.settings["GroupColumn"]
    groups = study.table["group"].dropna().unique()
    if column is None:
        why = "participants.tsv has no column group or diagnosis; name one with `group_column`"
        return Analysis((empty_table(name, study.by, why),))
    if len(groups) < 2 or study.reference is None:
        why = f"{column} is {groups[0]} for all" if len(groups) else f"{column} is not known"
        return Analysis((empty_table(name, study.by, why),))
    covariates = tuple(covariate for covariate in study.covariates if covariate != "group")
    table, lines = without_contradictions(study, ("group", *covariates), where=name)
    table, site_lines = first_site_only(table, where=name)
    parts, warnings = [], [*lines, *site_lines]
    options = GroupOptions(
        reference=study.reference,
        by=study.by,
        covariates=covariates,
        site="site" if table["site"].nunique() > 1 else None,
        site_from=study.cohort.settings["SiteFrom"],
    )
    for measure in study.measures:
        try:
            untested = _UNTESTED if measure.endswith(HARMONIZED) else ""
            found = compare_groups(table, options=replace(options, value=measure, untested=untested))
            if covariates:
                keys = [*study.by, "reference", "group"]
                adjusted = ancova(table, options=replace(options, value=measure))
                renamed = {column: f"ancova_{column}" for column in adjusted.columns if column not in keys}
                found = found.merge(adjusted.rename(columns=renamed), on=keys, how="left", validate="1:1")
        except InputError as error:
            warnings.append(not_computed_line(name, error))
            continue
        parts.append(add_constants(found, measure=measure))
    if not parts:
        return Analysis((empty_table(name, study.by, warnings[-1]),), tuple(dict.fromkeys(warnings)))
    rows = pd.concat(parts, ignore_index=True)
    participants = table.groupby("participant_id", observed=True)[["site", "group"]].first()  # that are known
    result = ResultTable(
        name,
        rows,
        facts={
            "AncovaCovariates": list(covariates),
            "ParticipantsBySite": {
                site: part["group"].value_counts().to_dict() for site, part in participants.groupby("site")
            },
        },
        notes=tuple(warnings),
    )
    return Analysis((result,), (*warnings, *_confounding_warnings(name, rows)))


def without_contradictions(
    study: Study, columns: Sequence[str], *, where: str, tests: str = "", unnamed: Collection[str] = ()
) -> tuple[pd.DataFrame, list[str]]:
    """Return the table without the values of participants who have several of a category, and a warning per column.

    `tests` is what the participants are left out of, for the warnings; by default the comparisons of groups. There is
    no warning about columns that are `unnamed`.
    """
    table, lines = study.table.copy(), []
    for column in columns:
        if column == "site" or pd.api.types.is_numeric_dtype(table[column]):
            continue
        several = table.groupby("participant_id")[column].nunique()
        if names := list(several.index[several > 1]):
            missed = tests or ("comparisons of groups" if column == "group" else "the ancova_ columns")
            table.loc[table["participant_id"].isin(names), column] = None
            if column in unnamed:
                continue
            shown = study.cohort.settings[f"{column.capitalize()}Column"] if column in ("group", "sex") else column
            lines.append(
                f"{where}.tsv: {shown} of {list_some(names)} differs between sessions; {len(names)} of {len(several)} "
                f"participants {'is' if len(names) == 1 else 'are'} left out of {missed}"
            )
    return table, lines


def first_site_only(table: pd.DataFrame, *, where: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the scans at each participant's first site, and a warning if there are others."""
    first = table.sort_values("years", kind="stable").groupby("participant_id")["site"].first()
    moved = table["site"].notna() & (table["site"] != table["participant_id"].astype(object).map(first))
    if not moved.any():
        return table, []
    names = table["participant_id"][moved].unique()
    were, their = ("was", "its") if len(names) == 1 else ("were", "their")
    line = f"{where}.tsv: {list_some(names)} {were} scanned at several sites; only {their} scans at the first are used"
    return table[~moved], [line]


def _confounding_warnings(name: str, rows: pd.DataFrame) -> list[str]:
    """Return one line per note about groups that covariates or sites are confounded with."""
    lines = []
    for group, compared in rows.groupby("group", sort=False):
        notes = compared.filter(["note", "ancova_note"])
        for note in dict.fromkeys(notes.to_numpy().ravel().tolist()):
            if str(note).startswith(("group and ", "groups are ")):
                n = int((notes == note).any(axis=1).sum())
                lines.append(f"{name}.tsv: {note}" + ("" if n == len(rows) else f" ({n} rows of {group})"))
    return list(dict.fromkeys(lines))


def estimate_changes(study: Study) -> Analysis:
    """Estimate changes per year of participants with several sessions (``group_longitudinal``, ``group_changes``)."""
    names = ("group_longitudinal", "group_changes")
    demographics = study.cohort.demographics
    if not (demographics.groupby("participant_id")["years"].nunique() > 1).any():
        several = demographics["participant_id"].duplicated().any()
        why = "no times; add age or acq_time to sub-X_sessions.tsv" if several else "no participant has two sessions"
        why = f"no participant was scanned at two known times ({why})"
        return Analysis(tuple(empty_table(name, study.by, why) for name in names))
    table, notes = without_contradictions(study, ("group",), where=names[0])  # warnings of group_differences.tsv
    summaries, changes, warnings = [], [], []
    for measure in study.measures:
        try:
            change = change_per_year(
                table, time="years", value=measure, by=study.by, group="group", reference=study.reference, site="site"
            )
        except InputError as error:
            warnings.append(not_computed_line(names[0], error))
            continue
        summaries.append(add_constants(change.summary, measure=measure))
        repeated = change.participants[change.participants["n_scans"] + change.participants["n_missing"] > 1]
        changes.append(add_constants(repeated, measure=measure))
    if not summaries:
        return Analysis(tuple(empty_table(name, study.by, warnings[-1]) for name in names), tuple(warnings))
    by_participant = pd.concat(changes, ignore_index=True)
    if moved := list(by_participant["participant_id"][by_participant["site_change"]].unique()):
        whose = "its change contains" if len(moved) == 1 else "their changes contain"
        warnings.append(
            f"{names[0]}.tsv: the site ({study.cohort.settings['SiteFrom']}) of {list_some(moved)} changes between "
            f"sessions; {whose} the difference between the sites, so that {count(len(moved), 'participant')} "
            f"{'is' if len(moved) == 1 else 'are'} left out of the tests; see {names[1]}.tsv"
        )
    keys = study.cohort.keys.filter(["participant_id", "dataset"]).set_index(demographics["participant_id"])
    keys = keys[~keys.index.duplicated()]
    person = by_participant["participant_id"]
    if "dataset" in keys:
        place = list(by_participant.columns).index("participant_id") + 1
        by_participant.insert(place, "dataset", person.map(keys["dataset"]))
    by_participant["participant_id"] = person.map(keys["participant_id"])
    tables = (
        ResultTable(names[0], pd.concat(summaries, ignore_index=True), notes=(*notes, *warnings)),
        ResultTable(names[1], by_participant),
    )
    return Analysis(tables, tuple(warnings))
