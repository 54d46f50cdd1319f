"""Any quantitative map in any labels: reading, bringing them to one grid, measuring."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, describe_grid_mismatch
from bids_dgmseg.image.masks import is_valid, outside_field_of_view, reaching_the_border
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.units import check_chi, column_unit, has_both_signs, standard_units, to_seconds
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import read_sidecar
from bids_dgmseg.io.nifti import check_header, check_intact, load_image
from bids_dgmseg.measurement.columns import spell_unit
from bids_dgmseg.measurement.nuclei import insert_bilateral, join_labels, measure_nuclei
from bids_dgmseg.models.lookup_table import read_lookup_table
from bids_dgmseg.models.structures import ALL_STRUCTURES, Structure

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
    found = values[np.isfinite(values)]
    if suffix not in _PLAUSIBLE or unit not in ("s", "per_s") or not len(found):
        return
    low, high = _PLAUSIBLE[suffix]
    if not low <= (median := float(np.median(found))) <= high:
        raise InputError(
            f"{path.name}: the median in the labels is {median:.3g} {spell_unit(unit)}, expected {low:g} to "
            f'{high:g}; state the unit of the map as "Units" in its sidecar, such as "ms"'
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
    return values.with_array(np.where(np.isfinite(array), array, np.float32(np.nan))), column_unit(unit)


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
    if lut is None:
        known = {structure.index: structure for structure in ALL_STRUCTURES}
        remedy = "pass their look-up table as `lut`"
    else:
        no_side: Any = ""
        known = {
            number: Structure(number, name, abbreviation, no_side, "", 0)
            for number, (name, abbreviation) in read_lookup_table(lut).items()
        }
        remedy = "add them to the look-up table"
    present = [int(number) for number in np.unique(labels.array) if number]
    if not present:
        raise InputError(f"{name}: no labels, all voxels are 0")
    if unknown := [str(number) for number in present if number not in known]:
        raise InputError(f"{name}: unknown labels {', '.join(unknown[:5])}{' …' if unknown[5:] else ''}; {remedy}")
    return [known[number] for number in present]


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


def measure_labels(
    values: Volume, dseg: NDArray[Any], structures: Sequence[Structure], *, bilateral: bool = False
) -> pd.DataFrame:
    """Return the measures that make sense for any map; with `bilateral` also of both sides together."""
    table = measure_nuclei(values.array, dseg, structures=structures, voxel_size_mm=values.voxel_size_mm)
    table = table.drop(columns="mass_ppm_mm3")
    return insert_bilateral(table, measure_labels(values, *join_labels(dseg, structures))) if bilateral else table


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
