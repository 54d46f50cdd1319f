"""Norms of a study's controls by age and sex, or saved ones of another study, and z-scores relative to them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import sha256
from bids_dgmseg.stats.age_curves import CENTILES, N_NORM, AgeSexNorm, centile_curves, fit_norms, score_scans
from bids_dgmseg.study.cohort import load_cohort
from bids_dgmseg.study.harmonization import (
    HARMONIZED,
    NormFit,
    SavedNorms,
    compare_origin,
    find_fit,
    read_saved,
    shown_stratum,
)
from bids_dgmseg.study.results import ResultsSelection, find_results_folders
from bids_dgmseg.study.study import Analysis, ResultTable, Study, add_constants, build_study, count_scans, empty_table

_NAMES = ("group_norms", "group_zscores")


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
        return Analysis(tuple(empty_table(name, study.by, why) for name in _NAMES))
    controls = np.full(len(study.table), False)
    if study.controls is not None:
        controls = study.controls[study.table["scan"].to_numpy()]
    norms, scores, fits, lines = [], [], [], list[str]()
    measures = study.measures
    if saved:
        harmonized = {fit.measure for fit in saved.fits if options.harmonization_apply}
        measures = tuple(name for name in measures if not name.endswith(HARMONIZED) or name in harmonized)
    for measure in measures:
        if path and saved:
            fitted = _find_norms(path, saved, study, measure)
            scored = score_scans(study.table, fitted, value=measure, by=study.by)
        else:
            fitted = fit_norms(study.table, controls=controls, value=measure, by=study.by)
            scored = score_scans(study.table, fitted, controls=controls, value=measure, by=study.by)
            fits += _to_fits(study, fitted, measure)
        norms.append(add_constants(centile_curves(fitted, by=study.by), measure=measure))
        rows = study.table[["scan", "abbreviation"]].assign(
            measure=measure, control=controls, age_years=study.table["age"], value=study.table[measure]
        )
        scores.append(pd.concat([rows, scored], axis=1))
    curves = pd.concat(norms, ignore_index=True)
    z_scores = pd.concat(scores, ignore_index=True).sort_values("scan", kind="stable", ignore_index=True)
    facts: dict[str, Any] = {"Centiles": list(CENTILES)}
    if path and saved:
        facts |= {"NormsApplied": path.name, "Sites": saved.sites}
        lines += [*compare_origin(path, saved, study), *_describe(path, saved, study, z_scores)]
    elif curves.empty and study.controls is not None:
        n = study.cohort.demographics["participant_id"][study.controls].nunique()
        why = f"`controls` are {n} participant(s); centiles need {N_NORM} with values and ages"
        lines.append(f"{_NAMES[0]}.tsv: not computed: {why}")
    notes = tuple(lines)
    tables = (
        ResultTable(_NAMES[0], curves, facts, notes, why, fits=tuple(fits)),
        ResultTable(_NAMES[1], z_scores, facts, notes),
    )
    return Analysis(tables, notes)


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


def _describe(path: Path, saved: SavedNorms, study: Study, scores: pd.DataFrame) -> list[str]:
    """Return one line each about another harmonization, sites without norms, and scans without a score."""
    lines = []
    applied = study.options.harmonization_apply
    if applied and saved.harmonization_checksum not in ("", sha256(applied)):
        lines.append(
            f"{path.name}: norms of harmonized values were saved with another harmonization than {applied.name}"
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
    if study.options.norms is None:
        raise ValueError("no norms to apply")
    saved = read_saved(study.options.norms, SavedNorms)
    for measure in study.options.measures:
        _find_norms(study.options.norms, saved, study, measure)
    return saved


def check_norms(path: Path, model: str, nuclei: Sequence[str]) -> tuple[str, ...]:
    """Return the measures of a file of norms, without harmonized ones.

    Raises
    ------
    InputError
        If it has none of this model and these nuclei.
    """
    saved = read_saved(path, SavedNorms)
    measures = tuple(dict.fromkeys(fit.measure for fit in saved.fits if not fit.measure.endswith(HARMONIZED)))
    if not measures:
        raise InputError(f"{path.name}: only of harmonized values; save norms of measured values")
    strata = [fit.stratum for fit in saved.fits if fit.stratum.get("model") == model] or [{"model": model}]
    for measure, stratum in product(measures, strata):
        find_fit(path, saved.fits, measure, stratum, nuclei)
    return measures


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
    analysis = compare_with_norms(study)
    names, models = study.cohort.names.tolist(), study.cohort.keys["model"].tolist()
    scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in analysis.tables[1].rows.to_dict("records"):
        nuclei = scores.setdefault((names[row["scan"]], models[row["scan"]]), {})
        columns = {f"norm_{row['measure']}_{name}": row[name] for name in ("z", "centile")}
        nuclei.setdefault(str(row["abbreviation"]), {}).update(columns)
    return scores, list(analysis.warnings)
