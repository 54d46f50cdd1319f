"""Analyses of a study: side differences, outliers, volume adjustment, age.

Those of sites are in `harmonization`, those of groups and of change over time in `group_comparisons`. Each takes a
`Study` and returns an `Analysis`; `run_analyses` states which measures feed which analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import count, list_some
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.measurement.nuclei import asymmetry_index
from bids_dgmseg.models.structures import bilateral_names
from bids_dgmseg.stats.ageing import AgeingOptions, fit_age_curves
from bids_dgmseg.stats.long_table import N_CONTROLS, adjust_for_size, robust_z
from bids_dgmseg.stats.scan_changes import compare_sites, find_changed_scans
from bids_dgmseg.study.clinical import find_variables, model_changes, relate_to_variables
from bids_dgmseg.study.group_comparisons import compare_with_reference_group, estimate_changes
from bids_dgmseg.study.harmonization import harmonize_sites
from bids_dgmseg.study.normative import compare_with_norms
from bids_dgmseg.study.review_decisions import compare_raters
from bids_dgmseg.study.study import (
    REFERENCE_MEASURES,
    VOLUME,
    WITHIN_PARTICIPANTS,
    Study,
    count_scans,
    first_rows,
    read_reference_values,
)
from bids_dgmseg.study.tabular_files import Analysis, ResultTable, add_constants, empty_table

_SEED = 1
"""Of the bootstrap, so that the same tables give the same limits."""

_ADDED = ("Coefficients", "NumberOfOutliers")
"""Facts about the rows of a table."""

_ADVICE = ("check the voxel sizes of these maps", "check the scale and the reference of these maps")
"""Of a volume, of a susceptibility."""

_SITE_RATIO, _SITE_SHIFT = (1.25, 1.5), 0.02
"""Larger ratios (of a volume, of a susceptibility) and shifts (ppm) between sites are reported. Iron and atrophy of
sites of other ages, and reconstructions of one unit, differ by less."""


def run_analyses(study: Study) -> tuple[list[ResultTable], list[str]]:
    """Run all analyses, of single sides and, apart from them, of bilateral rows.

    Rows of both sides repeat those of the sides: they must neither change the harmonization of the sides nor count as
    further tests, so that false discovery rates are corrected within each kind.

    The warnings are those of the study and of all analyses.

    Raises
    ------
    InputError
        If an option does not fit the data.
    """
    is_bilateral = study.table["abbreviation"].isin(bilateral_names(study.table["abbreviation"].unique()))
    study = with_variables(study)
    analyses = _run(replace(study, table=study.table[~is_bilateral].reset_index(drop=True)))
    if is_bilateral.any():
        bilateral = _run(replace(study, table=study.table[is_bilateral].reset_index(drop=True)))
        analyses = [_append(one, other) for one, other in zip(analyses, bilateral, strict=True)]
    analyses += [find_scan_outliers(study, is_bilateral), list_decisions(study)]
    tables = [table for analysis in analyses for table in analysis.tables]
    warnings = dict.fromkeys(line for analysis in analyses for line in analysis.warnings)
    return tables, [*study.warnings, *warnings]


def with_variables(study: Study) -> Study:
    """Return the study with the clinical variables as columns of its table."""
    variables, warnings = find_variables(study.cohort, study.options.correlate)
    scan = study.table["scan"].to_numpy()
    columns = {str(name): values.to_numpy()[scan] for name, values in variables.items()}
    return replace(study, table=study.table.assign(**columns), warnings=(*study.warnings, *warnings))


def _run(study: Study) -> list[Analysis]:
    """Run all analyses.

    Volume adjustment starts from the measures that were asked for, harmonization from these and the adjusted ones; the
    analyses of age, groups and change use all of them. Measures relative to the mean of each participant have slopes
    only; mixed models would take their scans for more independent than they are.
    """
    within = [measure for measure in study.measures if measure in WITHIN_PARTICIPANTS]
    study = study.between_participants
    adjustment = adjust_for_volume(study)
    adjusted = study.with_measures(adjustment.measures)
    harmonization = harmonize_sites(adjusted)
    extended = adjusted.with_measures(harmonization.measures)
    return [
        compare_sides(study),
        find_outliers(study),
        _with_harmonized(adjustment, harmonization),
        harmonization,
        fit_ageing(extended),
        compare_with_reference_group(extended),
        estimate_changes(replace(extended, measures=(*extended.measures, *within))),
        model_changes(extended),
        relate_to_variables(extended),
        compare_with_norms(extended),
    ]


def _append(analysis: Analysis, other: Analysis) -> Analysis:
    """Append the rows, coefficients, notes and warnings of the same analysis of other nuclei."""
    tables = []
    for table, further in zip(analysis.tables, other.tables, strict=True):
        if len(further.rows):
            rows = pd.concat([table.rows, further.rows], ignore_index=True) if len(table.rows) else further.rows
            if "scan" in rows and table.rows["scan"].is_monotonic_increasing:
                rows = _sort_by_scan([rows])
            rows = rows.infer_objects()  # a part may lack numbers
            added = {key: table.facts[key] + further.facts[key] for key in _ADDED if key in table.facts}
            notes = tuple(dict.fromkeys((*table.notes, *further.notes)))
            fits = (*table.fits, *further.fits)
            table = replace(table, rows=rows, facts={**table.facts, **added}, notes=notes, not_computed="", fits=fits)
        tables.append(table)
    return Analysis(tuple(tables), (*analysis.warnings, *other.warnings))


def list_decisions(study: Study) -> Analysis:
    """List the raters' decisions and their agreement (``group_decisions``, ``group_raters``)."""
    decisions = study.cohort.decisions
    raters = compare_raters(decisions)
    why = "" if len(decisions) else "no decisions of raters were given: `qc`"
    listed = decisions.drop(columns="row").rename(columns={"scan": "scan_name"})
    no_pair = "" if len(raters) else "fewer than two raters have decided on the same scans"
    tables = (
        ResultTable("group_decisions", listed, not_computed=why),
        ResultTable("group_raters", raters, not_computed=why or no_pair),
    )
    return Analysis(tables)


