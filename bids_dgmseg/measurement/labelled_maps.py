"""Measure several maps in the labels of any program: read tables of labels, sample, measure, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import SAMPLED_MEASURES, describe_sampled
from bids_dgmseg.measurement.maps import check_plausible, measure_labels, name_units, read_map, sample_map
from bids_dgmseg.models.color_tables import LabelColor, read_color_table
from bids_dgmseg.models.label_map import match_name, read_label_map
from bids_dgmseg.models.nnunet_folder import CEREBELLUM
from bids_dgmseg.models.structures import ALL_STRUCTURES, STRUCTURES, Structure, join_parts

KNOWN_TABLES = ("dgmseg", "freesurfer")
"""Names of tables of labels that the program has."""

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


def read_label_names(lut: str) -> list[LabelColor]:
    """Read a table of labels: the path of one, or one of `KNOWN_TABLES`."""
    if lut == "dgmseg":
        return [LabelColor(one.index, one.abbreviation, one.color) for one in ALL_STRUCTURES]
    if lut == "freesurfer":
        text = files("bids_dgmseg").joinpath("data", "freesurfer_aseg.tsv").read_text(encoding="utf-8")
        rows = [line.split("\t") for line in text.splitlines()[1:]]
        return [LabelColor(int(number), name, "#888888") for number, name in rows]
    return read_color_table(Path(lut))


def name_structures(
    labels: Volume, names: Sequence[LabelColor], *, name: str, label_map: Path | None = None
) -> list[Structure]:
    """Return the structures in a label image.

    Labels with the name of a nucleus of this program, also as FreeSurfer spells it, get its abbreviation and color.

    Parameters
    ----------
    labels : Volume
    names : sequence of LabelColor
    name : str
        Name of the image, for errors.
    label_map : path, optional
        Table of labels (name or number) and abbreviations of nuclei; other labels are left out.

    Raises
    ------
    InputError
        If the image has no label, or one that is not in the tables.
    """
    known = {one.index: one for one in names}
    present = [int(number) for number in np.unique(labels.array) if number]
    given = {} if label_map is None else read_label_map(label_map)
    if label_map is not None:
        known = {**{number: LabelColor(number, str(number), "#888888") for number in present}, **known}
        present = [number for number in present if given.get(known[number].name) or given.get(str(number))]
    if not present:
        what = "of its labels is in the label map" if label_map else "voxel is labelled"
        raise InputError(f"{name}: no {what}; check the labels")
    if unknown := [str(number) for number in present if number not in known]:
        raise InputError(
            f"{name}: label {list_some(unknown)} is not in the label table; provide another one with `lut`"
        )
    structures = []
    for number in present:
        row = known[number]
        ours = given.get(row.name) or given.get(str(number)) or match_name(row.name)
        if ours == CEREBELLUM:  # which networks for the dentate nuclei label, too
            structures.append(Structure(number, ours, ours, "", row.color, 0))  # type: ignore[arg-type]
        elif ours:
            structures.append(replace(STRUCTURES.named(ours), index=number))
        else:
            side: dict[str, str] = {"left": "L", "right": "R"}
            hemisphere = side.get(row.name.lower().replace("_", "-").partition("-")[0], "")
            structures.append(Structure(number, row.name, row.name, hemisphere, row.color, 0))  # type: ignore[arg-type]
    abbreviations = [one.abbreviation for one in structures]
    if twice := sorted({one for one in abbreviations if abbreviations.count(one) > 1}):
        raise InputError(f"{name}: several labels are {twice[0]}; give each its own name")
    return structures


def measure_maps(
    paths: Sequence[Path],
    labels: Volume,
    structures: Sequence[Structure],
    *,
    labels_name: str,
    units: str | None = None,
    bilateral: bool = False,
) -> list[MeasuredMap]:
    """Measure maps in labels, each sampled on the grid of the labels (`bids_dgmseg.measurement.maps.sample_map`).

    Raises
    ------
    InputError
        If a map cannot be read, its values contradict its unit, or most labelled voxels lie outside of it.
    """
    return [
        measure_map(path, labels, structures, name=name, labels_name=labels_name, units=units, bilateral=bilateral)
        for path, name in zip(paths, name_maps(paths), strict=True)
    ]


def measure_map(
    path: Path,
    labels: Volume,
    structures: Sequence[Structure],
    *,
    name: str,
    labels_name: str,
    units: str | None = None,
    bilateral: bool = False,
    wholes: Sequence[Structure] = (),
    exclude: NDArray[np.bool_] | None = None,
    check: Callable[[Volume], None] = lambda values: None,
) -> MeasuredMap:
    """Measure one map; arguments and errors as `measure_maps`.

    `wholes` are nuclei that are labelled in parts, measured as well; `exclude` are voxels of the labels without a
    value; `check` gets the map before it is sampled and may raise.
    """
    inside = np.isin(labels.array, [one.index for one in structures])
    values, unit = read_map(path, units)
    negated = "_desc-diamagnetic_" in path.name and np.nanmedian(_nonzero(values.array)) < 0
    if negated:  # QSMxT stores |chi-|
        values = values.with_array(-values.array)
    check(values)
    sampled = sample_map(values, labels, labels=inside, name=path.name, labels_name=labels_name)
    check_plausible(sampled.array[inside], path, unit)
    is_sampled = sampled is not values
    if exclude is not None:
        sampled = sampled.with_array(np.where(exclude, np.float32(np.nan), sampled.array))
    table = measure_labels(sampled, labels.array, structures, bilateral=bilateral)
    if wholes:
        joined = measure_labels(sampled, join_parts(labels.array), wholes, bilateral=bilateral)
        table = pd.concat([table, joined], ignore_index=True)
    return MeasuredMap(name, path, unit, sampled, is_sampled, name_units(table, unit), negated)


def _nonzero(array: NDArray[np.floating]) -> NDArray[np.floating]:
    values = array[np.isfinite(array) & (array != 0)]
    return values if len(values) else np.ones(1)


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
    for one in measured:
        unit = f"_{one.unit}" if one.unit else ""
        table[f"{one.name}_n_valid"] = one.table["n_valid"]
        for measure in SAMPLED_MEASURES:
            table[f"{one.name}_{measure}{unit}"] = one.table[f"{measure}{unit}"]
    return table


def describe_columns(measured: Sequence[MeasuredMap]) -> Mapping[str, Mapping[str, str]]:
    """Return the data dictionary of `join_measures`."""
    entries: dict[str, Mapping[str, str]] = {}
    for one in measured:
        for column in join_measures([one]).columns:
            if entry := describe_sampled(str(column)):
                about = f" in {one.path.name}"
                entries[str(column)] = {**entry, "Description": entry["Description"] + about}
    return entries
