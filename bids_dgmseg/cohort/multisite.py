"""Measures without what sites add to them, and how much sites differ before and after."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.cohort.harmonize import N_SITE, Harmonized, harmonize
from bids_dgmseg.cohort.study import Study
from bids_dgmseg.cohort.writing import GroupTable
from bids_dgmseg.errors import InputError

_NAMES = ("group_harmonized", "group_site_variance", "group_site_effects")
_LONG = ("scan", "abbreviation", "measure", "raw", "harmonized")
_VARIANCE = ("abbreviation", "n", "site_variance_before", "site_variance_after", "reduction", "p_site_before",
             "p_site_after")  # fmt: skip
_EFFECTS = ("site", "abbreviation", "n", "n_unused", "shift", "scale", "shift_bayes", "scale_bayes", "note")


def harmonized_tables(study: Study) -> list[GroupTable]:
    """Harmonize each measure of each model over the sites, and give the study the harmonized measures.

    Returns
    -------
    list of GroupTable
        ``group_harmonized``, ``group_site_variance`` and ``group_site_effects``; empty, with the reason, where nothing
        can be harmonized.
    """
    front = ("measure", *study.cohort.apart)
    columns = dict(zip(_NAMES, (_LONG, (*front, *_VARIANCE), (*front, *_EFFECTS)), strict=True))
    sites = study.cohort.facts["site"].value_counts().sort_index()
    facts: dict[str, Any] = {"Sites": sites.to_dict(), "ScansWithoutSite": len(study.cohort.scans) - int(sites.sum())}
    if len(sites) < 2:
        why = _too_few(sites, facts["ScansWithoutSite"])
        return [
            GroupTable(name, pd.DataFrame(columns=there), facts=facts, not_computed=why)
            for name, there in columns.items()
        ]
    covariates = _kept(study)
    before = len(study.warnings)
    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in _NAMES}
    for measure in study.options.measures:
        for key, done, rows in _harmonize_all(study, measure, covariates):
            known = {"measure": measure, **key}
            for name, found in zip(_NAMES, (rows, done.variance, done.sites), strict=True):
                named = found.rename(columns={"nucleus": "abbreviation"})
                parts[name].append(named.assign(**known)[[*columns[name]]])
    notes = tuple(dict.fromkeys(study.warnings[before:]))
    study.warnings[before:] = notes
    why = "" if parts[_NAMES[0]] else "; ".join(note for note in notes if "not computed" in note)
    spellings = study.cohort.spellings
    doubts = [line for factor in ("site", *covariates) for line in spellings.get(factor, ())]
    facts |= {"Method": "ComBat with empirical Bayes", "CovariatesKept": covariates}
    return [
        GroupTable(name, pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns[name]),
                   facts=facts, notes=(*doubts, *notes), not_computed=why)
        for name, found in parts.items()
    ]  # fmt: skip


def _too_few(sites: pd.Series, n_without: int) -> str:
    """Say why nothing is harmonized."""
    if not len(sites):
        return "no site is known; name its column: --site-column"
    without = f"; {n_without} {'scan' if n_without == 1 else 'scans'} without one" if n_without else ""
    return f"one site only ({sites.index[0]}){without}"


def _kept(study: Study) -> list[str]:
    """Covariates whose part stays; without the user's own, the group is one."""
    several = study.options.covariates is None and study.cohort.facts["group"].nunique() > 1
    return [*study.covariates, *(["group"] if several and "group" not in study.covariates else [])]


def _harmonize_all(
    study: Study, measure: str, covariates: Sequence[str]
) -> list[tuple[dict[str, Any], Harmonized, pd.DataFrame]]:
    """Harmonize one measure of each model; the study's table gets the harmonized column."""
    column = np.full(len(study.table), np.nan)
    results = []
    for key, rows in study.apart():
        part = study.name_part(key)
        work = partial(_harmonize, study, rows, measure, covariates, part=part)
        done = study.attempt(_NAMES[0], work, part=part)
        if done is None:
            continue
        place = (done.values.index.get_indexer(rows["scan"]), done.values.columns.get_indexer(rows["abbreviation"]))
        harmonized = done.values.to_numpy()[place]
        column[rows.index.to_numpy()] = harmonized
        both = rows[["scan", "abbreviation"]].assign(measure=measure, raw=rows[measure], harmonized=harmonized)
        results.append((key, done, both))
    if results:
        study.table[f"{measure}_harmonized"] = column
        study.measures.append(f"{measure}_harmonized")
    return results


def _harmonize(study: Study, rows: pd.DataFrame, measure: str, covariates: Sequence[str], *, part: str) -> Harmonized:
    """Lay one model's values out and harmonize the sites that have enough scans."""
    wide = rows.pivot(index="scan", columns="abbreviation", values=measure)[rows["abbreviation"].unique()]
    about = rows.drop_duplicates("scan").set_index("scan").loc[wide.index]
    kept = about[[name for name in covariates if about[name].nunique() > 1]]
    usable = kept.notna().all(axis=1) & about["site"].notna()
    counts = about["site"][usable].value_counts()
    few = [site for site in about["site"].dropna().unique() if counts.get(site, 0) < N_SITE]
    where = f"{_NAMES[0]}.tsv: {part}: " if part else f"{_NAMES[0]}.tsv: "
    study.warnings += [
        f"{where}site {site} has too few usable scans ({counts.get(site, 0)}, harmonizing needs {N_SITE}); "
        "its values are not harmonized" for site in sorted(few, key=str)
    ]  # fmt: skip
    if n_lost := int((~usable).sum()):
        lacking = " or ".join(["site", *kept.columns])
        study.warnings.append(f"{where}{n_lost} scans lack {lacking}; their values are not harmonized")
    if (counts >= N_SITE).sum() < 2:
        raise InputError(f"fewer than two sites have {N_SITE} usable scans")
    return harmonize(wide, site=about["site"].where(~about["site"].isin(few)), covariates=kept)
