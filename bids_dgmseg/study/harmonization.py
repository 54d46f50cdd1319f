"""Harmonization of a study across sites: fitted to it, or fitted to another study and saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.stats.combat import N_SITE, Harmonized, describe_effects, harmonize, sites_apart
from bids_dgmseg.stats.combat_model import N_MATCHED, N_TRAVELLING, CombatModel, NewSite, SiteEffects, Term, add_sites
from bids_dgmseg.study.saved_models import (
    SavedModel,
    compare_origin,
    read_model,
    shown_stratum,
    without_unknown_pairs,
)
from bids_dgmseg.study.study import Study, covariate_values
from bids_dgmseg.study.tabular_files import Analysis, ResultTable, not_computed_line

_HARMONIZED = {
    "group_harmonized": ("scan", "abbreviation", "measure", "raw", "harmonized"),
    "group_site_variance": (
        *("abbreviation", "n", "site_variance_before", "site_variance_after", "reduction"),
        *("p_site_before", "p_site_after"),
    ),
    "group_site_effects": (
        *("site", "abbreviation", "n", "n_participants", "n_unused"),
        *("shift", "scale", "shift_bayes", "scale_bayes", "note"),
    ),
}
"""Tables of harmonization → columns, after the strata in those of the site effects."""

_EFFECTS = {
    "Shift": "shift",
    "Variance": "variance",
    "ShiftBayes": "shift_bayes",
    "VarianceBayes": "variance_bayes",
    "Participants": "n_participants",
}
"""Entry of a site in a file → field of `SiteEffects`."""


def harmonize_sites(study: Study) -> Analysis:
    """Harmonize each measure of each model across sites with ComBat, or with a saved one.

    The tables are ``group_harmonized``, ``group_site_variance`` and ``group_site_effects``; they are empty, with the
    reason, if nothing can be harmonized.
    """
    strata = ("measure", *study.cohort.strata)
    columns = {name: [*(() if name == "group_harmonized" else strata), *own] for name, own in _HARMONIZED.items()}
    sites = study.cohort.demographics["site"].value_counts().sort_index()
    n_without = len(study.cohort.scans) - int(sites.sum())
    facts: dict[str, Any] = {"Sites": sites.to_dict(), "ScansWithoutSite": n_without}
    if study.options.harmonization_apply:
        return _apply_saved(study, columns, facts)
    if len(sites) < 2:
        why = f"only one site ({sites.index[0]})" if len(sites) else "no site is known; name its column: `site_column`"
        if len(sites) and n_without:
            why += f"; {count(n_without, 'scan')} without a site"
        empty = {name: pd.DataFrame(columns=names) for name, names in columns.items()}
        return Analysis(tuple(ResultTable(name, rows, facts, not_computed=why) for name, rows in empty.items()))
    covariates = [name for name in study.covariates if name != "site"]
    has_groups = study.cohort.demographics["group"].nunique() > 1 and not _fit_on_controls(study)
    if has_groups and not study.options.covariates:
        covariates.append("group")  # unless the covariates were chosen by the user
    parts: dict[str, list[pd.DataFrame]] = {name: [pd.DataFrame(columns=names)] for name, names in columns.items()}
    measures: dict[str, list[pd.Series]] = defaultdict(list)
    lines: list[str] = []
    fits: list[Mapping[str, Any]] = []
    for measure, (key, rows) in product(study.measures, study.strata()):
        result, warnings = _harmonize_stratum(study, rows, measure, covariates, stratum=study.stratum_name(key))
        lines += warnings
        if result is None:
            continue
        harmonized = _as_column(result.values, rows)
        measures[f"{measure}_harmonized"].append(harmonized)
        both = rows[["scan", "abbreviation"]].assign(raw=rows[measure], harmonized=harmonized)
        for name, table in zip(columns, (both, result.variance, result.sites), strict=True):
            named = table.rename(columns={"nucleus": "abbreviation"}).assign(measure=measure, **key)
            parts[name].append(named[columns[name]])
        if measure in study.options.measures:
            fits.append(_to_record(result.model, measure, key, result.values.columns))
    lines = list(dict.fromkeys(lines))
    spellings = [line for name in ("site", *covariates) for line in study.cohort.spellings.get(name, ())]
    facts |= {
        "Method": "longitudinal ComBat" if study.options.combat_longitudinal else "ComBat with empirical Bayes",
        "CovariatesKept": covariates,
        "AgeEffect": study.options.combat_age,
    }
    if _fit_on_controls(study):
        facts["FittedOn"] = "controls"
    why = "" if measures else "; ".join(line for line in lines if "not computed" in line)
    tables = (
        ResultTable(
            name,
            pd.concat(found[1:] or found, ignore_index=True),
            facts,
            (*spellings, *lines),
            why,
            fits=tuple(fits) if name == "group_harmonized" else (),
        )
        for name, found in parts.items()
    )
    harmonized_columns = {name: pd.concat(values) for name, values in measures.items()}
    return Analysis(tuple(tables), tuple(lines), pd.DataFrame(harmonized_columns, index=study.table.index))


def _fit_on_controls(study: Study) -> bool:
    """Return whether the fit is of the controls only, since it is to be saved."""
    return study.controls is not None and study.options.harmonization_save is not None


def _as_column(values: pd.DataFrame, rows: pd.DataFrame) -> pd.Series:
    """Return values of scans and nuclei in the order of the rows of a long table."""
    scan = values.index.get_indexer(pd.Index(rows["scan"]))
    nucleus = values.columns.get_indexer(pd.Index(rows["abbreviation"]))
    return pd.Series(values.to_numpy()[scan, nucleus], rows.index)


def _pivot(rows: pd.DataFrame, measure: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per scan: the values of the nuclei, and everything else."""
    wide = rows.pivot(index="scan", columns="abbreviation", values=measure)[rows["abbreviation"].unique()]
    return wide, rows.drop_duplicates("scan").set_index("scan").loc[wide.index]


