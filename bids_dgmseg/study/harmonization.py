"""Harmonization of a study across sites by ComBat, and files with fits (ComBat, norms) for other scans."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_json, sha256, write_json
from bids_dgmseg.measurement.nuclei import STATS_COLUMNS
from bids_dgmseg.stats.age_curves import AgeSexNorm
from bids_dgmseg.stats.combat import N_SITE, CombatModel, fit_combat, sites_apart
from bids_dgmseg.stats.regression import Covariate, Floats
from bids_dgmseg.study.study import (
    Analysis,
    ResultTable,
    Study,
    add_constants,
    covariate_values,
    empty_table,
    first_rows,
    not_computed_line,
)


class HarmonizationFit(msgspec.Struct, frozen=True):
    """ComBat of one measure of one model."""

    measure: str
    stratum: dict[str, str]
    """Model, and reconstruction if there are several."""
    model: CombatModel

    @property
    def nuclei(self) -> Collection[str]:
        """Return the abbreviations."""
        return self.model.nuclei


class NormFit(msgspec.Struct, frozen=True):
    """Norms of one measure of one model."""

    measure: str
    stratum: dict[str, str]
    norms: dict[str, AgeSexNorm]
    """Norms by nucleus."""

    @property
    def nuclei(self) -> Collection[str]:
        """Return the abbreviations."""
        return self.norms.keys()


class _SavedFits(msgspec.Struct, frozen=True, kw_only=True, tag_field="Type", rename="pascal"):
    """Fits with what is needed to know whether they suit other scans."""

    version: str
    units: dict[str, str]
    reference_regions: list[str]
    controls: list[str]
    sites: list[str]


class SavedHarmonization(_SavedFits, frozen=True, kw_only=True, tag="bids_dgmseg harmonization"):
    """File that the option harmonization_save writes."""

    fits: list[HarmonizationFit]


class SavedNorms(_SavedFits, frozen=True, kw_only=True, tag="bids_dgmseg norms"):
    """File that the option norms_save writes."""

    fits: list[NormFit]
    harmonization_checksum: str = ""
    """SHA-256 of the harmonization of the values, empty without."""


_Saved = TypeVar("_Saved", bound=SavedHarmonization | SavedNorms)

_Fit = TypeVar("_Fit", bound=HarmonizationFit | NormFit)

_TABLES = {"harmonization": "group_harmonized", "norms": "group_norms"}
"""What is saved → table with its fits."""


def read_saved(path: Path, kind: type[_Saved]) -> _Saved:
    """Read a file with fits.

    Raises
    ------
    InputError
        If it is not a JSON file of this kind, or its units are not those of the program.
    """
    again = f"save it again with `{'norms' if kind is SavedNorms else 'harmonization'}_save`"
    try:
        saved = msgspec.convert(read_json(path), kind, dec_hook=_to_array)
    except msgspec.ValidationError as error:
        raise InputError(f"{path.name}: {error}; {again}") from None
    if not saved.fits:
        raise InputError(f"{path.name}: no fits; {again}")
    for fit in saved.fits:
        if (unit := saved.units.get(fit.measure)) != unit_of(fit.measure):
            raise InputError(f"{path.name}: {fit.measure} is in {unit}, expected {unit_of(fit.measure)}; {again}")
    return saved


def _to_array(kind: Any, values: Any) -> Floats:
    """Convert numbers to an array; ``n/a`` is NaN."""
    array = np.array(values, dtype=object)
    return np.asarray(np.where(array == MISSING, np.nan, array), dtype=np.float64)


def find_fit(
    path: Path, fits: Sequence[_Fit], measure: str, stratum: Mapping[str, Any], nuclei: Collection[str]
) -> _Fit:
    """Return the fit of a measure, a model and some of the nuclei.

    Raises
    ------
    InputError
        If there is none; the line says which measures, models or nuclei the file has.
    """
    key = shown_stratum(stratum)
    for fit in fits:
        if fit.measure == measure and fit.stratum == key and {*nuclei} & {*fit.nuclei}:
            return fit
    shown = {f"{fit.measure}, {', '.join(fit.stratum.values())}: {list_some(fit.nuclei)}" for fit in fits}
    raise InputError(
        f"{path.name}: has no {measure}, {', '.join(key.values())}: {list_some(nuclei)} (has "
        f"{list_some(shown, most=3)}); use the same `measures`, `model` and nuclei"
    )


def shown_stratum(stratum: Mapping[str, Any]) -> dict[str, str]:
    """Return the model and what else distinguishes a stratum, without what is missing."""
    return {str(name): str(value) for name, value in stratum.items() if value != MISSING}


def unit_of(measure: str) -> str:
    """Return the unit of a measure, harmonized or not."""
    return STATS_COLUMNS.get(measure.removesuffix("_harmonized"), {}).get("Units", MISSING)


def check_fits(tables: Sequence[ResultTable], options: GroupOptions) -> None:
    """Raise an `InputError` if there is nothing to save, before anything is written."""
    for kind in _targets(options):
        table = next(table for table in tables if table.name == _TABLES[kind])
        if not table.fits:
            raise InputError(f"`{kind}_save`: nothing to save: {table.not_computed or 'nothing could be fitted'}")


def save_fits(tables: Sequence[ResultTable], study: Study) -> list[Path]:
    """Write the fits of the tables to the files that were asked for."""
    paths = []
    scans = study.cohort.demographics if study.controls is None else study.cohort.demographics[study.controls]
    for kind, path in _targets(study.options).items():
        fits = next(table for table in tables if table.name == _TABLES[kind]).fits
        content: dict[str, Any] = {
            "version": __version__,
            "units": {fit.measure: unit_of(fit.measure) for fit in fits},
            "reference_regions": reference_regions(study),
            "controls": list(study.options.controls),
            "sites": sorted(map(str, scans["site"].dropna().unique())),
            "fits": list(fits),
        }
        harmonization = study.options.harmonization_save or study.options.harmonization_apply
        if kind == "harmonization":
            saved: SavedHarmonization | SavedNorms = SavedHarmonization(**content)
        else:  # the harmonization was written before
            saved = SavedNorms(**content, harmonization_checksum=sha256(harmonization) if harmonization else "")
        paths.append(write_json(msgspec.to_builtins(saved, enc_hook=np.ndarray.tolist), path))
    return paths


def _targets(options: GroupOptions) -> dict[str, Path]:
    targets = {"harmonization": options.harmonization_save, "norms": options.norms_save}
    return {kind: path for kind, path in targets.items() if path}


def compare_origin(path: Path, saved: SavedHarmonization | SavedNorms, study: Study) -> list[str]:
    """Return one line each if the fits are of another version of the program or of other reference regions."""
    lines = []
    if saved.version != __version__:
        lines.append(
            f"{path.name}: is of version {saved.version}, this is {__version__}; measure both with the same version if "
            "its models differ"
        )
    others = [name for name in reference_regions(study) if name not in saved.reference_regions]
    if others and saved.reference_regions:
        lines.append(
            f"{path.name}: susceptibilities are relative to {list_some(saved.reference_regions)}, here also to "
            f"{list_some(others)}; use the same reference region"
        )
    return lines


def reference_regions(study: Study) -> list[str]:
    """Return the reference regions of the maps, as their quality records state them."""
    if "input_reference" not in study.cohort.qc:
        return []
    return sorted(str(name) for name in study.cohort.qc["input_reference"].dropna().unique() if name != MISSING)


HARMONIZED = "_harmonized"
"""Ending of the measures after harmonization."""

_NAMES = ("group_harmonized", "group_site_effects")


def harmonize_sites(study: Study) -> Analysis:
    """Harmonize each measure of each model across sites with ComBat, or with a saved one.

    The tables are ``group_harmonized`` and ``group_site_effects``; they are empty, with the reason, if nothing can be
    harmonized.
    """
    options, path = study.options, study.options.harmonization_apply
    scan_sites = study.cohort.demographics["site"].iloc[np.unique(first_rows(study.cohort))]
    counts = scan_sites.value_counts().sort_index()
    facts: dict[str, Any] = {"Sites": counts.to_dict(), "ScansWithoutSite": int(scan_sites.isna().sum())}
    lines, saved = [], None
    if path:
        saved = load_harmonization(study)
        facts |= {"Method": "saved ComBat", "HarmonizationApplied": path.name, "SitesOfTheFit": saved.sites}
        lines += compare_origin(path, saved, study)
    elif len(counts) < 2:
        why = (
            f"only one site ({counts.index[0]})" if len(counts) else "no site is known; name its column: `site_column`"
        )
        return Analysis(tuple(empty_table(name, study.by, why, facts) for name in _NAMES))
    else:
        kept = {"CovariatesKept": _covariates_kept(study), "FittedOn": "controls" if _fits_controls(study) else "all"}
        facts |= {"Method": "ComBat with empirical Bayes", **kept}
    parts: tuple[list[pd.DataFrame], list[pd.DataFrame]] = ([], [])
    measures: dict[str, pd.Series] = {}
    fits: list[HarmonizationFit] = []
    for measure, (key, rows) in product(study.measures, study.strata()):
        wide = rows.pivot(index="scan", columns="abbreviation", values=measure)[rows["abbreviation"].unique()]
        scans = rows.drop_duplicates("scan").set_index("scan").loc[wide.index]
        where = f"group_harmonized.tsv: {study.stratum_name(key)}".rstrip(": ")
        if path and saved:
            model = find_fit(path, saved.fits, measure, key, list(map(str, wide.columns))).model
        else:
            try:
                model = _fit(study, wide, scans, lines, where=where)
            except InputError as error:
                lines.append(not_computed_line(_NAMES[0], error, study.stratum_name(key)))
                continue
        covariates = pd.DataFrame(
            {term.name: _covariate(study, term)[wide.index] for term in model.covariates}, index=wide.index
        )
        values = model.apply(wide, site=scans["site"], covariates=covariates)
        lines += _describe(model, wide, values, scans, covariates, where=path.name if path else where)
        column = values.to_numpy()[
            values.index.get_indexer(pd.Index(rows["scan"])), values.columns.get_indexer(pd.Index(rows["abbreviation"]))
        ]
        harmonized = pd.Series(column, rows.index)
        name = f"{measure}{HARMONIZED}"
        measures[name] = pd.concat([measures[name], harmonized]) if name in measures else harmonized
        pairs = rows[["scan", "abbreviation"]].assign(measure=measure, raw=rows[measure], harmonized=harmonized)
        effects = model.describe_sites(values, scans["site"]).rename(columns={"nucleus": "abbreviation"})
        parts[0].append(pairs)
        parts[1].append(add_constants(effects, measure=measure, **key))
        if measure in options.measures:
            fits.append(HarmonizationFit(measure, shown_stratum(key), model))
    lines = list(dict.fromkeys(lines))
    why = "" if fits else "; ".join(line for line in lines if "not computed" in line)
    tables = (
        ResultTable(
            name,
            pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=["measure", *study.by]),
            facts,
            tuple(lines),
            why,
            fits=tuple(fits) if name == _NAMES[0] else (),
        )
        for name, rows in zip(_NAMES, parts, strict=True)
    )
    return Analysis(tuple(tables), tuple(lines), pd.DataFrame(measures, index=study.table.index))


def load_harmonization(study: Study) -> SavedHarmonization:
    """Read the saved harmonization, and check that it suits the study's measures, models, nuclei and covariates.

    Raises
    ------
    InputError
        If it does not.
    """
    path = Path(str(study.options.harmonization_apply))
    saved = read_saved(path, SavedHarmonization)
    for measure, (key, rows) in product(study.options.measures, study.strata()):
        fit = find_fit(path, saved.fits, measure, key, list(map(str, rows["abbreviation"].unique())))
        for term in fit.model.covariates:
            try:
                is_known = bool(_covariate(study, term).notna().any())
            except InputError:
                is_known = False
            if not is_known:
                raise InputError(f"{path.name}: needs {term.name} of the participants; add it to participants.tsv")
    return saved


def _covariate(study: Study, term: Covariate) -> pd.Series:
    """Return a covariate of each scan of the cohort; categories that are all numbers here are text, as in the fit."""
    if term.name in ("age", "sex", "group"):
        return study.cohort.demographics[term.name]
    if term.levels is not None and term.name in study.cohort.participants:
        return study.cohort.participants[term.name]
    return covariate_values(study.cohort, term.name)


def _fits_controls(study: Study) -> bool:
    """Return whether the fit is of the controls only, since it is to be saved."""
    return study.controls is not None and study.options.harmonization_save is not None


def _covariates_kept(study: Study) -> list[str]:
    """Return the covariates whose effects are preserved: those of the study and the groups."""
    covariates = [name for name in study.covariates if name not in ("site", "group")]
    has_groups = study.cohort.demographics["group"].nunique() > 1 and not _fits_controls(study)
    return [*covariates, *(["group"] if has_groups else [])]


def _fit(study: Study, wide: pd.DataFrame, scans: pd.DataFrame, lines: list[str], *, where: str) -> CombatModel:
    """Fit one measure of one model to the sites that have enough participants; warnings are added to `lines`."""
    if study.controls is not None and _fits_controls(study):
        is_control = study.controls[wide.index.to_numpy(int)]
        wide, scans = wide[is_control], scans[is_control]
    covariates = scans[[name for name in _covariates_kept(study) if scans[name].nunique() > 1]]
    usable = covariates.notna().all(axis=1) & scans["site"].notna()
    counts = scans[usable].groupby("site")["participant_id"].nunique()
    small = [site for site in scans["site"].dropna().unique() if counts.get(site, 0) < N_SITE]
    for site in sorted(small, key=str):
        lines.append(
            f"{where}: site {site} has only {counts.get(site, 0)} participant(s) with usable scans (minimum {N_SITE}); "
            "site not harmonized"
        )
    if (counts >= N_SITE).sum() < 2:
        raise InputError(f"fewer than two sites have {N_SITE} participants with usable scans")
    large = scans["site"].where(~scans["site"].isin(small))
    if "age" in covariates:
        for site in sites_apart(scans["age"][usable], large[usable]):
            youngest, oldest = scans["age"][usable & (large == site)].agg(["min", "max"])
            lines.append(
                f"{where}: ages at site {site} ({youngest:.0f} to {oldest:.0f}) hardly overlap those at other sites, "
                "so its site effect depends on the linear effect of age; harmonize only sites of similar ages"
            )
    return fit_combat(wide, site=large, covariates=covariates, participant=scans["participant_id"])


def _describe(
    model: CombatModel,
    raw: pd.DataFrame,
    values: pd.DataFrame,
    scans: pd.DataFrame,
    covariates: pd.DataFrame,
    *,
    where: str,
) -> list[str]:
    """Return one line each about sites that are not in the fit, scans without values, and ages beyond the fit."""
    lines: list[str] = []
    is_new = scans["site"].notna() & ~scans["site"].map(str, na_action="ignore").isin(model.sites)
    shown = ", ".join(sorted(map(str, scans["site"][is_new].unique())))
    if shown and where.endswith(".json"):
        sites = ", ".join(model.sites)
        lines.append(f"{where}: site {shown} is not in the harmonization (has {sites}); its values are not harmonized")
    lost = ~is_new & raw.notna().any(axis=1) & values.isna().all(axis=1)
    if n := int(lost.sum()):
        names = " or ".join(["site", *(term.name for term in model.covariates)])
        lines.append(
            f"{where}: {n} scan(s) without {names}, or with a category that is not in the saved fit; not harmonized"
        )
    for term in model.covariates:
        if term.levels is None:
            numbers = pd.to_numeric(covariates[term.name], errors="coerce")
            if n := int(((numbers < term.low) | (numbers > term.high)).sum()):
                lines.append(
                    f"{where}: {term.name} of {n} scan(s) is beyond that of the fit, {term.low:.4g} to "
                    f"{term.high:.4g}; its effect is extrapolated"
                )
    return lines
