"""Confidence in the segmentation of each nucleus, from the map and the probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage, special

from bids_dgmseg.measurement.columns import CONFIDENCE_COLUMNS
from bids_dgmseg.measurement.field_of_view import FieldOfView
from bids_dgmseg.models.structures import Structure

RIM_MM = (1.0, 3.0)
"""Distances from the nucleus between which the rim lies: beyond partial volume, before other tissue."""

_ROUNDING_MM = 1e-6
"""Rounding error of affines in float32."""


def measure_confidence(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
    fov: FieldOfView,
) -> pd.DataFrame:
    r"""Compute indicators of a good or bad segmentation per nucleus.

    Parameters
    ----------
    chi, dseg, probseg, structures, voxel_size_mm
        As in `bids_dgmseg.measurement.nuclei.measure_nuclei`.
    fov : FieldOfView
        Field of view of the whole map, cropped to the block that the arrays cover.

    Returns
    -------
    DataFrame
        One row per nucleus: ``index``, ``abbreviation`` and the columns of `CONFIDENCE_COLUMNS`. A nucleus without
        voxels has 0 components and NaN otherwise, except that all of its probability lies outside and its expected
        Dice is 0.

    Raises
    ------
    ValueError
        If the arrays differ in shape, or `probseg` does not have one channel per structure.

    Notes
    -----
    With probabilities :math:`p_i`, the voxels :math:`R` of the nucleus in `dseg`, and
    :math:`H(p) = -p \log_2 p - (1 - p) \log_2 (1 - p)`:

    .. math::

       \text{mean\_entropy} = \sum_R H(p_i) / |R|, \qquad
       \text{mass\_outside} = \sum_{i \notin R} p_i \Big/ \sum_i p_i, \qquad
       \text{expected\_dice} = 2 \sum_R p_i \Big/ \Big(|R| + \sum_i p_i\Big).

    The expected Dice is the ratio of expectations for a truth that contains each voxel with its probability. Unlike
    the other two it needs no separate limit for small nuclei, which are mostly boundary.

    The entropy is that of one nucleus against everything else, so that models with several heads, whose probabilities
    do not sum to 1, are comparable. Contrast and gradient are positive if the nucleus is more paramagnetic than its
    surroundings, as iron makes it. The rim holds valid voxels of no nucleus between 1 and 3 mm from the nucleus,
    centre to centre. The gradient is
    :math:`\sum_f a_f (\chi_\text{in} - \chi_\text{out}) / d_f \big/ \sum_f a_f` over the faces :math:`f` between a
    voxel of the nucleus and one of no nucleus, with area :math:`a_f` and distance of centres :math:`d_f`.
    """
    expected = (len(structures), *chi.shape)
    if probseg.shape != expected:
        raise ValueError(f"probseg has shape {probseg.shape}, expected {expected}")
    for name, shape in (("dseg", dseg.shape), ("fov", fov.inside.shape)):
        if shape != chi.shape:
            raise ValueError(f"{name} has shape {shape}, expected {chi.shape}")
    boxes = ndimage.find_objects(dseg, max_label=max((structure.index for structure in structures), default=0))
    values = np.where(fov.inside, chi, np.nan)
    rows = []
    for structure, probability in zip(structures, probseg, strict=True):
        row: dict[str, Any] = {"index": structure.index, "abbreviation": structure.abbreviation, "n_components": 0}
        total = probability.sum(dtype=np.float64)
        within, n_voxels = 0.0, 0
        if (tight := boxes[structure.index - 1]) is not None:
            steps = [int(np.ceil(RIM_MM[1] / edge)) for edge in voxel_size_mm]
            x, y, z = (
                slice(max(piece.start - step, 0), min(piece.stop + step, size))
                for piece, step, size in zip(tight, steps, chi.shape, strict=True)
            )
            box = x, y, z  # with a margin as wide as the rim
            region = dseg[box] == structure.index
            n_voxels = int(np.count_nonzero(region))
            within = float(probability[box][region].sum(dtype=np.float64))
            p = np.clip(probability[box][region].astype(np.float64), 0, 1)
            row["n_components"] = ndimage.label(region, np.ones((3, 3, 3)))[1]
            row["mean_entropy_bits"] = float((special.entr(p) + special.entr(1 - p)).mean() / np.log(2))
            row |= _compare_with_surroundings(values[box], region, dseg[box] == 0, voxel_size_mm)
            row["edge_distance_mm"] = fov.crop(box).distance_to_edge(region)
        if total > 0:
            row["mass_outside_fraction"] = max(0.0, 1 - within / total)
            row["expected_dice"] = 2 * within / (n_voxels + total)
        rows.append(row)
    return pd.DataFrame(rows, columns=["index", "abbreviation", *CONFIDENCE_COLUMNS]).astype({"n_components": "Int64"})


def _compare_with_surroundings(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    free: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> dict[str, float]:
    """Contrast with the rim and gradient across the surface; `free` are the voxels of no nucleus."""
    within, beyond = region & np.isfinite(chi), free & np.isfinite(chi)
    distance_mm = ndimage.distance_transform_edt(~region, sampling=voxel_size_mm)
    rim = (distance_mm > RIM_MM[0] + _ROUNDING_MM) & (distance_mm <= RIM_MM[1] + _ROUNDING_MM)
    contrast = np.nan
    if within.any() and (rim & beyond).any():
        contrast = float(np.median(chi[within]) - np.median(chi[rim & beyond]))
    flux = area = 0.0
    for axis, edge in enumerate(voxel_size_mm):
        face_mm2 = float(np.prod(voxel_size_mm)) / edge
        low = tuple(slice(None, -1) if other == axis else slice(None) for other in range(3))
        high = tuple(slice(1, None) if other == axis else slice(None) for other in range(3))
        for inner, outer in ((low, high), (high, low)):
            faces = within[inner] & beyond[outer]
            steps = chi[inner][faces].astype(np.float64) - chi[outer][faces]
            flux += face_mm2 * float(steps.sum()) / edge
            area += face_mm2 * int(np.count_nonzero(faces))
    return {"rim_contrast_ppm": contrast, "boundary_gradient_ppm_per_mm": flux / area if area else np.nan}