def _harmonize_stratum(
    study: Study, rows: pd.DataFrame, measure: str, covariates: Sequence[str], *, stratum: str
) -> tuple[Harmonized | None, list[str]]:
    """Harmonize one measure of one model across the sites that have enough scans; None if it cannot be done."""
    age_effect = study.options.combat_age
    wide, scans = _pivot(rows, measure)
    chosen = np.full(len(wide), True)
    if study.controls is not None and _fit_on_controls(study):
        chosen = study.controls[wide.index.to_numpy(int)]
    varying = scans[[name for name in covariates if scans[name][chosen].nunique() > 1]]
    usable = varying.notna().all(axis=1) & scans["site"].notna()
    counts = scans[usable & chosen].groupby("site")["participant_id"].nunique()
    small = [site for site in scans["site"].dropna().unique() if counts.get(site, 0) < N_SITE]
    where = f"group_harmonized.tsv: {stratum}: " if stratum else "group_harmonized.tsv: "
    who = "control" if _fit_on_controls(study) else "participant"
    warnings = [
        f"{where}site {site} has usable scans of {count(counts.get(site, 0), who)}, harmonization needs "
        f"{N_SITE}; its values are not harmonized"
        for site in sorted(small, key=str)
    ]
    if n_unusable := int((~usable).sum()):
        lacking = " or ".join(["site", *varying.columns])
        verb, whose = ("lacks", "its") if n_unusable == 1 else ("lack", "their")
        warnings.append(f"{where}{count(n_unusable, 'scan')} {verb} {lacking}; {whose} values are not harmonized")
    large = scans["site"].where(~scans["site"].isin(small))
    if "age" in varying:
        remedy = "compare `combat_age` spline, or " if age_effect == "linear" else ""
        fitted = usable & chosen
        for site in sites_apart(scans["age"][fitted], large[fitted]):
            youngest, oldest = scans["age"][fitted & (large == site)].agg(["min", "max"])
            warnings.append(
                f"{where}ages at site {site} ({youngest:.0f} to {oldest:.0f}) hardly overlap those at other sites, so "
                f"its site effect depends on the assumed effect of age ({age_effect}); {remedy}harmonize only sites of "
                "similar ages"
            )
    try:
        if (counts >= N_SITE).sum() < 2:
            raise InputError(f"fewer than two sites have usable scans of {N_SITE} {who}s")
        smooth = ["age"] if age_effect == "spline" and "age" in varying else []
        result = harmonize(
            wide,
            site=large,
            covariates=varying,
            smooth=smooth,
            participant=scans["participant_id"],
            fit_on=chosen,
            longitudinal=study.options.combat_longitudinal,
        )
    except InputError as error:
        return None, [*warnings, not_computed_line("group_harmonized", error, stratum)]
    return result, warnings


