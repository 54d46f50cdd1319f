"""Harmonization of a study across sites: fitted to it, or fitted to another study and saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.stats.combat import N_SITE, Harmonized, describe_effects, harmonize, sites_apart
from bids_dgmseg.stats.combat_model import N_MATCHED, N_TRAVELLING, CombatModel, NewSite, add_sites
from bids_dgmseg.study.saved_harmonization import covariate_of, find_model, load_harmonization, to_record
from bids_dgmseg.study.saved_models import SavedModel, compare_origin, without_unknown_pairs
from bids_dgmseg.study.study import Study, first_rows
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


class _Results:
    """Tables, harmonized measures and fits, filled stratum by stratum."""

    def __init__(self, study: Study) -> None:
        strata = ("measure", *study.cohort.strata)
        self._columns = {
            name: [*(() if name == "group_harmonized" else strata), *own] for name, own in _HARMONIZED.items()
        }
        self._parts: dict[str, list[pd.DataFrame]] = {name: [] for name in _HARMONIZED}
        self._measures: dict[str, list[pd.Series]] = defaultdict(list)
        self.fits: list[Mapping[str, Any]] = []

    def add(self, name: str, table: pd.DataFrame, measure: str, key: Mapping[str, Any]) -> None:
        """Add rows to a table."""
        named = table.rename(columns={"nucleus": "abbreviation"}).assign(measure=measure, **key)
        self._parts[name].append(named[self._columns[name]])

    def add_values(self, values: pd.DataFrame, rows: pd.DataFrame, measure: str, key: Mapping[str, Any]) -> None:
        """Add the harmonized values of scans and nuclei for rows of the long table."""
        harmonized = _as_column(values, rows)
        self._measures[f"{measure}_harmonized"].append(harmonized)
        both = rows[["scan", "abbreviation"]].assign(raw=rows[measure], harmonized=harmonized)
        self.add("group_harmonized", both, measure, key)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was harmonized."""
        return not self._measures

    def analysis(
        self,
        index: pd.Index[Any],
        facts: Mapping[str, Any],
        lines: Sequence[str] = (),
        *,
        notes: Sequence[str] = (),
        not_computed: Mapping[str, str],
    ) -> Analysis:
        """Return everything, with notes in front of the lines and why each table is empty."""
        tables = (
            ResultTable(
                name,
                pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=self._columns[name]),
                facts,
                (*notes, *lines),
                not_computed.get(name, ""),
                fits=tuple(self.fits) if name == "group_harmonized" else (),
            )
            for name, parts in self._parts.items()
        )
        measures = {name: pd.concat(values) for name, values in self._measures.items()}
        return Analysis(tuple(tables), tuple(lines), pd.DataFrame(measures, index=index))


def harmonize_sites(study: Study) -> Analysis:
    """Harmonize each measure of each model across sites with ComBat, or with a saved one.

    The tables are ``group_harmonized``, ``group_site_variance`` and ``group_site_effects``; they are empty, with the
    reason, if nothing can be harmonized.
    """
    of_scan = study.cohort.demographics["site"].iloc[np.unique(first_rows(study.cohort))]
    sites, n_without = of_scan.value_counts().sort_index(), int(of_scan.isna().sum())
    facts: dict[str, Any] = {"Sites": sites.to_dict(), "ScansWithoutSite": n_without}
    if study.options.harmonization_apply:
        return _apply_saved(study, facts)
    results, index = _Results(study), study.table.index
    if len(sites) < 2:
        why = f"only one site ({sites.index[0]})" if len(sites) else "no site is known; name its column: `site_column`"
        if len(sites) and n_without:
            why += f"; {count(n_without, 'scan')} without a site"
        return results.analysis(index, facts, not_computed=dict.fromkeys(_HARMONIZED, why))
    covariates = _covariates_kept(study)
    lines: list[str] = []
    for measure, (key, rows) in product(study.measures, study.strata()):
        result, warnings = _harmonize_stratum(study, rows, measure, covariates, stratum=study.stratum_name(key))
        lines += warnings
        if result is None:
            continue
        results.add_values(result.values, rows, measure, key)
        results.add("group_site_variance", result.variance, measure, key)
        results.add("group_site_effects", result.sites, measure, key)
        if measure in study.options.measures:
            results.fits.append(to_record(result.model, measure, key, result.values.columns))
    lines = list(dict.fromkeys(lines))
    facts |= {
        "Method": "longitudinal ComBat" if study.options.combat_longitudinal else "ComBat with empirical Bayes",
        "CovariatesKept": covariates,
        "AgeEffect": study.options.combat_age,
        **({"FittedOn": "controls"} if _fit_on_controls(study) else {}),
    }
    why = "; ".join(line for line in lines if "not computed" in line) if results.is_empty else ""
    return results.analysis(index, facts, lines, not_computed=dict.fromkeys(_HARMONIZED, why))


