"""Analyses of a study: side differences, outliers, volume adjustment, age, norms of controls, decisions of raters.

Those of sites are in `harmonization`, those between participants in `group_comparisons`. Each takes a `Study` and
returns an `Analysis`; `run_analyses` states which measures feed which analysis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from bids_dgmseg.errors import list_some
from bids_dgmseg.io.files import MISSING, sha256
from bids_dgmseg.measurement.nuclei import asymmetry_index
from bids_dgmseg.stats.age_curves import (
    CENTILES,
    N_NORM,
    AgeSexNorm,
    centile_curves,
    fit_age_curves,
    fit_norms,
    score_scans,
)
from bids_dgmseg.stats.agreement import adjust_p_values
from bids_dgmseg.stats.outliers import compare_sites, find_changed_scans, robust_z
from bids_dgmseg.stats.regression import adjust_for_volume
from bids_dgmseg.study.group_comparisons import (
    compare_samples,
    compare_with_reference_group,
    estimate_changes,
    find_variables,
    first_site_only,
    relate_to_variables,
    with_labels,
    without_contradictions,
)
from bids_dgmseg.study.harmonization import (
    HARMONIZED,
    NormFit,
    SavedNorms,
    compare_origin,
    find_fit,
    harmonize_sites,
    read_saved,
    shown_stratum,
)
from bids_dgmseg.study.reliability import add_noise, estimate_reliability, plan_study
from bids_dgmseg.study.review_decisions import compare_raters
from bids_dgmseg.study.study import (
    VOLUME,
    WITHIN_PARTICIPANTS,
    Analysis,
    ResultTable,
    Study,
    add_constants,
    count_scans,
    empty_table,
    is_one_sided,
)

_ADVICE = ("check the voxel sizes of these maps", "check the scale and the reference of these maps")
"""Advice on a volume, on a susceptibility."""

_SITE_RATIO, _SITE_SHIFT = (1.25, 1.5), 0.02
"""Larger ratios (of a volume, of a susceptibility) and shifts (ppm) between sites are reported. Iron and atrophy of
sites of other ages, and reconstructions of one unit, differ by less."""


def run_analyses(study: Study, everybody: Study | None = None) -> tuple[list[ResultTable], list[str]]:
    """Run all analyses; also return the warnings of the study and of all analyses.

    Comparisons and age curves are of the means of both sides, and again of single sides (tables ``…_sides``); they have
    the site as a covariate, as harmonized values would count what harmonization estimated as known. Norms are also of
    harmonized measures. Measures relative to the mean of each participant have changes only. `everybody` is the study
    with what is excluded, for the sensitivity of the differences between groups.

    Raises
    ------
    InputError
        If an option does not fit the data.
    """
    study = with_variables(study)
    within = [measure for measure in study.measures if measure in WITHIN_PARTICIPANTS]
    study = study.between_participants
    harmonization = harmonize_sites(study)
    extended = study.with_measures(harmonization.measures)
    changing, means = replace(study, measures=(*study.measures, *within)), study.side_means
    reliability, differences = estimate_reliability(means), compare_with_reference_group(means)
    analyses = [
        compare_sides(study),
        find_outliers(study),
        adjust_volumes(study),
        harmonization,
        fit_ageing(means),
        differences,
        *([compare_samples(means, differences, everybody.between_participants.side_means)] if everybody else []),
        add_noise(means, estimate_changes(changing.side_means), reliability),
        reliability,
        plan_study(means, reliability.tables[0]),
        relate_to_variables(means),
        compare_with_norms(extended),
        find_scan_outliers(study),
        list_decisions(study),
    ]
    if len(means.table) < len(study.table):
        sides = fit_ageing(study), compare_with_reference_group(study), relate_to_variables(study)
        analyses += map(_of_sides, (*sides, estimate_changes(changing)))
    tables = [table for analysis in analyses for table in analysis.tables]
    warnings = dict.fromkeys(line for analysis in analyses for line in analysis.warnings)
    return tables, [*study.warnings, *warnings]


def _of_sides(analysis: Analysis) -> Analysis:
    """Return the first table under another name, without the warnings, which are those of the means of both sides."""
    table = analysis.tables[0]
    return Analysis(() if table.not_computed else (replace(table, name=f"{table.name}_sides"),))


def with_variables(study: Study) -> Study:
    """Return the study with the clinical variables as columns of its table."""
    variables, warnings = find_variables(study.cohort, study.options.correlate)
    scan = study.table["scan"].to_numpy()
    columns = {str(name): values.to_numpy()[scan] for name, values in variables.items()}
    return replace(study, table=study.table.assign(**columns), warnings=(*study.warnings, *warnings))


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
    table = study.table[is_one_sided(study.table)]
    side, names = table["abbreviation"].str[-2:], table["abbreviation"].str[:-2]
    nuclei = pd.Categorical(names, categories=list(names.unique()))  # the merge sorts them in this order
    for measure in study.options.measures:
        rows = pd.DataFrame({"scan": table["scan"], "nucleus": nuclei, "value": table[measure]})
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
        scores = robust_z(study.table, value=measure, by=study.by, age=age)
        rows = study.table[["scan", "abbreviation"]].assign(measure=measure, value=study.table[measure])
        parts.append(pd.concat([rows, scores], axis=1))
    rows = _sort_by_scan(parts)
    facts = {"NumberOfOutliers": int(rows["outlier"].sum())}
    notes = () if age else ("values are not adjusted for age: no ages",)
    return Analysis((ResultTable("group_outliers", rows, facts=facts, notes=notes),))


def find_scan_outliers(study: Study) -> Analysis:
    """Compare the scale, zero and size that all nuclei of a scan, or of a site, have in common.

    The tables are ``group_scan_outliers`` and ``group_sites``.
    """
    table, name = study.table[is_one_sided(study.table)], "group_scan_outliers"
    age = "age" if table["age"].notna().any() else None
    parts, sites, warnings = [], [], []
    for measure in study.options.measures:
        if not measure.endswith(("_ppm", "_mm3")):
            continue
        with_shift = measure.endswith("_ppm")
        scores = robust_z(table, value=measure, by=study.by, age=age)
        expected = table.assign(**scores[["expected", "median", "n_site"]])
        scans = find_changed_scans(expected, value=measure, by=study.cohort.strata, with_shift=with_shift)
        parts.append(scans.assign(measure=measure)[["scan", "measure", *scans.columns[1:]]])
        changed = scans[scans["outlier"]]
        names = [_scan_label(study, scan) for scan in changed["scan"]]
        warnings += _describe_changes(
            changed, names, f"{measure} of all nuclei differs from the other scans of the site"
        )
        others = compare_sites(expected, by=study.cohort.strata, with_shift=with_shift)
        sites.append(add_constants(others, measure=measure))
        limit = _SITE_RATIO[with_shift]
        is_apart = ~others["ratio"].fillna(1).between(1 / limit, limit) | (others["shift"].abs() > _SITE_SHIFT)
        apart = others[is_apart]
        strata = [study.stratum_name({key: row[key] for key in study.cohort.strata}) for _, row in apart.iterrows()]
        names = [f"{site} {stratum}".strip() for site, stratum in zip(apart["site"], strata, strict=True)]
        warnings += _describe_changes(apart, names, f"{measure} of all nuclei differs between sites")
    if not parts:
        why = "no susceptibility or volume among `measures`"
        return Analysis(tuple(empty_table(name, study.by, why) for name in (name, "group_sites")))
    rows = _sort_by_scan(parts)
    facts, all_sites = {"NumberOfOutliers": int(rows["outlier"].sum())}, pd.concat(sites, ignore_index=True)
    tables = (
        ResultTable(name, rows, facts=facts),
        ResultTable("group_sites", all_sites, not_computed="" if len(all_sites) else "fewer than two sites of 5 scans"),
    )
    return Analysis(tables, tuple(f"{name}.tsv: {line}" for line in warnings))


def _scan_label(study: Study, scan: int) -> str:
    """Return participant and session of a scan, and what else distinguishes it."""
    keys = study.cohort.keys.drop(columns="site")
    values = [str(keys[name].iloc[scan]) for name in keys if name == "participant_id" or keys[name].nunique() > 1]
    return " ".join(value for value in values if value != MISSING)


def _describe_changes(rows: pd.DataFrame, names: Sequence[str], what: str) -> list[str]:
    """Return a line with the ratio, and the shift of susceptibilities, of each row; none without rows."""
    with_shift = what.split()[0].endswith("_ppm")
    changes = [
        f"{name} (ratio {ratio:.2f}" + (f", shift {shift:+.3f} ppm)" if with_shift else ")")
        for name, ratio, shift in zip(names, rows["ratio"], rows["shift"], strict=True)
    ]
    return [f"{what} in {list_some(changes)}; {_ADVICE[with_shift]}"] if changes else []


def adjust_volumes(study: Study) -> Analysis:
    """Adjust susceptibilities for volume by the controls' regression (``group_adjusted``)."""
    name = "group_adjusted"
    measures = [measure for measure in study.options.measures if measure.endswith("_ppm")]
    if study.controls is None or not measures or study.table[VOLUME].isna().all():
        why = (
            "no volume or no susceptibility among the measures"
            if study.controls is not None
            else "no `controls` were named"
        )
        return Analysis((empty_table(name, study.by, why),))
    participants = study.cohort.demographics["participant_id"][study.controls].nunique()
    counts = {"Participants": participants, "Scans": count_scans(study.cohort, study.controls)}
    control = study.controls[study.table["scan"].to_numpy()]
    covariates = tuple(covariate for covariate in study.covariates if covariate != "group")
    table, lines = without_contradictions(study, covariates, where=name, tests="the regression")
    kept, site_lines = first_site_only(table, where=name)
    fitted = control & table.index.isin(kept.index)
    parts, coefficients = [], []
    for measure in measures:
        adjusted, relations = adjust_for_volume(
            table, controls=fitted, value=measure, by=study.by, covariates=covariates
        )
        coefficients += add_constants(relations, measure=measure).to_dict("records")
        rows = study.table[["scan", "abbreviation"]].assign(
            control=control, measure=measure, volume_mm3=study.table[VOLUME], value=study.table[measure]
        )
        parts.append(rows.assign(adjusted=adjusted))
    notes = {record["note"]: record["abbreviation"] for record in reversed(coefficients) if record["note"]}
    warnings = (*lines, *site_lines, *(f"{name}.tsv: {nucleus}: {note}" for note, nucleus in notes.items()))
    facts: dict[str, Any] = {"Controls": counts, "Covariates": list(covariates), "Coefficients": coefficients}
    return Analysis((ResultTable(name, _sort_by_scan(parts), facts=facts, notes=warnings),), warnings)