def _apply_saved(study: Study, columns: Mapping[str, list[str]], facts: Mapping[str, Any]) -> Analysis:
    """Remove the site effects of a saved harmonization, and of new sites with enough participants."""
    saved, index = load_harmonization(study), study.table.index
    study = without_unknown_pairs(saved, study)
    if study.table.empty:
        why = f"{saved.path.name} has no bilateral rows"
        empty = [ResultTable(name, pd.DataFrame(columns=names), not_computed=why) for name, names in columns.items()]
        return Analysis(tuple(empty), measures=pd.DataFrame(index=index))
    parts: dict[str, list[pd.DataFrame]] = {name: [pd.DataFrame(columns=names)] for name, names in columns.items()}
    measures: dict[str, list[pd.Series]] = defaultdict(list)
    lines, fits = compare_origin(saved, study), []
    for measure, (key, rows) in product(study.options.measures, study.strata()):
        wide, scans = _pivot(rows, measure)
        model = _find_model(saved, measure, key, list(map(str, wide.columns)))
        covariates = pd.DataFrame(
            {term.name: _covariate(study, term.name)[wide.index] for term in model.terms}, index=wide.index
        )
        participant, site = scans["participant_id"], scans["site"]
        controls = None if study.controls is None else study.controls[wide.index.to_numpy(int)]
        extended, new = add_sites(
            model, wide, site=site, covariates=covariates, participant=participant, fit_on=controls
        )
        lines += _describe_new_sites(saved, model, new, has_controls=controls is not None)
        lines += _describe_covariates(saved, model, covariates)
        result = extended.apply(wide, site=site, covariates=covariates, participant=participant)
        harmonized = _as_column(result, rows)
        measures[f"{measure}_harmonized"].append(harmonized)
        parts["group_harmonized"].append(
            rows[["scan", "abbreviation"]].assign(measure=measure, raw=rows[measure], harmonized=harmonized)
        )
        effects = _effects_table(extended, new, result, site, known=model.sites.names)
        parts["group_site_effects"].append(effects.assign(measure=measure, **key)[columns["group_site_effects"]])
        fits.append(_to_record(extended, measure, key, wide.columns))
    lines = list(dict.fromkeys(lines))
    facts = {**facts, "Method": "saved ComBat", "HarmonizationApplied": saved.path.name}
    facts |= {"SitesOfTheFit": list(dict.fromkeys(str(site["Name"]) for fit in saved.fits for site in fit["Sites"]))}
    reasons = {"group_site_variance": f"the site effects are those of {saved.path.name}, see group_site_effects.tsv"}
    tables = (
        ResultTable(
            name,
            pd.concat(found[1:] or found, ignore_index=True),
            facts,
            tuple(lines),
            reasons.get(name, ""),
            fits=tuple(fits) if name == "group_harmonized" else (),
        )
        for name, found in parts.items()
    )
    harmonized_columns = {name: pd.concat(values) for name, values in measures.items()}
    return Analysis(tuple(tables), tuple(lines), pd.DataFrame(harmonized_columns, index=study.table.index))


