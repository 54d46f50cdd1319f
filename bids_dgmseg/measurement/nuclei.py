"""Volume and susceptibility of each nucleus."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.measurement.columns import HIGH_IRON_COLUMNS, REGION_COLUMNS
from bids_dgmseg.models.structures import Structure

CORE_DEPTH_MM = 1.0
"""Partial volume and blur reach about this far into a nucleus."""

CORE_DEPTH_EDGES = 1.2
"""At least one layer is removed along the short edges of a voxel, and none along edges 1.2 times longer."""


def measure_regions(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
    missing: Collection[str] = (),
) -> pd.DataFrame:
    r"""Measure each nucleus on the map's own grid.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Magnetic susceptibility in ppm. NaN means not measured; 0 is a value like any other.
    dseg : ndarray of int, shape (X, Y, Z)
        Numbers of ``structures.tsv``; 0 is background.
    probseg : ndarray of shape (C, X, Y, Z)
        Probability of nucleus ``structures[c]``, from 0 to 1.
    structures : sequence of C Structure
        In the order of the channels, which is also the order of the rows.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    missing : collection of str
        Abbreviations of nuclei outside the field of view: every measure of theirs is missing.

    Returns
    -------
    DataFrame
        One row a nucleus, the columns of `REGION_COLUMNS`. A nucleus without a voxel has volume 0 and NaN for its
        susceptibilities; a single voxel has no ``std_ppm``. ``n_voxels`` and ``n_valid`` are
        ``Int64``, so that they can be missing.

    Raises
    ------
    ValueError
        If the arrays do not lie on one grid, `probseg` has not one channel a structure, or `missing` holds a nucleus
        that is not in `structures`.

    Notes
    -----
    With voxel volume :math:`v`, susceptibility :math:`\chi_i`, probabilities :math:`p_{ci}`, the voxels
    :math:`R_c` of the nucleus in `dseg`, and :math:`M` the voxels where :math:`\chi` is not NaN:

    .. math::

       \text{volume} &= v\,|R_c| & \text{volume\_pv} &= v \sum_i p_{ci} \\
       \text{mean} &= \sum_{R_c \cap M} \chi_i / |R_c \cap M| &
       \text{mean\_pv} &= \sum_M p_{ci}\chi_i / \sum_M p_{ci} \\
       \text{mass} &= v \sum_{R_c \cap M} \chi_i & \text{mean\_probability} &= \sum_{R_c} p_{ci} / |R_c|

    ``std`` is the sample standard deviation (:math:`n - 1`), percentiles interpolate linearly between order
    statistics, and ``core_mean`` is the mean over `core_mask`. Volumes count voxels without a measurement too.
    """
    expected = (len(structures), *chi.shape)
    if probseg.shape != expected:
        raise ValueError(f"probseg has shape {probseg.shape}, expected {expected}")
    if dseg.shape != chi.shape:
        raise ValueError(f"dseg has shape {dseg.shape}, expected {chi.shape}")
    if unknown := set(missing) - {structure.abbreviation for structure in structures}:
        raise ValueError(f"missing holds {sorted(unknown)}, not among the structures")
    boxes = ndimage.find_objects(dseg, max_label=max((structure.index for structure in structures), default=0))
    rows = []
    for structure, probability in zip(structures, probseg, strict=True):
        row: dict[str, object] = {
            "index": structure.index,
            "name": structure.name,
            "abbreviation": structure.abbreviation,
            "hemisphere": structure.hemisphere,
        }
        if structure.abbreviation not in missing:
            box = boxes[structure.index - 1] or (slice(0, 0),) * 3
            region = dseg[box] == structure.index
            row |= _label_measures(chi[box], region, probability[box], voxel_size_mm)
            row |= _weighted_measures(chi, probability, voxel_size_mm)
        rows.append(row)
    return pd.DataFrame(rows, columns=list(REGION_COLUMNS)).astype({"n_voxels": "Int64", "n_valid": "Int64"})


def core_mask(region: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]) -> NDArray[np.bool_]:
    """Keep the voxels deep inside a region.

    A voxel stays if every voxel outside the region (and every place outside the array) is farther from it, centre to
    centre, than 1 mm and than 1.2 times the shortest edge. On isotropic voxels of 0.85 mm and more that is an erosion
    by one layer of face neighbours; thick slices are eroded within the slice only.

    Parameters
    ----------
    region : ndarray of bool, shape (X, Y, Z)
        Voxels of one nucleus.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    """
    if not region.any():
        return region.copy()
    depth_mm = max(CORE_DEPTH_MM, CORE_DEPTH_EDGES * min(voxel_size_mm)) + 1e-6  # affines round in float32
    distance_mm = ndimage.distance_transform_edt(np.pad(region, 1), sampling=voxel_size_mm)
    return np.asarray(distance_mm[1:-1, 1:-1, 1:-1] > depth_mm)


def _label_measures(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    probability: NDArray[np.floating],
    voxel_size_mm: tuple[float, float, float],
) -> Mapping[str, float]:
    """Measure the voxels of one label; all arrays are cut to its box."""
    voxel_mm3 = float(np.prod(voxel_size_mm))
    n_voxels = int(np.count_nonzero(region))
    measured = np.isfinite(chi)
    values = chi[region & measured].astype(np.float64)
    row = {"n_voxels": n_voxels, "n_valid": len(values), "volume_mm3": n_voxels * voxel_mm3}
    if n_voxels:
        row["mean_probability"] = float(probability[region].mean(dtype=np.float64))
    if not len(values):
        return row
    p05, p25, median, p75, p95 = np.percentile(values, (5, 25, 50, 75, 95))
    core = chi[core_mask(region, voxel_size_mm=voxel_size_mm) & measured].astype(np.float64)
    return row | {
        "mean_ppm": values.mean(),
        "median_ppm": median,
        "p05_ppm": p05,
        "p25_ppm": p25,
        "p75_ppm": p75,
        "p95_ppm": p95,
        "std_ppm": values.std(ddof=1) if len(values) > 1 else np.nan,
        "core_mean_ppm": core.mean() if len(core) else np.nan,
        "mass_ppm_mm3": values.sum() * voxel_mm3,
    }


def _weighted_measures(
    chi: NDArray[np.floating], probability: NDArray[np.floating], voxel_size_mm: tuple[float, float, float]
) -> Mapping[str, float]:
    """Measure one nucleus, counting a voxel as far as it belongs to it."""
    inside = probability > 0
    fractions = probability[inside].astype(np.float64)
    values = chi[inside].astype(np.float64)
    measured = np.isfinite(values)
    weight = fractions[measured].sum()
    return {
        "volume_pv_mm3": float(fractions.sum() * np.prod(voxel_size_mm)),
        "mean_pv_ppm": float(fractions[measured] @ values[measured] / weight) if weight > 0 else np.nan,
    }


THRESHOLD_SDS = 1.0
"""The high-iron part lies this many standard deviations above the mean of the nucleus."""


def measure_high_iron(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:
    r"""Measure the high-iron part of each nucleus and the standard errors of the means.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Magnetic susceptibility in ppm; NaN means not measured.
    dseg : ndarray of int, shape (X, Y, Z)
        Numbers of ``structures.tsv``.
    structures : sequence of Structure
        The nuclei, in the order of the rows.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.

    Returns
    -------
    DataFrame
        One row a nucleus: ``index``, ``abbreviation`` and the columns of `HIGH_IRON_COLUMNS`. A standard error needs
        two voxels, the threshold too; where no voxel lies above it (all are equal), the part has volume 0 and no mean.

    Raises
    ------
    ValueError
        If the arrays do not lie on one grid.

    Notes
    -----
    Two-region analyses [1]_ split a nucleus into a part of low (RI) and one of high iron content (RII) by a threshold
    that depends on age and is learned from healthy controls. One scan has no controls, so the threshold here is the
    nucleus's own: with mean :math:`m` and standard deviation :math:`s` (:math:`n - 1`) of its measured voxels, the
    part is :math:`\{i : \chi_i > m + s\}`. It describes the upper end of the distribution inside the nucleus. It does
    not say whether a nucleus holds more iron than others of its age: adding a constant to the map moves threshold and
    mean alike, and its volume says nothing about iron. Voxels of pure Gaussian noise have
    :math:`\bar\chi_\text{high} = m + 1.525 s`; only what exceeds this is a part of its own.

    Standard errors are :math:`s / \sqrt{n}` and take voxels for independent. Neighbouring voxels of a map are not, so
    the true errors are larger; that of the high-iron part takes its voxels as given.

    References
    ----------
    .. [1] Li Y, Sethi SK, et al. Iron content in deep gray matter as a function of age using quantitative
       susceptibility mapping: a multicenter study. Front Neurosci 14 (2021) 607705. doi:10.3389/fnins.2020.607705
    """
    if dseg.shape != chi.shape:
        raise ValueError(f"dseg has shape {dseg.shape}, expected {chi.shape}")
    boxes = ndimage.find_objects(dseg, max_label=max((structure.index for structure in structures), default=0))
    voxel_mm3 = float(np.prod(voxel_size_mm))
    rows = []
    for structure in structures:
        box = boxes[structure.index - 1] or (slice(0, 0),) * 3
        values = chi[box][(dseg[box] == structure.index) & np.isfinite(chi[box])].astype(np.float64)
        rows.append({"index": structure.index, "abbreviation": structure.abbreviation, **_split(values, voxel_mm3)})
    return pd.DataFrame(rows, columns=["index", "abbreviation", *HIGH_IRON_COLUMNS])


def _split(values: NDArray[np.float64], voxel_mm3: float) -> dict[str, float]:
    if len(values) < 2:
        return {}
    spread = float(values.std(ddof=1))
    threshold = float(values.mean()) + THRESHOLD_SDS * spread
    # A spread of rounding errors would make a part of equal values.
    high = values[values > threshold] if spread > 1e-12 else values[:0]
    return {
        "sem_ppm": _standard_error(values),
        "high_iron_threshold_ppm": threshold,
        "high_iron_mean_ppm": float(high.mean()) if len(high) else np.nan,
        "high_iron_sem_ppm": _standard_error(high),
        "high_iron_volume_mm3": len(high) * voxel_mm3,
        "high_iron_fraction": len(high) / len(values),
    }


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