def fit_ageing(study: Study) -> Analysis:
    """Fit curves over age, with a constant per site (``group_ageing``, ``…_curves``, ``group_ageing_values``).

    The curves are first those of the controls or the reference group, then of each other group.
    """
    names = ("group_ageing", "group_ageing_curves", "group_ageing_values")
    if study.table["age"].isna().all():
        why = "no ages; add a column age to participants.tsv or sessions.tsv"
        return Analysis(tuple(empty_table(name, study.by, why) for name in names))
    site = "site" if "site" in study.covariates else None
    kept, lines = first_site_only(study.table, where=names[0]) if site else (study.table, [])
    parts: tuple[list[pd.DataFrame], ...] = ([], [], [])
    for which, selected in _select_by_group(study).items():
        table = kept[selected[kept["scan"].to_numpy()]]
        for measure in study.measures:
            for fitted, rows in zip(fit_age_curves(table, value=measure, by=study.by, site=site), parts, strict=True):
                rows.append(add_constants(fitted, measure=measure, scans=which))
    fits, curves, values = (pd.concat(rows, ignore_index=True) for rows in parts)
    if fits["aicc"].isna().all():
        return Analysis(tuple(empty_table(name, study.by, fits["note"].iloc[1]) for name in names), tuple(lines))
    facts, contents = {"Covariates": [site] if site else []}, (fits, curves, with_labels(values, study))
    tables = (ResultTable(name, rows, facts, tuple(lines)) for name, rows in zip(names, contents, strict=True))
    return Analysis(tuple(tables), tuple(lines))


