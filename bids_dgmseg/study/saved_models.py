"""Fits of a study, saved as JSON and applied to other scans: harmonization and norms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from bids_dgmseg import __version__
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_json, sha256, write_json
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.stats.age_curves import AgeSexNorm
from bids_dgmseg.stats.combat import CombatModel
from bids_dgmseg.stats.long_table import Floats
from bids_dgmseg.study.study import Study
from bids_dgmseg.study.tabular_files import ResultTable


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
    of_measure = [fit for fit in fits if fit.measure == measure]
    if not of_measure:
        measures = list_some({fit.measure for fit in fits})
        raise InputError(f"{path.name}: has no {measure} (has {measures}); choose these with `measures`")
    key = shown_stratum(stratum)
    matches = [fit for fit in of_measure if fit.stratum == key]
    if not matches:
        shown = list_some({_describe(fit.stratum) for fit in of_measure})
        raise InputError(f"{path.name}: is of {shown}, not of {_describe(key)}; select its scans with `model`")
    for fit in matches:
        if {*nuclei} & {*fit.nuclei}:
            return fit
    names = list_some({name for fit in matches for name in fit.nuclei}, most=40)
    raise InputError(
        f"{path.name}: has no {measure} of {list_some(nuclei)} (has {names}); use results with the same nuclei"
    )


def shown_stratum(stratum: Mapping[str, Any]) -> dict[str, str]:
    """Return the model and what else distinguishes a stratum, without what is missing."""
    return {str(name): str(value) for name, value in stratum.items() if value != MISSING}


def _describe(stratum: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in stratum.items())


def unit_of(measure: str) -> str:
    """Return the unit of a measure, harmonized or not."""
    return STATS_COLUMNS.get(measure.removesuffix("_harmonized"), {}).get("Units", MISSING)


def check_targets(options: GroupOptions) -> None:
    """Raise an `InputError` if a file to save to is a folder or another file of the run."""
    files = {f"{kind}_save": path for kind, path in _targets(options).items()}
    others = {**files, "harmonization_apply": options.harmonization_apply, "norms": options.norms}
    for name, path in files.items():
        if path.is_dir():
            raise InputError(f"`{name}` {path}: is a folder; name a file")
        for other, file in others.items():
            if file and other != name and file.resolve() == path.resolve():
                raise InputError(f"`{name}` {path}: is also the file of `{other}`; name another file")


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
