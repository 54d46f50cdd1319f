"""A saved harmonization: what was fitted to a study, as a record of a file and as a model to apply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.combat_model import CombatModel, SiteEffects, Term
from bids_dgmseg.study.saved_models import SavedModel, read_model, saved_strata, shown_stratum
from bids_dgmseg.study.study import Study, covariate_values

_EFFECTS = {
    "Shift": "shift",
    "Variance": "variance",
    "ShiftBayes": "shift_bayes",
    "VarianceBayes": "variance_bayes",
    "Participants": "n_participants",
}
"""Entry of a site in a file → field of `SiteEffects`."""


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
    for measure, (key, rows) in product(study.options.measures, saved_strata(saved, study)):
        model = find_model(saved, measure, key, list(map(str, rows["abbreviation"].unique())))
        for term in model.terms:
            try:
                is_known = bool(covariate_of(study, term).notna().any())
            except InputError:
                is_known = False
            if not is_known:
                raise InputError(f"{path.name}: needs {term.name} of the participants; add it to participants.tsv")
    return saved


def covariate_of(study: Study, term: Term) -> pd.Series:
    """Return a covariate of each scan of the cohort; categories that are all numbers here are text, as in the fit."""
    demographics, participants = study.cohort.demographics, study.cohort.participants
    if term.name in ("age", "sex", "group"):
        return demographics[term.name]
    is_text = term.kind == "category" and term.name in participants
    return participants[term.name] if is_text else covariate_values(study.cohort, term.name)


def to_record(model: CombatModel, measure: str, key: Mapping[str, Any], nuclei: pd.Index[Any]) -> dict[str, Any]:
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


def find_model(saved: SavedModel, measure: str, key: Mapping[str, Any], nuclei: Sequence[str]) -> CombatModel:
    """Return the saved fit of a measure and model."""
    record = saved.find(measure, key, nuclei)
    names = tuple(map(str, saved.entry(record, "Nuclei", list)))
    terms = tuple(_read_term(saved, term) for term in saved.entry(record, "Covariates", list))
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
        terms,
        saved.numbers(record, "Constant", (n,)),
        saved.numbers(record, "Coefficients", (n_columns, n)),
        std,
        SiteEffects(tuple(site["Name"] for site in sites), *effects),
        saved.numbers(record, "StandardDeviationBetween", (n,)) if is_longitudinal else None,
        np.array([saved.numbers(site, "Offset", (n,)) for site in sites]) if is_longitudinal else None,
    )


def _read_term(saved: SavedModel, term: Any) -> Term:
    """Return a covariate of a saved fit."""
    where = "Fits.Covariates"
    if not isinstance(term, dict) or term.get("Kind") not in ("line", "spline", "category"):
        saved.fail(where, "a Kind is not line, spline or category")
    label = saved.entry(term, "Name", str, where=where)
    if term["Kind"] == "category":
        return Term(label, "category", levels=tuple(saved.entry(term, "Levels", list, where=where)))
    centre, low, high = (
        float(saved.entry(term, entry, (int, float), where=where)) for entry in ("Centre", "Low", "High")
    )
    knots = saved.numbers(term, "Knots", (len(saved.entry(term, "Knots", list)),)).tolist()
    if term["Kind"] == "spline" and not (len(knots) > 2 and (np.diff(knots) > 0).all()):
        saved.fail(f"{where}.Knots", "not three or more increasing numbers")
    return Term(label, term["Kind"], centre=centre, low=low, high=high, knots=tuple(knots))
