"""Any quantitative map in any labels: names of labels, reading, bringing images to one grid, measuring."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch, resample
from bids_dgmseg.image.masks import is_valid, outside_field_of_view, reaching_the_border
from bids_dgmseg.image.units import check_chi, column_unit, has_both_signs, standard_units, to_seconds
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import read_sidecar
from bids_dgmseg.io.nifti import check_header, check_intact, load_image
from bids_dgmseg.measurement.nuclei import (
    SAMPLED_MEASURES,
    describe_sampled,
    measure_nuclei,
    spell_unit,
    unindex_joined,
)
from bids_dgmseg.models.label_tables import Label, match_name, read_label_table
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES, Structure

_SUFFIX_UNITS = {
    "Chimap": "ppm",
    **dict.fromkeys(("T1map", "T2map", "T2starmap"), "s"),
    **dict.fromkeys(("R1map", "R2map", "R2starmap"), "1/s"),
}
"""BIDS suffix → unit of the map."""


_PLAUSIBLE = {
    "T1map": (0.1, 10.0),
    "T2map": (0.002, 3.0),
    "T2starmap": (0.002, 3.0),
    "R1map": (0.1, 10.0),
    "R2map": (0.3, 500.0),
    "R2starmap": (0.3, 1000.0),
}
"""BIDS suffix → smallest and largest median in tissue from 1.5 to 11.7 T, in s and 1/s."""


def check_plausible(values: NDArray[np.floating], path: Path, unit: str) -> None:
    """Check the median of a map in labelled voxels; `InputError` if no tissue has it, so that the unit is wrong."""
    suffix = path.name.partition(".")[0].rpartition("_")[2]
    finite = values[np.isfinite(values)]
    if suffix not in _PLAUSIBLE or unit not in ("s", "per_s") or not len(finite):
        return
    low, high = _PLAUSIBLE[suffix]
    if not low <= (median := float(np.median(finite))) <= high:
        raise InputError(
            f"{path.name}: the median in the labels is {median:.3g} {spell_unit(unit)}, expected {low:g} to "
            f'{high:g}; set "Units" in its sidecar to the unit of the map, such as "ms"'
        )


def read_map(path: Path, units: str | None) -> tuple[Volume, str]:
    """Read a map, NaN where it has no value, and its unit as in names of columns; chi maps as by `read_chi`."""
    suffix = path.name.partition(".")[0].rpartition("_")[2]
    beside = {key.casefold(): value for key, value in read_sidecar(path).items()}
    text = beside.get("units", beside.get("unit"))
    stated = units or ("" if text is None else str(text))
    if not units and standard_units(stated) == "":  # such as "arbitrary"
        stated = _SUFFIX_UNITS.get(suffix, stated)
    if standard_units(stated) == "Hz" and _SUFFIX_UNITS.get(suffix) == "1/s":  # a rate
        stated = "1/s"
    if standard_units(stated) in ("ppm", "ppb"):
        return read_chi(path, units), "ppm"
    check_intact(path)
    check_header(load_image(path), path.name)
    values, (unit, factor) = Volume.read(path), to_seconds(stated)
    array = values.array * np.float32(factor)
    is_value = np.isfinite(array) & ((array != 0) | (suffix not in _PLAUSIBLE))  # no tissue relaxes at a rate of 0
    return values.with_array(np.where(is_value, array, np.float32(np.nan))), column_unit(unit)


def read_chi(path: Path, units: str | None = None) -> Volume:
    """Read a chi map in ppm, NaN where it covers nothing: outside of the brain mask, and in wide holes in it.

    In maps of one sign zeros inside the brain are values, since there may be no source.
    """
    chi = check_chi(path, read_sidecar(path, units)).chi_ppm
    outside = outside_field_of_view(is_valid(chi.array))
    if not has_both_signs(chi.array):
        outside = reaching_the_border(outside)
    return chi.with_array(np.where(outside, np.float32(np.nan), chi.array))


def label_structures(labels: Volume, lut: str | os.PathLike[str] | pd.DataFrame | None, name: str) -> list[Structure]:
    """Return the structures that a label image contains, in the order of their numbers."""
    rows = {structure.index: structure for structure in ALL_STRUCTURES}
    if lut is not None:
        rows = {row.index: Structure(row.index, row.name, row.abbreviation, "", "", 0) for row in read_label_table(lut)}
    return [rows[number] for number in _present_numbers(labels, rows, name)]


def _present_numbers(labels: Volume, rows: Collection[int], name: str) -> list[int]:
    """Return the numbers in a label image; `InputError` if there is none, or one is not in its table."""
    present = [int(number) for number in np.unique(labels.array) if number]
    if not present:
        raise InputError(f"{name}: no labels, all voxels are 0; check the labels")
    if unknown := [str(number) for number in present if number not in rows]:
        raise InputError(
            f"{name}: label {list_some(unknown)} is not in the label table; provide another one with `lut`"
        )
    return present


def labels_on_grid(labels: Volume, values: Volume, name: str, map_name: str) -> NDArray[Any]:
    """Resample labels to the grid of a map, nearest neighbour; refuse labels of another space."""
    if not describe_grid_mismatch(values, labels):
        return labels.array
    if outside := share_outside(labels, values):
        raise InputError(
            f"{name}: {outside:.0%} of the labelled voxels lie outside {map_name}; register them to the map first"
        )
    return resample(labels, Grid(values.shape, values.affine), order=0).array


def share_outside(labels: Volume, values: Volume) -> float:
    """Return the fraction of labelled voxels outside of a map, 0 up to a half."""
    to_map = np.linalg.inv(values.affine) @ labels.affine
    voxels = nib.affines.apply_affine(to_map, np.argwhere(labels.array))
    covered = float(((voxels > -0.5) & (voxels < np.array(values.shape) - 0.5)).all(axis=1).mean())
    return 1 - covered if covered < 0.5 else 0.0


def measure_labels(values: Volume, dseg: NDArray[Any], structures: Sequence[Structure]) -> pd.DataFrame:
    """Return the measures that make sense for any map."""
    table = measure_nuclei(values.array, dseg, structures=structures, voxel_size_mm=values.voxel_size_mm)
    return unindex_joined(table.drop(columns="mass_ppm_mm3"), structures)


def name_units(table: pd.DataFrame, unit: str) -> pd.DataFrame:
    """Name the columns of a table of `measure_labels` after the unit of the map, such as ``mean_per_s``."""
    suffix = f"_{unit}" if unit else ""
    return table.rename(columns=lambda column: re.sub("_ppm$", suffix, column))


def sample_map(values: Volume, grid: Volume, *, labels: NDArray[np.bool_], name: str, labels_name: str) -> Volume:
    """Sample a map at the voxels of labels.

    A map on the grid of the labels is not changed. Otherwise each voxel of the labels gets the linear interpolation of
    the valid voxels around its centre, after averaging where the voxels of the map are smaller; it is missing (NaN) if
    less than half of their weight is valid. Nothing is registered.

    Raises
    ------
    InputError
        If more than half of the labelled voxels lie outside of the map.
    """
    if not describe_grid_mismatch(grid, values):
        return values
    if outside := share_outside(grid.with_array(labels), values):
        raise InputError(
            f"{labels_name}: {outside:.0%} of the labelled voxels lie outside {name}; register the images first"
        )
    target = Grid(grid.shape, grid.affine)
    valid = np.isfinite(values.array)
    weights = resample(values.with_array(valid.astype(np.float32)), target, antialias=True).array
    filled = values.with_array(np.where(valid, values.array, np.float32(0)))
    sums = resample(filled, target, antialias=True).array
    enough = weights >= 0.5
    return grid.with_array(np.where(enough, sums / np.where(enough, weights, 1), np.nan).astype(np.float32))


_NUCLEUS = ("index", "name", "abbreviation", "hemisphere")


@dataclass(frozen=True)
class MeasuredMap:
    """One map in the labels."""

    name: str
    """Such as ``R2starmap`` or ``paramagnetic_Chimap``; different for each map."""
    path: Path
    unit: str
    """As in the names of columns; empty if unknown."""
    values: Volume
    """On the grid of the labels."""
    is_sampled: bool
    """Whether the map has another grid."""
    table: pd.DataFrame
    """One row per label, columns of `bids_dgmseg.measure`."""
    negated: bool = False
    """Whether the sign of the values was changed: diamagnetic susceptibility is measured as ``|chi-|``."""


def name_structures(labels: Volume, names: Sequence[Label], *, name: str) -> list[Structure]:
    """Return the structures in a label image.

    Labels with the name of a nucleus of this program, also as FreeSurfer spells it, get its abbreviation and color.

    Parameters
    ----------
    labels : Volume
    names : sequence of Label
    name : str
        Name of the image, for errors.

    Raises
    ------
    InputError
        If the image has no label, or one that is not in the table.
    """
    rows = {row.index: row for row in names}
    structures = []
    for number in _present_numbers(labels, rows, name):
        row = rows[number]
        if ours := match_name(row.abbreviation):
            structures.append(replace(STRUCTURES.named(ours), index=number))
        else:
            side: dict[str, str] = {"left": "L", "right": "R"}
            hemisphere = side.get(row.abbreviation.lower().replace("_", "-").partition("-")[0], "")
            structures.append(Structure(number, row.abbreviation, row.abbreviation, hemisphere, row.color, 0))  # type: ignore[arg-type]
    abbreviations = [structure.abbreviation for structure in structures]
    if twice := sorted({name for name in abbreviations if abbreviations.count(name) > 1}):
        raise InputError(f"{name}: {twice[0]} appears more than once; give each label its own name")
    return structures


def measure_map(
    path: Path,
    labels: Volume,
    structures: Sequence[Structure],
    *,
    name: str,
    labels_name: str,
    units: str | None = None,
    lesions: NDArray[np.bool_] | None = None,
    brain_mm: NDArray[np.float64] | None = None,
) -> MeasuredMap:
    """Measure one map in labels, sampled on their grid (`sample_map`).

    `lesions` are voxels of the labels without a value, `brain_mm` points (N, 3) of the brain, where the map must have
    values.

    Raises
    ------
    InputError
        If a map cannot be read, its values contradict its unit, or most labelled voxels lie outside of it.
    """
    inside = np.isin(labels.array, [label for structure in structures for label in structure.labels])
    values, unit = read_map(path, units)
    negated = "_desc-diamagnetic_" in path.name and bool(np.nansum(np.sign(values.array)) < 0)
    if negated:  # QSMxT stores |chi-|
        values = values.with_array(-values.array)
    if brain_mm is not None:
        _check_overlap(values, brain_mm, name=path.name)
    sampled = sample_map(values, labels, labels=inside, name=path.name, labels_name=labels_name)
    check_plausible(sampled.array[inside], path, unit)
    is_sampled = sampled is not values
    if lesions is not None:
        sampled = sampled.with_array(np.where(lesions, np.float32(np.nan), sampled.array))
    table = measure_labels(sampled, labels.array, structures)
    return MeasuredMap(name, path, unit, sampled, is_sampled, name_units(table, unit), negated)


def name_maps(paths: Sequence[Path]) -> list[str]:
    """Name maps by their suffix, with ``desc`` or, where these are alike, with their whole names.

    >>> name_maps([Path("sub-01_R2starmap.nii"), Path("sub-01_desc-paramagnetic_Chimap.nii.gz")])
    ['R2starmap', 'paramagnetic_Chimap']
    """
    stems = [path.name.partition(".")[0] for path in paths]
    names = []
    for stem in stems:
        parts = stem.split("_")
        desc = [part.removeprefix("desc-") for part in parts if part.startswith("desc-")]
        names.append("_".join([*desc, parts[-1]]))
    names = [name if names.count(name) == 1 else stem for name, stem in zip(names, stems, strict=True)]
    if len(set(names)) < len(names):
        raise InputError(f"{list_some(names)}: two maps have the same name; rename one")
    return names


def join_measures(measured: Sequence[MeasuredMap]) -> pd.DataFrame:
    """Join the main measures of all maps: one row per label, columns such as ``R2starmap_mean_per_s``."""
    first = measured[0].table
    table = first[[*(column for column in _NUCLEUS if column in first), "n_voxels", "volume_mm3"]].copy()
    for item in measured:
        unit = f"_{item.unit}" if item.unit else ""
        table[f"{item.name}_n_valid"] = item.table["n_valid"]
        for measure in SAMPLED_MEASURES:
            table[f"{item.name}_{measure}{unit}"] = item.table[f"{measure}{unit}"]
    return table


def describe_columns(measured: Sequence[MeasuredMap]) -> Mapping[str, Mapping[str, str]]:
    """Return the data dictionary of `join_measures`."""
    entries: dict[str, Mapping[str, str]] = {}
    for item in measured:
        for column in join_measures([item]).columns:
            if entry := describe_sampled(str(column)):
                entries[str(column)] = {**entry, "Description": f"{entry['Description']} in {item.path.name}"}
    return entries


LEAST_OVERLAP = 0.5
"""Fraction of the brain within its field of view in which a further map must have values."""


@dataclass(frozen=True)
class FurtherMeasures:
    """Measures of the further maps of a scan."""

    measured: tuple[MeasuredMap, ...]
    report: Mapping[str, Mapping[str, Any]]
    """Name of each map → file, unit, whether it was resampled, and for refused maps the ``problem``."""
    warnings: tuple[str, ...]


def measure_further_maps(
    paths: Mapping[str, Path],
    chi: Volume,
    dseg: Volume,
    structures: Sequence[Structure],
    *,
    units: Mapping[str, str] | None = None,
    brain: NDArray[np.bool_] | None = None,
    lesions: NDArray[np.bool_] | None = None,
) -> FurtherMeasures:
    """Measure further maps of a session in the nuclei of a scan.

    The maps must be in the space of the chi map; nothing is registered. A map on another grid is sampled at the voxels
    of the labels (`sample_map`). A map that cannot be read, contradicts its unit, or
    has values in less than half of the brain is refused with a warning.

    Parameters
    ----------
    paths : mapping of str to path
        Name in columns → map.
    chi, dseg : Volume
        Map in ppm, and labels on its grid.
    structures : sequence of Structure
        Rows of the tables.
    units : mapping of str to str, optional
        Unit of each map, by default that of its sidecar or suffix.
    brain : ndarray of bool, optional
        Brain on the grid of `chi`; by default the voxels of `chi` with a value.
    lesions : ndarray of bool, optional
        Voxels that are not measured.
    """
    is_labelled = np.isin(dseg.array, [label for structure in structures for label in structure.labels]).any()
    brain_mm = apply_affine(chi.affine, np.argwhere(is_valid(chi.array) if brain is None else brain))
    measured, report, warnings = [], {}, []
    for name, path in paths.items():
        about: dict[str, Any] = {"file": path.name}
        try:
            if not is_labelled:
                raise InputError(f"{path.name}: no nuclei; map not measured")
            measures = measure_map(
                path,
                dseg,
                structures,
                name=name,
                labels_name="the labels",
                units=(units or {}).get(name) or None,
                lesions=lesions,
                brain_mm=brain_mm,
            )
        except InputError as error:
            about["problem"] = str(error)
            warnings.append(f"{error}; its measures are n/a")
        else:
            measured.append(measures)
            about |= {"unit": spell_unit(measures.unit), "resampled": measures.is_sampled, "negated": measures.negated}
        report[name] = about
    return FurtherMeasures(tuple(measured), report, tuple(warnings))


def _check_overlap(values: Volume, brain_mm: NDArray[np.float64], *, name: str) -> None:
    """Raise InputError if a map has values in too little of the brain within its field of view."""
    voxels = np.rint(apply_affine(np.linalg.inv(values.affine), brain_mm)).astype(int)
    voxels = voxels[((voxels >= 0) & (voxels < values.shape)).all(axis=1)]
    sampled = values.array[tuple(voxels.T)]
    overlap = float((np.isfinite(sampled) & (sampled != 0)).mean()) if len(sampled) else 0.0
    if overlap < LEAST_OVERLAP:
        raise InputError(
            f"{name}: has values in only {overlap:.0%} of the brain; register the map to the chi map first"
        )
