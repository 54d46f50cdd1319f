"""Measure further maps of a session in the nuclei of a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import spell_unit
from bids_dgmseg.measurement.labelled_maps import MeasuredMap, measure_map
from bids_dgmseg.models.structures import Structure, wholes_of

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
    exclude: NDArray[np.bool_] | None = None,
    bilateral: bool = False,
    labels_name: str = "the labels",
) -> FurtherMeasures:
    """Measure further maps of a session in the nuclei of a scan.

    The maps must be in the space of the chi map; nothing is registered. A map on another grid is sampled at the voxels
    of the labels (`bids_dgmseg.measurement.maps.sample_map`). A map that cannot be read, contradicts its unit, or
    has values in less than half of the brain is refused with a warning.

    Parameters
    ----------
    paths : mapping of str to path
        Name in columns → map.
    chi, dseg : Volume
        Map in ppm, and labels on its grid.
    structures : sequence of Structure
        Nuclei with a label.
    units : mapping of str to str, optional
        Unit of each map, by default that of its sidecar or suffix.
    brain : ndarray of bool, optional
        Brain on the grid of `chi`; by default the voxels of `chi` with a value.
    exclude : ndarray of bool, optional
        Voxels that are not measured.
    bilateral : bool
        Add a bilateral row (left and right combined) per nucleus.
    labels_name : str
        Name of the labels, for messages.
    """
    is_labelled = any((dseg.array == structure.index).any() for structure in structures)
    brain_mm = apply_affine(chi.affine, np.argwhere(is_valid(chi.array) if brain is None else brain))
    measured, report, warnings = [], {}, []
    for name, path in paths.items():
        about: dict[str, Any] = {"file": path.name}

        def check(values: Volume, path: Path = path) -> None:
            _check_overlap(values, brain_mm, name=path.name)

        try:
            if not is_labelled:
                raise InputError(f"{path.name}: no nucleus was found; nothing to measure it in")
            measures = measure_map(
                path,
                dseg,
                structures,
                name=name,
                labels_name=labels_name,
                units=(units or {}).get(name) or None,
                bilateral=bilateral,
                wholes=wholes_of(structures),
                exclude=exclude,
                check=check,
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
