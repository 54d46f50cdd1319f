"""Files with what was fitted to a study, to be applied to other scans: written and read as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.config import GroupOptions
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, read_json, sha256, write_json
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import bilateral_names
from bids_dgmseg.stats.long_table import Floats
from bids_dgmseg.study.study import Study, count_scans
from bids_dgmseg.study.tabular_files import ResultTable

FORMAT_VERSION = 1

_TABLES = {"harmonization": "group_harmonized", "norms": "group_norms"}
"""Kind of a saved model → table with its fits."""


@dataclass(frozen=True)
class SavedModel:
    """Content of a file with fits."""

    path: Path
    kind: str
    """``harmonization`` or ``norms``, which is also the name of the parameter that saves it."""
    content: Mapping[str, Any]

    def fail(self, where: str, problem: str) -> NoReturn:
        """Raise an `InputError` about a part of the file."""
        raise InputError(f"{self.path.name}: {where}: {problem}; save it again with `{self.kind}_save`")

    def entry(self, record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], *, where: str = "Fits") -> Any:
        """Return an entry of a record that must have this type."""
        value = record.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(f"{where}.{name}", "missing or of another type")
        return value

    def numbers(self, record: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Floats:
        """Return an entry as an array; ``n/a`` is NaN."""
        values = np.array(self.entry(record, name, list), dtype=object)
        try:
            array = np.where(values == MISSING, np.nan, values).astype(np.float64)
        except (TypeError, ValueError):
            self.fail(f"Fits.{name}", "not numbers")
        if array.size == 0 == np.prod(shape):
            array = array.reshape(shape)
        if array.shape != shape:
            self.fail(f"Fits.{name}", f"shape {array.shape}, expected {shape}")
        return array

    @property
    def fits(self) -> Sequence[Mapping[str, Any]]:
        """Return the records of the fits."""
        fits = self.entry(self.content, "Fits", list, where="file")
        if not fits or not all(isinstance(fit, dict) for fit in fits):
            self.fail("Fits", "missing or of another type")
        return list(fits)

    def find(self, measure: str, stratum: Mapping[str, Any], nuclei: Sequence[str]) -> Mapping[str, Any]:
        """Return the fit of a measure, a model and its nuclei.

        Raises
        ------
        InputError
            If there is none; the line says which measures, models or nuclei the file has.
        """
        key = shown_stratum(stratum)
        of_measure = [fit for fit in self.fits if fit.get("Measure") == measure]
        if not of_measure:
            known = list_some({str(fit.get("Measure")) for fit in self.fits})
            raise InputError(f"{self.path.name}: has no {measure} (has {known}); choose these with `measures`")
        matches = [fit for fit in of_measure if fit.get("Stratum") == key]
        if not matches:
            known, own = list_some({describe_stratum(fit.get("Stratum")) for fit in of_measure}), describe_stratum(key)
            raise InputError(f"{self.path.name}: is of {known}, not of {own}; select its scans with `model`")
        for fit in matches:
            if {*nuclei} <= {*map(str, self.entry(fit, "Nuclei", list)), *map(str, fit.get("NotFitted", ()))}:
                return fit
        names = {str(name) for fit in matches for name in fit["Nuclei"]}
        lacking = {*nuclei} - names or {*nuclei}
        raise InputError(
            f"{self.path.name}: has no {measure} of {list_some(lacking)} (has {list_some(names, most=40)}); use "
            "results with the same nuclei"
        )


def without_unknown_pairs(saved: SavedModel, study: Study) -> Study:
    """Return the study without bilateral rows (``RN``), if the file has only those of the sides."""
    names = study.table["abbreviation"]
    pairs = {str(name) for name in names.unique() if not str(name).endswith(("_L", "_R"))}
    known = {str(name) for fit in saved.fits for name in saved.entry(fit, "Nuclei", list)}
    return study if pairs & known else replace(study, table=study.table[~names.isin(pairs)])


def saved_strata(saved: SavedModel, study: Study) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    """Return the strata of the study without unknown pairs; other bilateral rows are apart, as their fits are."""
    study = without_unknown_pairs(saved, study)
    names = study.table["abbreviation"]
    is_bilateral = names.isin(bilateral_names(names.unique()))
    parts = (study.table[~is_bilateral], study.table[is_bilateral])
    return [stratum for table in parts for stratum in replace(study, table=table).strata()]


def shown_stratum(stratum: Mapping[str, Any]) -> dict[str, str]:
    """Return the model and what else distinguishes a stratum, without what is missing."""
    return {str(name): str(value) for name, value in stratum.items() if value != MISSING}


def describe_stratum(stratum: Any) -> str:
    """Return a stratum as text.

    >>> describe_stratum({"model": "dgm16", "description": "cosmos"})
    'model dgm16, description cosmos'
    """
    return ", ".join(f"{name} {value}" for name, value in stratum.items()) if isinstance(stratum, dict) else "unknown"


def unit_of(measure: str) -> str:
    """Return the unit of a measure, with or without the endings of adjusted and harmonized ones."""
    for ending in ("_harmonized", "_adjusted"):
        measure = measure.removesuffix(ending)
    return STATS_COLUMNS.get(measure, {}).get("Units", MISSING)


def write_model(
    path: Path, kind: str, study: Study, fits: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> Path:
    """Write fits with what is needed to know whether they suit other scans."""
    scans = study.cohort.demographics
    chosen = np.full(len(scans), True) if study.controls is None else study.controls
    content = {
        "Type": f"bids_dgmseg {kind}",
        "FormatVersion": FORMAT_VERSION,
        "GeneratedBy": {"Name": "bids_dgmseg", "Version": __version__},
        "Units": {str(fit["Measure"]): unit_of(str(fit["Measure"])) for fit in fits},
        "ReferenceRegions": _reference_regions(study),
        "ControlFilter": study.options.control_filter,
        "Participants": int(scans["participant_id"][chosen].nunique()),
        "Scans": count_scans(study.cohort, chosen),
        **about,
        "Fits": list(fits),
    }
    return write_json(content, path)


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
    for kind, path in _targets(study.options).items():
        table = next(table for table in tables if table.name == _TABLES[kind])
        about = {key: table.facts[key] for key in ("Sites", "CovariatesKept", "AgeEffect") if key in table.facts}
        harmonization = study.options.harmonization_save or study.options.harmonization_apply
        if kind == "norms" and harmonization:  # which was written before
            about["HarmonizationChecksum"] = sha256(harmonization)
        paths.append(write_model(path, kind, study, table.fits, about))
    return paths


def _targets(options: GroupOptions) -> dict[str, Path]:
    targets = {"harmonization": options.harmonization_save, "norms": options.norms_save}
    return {kind: path for kind, path in targets.items() if path}


def read_model(path: Path, kind: str) -> SavedModel:
    """Read a file with fits.

    Raises
    ------
    InputError
        If it is not a JSON file of this kind and version, or its units are not those of the program.
    """
    model = SavedModel(path, kind, read_json(path))
    content = model.content
    if content.get("Type") != f"bids_dgmseg {kind}":
        raise InputError(
            f"{path.name}: Type is {content.get('Type')!r}, expected 'bids_dgmseg {kind}'; name another file"
        )
    if content.get("FormatVersion") != FORMAT_VERSION:
        model.fail("FormatVersion", f"{content.get('FormatVersion')!r}, this version reads {FORMAT_VERSION}")
    units = model.entry(content, "Units", dict, where="file")
    for measure in {str(fit.get("Measure")) for fit in model.fits}:
        if units.get(measure) != unit_of(measure):
            raise InputError(
                f"{path.name}: {measure} is in {units.get(measure)}, expected {unit_of(measure)}; save it again with "
                f"`{kind}_save`"
            )
    return model


def compare_origin(model: SavedModel, study: Study) -> list[str]:
    """Return one line each if the fits are of another version of the program or of other reference regions."""
    lines = []
    made_by = model.content.get("GeneratedBy")
    version = made_by.get("Version") if isinstance(made_by, dict) else None
    if version != __version__:
        lines.append(
            f"{model.path.name}: is of version {version}, this is {__version__}; measure both with the same version if "
            "its models differ"
        )
    own, known = _reference_regions(study), model.content.get("ReferenceRegions")
    if isinstance(known, list) and (other := [name for name in own if name not in known]) and known:
        lines.append(
            f"{model.path.name}: susceptibilities are relative to {list_some(map(str, known))}, here also to "
            f"{list_some(other)}; use the same reference region"
        )
    return lines


def _reference_regions(study: Study) -> list[str]:
    """Return the reference regions of the maps, as their quality records state them."""
    if "input_reference" not in study.cohort.qc:
        return []
    return sorted(str(name) for name in study.cohort.qc["input_reference"].dropna().unique() if name != MISSING)