def load_harmonization(study: Study) -> SavedModel:
    """Read the saved harmonization, and check that it suits the study's measures, models, nuclei and covariates.

    Raises
    ------
    InputError
        If it does not.
    """
    path = study.options.harmonization_apply
    if path is None:
        raise ValueError("no harmonization to apply")
    saved = read_model(path, "harmonization")
    for measure, (key, rows) in product(study.options.measures, without_unknown_pairs(saved, study).strata()):
        model = _find_model(saved, measure, key, list(map(str, rows["abbreviation"].unique())))
        for term in model.terms:
            try:
                is_known = bool(_covariate(study, term.name).notna().any())
            except InputError:
                is_known = False
            if not is_known:
                raise InputError(f"{path.name}: needs {term.name} of the participants; add it to participants.tsv")
    return saved


def _covariate(study: Study, name: str) -> pd.Series:
    """Return a covariate of each scan of the cohort."""
    demographics = study.cohort.demographics
    return demographics[name] if name in ("age", "sex", "group") else covariate_values(study.cohort, name)


def _describe_new_sites(
    saved: SavedModel, model: CombatModel, new: Sequence[NewSite], *, has_controls: bool
) -> list[str]:
    """Return one line per site that is not in the file."""
    lines, known = [], list_some(map(str, model.sites.names))
    who = "control" if has_controls else "participant"
    for site in new:
        start = f"{saved.path.name}: site {site.name} is new (known: {known}); "
        if site.method:
            how = {"travelling": f"{site.n_travelling} also scanned at a known site", "matched": ""}[site.method]
            used = how or count(site.n_participants, who)
            lines.append(f"{start}its effects are estimated from {used}")
        else:
            lines.append(
                f"{start}its values are not harmonized: {count(site.n_participants, who)}, needed are {N_MATCHED}, or "
                f"{N_TRAVELLING} also scanned at a known site (here {site.n_travelling})"
            )
    return lines


def _describe_covariates(saved: SavedModel, model: CombatModel, covariates: pd.DataFrame) -> list[str]:
    """Return lines about scans beyond the fit's numbers, of unknown categories or without a covariate."""
    lines = []
    for name, beyond in model.beyond(covariates).items():
        if n := int(beyond.sum()):
            term = next(term for term in model.terms if term.name == name)
            lines.append(
                f"{saved.path.name}: {name} of {count(n, 'scan')} is beyond that of the fit, {term.low:.4g} to "
                f"{term.high:.4g}; its effect is extrapolated"
            )
    for term in model.terms:
        missing = ~np.isfinite(term.columns(covariates[term.name])).all(axis=1)
        if n := int(missing.sum()):
            known = f" or not {' or '.join(map(str, term.levels))}" if term.kind == "category" else ""
            lines.append(f"{saved.path.name}: {term.name} of {count(n, 'scan')} is missing{known}; not harmonized")
    return lines


def _effects_table(
    model: CombatModel, new: Sequence[NewSite], result: pd.DataFrame, site: pd.Series, *, known: Sequence[Any]
) -> pd.DataFrame:
    """Return the effects of the sites of these scans."""
    methods, records = {own.name: own.method for own in new}, []
    for name in sorted(site.dropna().unique(), key=str):
        scans = result[(site == name).to_numpy()]
        row = model.sites.names.index(name) if name in model.sites.names else None
        for label in result.columns:
            n = int(scans[label].notna().sum())
            record: dict[str, Any] = {"site": name, "abbreviation": label, "n": n, "n_unused": len(scans) - n}
            record |= {"n_participants": 0, "note": ""}
            if row is None or label not in model.nuclei:
                record["note"] = "not harmonized: not in the saved harmonization"
            else:
                nucleus = model.nuclei.index(str(label))
                record |= describe_effects(model, row, nucleus)
                record["n_participants"] = int(model.sites.n_participants[row, nucleus])
                if name not in known:
                    record["note"] = f"estimated from {methods[name]} participants"
            records.append(record)
    return pd.DataFrame(records, columns=list(_HARMONIZED["group_site_effects"]))


