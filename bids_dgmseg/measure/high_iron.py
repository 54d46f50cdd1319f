"""The part of a nucleus that holds most iron, and how precisely means are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.measure.columns import HIGH_IRON_COLUMNS
from bids_dgmseg.structures import Structure

THRESHOLD_SDS = 1.0
"""The high-iron part lies this many standard deviations above the mean of the nucleus."""


def measure_high_iron(
    chi: NDArray[np.floating], dseg: NDArray[np.integer], *, structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
) -> pd.DataFrame:  # fmt: skip
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