def compare_sides(study: Study) -> Analysis:
    """Compute the asymmetry index of each nucleus in each scan (``group_asymmetry``)."""
    parts = []
    side = study.table["abbreviation"].str[-2:]
    names = study.table["abbreviation"].str[:-2]
    nuclei = pd.Categorical(names, categories=list(names.unique()))  # the merge sorts them in this order
    for measure in study.options.measures:
        rows = pd.DataFrame({"scan": study.table["scan"], "nucleus": nuclei, "value": study.table[measure]})
        left, right = (rows[side == f"_{name}"] for name in "LR")
        both = left.merge(right, on=["scan", "nucleus"], suffixes=("_left", "_right"), how="outer")
        both = both.rename(columns={"value_left": "left", "value_right": "right"})
        asymmetry = asymmetry_index(both["left"], both["right"])
        columns = ["scan", "nucleus", "measure", "left", "right", "asymmetry"]
        parts.append(both.assign(measure=measure, asymmetry=asymmetry)[columns])
    return Analysis((ResultTable("group_asymmetry", _sort_by_scan(parts)),))


def find_outliers(study: Study) -> Analysis:
    """Compute the robust z of each value within its site, for its age where that is known (``group_outliers``)."""
    parts = []
    age = "age" if study.table["age"].notna().any() else None
    for measure in study.options.measures:
        found = robust_z(study.table, value=measure, by=study.by, age=age)
        rows = study.table[["scan", "abbreviation"]].assign(measure=measure, value=study.table[measure])
        parts.append(pd.concat([rows, found], axis=1))
    rows = _sort_by_scan(parts)
    facts = {"NumberOfOutliers": int(rows["outlier"].sum())}
    notes = () if age else ("values are not adjusted for age: no ages",)
    return Analysis((ResultTable("group_outliers", rows, facts=facts, notes=notes),))


