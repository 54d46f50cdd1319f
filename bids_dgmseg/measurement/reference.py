"""A region of the map itself as the zero of its susceptibilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.measurement.columns import REFERENCED

FEWEST_VOXELS = 20
"""The mean of fewer is no reference: one vessel or the noise of a few voxels would move every nucleus."""

SMALLEST_MM3 = 50.0
"""Two thirds of the smallest nucleus; at 0.5 mm, twenty voxels are less than the error of any label."""

_ROUNDING_MM = 1e-6
"""Of affines in float32."""


@dataclass(frozen=True)
class Reference:
    """The susceptibility of a region, and where the region came from."""

    region: str
    """``csf``, ``whole-brain``, or a nucleus."""
    source: str
    """In words."""
    mean_ppm: float = np.nan
    """NaN where it cannot be had."""
    std_ppm: float = np.nan
    n_voxels: int = 0
    problem: str = ""
    """Why there is no value, as a warning without the scan's name; empty where there is one."""

    @property
    def sem_ppm(self) -> float:
        """Standard error of the mean, voxels taken for independent; it is common to all nuclei of the scan."""
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
        Magnetic susceptibility in ppm; NaN means not measured.
    region : ndarray of bool, shape (X, Y, Z)
        Voxels to average, none of them outside the measured part of the map.
    name : str
        Which region it is.
    source : str
        Where the voxels came from, in words.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    Reference
        Mean and sample standard deviation (n - 1); without them where fewer than 20 voxels or 50 mm³ were measured.
    """
    values = chi[region & np.isfinite(chi)].astype(np.float64)
    volume_mm3 = len(values) * float(np.prod(voxel_size_mm))
    if len(values) < FEWEST_VOXELS or volume_mm3 < SMALLEST_MM3:
        problem = (
            f"reference {name}: {len(values)} voxels ({volume_mm3:.0f} mm3) in {source}, expected {FEWEST_VOXELS} and "
            f"{SMALLEST_MM3:.0f} mm3 or more; its referenced values are n/a"
        )
        return Reference(name, source, n_voxels=len(values), problem=problem)
    return Reference(name, source, float(values.mean()), float(values.std(ddof=1)), len(values))


def find_ventricle_core(
    ventricles: NDArray[np.bool_],
    *,
    voxel_size_mm: tuple[float, float, float],
    label_size_mm: tuple[float, float, float],
) -> NDArray[np.bool_]:
    """Keep the voxels deep inside the lateral ventricles.

    Parameters
    ----------
    ventricles : ndarray of bool, shape (X, Y, Z)
        On the map's grid, carried from coarser labels.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel of the map in mm.
    label_size_mm : tuple of 3 float
        Edge lengths of a voxel of the labels they were carried from.

    Returns
    -------
    ndarray of bool
        Voxels farther than half an edge of the label's voxels from every voxel outside, centre to centre, and that
        share no face with one. By so much a border between coarse labels can be wrong, and what lies there is caudate
        or white matter; voxels with edges longer than that hold some of it wherever they touch the border.
    """
    core = np.zeros(ventricles.shape, bool)
    found = ndimage.find_objects(ventricles.astype(np.uint8))
    if found:
        whole = np.pad(ventricles[found[0]], 1)
        distance_mm = ndimage.distance_transform_edt(whole, sampling=voxel_size_mm)
        inner = ndimage.binary_erosion(whole) & (distance_mm > max(label_size_mm) / 2 + _ROUNDING_MM)
        core[found[0]] = inner[1:-1, 1:-1, 1:-1]
    return core


def describe_core(*, voxel_size_mm: tuple[float, float, float], label_size_mm: tuple[float, float, float]) -> str:
    """Say by how much `find_ventricle_core` erodes.

    >>> describe_core(voxel_size_mm=(1.0, 1.0, 2.0), label_size_mm=(3.0, 3.0, 3.0))
    'eroded by 1.5 mm, at least by one voxel'
    """
    rim_mm = max(label_size_mm) / 2
    at_least = ", at least by one voxel" if max(voxel_size_mm) > rim_mm + _ROUNDING_MM else ""
    return f"eroded by {rim_mm:g} mm{at_least}"


def refer(stats: pd.DataFrame, reference: Reference, *, voxel_size_mm: tuple[float, float, float]) -> pd.DataFrame:
    r"""Put referenced susceptibilities beside the raw ones.

    Parameters
    ----------
    stats : DataFrame
        Columns of `bids_dgmseg.measurement.nuclei.measure_regions`, and more.
    reference : Reference
        Its mean becomes 0.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    DataFrame
        `stats` and the columns of `REFERENCE_COLUMNS` behind; NaN where value or reference is missing.

    Notes
    -----
    With the reference's mean :math:`\chi_0`: :math:`\chi - \chi_0` for means, medians, percentiles and thresholds;
    :math:`m - \chi_0 v n` for the mass :math:`m = v \sum \chi` of the :math:`n` measured voxels of volume :math:`v`.
    Standard deviations and the standard errors of the nuclei stay: the error of :math:`\chi_0` is one number, common
    to all of them.
    """
    table = stats.copy()
    for column, name in REFERENCED.items():
        table[name] = table[column] - reference.mean_ppm
    measured_mm3 = table["n_valid"].astype(np.float64) * np.prod(voxel_size_mm)
    table["mass_ref_ppm_mm3"] = table["mass_ppm_mm3"] - reference.mean_ppm * measured_mm3
    return table
