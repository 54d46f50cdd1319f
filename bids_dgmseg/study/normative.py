"""Norms of a study's controls by age and sex, or saved ones of another study, and z-scores relative to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.io.files import sha256
from bids_dgmseg.stats.norms import CENTILES, N_NORM, AgeSexNorm, apply_norms, find_norms, fit_norms
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.group_comparisons import HARMONIZED
from bids_dgmseg.study.results import ResultsSelection, find_results_folders
from bids_dgmseg.study.saved_models import (
    SavedModel,
    compare_origin,
    read_model,
    saved_strata,
    shown_stratum,
    without_unknown_pairs,
)
from bids_dgmseg.study.study import Study, build_study, count_scans
from bids_dgmseg.study.tabular_files import Analysis, ResultTable, add_constants, empty_table

_NAMES = ("group_norms", "group_zscores")

_NUMBERS = {
    "Controls": "n_controls",
    "AgeLow": "age_low",
    "AgeHigh": "age_high",
    "AgeCentre": "age_centre",
    "AgeScale": "age_scale",
    "AgePowers": "powers",
    "StandardDeviation": "std",
}
"""Entry of a nucleus in a file → field of `AgeSexNorm`."""


def compare_with_norms(study: Study) -> Analysis:
    """Compute centiles by age and sex, and the z-score of each scan (``group_norms``, ``group_zscores``).

    They are those of the study's controls, or of a file of saved norms.
    """
    if study.options.norms:
        return _apply_saved(study)
    why = ""
    if study.controls is None:
        why = "no `control_filter` was given"
    elif study.table["age"].isna().all():
        why = "no ages"
    if why or study.controls is None:
        return Analysis(tuple(empty_table(name, study.by, why) for name in _NAMES))
    controls = study.controls[study.table["scan"].to_numpy()]
    norms, scores, fits = [], [], []
    for measure in study.measures:
        base = measure.removesuffix(HARMONIZED)
        if base not in study.options.measures:
            continue
        options: dict[str, Any] = {"controls": controls, "value": measure, "by": study.by, "sex": "sex"}
        curves, found = fit_norms(study.table, **options)
        norms.append(add_constants(curves, measure=measure))
        scores.append(pd.concat([_values(study, measure, controls), found], axis=1))
        if study.options.norms_save and (base == measure or _travels(study.options)):
            fits += _to_records(find_norms(study.table, **options), measure, study)
    table = pd.concat(norms, ignore_index=True)
    warnings: tuple[str, ...] = ()
    if table.empty:
        n = study.cohort.demographics["participant_id"][study.controls].nunique()
        why = f"`control_filter` matches {n} participants; centiles need {N_NORM} with values and ages"
        warnings = (f"{_NAMES[0]}.tsv: not computed: {why}",)
    facts: dict[str, Any] = {"Centiles": list(CENTILES)}
    people = study.cohort.demographics[study.controls]
    about = {"Sites": people.groupby("site")["participant_id"].nunique().to_dict()}
    tables = (
        ResultTable(_NAMES[0], table, facts={**facts, **about}, not_computed=why, fits=tuple(fits)),
        ResultTable(_NAMES[1], _by_scan(scores)),
    )
    return Analysis(tables, warnings)


def _travels(options: GroupOptions) -> bool:
    """Return whether harmonized values of other scans can be on the same scale."""
    return bool(options.harmonization_save or options.harmonization_apply)


def _values(study: Study, measure: str, controls: np.ndarray) -> pd.DataFrame:
    """Return the first columns of the table of z-scores."""
    return study.table[["scan", "abbreviation"]].assign(
        measure=measure, control=controls, age_years=study.table["age"], value=study.table[measure]
    )


def _by_scan(scores: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(scores, ignore_index=True).sort_values("scan", kind="stable", ignore_index=True)


def _apply_saved(study: Study) -> Analysis:
    """Score the scans relative to the norms of a file."""
    saved = load_norms(study)
    study = without_unknown_pairs(saved, study)
    if study.table.empty:
        why = f"{saved.path.name} has no bilateral rows"
        return Analysis(tuple(empty_table(name, study.by, why) for name in _NAMES))
    controls = np.full(len(study.table), False)
    if study.controls is not None:
        controls = study.controls[study.table["scan"].to_numpy()]
    norms, scores, lines = [], [], compare_origin(saved, study)
    harmonized = [f"{measure}{HARMONIZED}" for measure in study.options.measures]
    if study.options.harmonization_apply:
        lines += _compare_harmonization(saved, study.options.harmonization_apply)
    else:
        harmonized = []
    known = {str(fit.get("Measure")) for fit in saved.fits}
    measures = [*study.options.measures, *(name for name in harmonized if name in known and name in study.table)]
    for measure in measures:
        found_scores = []
        for key, rows in saved_strata(saved, study):
            own = _read_norms(saved, measure, key, list(map(str, rows["abbreviation"].unique())))
            curves, found = apply_norms(rows, own, value=measure)
            norms.append(add_constants(curves.assign(**key), measure=measure)[["measure", *key, *curves.columns]])
            found_scores.append(found)
        all_scores = pd.concat(found_scores).loc[study.table.index]
        scores.append(pd.concat([_values(study, measure, controls), all_scores], axis=1))
    table = _by_scan(scores)
    lines += _describe_scans(saved, study, table)
    facts = {"Centiles": list(CENTILES), "NormsApplied": saved.path.name, "Sites": saved.content.get("Sites")}
    rows = pd.concat(norms, ignore_index=True)
    notes = tuple(lines)
    return Analysis((ResultTable(_NAMES[0], rows, facts, notes), ResultTable(_NAMES[1], table, facts, notes)), notes)


def _compare_harmonization(saved: SavedModel, path: Path) -> list[str]:
    """Return a line if the norms of harmonized values are of another harmonization."""
    stated = saved.content.get("HarmonizationChecksum")
    has_harmonized = any(str(fit.get("Measure")).endswith(HARMONIZED) for fit in saved.fits)
    if not has_harmonized or stated == sha256(path):
        return []
    return [f"{saved.path.name}: norms of harmonized values were saved with another harmonization than {path.name}"]


def _describe_scans(saved: SavedModel, study: Study, scores: pd.DataFrame) -> list[str]:
    """Return one line each about sites without norms, ages beyond the norms, and scans without age or sex."""
    lines, name = [], saved.path.name
    sites, known = study.cohort.demographics["site"].dropna().unique(), saved.content.get("Sites")
    if isinstance(known, dict) and (new := [site for site in sites if site not in known]) and known:
        lines.append(
            f"{name}: site {list_some(map(str, new))} is not among those of the norms ({list_some(map(str, known))}); "
            "z-scores of raw values contain the difference between the sites"
        )
    per_scan = scores[scores["value"].notna()].drop_duplicates(["scan", "note"])
    for start, what in (
        ("extrapolated", "an age beyond those of the norms; the scores are extrapolated"),
        ("no score: the norms are of", "a sex that the norms lack; no score"),
    ):
        rows = per_scan["scan"][per_scan["note"].str.startswith(start)].to_numpy(int)
        if n := count_scans(study.cohort, rows):
            limits = next(note.rpartition("(")[2].rstrip(")") for note in per_scan["note"] if note.startswith(start))
            shown = f" ({limits})" if start == "extrapolated" else ""
            lines.append(f"{name}: {count(n, 'scan')} with {what}{shown}")
    if n := count_scans(study.cohort, study.cohort.demographics["age"].isna()):
        lines.append(f"{name}: {count(n, 'scan')} without an age; no score")
    return lines


def load_norms(study: Study) -> SavedModel:
    """Read the saved norms, and check that they suit the study's measures, models and nuclei.

    Raises
    ------
    InputError
        If they do not.
    """
    if study.options.norms is None:
        raise ValueError("no norms to apply")
    saved = read_model(study.options.norms, "norms")
    for measure, (key, rows) in product(study.options.measures, saved_strata(saved, study)):
        _read_norms(saved, measure, key, list(map(str, rows["abbreviation"].unique())))
    return saved


def check_norms(path: Path, model: str, nuclei: Sequence[str]) -> tuple[str, ...]:
    """Return the measures of a file of norms, without harmonized ones.

    Raises
    ------
    InputError
        If it has none of this model and these nuclei.
    """
    saved = read_model(path, "norms")
    measures = list(dict.fromkeys(str(fit.get("Measure")) for fit in saved.fits))
    raw = [measure for measure in measures if not measure.endswith(HARMONIZED)]
    if not raw:
        saved.fail("Fits", "only of harmonized values")
    for measure in raw:
        strata = [fit.get("Stratum") or {} for fit in saved.fits if fit.get("Measure") == measure]
        for stratum in [one for one in strata if one.get("model") == model] or [{"model": model}]:
            saved.find(measure, stratum, nuclei)
    return tuple(raw)


def _to_records(
    norms: Sequence[tuple[Mapping[str, Any], AgeSexNorm]], measure: str, study: Study
) -> list[dict[str, Any]]:
    """Return norms as they are saved: one record per model."""
    records = []
    for key, rows in study.strata():
        own = {
            str(found["abbreviation"]): one
            for found, one in norms
            if all(found[name] == value for name, value in key.items())
        }
        nuclei = list(map(str, rows["abbreviation"].unique()))
        if own:
            records.append(
                {
                    "Measure": measure,
                    "Stratum": shown_stratum(key),
                    "Nuclei": list(own),
                    "NotFitted": [name for name in nuclei if name not in own],
                    "Norms": [_to_record(one) for one in own.values()],
                }
            )
    return records


def _to_record(found: AgeSexNorm) -> dict[str, Any]:
    return {
        **{entry: getattr(found, field) for entry, field in _NUMBERS.items()},
        "Sexes": found.sexes,
        "Coefficients": found.coefficients,
        "Inverse": found.inverse,
    }


def _read_norms(
    saved: SavedModel, measure: str, key: Mapping[str, Any], nuclei: Sequence[str]
) -> dict[str, AgeSexNorm]:
    """Return the norms of a measure and model by nucleus."""
    fit = saved.find(measure, key, nuclei)
    names, records = fit["Nuclei"], saved.entry(fit, "Norms", list)
    if len(names) != len(records) or not all(isinstance(record, dict) for record in records):
        saved.fail("Fits.Norms", f"expected one record for each of {len(names)} nuclei")
    found = {}
    for name, record in zip(names, records, strict=True):
        numbers = {
            field: saved.entry(record, entry, (int, float), where="Fits.Norms") for entry, field in _NUMBERS.items()
        }
        sexes = tuple(map(str, saved.entry(record, "Sexes", list, where="Fits.Norms")))
        n = numbers["powers"] + max(len(sexes) - 1, 0)
        if numbers["powers"] not in (2, 3) or not numbers["age_scale"] > 0 or not numbers["std"] > 0:
            saved.fail("Fits.Norms", "AgePowers is not 2 or 3, or AgeScale or StandardDeviation not positive")
        if numbers["n_controls"] <= n:
            saved.fail("Fits.Norms.Controls", f"{numbers['n_controls']} for {n} coefficients")
        coefficients, inverse = saved.numbers(record, "Coefficients", (n,)), saved.numbers(record, "Inverse", (n, n))
        found[str(name)] = AgeSexNorm(**numbers, sexes=sexes, coefficients=coefficients, inverse=inverse)
    return found


def score_participants(
    output_dir: Path, dataset: Path, norms: Path, *, model: str, measures: Sequence[str], participants: Sequence[str]
) -> tuple[dict[tuple[str, str], dict[str, dict[str, Any]]], list[str]]:
    """Score the results of some participants, for their pages.

    Returns
    -------
    scores : dict
        Name of the scan and model → nucleus → column (``norm_mean_ppm_z``, ``norm_mean_ppm_centile``) → value.
    warnings : list of str

    Raises
    ------
    InputError
        If participants.tsv cannot be read, or the norms do not suit the results.
    """
    selection = ResultsSelection(participants=tuple(participants), models=(model,))
    folders = find_results_folders([output_dir], datasets=[dataset])
    cohort = load_cohort(folders, selection=selection, include_failed=True)
    if cohort.demographics["age"].isna().all():
        raise InputError(f"{norms.name}: no ages; add a column age to participants.tsv")
    study = build_study(cohort, GroupOptions(measures=tuple(measures), norms=norms, covariates=("none",)))
    analysis = _apply_saved(study)
    names, models = study.cohort.names.tolist(), study.cohort.keys["model"].tolist()
    scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in analysis.tables[1].rows.to_dict("records"):
        own = scores.setdefault((names[row["scan"]], models[row["scan"]]), {})
        columns = {f"norm_{row['measure']}_{name}": row[name] for name in ("z", "centile")}
        own.setdefault(str(row["abbreviation"]), {}).update(columns)
    return scores, list(analysis.warnings)
