"""Reference region of a scan: how it is found, its susceptibility, and values relative to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.masks import ROUNDING_MM
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.measurement.nuclei import REFERENCED
from bids_dgmseg.measurement.segmented_scan import SegmentedScan
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.models.structures import with_wholes

MIN_VOXELS = 20
"""With fewer, one vessel or the noise of a few voxels would shift every nucleus."""

MIN_VOLUME_MM3 = 50.0
"""Two thirds of the smallest nucleus; at 0.5 mm, 20 voxels are less than the error of any label."""


@dataclass(frozen=True)
class Reference:
    """Susceptibility of a reference region, and how the region was obtained."""

    region: str
    """``csf``, ``whole-brain``, or a nucleus."""
    source: str
    """Description of how the region was obtained."""
    mean_ppm: float = np.nan
    """NaN if there is no value."""
    std_ppm: float = np.nan
    n_voxels: int = 0
    problem: str = ""
    """Why there is no value, as a warning without the name of the scan; empty if there is one."""

    @property
    def sem_ppm(self) -> float:
        """Standard error of the mean, with voxels counted as independent; common to all nuclei of the scan."""
        return float(self.std_ppm / np.sqrt(self.n_voxels)) if self.n_voxels else np.nan


def measure_reference(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    *,
    name: str,
    source: str,
    voxel_size_mm: tuple[float, float, float],
) -> Reference:
    """Measure the susceptibility of a reference region.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Susceptibility in ppm, NaN where not valid.
    region : ndarray of bool, shape (X, Y, Z)
        Voxels of the region, all inside the field of view.
    name : str
        Name of the region.
    source : str
        Description of how the region was obtained.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    Reference
        Mean and sample standard deviation (n - 1); NaN for fewer than 20 valid voxels or less than 50 mm³.
    """
    values = chi[region & np.isfinite(chi)].astype(np.float64)
    volume_mm3 = len(values) * float(np.prod(voxel_size_mm))
    if len(values) < MIN_VOXELS or volume_mm3 < MIN_VOLUME_MM3:
        problem = (
            f"reference {name}: {len(values)} voxels ({volume_mm3:.0f} mm3) in {source}, expected {MIN_VOXELS} and "
            f"{MIN_VOLUME_MM3:.0f} mm3 or more; its referenced values are n/a"
        )
        return Reference(name, source, n_voxels=len(values), problem=problem)
    return Reference(name, source, float(values.mean()), float(values.std(ddof=1)), len(values))


def erode_ventricles(
    ventricles: NDArray[np.bool_],
    *,
    voxel_size_mm: tuple[float, float, float],
    label_size_mm: tuple[float, float, float],
) -> NDArray[np.bool_]:
    """Erode the lateral ventricles to voxels that contain only CSF.

    Parameters
    ----------
    ventricles : ndarray of bool, shape (X, Y, Z)
        On the grid of the map, resampled from coarser labels.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel of the map in mm.
    label_size_mm : tuple of 3 float
        Edge lengths of a voxel of the original labels in mm.

    Returns
    -------
    ndarray of bool
        Voxels farther than half an edge of the original voxels from every voxel outside, centre to centre, that share
        no face with one. The boundary of coarse labels can be wrong by this distance, and beyond it lies caudate or
        white matter; voxels of the map with longer edges contain some of it wherever they touch the boundary.
    """
    eroded = np.zeros(ventricles.shape, bool)
    boxes = ndimage.find_objects(ventricles.astype(np.uint8))
    if boxes:
        padded = np.pad(ventricles[boxes[0]], 1)
        distance_mm = ndimage.distance_transform_edt(padded, sampling=voxel_size_mm)
        inner = ndimage.binary_erosion(padded) & (distance_mm > max(label_size_mm) / 2 + ROUNDING_MM)
        eroded[boxes[0]] = inner[1:-1, 1:-1, 1:-1]
    return eroded


def describe_erosion(*, voxel_size_mm: tuple[float, float, float], label_size_mm: tuple[float, float, float]) -> str:
    """Describe the depth of `erode_ventricles`.

    >>> describe_erosion(voxel_size_mm=(1.0, 1.0, 2.0), label_size_mm=(3.0, 3.0, 3.0))
    'eroded by 1.5 mm, at least by one voxel'
    """
    depth_mm = max(label_size_mm) / 2
    at_least = ", at least by one voxel" if max(voxel_size_mm) > depth_mm + ROUNDING_MM else ""
    return f"eroded by {depth_mm:g} mm{at_least}"


def check_reference(reference: ReferenceRegion, model: Model) -> None:
    """Check that the options of the reference region fit each other and the model; `InputError` if not."""
    structures = with_wholes(model.structures)
    names = [*dict.fromkeys(row.nucleus for row in structures), *(row.abbreviation for row in structures)]
    if reference.region not in ("none", "whole-brain", "csf", *names):
        raise InputError(
            f"`reference` {reference.region}: unknown; choose from whole-brain, csf, {', '.join(names)} of {model.name}"
        )
    if reference.masks and reference.region != "csf":
        raise InputError(f"`reference_mask`: requires `reference` csf, not {reference.region}; add `reference` csf")
    if reference.region == "csf" and not reference.masks and "ventricles" not in model.localizer.labels:
        raise InputError(
            f"`reference` csf: {model.name} does not label the ventricles; provide masks with `reference_mask`"
        )


def find_reference(
    wanted: ReferenceRegion,
    scan: SegmentedScan,
    *,
    mask: Path | None,
    regions: Mapping[str, NDArray[np.bool_]],
    model: Model,
) -> Reference | None:
    """Measure the reference region of a scan; None if no reference was asked for.

    `mask` is the user's mask of this scan and `regions` are the masks of the head regions on the grid of the map. A
    reference without a value has a `problem`. `InputError` if a mask is not readable or on another grid.
    """
    if wanted.region == "none":
        return None
    name, size_mm = wanted.region, scan.chi.voxel_size_mm
    if wanted.masks is not None and mask is None:
        return Reference(name, "", problem=f"reference {name}: no mask for this scan; its referenced values are n/a")
    if wanted.region not in ("whole-brain", "csf"):
        indices = [
            label
            for structure in with_wholes(scan.structures)
            for label in structure.labels
            if name in (structure.nucleus, structure.abbreviation)
        ]
        region, source = np.isin(scan.dseg.array, indices), f"{name} labelled by {model.name}"
    elif mask is not None:
        values = Volume.read(mask)
        check_intact(mask)
        if difference := describe_grid_mismatch(scan.chi, values):
            raise InputError(f"{mask.name}: is not on the same grid as the map ({difference}); resample the mask first")
        region, source = np.asarray(values.array > 0.5), f"mask {mask.name}"
    elif wanted.region == "whole-brain" and "brain" in regions:
        region, source = regions["brain"], f"brain labelled by {model.name}"
    elif wanted.region == "whole-brain":
        region, source = scan.fov.inside, "field of view of the map"
    else:
        finder, network_input = model, model.localizer.input
        if model.ventricles:
            finder = get_model(model.ventricles)
            network_input = finder.input
        label_mm = network_input.spacing_mm if network_input else (0.0, 0.0, 0.0)
        ventricles = regions["ventricles"] & (scan.dseg.array == 0)
        region = erode_ventricles(ventricles, voxel_size_mm=size_mm, label_size_mm=label_mm)
        erosion = describe_erosion(voxel_size_mm=size_mm, label_size_mm=label_mm)
        source = f"lateral ventricles labelled by {finder.name}, {erosion}"
    return measure_reference(scan.chi.array, region & scan.fov.inside, name=name, source=source, voxel_size_mm=size_mm)


def add_referenced_columns(
    stats: pd.DataFrame, reference: Reference, *, voxel_size_mm: tuple[float, float, float]
) -> pd.DataFrame:
    r"""Add susceptibilities relative to the reference region.

    Returns a copy of the table of `measure_nuclei` and `measure_high_iron` with the columns of `REFERENCE_COLUMNS`
    appended; NaN if value or reference is missing.

    With the mean :math:`\chi_0` of the reference region: :math:`\chi - \chi_0` for means, medians and percentiles,
    :math:`m - \chi_0 v n` for the mass :math:`m = v \sum \chi` of :math:`n` valid voxels of volume :math:`v`.
    Standard deviations and standard errors of the nuclei do not change: the error of :math:`\chi_0` is common to all.
    """
    table = stats.copy()
    for column, name in REFERENCED.items():
        table[name] = table[column] - reference.mean_ppm
    valid_mm3 = table["n_valid"].astype(np.float64) * np.prod(voxel_size_mm)
    table["mass_ref_ppm_mm3"] = table["mass_ppm_mm3"] - reference.mean_ppm * valid_mm3
    return table