def _select_by_group(study: Study) -> dict[str, NDArray[np.bool_]]:
    """Return the scans whose curves are fitted together, by their name in column ``scans``."""
    groups = study.cohort.demographics["group"]
    controls = {} if study.controls is None else {"controls": study.controls}
    names = sorted(groups.dropna().unique(), key=lambda name: (name != study.reference, str(name)))
    selections = {f"group {name}": (groups == name).to_numpy() for name in names}
    if len(names) < 2:
        selections = {"all": np.full(len(groups), True)}
    # a group may be the controls
    others = {key: rows for key, rows in selections.items() if not any(map(np.array_equal, controls.values(), [rows]))}
    return controls | others


def _sort_by_scan(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True).sort_values("scan", kind="stable", ignore_index=True)


_WIDENING = 0.05
"""False discovery rate below which the spread grows with age."""

_NORM_TABLES = ("group_norms", "group_zscores")


def compare_with_norms(study: Study) -> Analysis:
    """Compute centiles by age and sex, and the z-score of each scan (``group_norms``, ``group_zscores``).

    They are those of the study's controls, or of a file of saved norms.
    """
    options, path = study.options, study.options.norms
    saved = load_norms(study) if path else None
    why = ""
    if not saved and study.controls is None:
        why = "no `controls` were named"
    elif not saved and study.table["age"].isna().all():
        why = "no ages"
    if why:
        return Analysis(tuple(empty_table(name, study.by, why) for name in _NORM_TABLES))
    controls = np.full(len(study.table), False)
    if study.controls is not None:
        controls = study.controls[study.table["scan"].to_numpy()]
    norms, scores, fits, lines = [], [], [], list[str]()
    harmonized = {fit.measure for fit in saved.fits if options.harmonization_apply} if saved else {*study.measures}
    for measure in (name for name in study.measures if not name.endswith(HARMONIZED) or name in harmonized):
        if path and saved:
            fitted = _find_norms(path, saved, study, measure)
        else:
            fitted = fit_norms(study.table, controls=controls, value=measure, by=study.by)
            fits += _to_fits(study, fitted, measure)
        scored = score_scans(study.table, fitted, value=measure, by=study.by)
        norms.append(add_constants(centile_curves(fitted, by=study.by), measure=measure))
        rows = study.table[["scan", "abbreviation"]].assign(
            measure=measure, control=controls, age_years=study.table["age"], value=study.table[measure]
        )
        scores.append(pd.concat([rows, scored], axis=1))
        if not saved:
            names = [name for name, grows in notice_spread(study.table["participant_id"], scores[-1]).items() if grows]
            line = f"{_NORM_TABLES[0]}.tsv: {measure}: the spread of the controls grows with age in {list_some(names)}"
            lines += [f"{line}; z-scores of old people are too large, of young ones too small"] if names else []
    curves = pd.concat(norms, ignore_index=True)
    z_scores = pd.concat(scores, ignore_index=True).sort_values("scan", kind="stable", ignore_index=True)
    facts: dict[str, Any] = {"Centiles": list(CENTILES)}
    if path and saved:
        facts |= {"NormsApplied": path.name, "Sites": saved.sites}
        lines += [*compare_origin(path, saved, study), *_describe_norms(path, saved, study, z_scores)]
    elif curves.empty and study.controls is not None:
        n = study.cohort.demographics["participant_id"][study.controls].nunique()
        why = f"`controls` are {n} participant(s); centiles need {N_NORM} with values and ages"
        lines.append(f"{_NORM_TABLES[0]}.tsv: not computed: {why}")
    notes = tuple(lines)
    tables = (
        ResultTable(_NORM_TABLES[0], curves, facts, notes, why, fits=tuple(fits)),
        ResultTable(_NORM_TABLES[1], z_scores, facts, notes),
    )
    return Analysis(tables, notes)


