"""Measure further maps of a session in the nuclei of a scan, if they are in its space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.alignment import compare_outlines
from bids_dgmseg.image.masks import is_valid, outside_field_of_view
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import spell_unit
from bids_dgmseg.measurement.labelled_maps import MeasuredMap, measure_map
from bids_dgmseg.models.structures import Structure, wholes_of

LARGEST_SHIFT_MM = 2.0
"""Displacement of the nuclei between the brain outlines of two maps from which one is refused."""

LARGEST_RESIDUAL_MM = 2.0
"""Median distance between brain outlines, apart from their displacement, from which they are of different heads."""

LARGEST_OFFSET_MM = 6.0
"""An outline that lies farther outside all around is that of a head with skull and skin, which is not compared."""

_BACKGROUND = 0.1
"""Smallest fraction of an image without a value around a brain that was extracted."""


@dataclass(frozen=True)
class SessionMeasures:
    """Measures of the further maps of a scan."""

    measured: tuple[MeasuredMap, ...]
    report: Mapping[str, Mapping[str, Any]]
    """Name of each map → file, unit, whether it was resampled, displacement in mm (None if it cannot be judged), and
    for refused maps the ``problem``."""
    warnings: tuple[str, ...]


def measure_session_maps(
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
) -> SessionMeasures:
    """Measure further maps of a session in the nuclei of a scan.

    A map on another grid is sampled at the voxels of the labels (`bids_dgmseg.measurement.maps.sample_map`). A map that
    cannot be read, contradicts its unit, or shows the brain more than 2 mm away from the chi map is refused with a
    warning. That is judged by the outlines of the brain (`bids_dgmseg.image.alignment.compare_outlines`); maps of whole
    heads have none and are used.

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
        Brain on the grid of `chi`, used if the chi map has a value everywhere.
    exclude : ndarray of bool, optional
        Voxels that are not measured.
    bilateral : bool
        Add a bilateral row (left and right combined) per nucleus.
    labels_name : str
        Name of the labels, for messages.
    """
    present = [one for one in structures if (dseg.array == one.index).any()]
    points_mm = np.argwhere(np.isin(dseg.array, [one.index for one in present])) @ dseg.affine[:3, :3].T
    points_mm = points_mm + dseg.affine[:3, 3]
    reference = _outline(chi, ~outside_field_of_view(is_valid(chi.array)))
    if reference is None and brain is not None:
        reference = chi.with_array(brain)
    measured, report, warnings = [], {}, []
    for name, path in paths.items():
        about: dict[str, Any] = {"file": path.name}
        shift: list[float] = []

        def check(values: Volume, path: Path = path, shift: list[float] = shift) -> None:
            shift += _check_alignment(values, reference, points_mm, name=path.name)

        try:
            if not present:
                raise InputError(f"{path.name}: no nucleus was found; nothing to measure it in")
            one = measure_map(
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
            measured.append(one)
            about |= {"unit": spell_unit(one.unit), "resampled": one.is_sampled, "negated": one.negated}
            about["shift_mm"] = round(shift[0], 2) if shift else None
        report[name] = about
    return SessionMeasures(tuple(measured), report, tuple(warnings))


def _outline(values: Volume, covered: NDArray[np.bool_]) -> Volume | None:
    """Return the mask of the part of an image with values; None if that is nearly all of it."""
    mask = ndimage.binary_fill_holes(covered)
    return values.with_array(mask) if mask.any() and 1 - mask.mean() > _BACKGROUND else None


def _check_alignment(
    values: Volume, reference: Volume | None, points_mm: NDArray[np.float64], *, name: str
) -> list[float]:
    """Return the displacement in mm, nothing if it cannot be judged; `InputError` if it is too large."""
    covered = np.isfinite(values.array) & (values.array != 0)
    mask = _outline(values, ~outside_field_of_view(covered))
    match = compare_outlines(reference, mask, points_mm) if reference is not None and mask is not None else None
    if match is None or match.offset_mm > LARGEST_OFFSET_MM:
        return []
    remedy = "register the map to the chi map first"
    if match.shift_mm > LARGEST_SHIFT_MM:
        raise InputError(
            f"{name}: shows the brain {match.shift_mm:.1f} mm away from the chi map (by their outlines, at the nuclei; "
            f"limit {LARGEST_SHIFT_MM:g} mm); {remedy}"
        )
    if match.residual_mm > LARGEST_RESIDUAL_MM:
        raise InputError(
            f"{name}: its brain outline is {match.residual_mm:.1f} mm away from that of the chi map (median), as if it "
            f"were of another head; check the file, or {remedy}"
        )
    return [match.shift_mm]