def _to_record(model: CombatModel, measure: str, key: Mapping[str, Any], nuclei: pd.Index[Any]) -> dict[str, Any]:
    """Return a fit as it is saved."""
    sites = []
    for row, name in enumerate(model.sites.names):
        site = {"Name": name, **{entry: getattr(model.sites, field)[row] for entry, field in _EFFECTS.items()}}
        sites.append(site | ({"Offset": model.offset[row]} if model.offset is not None else {}))
    terms = [
        {"Name": term.name, "Kind": term.kind, "Levels": term.levels}
        if term.kind == "category"
        else {
            **{"Name": term.name, "Kind": term.kind, "Centre": term.centre, "Low": term.low, "High": term.high},
            "Knots": term.knots,
        }
        for term in model.terms
    ]
    return {
        "Measure": measure,
        "Stratum": shown_stratum(key),
        "Nuclei": model.nuclei,
        "NotFitted": [str(name) for name in nuclei if name not in model.nuclei],
        "Covariates": terms,
        "Constant": model.constant,
        "Coefficients": model.coefficients,
        "StandardDeviation": model.std,
        **({"StandardDeviationBetween": model.std_between} if model.std_between is not None else {}),
        "Sites": sites,
    }


def _find_model(saved: SavedModel, measure: str, key: Mapping[str, Any], nuclei: Sequence[str]) -> CombatModel:
    """Return the saved fit of a measure and model."""
    record = saved.find(measure, key, nuclei)
    names = tuple(map(str, saved.entry(record, "Nuclei", list)))
    terms = []
    for term in saved.entry(record, "Covariates", list):
        if not isinstance(term, dict) or term.get("Kind") not in ("line", "spline", "category"):
            saved.fail("Fits.Covariates", "a Kind is not line, spline or category")
        label = saved.entry(term, "Name", str, where="Fits.Covariates")
        if term["Kind"] == "category":
            levels = saved.entry(term, "Levels", list, where="Fits.Covariates")
            terms.append(Term(label, "category", levels=tuple(levels)))
            continue
        centre, low, high = (
            float(saved.entry(term, entry, (int, float), where="Fits.Covariates"))
            for entry in ("Centre", "Low", "High")
        )
        knots = saved.numbers(term, "Knots", (len(saved.entry(term, "Knots", list)),)).tolist()
        if term["Kind"] == "spline" and not (len(knots) > 2 and (np.diff(knots) > 0).all()):
            saved.fail("Fits.Covariates.Knots", "not three or more increasing numbers")
        terms.append(Term(label, term["Kind"], centre=centre, low=low, high=high, knots=tuple(knots)))
    n, sites = len(names), saved.entry(record, "Sites", list)
    if not sites or not all(isinstance(site, dict) and isinstance(site.get("Name"), str) for site in sites):
        saved.fail("Fits.Sites", "each needs a Name")
    n_columns = sum(
        max(len(term.levels) - 1, 1) if term.kind == "category" else max(len(term.knots) - 1, 1) for term in terms
    )
    std = saved.numbers(record, "StandardDeviation", (n,))
    if not (std > 0).all():
        saved.fail("Fits.StandardDeviation", "not positive")
    effects = [np.array([saved.numbers(site, entry, (n,)) for site in sites]) for entry in _EFFECTS]
    is_longitudinal = "StandardDeviationBetween" in record
    return CombatModel(
        names,
        tuple(terms),
        saved.numbers(record, "Constant", (n,)),
        saved.numbers(record, "Coefficients", (n_columns, n)),
        std,
        SiteEffects(tuple(site["Name"] for site in sites), *effects),
        saved.numbers(record, "StandardDeviationBetween", (n,)) if is_longitudinal else None,
        np.array([saved.numbers(site, "Offset", (n,)) for site in sites]) if is_longitudinal else None,
    )