def notice_spread(who: pd.Series, scores: pd.DataFrame) -> dict[str, bool]:
    """Return the nuclei in which distances of the controls (`who`) from their norms rise with age, by rank."""
    rows = scores[scores["control"]].dropna(subset=["z"])
    people = rows.assign(distance=rows["z"].abs(), who=who[rows.index])
    people = people.groupby(["abbreviation", "who"], observed=True)[["distance", "age_years"]].mean()
    tests = {
        str(name): spearmanr(part["distance"], part["age_years"], alternative="greater").pvalue
        for name, part in people.groupby("abbreviation", observed=True)
    }
    rates = adjust_p_values([*tests.values()], method="fdr")
    return {name: bool(rate < _WIDENING) for name, rate in zip(tests, rates, strict=True)}


def _to_fits(study: Study, norms: dict[tuple[Any, ...], AgeSexNorm], measure: str) -> list[NormFit]:
    """Return norms as they are saved, one record per model; none of harmonized values without their harmonization."""
    options, fits = study.options, list[NormFit]()
    if measure.endswith(HARMONIZED) and not (options.harmonization_save or options.harmonization_apply):
        return fits
    for key, rows in study.strata():
        by_nucleus = {str(name): norms.get((*key.values(), name)) for name in rows["abbreviation"].unique()}
        if usable := {name: norm for name, norm in by_nucleus.items() if norm}:
            fits.append(NormFit(measure, shown_stratum(key), usable))
    return fits