def find_scan_outliers(study: Study, is_bilateral: pd.Series) -> Analysis:
    """Compare the scale, zero and size that all nuclei of a scan have in common (``group_scan_outliers``)."""
    table = study.table[~is_bilateral]
    age = "age" if table["age"].notna().any() else None
    parts, sites, warnings = [], [], []
    columns = ["scan", "measure", "n_nuclei", "ratio", "shift", "z_ratio", "z_shift", "outlier", "note"]
    for measure in study.options.measures:
        if not measure.endswith(("_ppm", "_mm3")):
            continue
        with_shift = measure.endswith("_ppm")
        expected = table.assign(
            **robust_z(table, value=measure, by=study.by, age=age)[["expected", "median", "n_site"]]
        )
        found = find_changed_scans(expected, value=measure, by=study.cohort.strata, with_shift=with_shift)
        parts.append(found.assign(measure=measure)[columns])
        names = [_scan_label(study, scan) for scan in found.loc[found["outlier"], "scan"]]
        changes = _describe_changes(found[found["outlier"]], with_shift=with_shift)
        if names:
            shown = list_some(f"{name} ({change})" for name, change in zip(names, changes, strict=True))
            warnings.append(
                f"group_scan_outliers.tsv: {measure} of all nuclei differs from the other scans of the site in "
                f"{shown}; {_ADVICE[with_shift]}"
            )
        others = compare_sites(expected, by=study.cohort.strata, with_shift=with_shift)
        sites += others.assign(measure=measure).to_dict("records")
        limit = _SITE_RATIO[with_shift]
        is_other = (others["ratio"] > limit) | (others["ratio"] < 1 / limit)
        apart = others[is_other | (others["shift"].abs() > _SITE_SHIFT)]
        if len(apart):
            changes = _describe_changes(apart, with_shift=with_shift)
            strata = [
                study.stratum_name({name: row[name] for name in study.cohort.strata})
                for row in apart.to_dict("records")
            ]
            names = [f"{site} {stratum}".strip() for site, stratum in zip(apart["site"], strata, strict=True)]
            shown = list_some(f"{name} ({change})" for name, change in zip(names, changes, strict=True))
            warnings.append(
                f"group_scan_outliers.tsv: {measure} of all nuclei differs between sites in {shown}; "
                f"{_ADVICE[with_shift]}"
            )
    if not parts:
        why = "no susceptibility or volume among `measures`"
        return Analysis((ResultTable("group_scan_outliers", pd.DataFrame(columns=columns), not_computed=why),))
    rows = _sort_by_scan(parts)
    facts = {"NumberOfOutliers": int(rows["outlier"].sum()), "Sites": sites}
    return Analysis((ResultTable("group_scan_outliers", rows, facts=facts),), tuple(warnings))


def _scan_label(study: Study, scan: int) -> str:
    """Return participant and session of a scan, and what else distinguishes it."""
    keys = study.cohort.keys.drop(columns="site")
    values = [str(keys[name].iloc[scan]) for name in keys if name == "participant_id" or keys[name].nunique() > 1]
    return " ".join(value for value in values if value != MISSING)


def _describe_changes(rows: pd.DataFrame, *, with_shift: bool) -> list[str]:
    """Describe each ratio, and shift if there is any."""
    pairs = zip(rows["ratio"], rows["shift"], strict=True)
    return [f"ratio {ratio:.2f}" + (f", shift {shift:+.3f} ppm" if with_shift else "") for ratio, shift in pairs]


def adjust_for_volume(study: Study) -> Analysis:
    """Adjust susceptibilities for volume by the controls' regression (``group_adjusted``)."""
    name = "group_adjusted"
    empty = pd.DataFrame(columns=["scan", "abbreviation", "control", "measure", "volume_mm3", "value", "adjusted"])
    if study.controls is None:
        return Analysis((ResultTable(name, empty, not_computed="no `control_filter` was given"),))
    n_controls = study.cohort.demographics["participant_id"][study.controls].nunique()
    n_scans = count_scans(study.cohort, study.controls)
    facts: dict[str, Any] = {"Controls": {"Participants": n_controls, "Scans": n_scans}}
    if n_controls < N_CONTROLS:
        matched = count(n_controls, "participant")
        why = f"`control_filter` matches {matched}, at least {N_CONTROLS} are needed for a slope"
        table = ResultTable(name, empty, facts=facts, not_computed=why)
        return Analysis((table,), (f"{name}.tsv: not computed: {why}",))
    control = study.controls[study.table["scan"].to_numpy()]
    parts, coefficients, measures = [], [], {}
    for measure in study.options.measures:
        if not measure.endswith("_ppm"):
            continue
        result = adjust_for_size(
            study.table,
            controls=control,
            value=measure,
            volume=VOLUME,
            by=study.by,
            participant="participant_id",
            covariates=("site", "age", "sex"),
        )
        coefficients += add_constants(result.coefficients, measure=measure).to_dict("records")
        rows = study.table[["scan", "abbreviation"]].assign(
            control=control,
            measure=measure,
            volume_mm3=study.table[VOLUME],
            value=study.table[measure],
            adjusted=result.values,
        )
        parts.append(rows)
        if result.values.notna().any():
            measures[f"{measure}_adjusted"] = result.values
    if not parts:
        return Analysis((ResultTable(name, empty, not_computed="no susceptibility among `measures`"),))
    notes = tuple(
        f"{record['measure']} of {record['abbreviation']} by {record['model']}: {record['note']}"
        for record in coefficients
        if record["note"]
    )
    table = ResultTable(name, _sort_by_scan(parts), facts={**facts, "Coefficients": coefficients}, notes=notes)
    return Analysis((table,), measures=pd.DataFrame(measures, index=study.table.index))