def _covariates_kept(study: Study) -> list[str]:
    """Return the covariates whose effects are preserved: the user's, by default with the groups."""
    covariates = [name for name in study.covariates if name != "site"]
    has_groups = study.cohort.demographics["group"].nunique() > 1 and not _fit_on_controls(study)
    return [*covariates, *(["group"] if has_groups and not study.options.covariates else [])]


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
    warnings += _describe_other_categories(varying, chosen, where=where)
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


def _describe_other_categories(covariates: pd.DataFrame, chosen: NDArray[np.bool_], *, where: str) -> list[str]:
    """Return one line per covariate with categories that no scan of the fit has."""
    lines = []
    for name, column in covariates.select_dtypes(exclude="number").items():
        if n := int((column.notna() & ~column.isin(column[chosen])).sum()):
            levels = " or ".join(sorted(map(str, column[chosen].dropna().unique())))
            lines.append(f"{where}{name} of {count(n, 'scan')} is not {levels}, as of the controls; not harmonized")
    return lines


def _apply_saved(study: Study, facts: Mapping[str, Any]) -> Analysis:
    """Remove the site effects of a saved harmonization, and of new sites with enough participants."""
    saved, index = load_harmonization(study), study.table.index
    study, results = without_unknown_pairs(saved, study), _Results(study)
    if study.table.empty:
        why = f"{saved.path.name} has no bilateral rows"
        return results.analysis(index, {}, not_computed=dict.fromkeys(_HARMONIZED, why))
    lines = compare_origin(saved, study)
    if n := facts["ScansWithoutSite"]:
        lines.append(f"{saved.path.name}: site of {count(n, 'scan')} is missing; not harmonized")
    for measure, (key, rows) in product(study.options.measures, study.strata()):
        wide, scans = _pivot(rows, measure)
        model = find_model(saved, measure, key, list(map(str, wide.columns)))
        covariates = pd.DataFrame(
            {term.name: covariate_of(study, term)[wide.index] for term in model.terms}, index=wide.index
        )
        about: Any = {"site": scans["site"], "covariates": covariates, "participant": scans["participant_id"]}
        controls = None if study.controls is None else study.controls[wide.index.to_numpy(int)]
        extended, new = add_sites(model, wide, **about, fit_on=controls)
        lines += _describe_new_sites(saved, model, new, has_controls=controls is not None)
        lines += _describe_covariates(saved, model, covariates)
        values = extended.apply(wide, **about)
        results.add_values(values, rows, measure, key)
        effects = _effects_table(extended, new, values, scans["site"], known=model.sites.names)
        results.add("group_site_effects", effects, measure, key)
        results.fits.append(to_record(extended, measure, key, wide.columns))
    known_sites = list(dict.fromkeys(str(site["Name"]) for fit in saved.fits for site in fit["Sites"]))
    facts = {**facts, "Method": "saved ComBat", "HarmonizationApplied": saved.path.name, "SitesOfTheFit": known_sites}
    why = f"the site effects are those of {saved.path.name}, see group_site_effects.tsv"
    lines = list(dict.fromkeys(lines))
    return results.analysis(study.table.index, facts, lines, not_computed={"group_site_variance": why})


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
                if np.isnan(record["shift_bayes"]):
                    record["note"] = f"not harmonized: values of only {count(record['n_participants'], 'participant')}"
                elif name not in known:
                    record["note"] = f"estimated from {methods[name]} participants"
            records.append(record)
    return pd.DataFrame(records, columns=list(_HARMONIZED["group_site_effects"]))