def _find_norms(path: Path, saved: SavedNorms, study: Study, measure: str) -> dict[tuple[Any, ...], AgeSexNorm]:
    """Return the saved norms of a measure by the values of ``study.by``."""
    norms: dict[tuple[Any, ...], AgeSexNorm] = {}
    for key, rows in study.strata():
        names = list(map(str, rows["abbreviation"].unique()))
        fit = find_fit(path, saved.fits, measure, key, names)
        norms |= {(*key.values(), name): fit.norms[name] for name in names if name in fit.norms}
    return norms


def _describe_norms(path: Path, saved: SavedNorms, study: Study, scores: pd.DataFrame) -> list[str]:
    """Return one line each about another harmonization, sites without norms, and scans without a score."""
    lines = []
    applied = study.options.harmonization_apply
    if applied and saved.harmonization_checksum not in ("", sha256(applied)):
        lines.append(
            f"{path.name}: norms of harmonized values were saved with a different harmonization from {applied.name}"
        )
    sites = sorted(map(str, study.cohort.demographics["site"].dropna().unique()))
    if saved.sites and (new := [site for site in sites if site not in saved.sites]):
        lines.append(
            f"{path.name}: site {list_some(new)} is not among those of the norms ({list_some(saved.sites)}); z-scores "
            "of raw values contain the difference between the sites"
        )
    lacking = scores[scores["z"].isna() & scores["value"].notna()]
    for note, rows in lacking.groupby("note", sort=False):
        n = count_scans(study.cohort, rows["scan"].unique())
        reason = "no age" if note == "no value or age" else str(note).removeprefix("no score: ")
        lines.append(f"{path.name}: no score for {n} scan(s): {reason}")
    return lines


def load_norms(study: Study) -> SavedNorms:
    """Read the saved norms, and check that they suit the study's measures, models and nuclei.

    Raises
    ------
    InputError
        If they do not.
    """
    path = Path(str(study.options.norms))
    saved = read_saved(path, SavedNorms)
    for measure in study.options.measures:
        _find_norms(path, saved, study, measure)
    return saved