def _with_harmonized(adjustment: Analysis, harmonization: Analysis) -> Analysis:
    """Add the harmonized adjusted values to ``group_adjusted``."""
    table, harmonized = adjustment.tables[0], harmonization.tables[0].rows
    keys = ["scan", "abbreviation", "measure"]
    wanted = table.rows[keys].assign(measure=table.rows["measure"] + "_adjusted")
    values = harmonized.set_index(keys)["harmonized"].reindex(pd.MultiIndex.from_frame(wanted))
    rows = table.rows.assign(adjusted_harmonized=values.to_numpy())
    return replace(adjustment, tables=(replace(table, rows=rows),))


def fit_ageing(study: Study) -> Analysis:
    """Fit curves over age (``group_ageing``, ``group_ageing_curves``).

    The curves are those of the predicted labels, first of the controls or the reference group, then of each other
    group; and with `evaluation`, for each of these also of the reference segmentations and of the predictions for
    the same scans and nuclei.
    """
    names = ("group_ageing", "group_ageing_curves")
    if study.table["age"].isna().all():
        why = "no ages; add a column age to participants.tsv or sessions.tsv"
        return Analysis(tuple(empty_table(name, study.by, why) for name in names))
    scan = study.table["scan"].to_numpy()
    selections = _select_by_group(study)
    sources = [("predicted", which, study.table[chosen[scan]], study.measures) for which, chosen in selections.items()]
    warnings: list[str] = []
    if study.options.evaluation:
        reference, warnings = read_reference_values(study.options.evaluation, study.cohort)
        measures = tuple(measure for measure in study.options.measures if measure in REFERENCE_MEASURES)
        scans = study.table.drop_duplicates("scan")[["scan", *study.cohort.strata, "participant_id", "age"]]
        labelled = reference.merge(scans, on="scan").assign(model=lambda rows: rows["reference"])
        bilateral = bilateral_names(labelled["abbreviation"].unique())
        of_both = not study.table["abbreviation"].str.endswith(("_L", "_R")).any()
        labelled = labelled[labelled["abbreviation"].isin(bilateral) == of_both]
        # predictions for the same scans and nuclei; a scan has one row per model, which are identified by the first
        first = first_rows(study.cohort)[study.table["scan"].to_numpy()]
        shared = labelled[["scan", "abbreviation"]].drop_duplicates().rename(columns={"scan": "first"})
        predicted = study.table.assign(first=first).merge(shared, on=["first", "abbreviation"])
        for which, chosen in selections.items():
            name = "with_reference" if which == "all" else f"{which} with_reference"
            for labels, table in (("reference", labelled), ("predicted", predicted)):
                sources.append((labels, name, table[chosen[table["scan"].to_numpy()]], measures))
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    for labels, which, table, columns in sources:
        for measure in columns:
            options = AgeingOptions(value=measure, by=study.by, n_replicates=study.options.bootstrap)
            fitted = fit_age_curves(table, options=options, rng=np.random.default_rng(_SEED))
            for found, rows in zip(fitted, parts, strict=True):
                rows.append(add_constants(found, measure=measure, labels=labels, scans=which))
    tables = (ResultTable(name, pd.concat(rows, ignore_index=True)) for name, rows in zip(names, parts, strict=True))
    return Analysis(tuple(tables), tuple(warnings))


def _select_by_group(study: Study) -> dict[str, NDArray[np.bool_]]:
    """Return the scans whose curves are fitted together, by their name in column ``scans``."""
    groups = study.cohort.demographics["group"]
    selections = {} if study.controls is None else {"controls": study.controls}
    names = sorted(groups.dropna().unique(), key=lambda name: (name != study.reference, str(name)))
    further = {f"group {name}": (groups == name).to_numpy() for name in names}
    if len(names) < 2:
        further = {"all": np.full(len(groups), True)}
    known = [*selections.values()]  # a group may be the controls
    return selections | {name: own for name, own in further.items() if not any(np.array_equal(own, c) for c in known)}


def _sort_by_scan(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True).sort_values("scan", kind="stable", ignore_index=True)
