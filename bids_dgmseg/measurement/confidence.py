"""How far the segmentation of a nucleus can be trusted, told from the map and the probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage, special

from bids_dgmseg.measurement.columns import QUALITY_COLUMNS
from bids_dgmseg.measurement.field_of_view import View
from bids_dgmseg.models.structures import Structure

RIM_START_MM, RIM_END_MM = 1.0, 3.0
"""The rim lies between these distances from the nucleus: partial volumes end before it, other tissue begins behind."""

_EVERY_NEIGHBOUR = np.ones((3, 3, 3))


def measure_quality(
    chi: NDArray[np.floating],
    dseg: NDArray[np.integer],
    probseg: NDArray[np.floating],
    *,
    structures: Sequence[Structure],
    voxel_size_mm: tuple[float, float, float],
    view: View,
) -> pd.DataFrame:
    r"""Measure signs of a good or a bad segmentation, nucleus by nucleus.

    Parameters
    ----------
    chi : ndarray of shape (X, Y, Z)
        Magnetic susceptibility in ppm; NaN means not measured.
    dseg : ndarray of int, shape (X, Y, Z)
        Numbers of ``structures.tsv``; 0 is background.
    probseg : ndarray of shape (C, X, Y, Z)
        Probability of nucleus ``structures[c]``, from 0 to 1.
    structures : sequence of C Structure
        In the order of the channels, which is also the order of the rows.
    voxel_size_mm : tuple of 3 float
        Edge lengths of a voxel in mm.
    view : View
        What was measured; of the whole map, cut to the block that the arrays cover.

    Returns
    -------
    DataFrame
        One row a nucleus: ``index``, ``abbreviation`` and the columns of `QUALITY_COLUMNS`. A nucleus without a voxel
        has 0 components and NaN for the rest, except that all of its probability lies outside and its expected Dice is
        0.

    Raises
    ------
    ValueError
        If the arrays do not lie on one grid, or `probseg` has not one channel a structure.

    Notes
    -----
    With probabilities :math:`p_i`, the voxels :math:`R` of the nucleus in `dseg`, and
    :math:`H(p) = -p \log_2 p - (1 - p) \log_2 (1 - p)`:

    .. math::

       \text{mean\_entropy} = \sum_R H(p_i) / |R|, \qquad
       \text{mass\_outside} = \sum_{i \notin R} p_i \Big/ \sum_i p_i, \qquad
       \text{expected\_dice} = 2 \sum_R p_i \Big/ \Big(|R| + \sum_i p_i\Big).

    The last is the Dice with a truth of which each voxel is a part with its probability, expectations taken of both
    sides of the fraction. Unlike the other two it needs no other limit for small nuclei, which are mostly border.

    The entropy is that of one nucleus against all else, not of the whole distribution, so that models with several
    heads, whose probabilities do not add up to 1, compare. Lower is better for the first two; contrast and gradient are
    positive where the nucleus is more paramagnetic than its surroundings, as iron makes it.

    The rim holds measured voxels of no nucleus between 1 and 3 mm from the nucleus, centre to centre. The gradient is
    :math:`\sum_f a_f (\chi_\text{in} - \chi_\text{out}) / d_f \big/ \sum_f a_f` over the faces :math:`f` between a
    voxel of the nucleus and one of no nucleus, with area :math:`a_f` and distance of centres :math:`d_f`.
    """
    expected = (len(structures), *chi.shape)
    if probseg.shape != expected:
        raise ValueError(f"probseg has shape {probseg.shape}, expected {expected}")
    for name, shape in (("dseg", dseg.shape), ("view", view.inside.shape)):
        if shape != chi.shape:
            raise ValueError(f"{name} has shape {shape}, expected {chi.shape}")
    boxes = ndimage.find_objects(dseg, max_label=max((structure.index for structure in structures), default=0))
    values = np.where(view.inside, chi, np.nan)
    rows = []
    for structure, probability in zip(structures, probseg, strict=True):
        row: dict[str, Any] = {"index": structure.index, "abbreviation": structure.abbreviation, "n_components": 0}
        total = probability.sum(dtype=np.float64)
        within, n_voxels = 0.0, 0
        if (place := boxes[structure.index - 1]) is not None:
            box = _grow(place, chi.shape, voxel_size_mm)
            region = dseg[box] == structure.index
            n_voxels = int(np.count_nonzero(region))
            within = float(probability[box][region].sum(dtype=np.float64))
            row |= _certainty(region, probability[box])
            row |= _contrast(values[box], region, dseg[box] == 0, voxel_size_mm)
            row["edge_distance_mm"] = view.cut(box).measure_gap(region)
        if total > 0:
            row["mass_outside_fraction"] = max(0.0, 1 - within / total)
            row["expected_dice"] = 2 * within / (n_voxels + total)
        rows.append(row)
    return pd.DataFrame(rows, columns=["index", "abbreviation", *QUALITY_COLUMNS]).astype({"n_components": "Int64"})


def _grow(
    box: tuple[slice, ...], shape: tuple[int, ...], voxel_size_mm: tuple[float, float, float]
) -> tuple[slice, slice, slice]:
    """Add room for the rim."""
    steps = [int(np.ceil(RIM_END_MM / edge)) for edge in voxel_size_mm]
    x, y, z = (
        slice(max(piece.start - step, 0), min(piece.stop + step, size))
        for piece, step, size in zip(box, steps, shape, strict=True)
    )
    return x, y, z


def _certainty(region: NDArray[np.bool_], probability: NDArray[np.floating]) -> dict[str, float]:
    p = np.clip(probability[region].astype(np.float64), 0, 1)
    nats = special.entr(p) + special.entr(1 - p)
    return {
        "n_components": ndimage.label(region, _EVERY_NEIGHBOUR)[1],
        "mean_entropy_bits": float(nats.mean() / np.log(2)),
    }


def _contrast(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    free: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> dict[str, float]:
    """Compare a nucleus with what is around it; `free` are the voxels of no nucleus."""
    measured = np.isfinite(chi)
    distance_mm = ndimage.distance_transform_edt(~region, sampling=voxel_size_mm)
    around = (distance_mm > RIM_START_MM + 1e-6) & (distance_mm <= RIM_END_MM + 1e-6)  # affines round in float32
    inner, outer = chi[region & measured], chi[around & free & measured]
    contrast = float(np.median(inner) - np.median(outer)) if len(inner) and len(outer) else np.nan
    gradient = _boundary_gradient(chi, region & measured, free & measured, voxel_size_mm)
    return {"rim_contrast_ppm": contrast, "boundary_gradient_ppm_per_mm": gradient}


def _boundary_gradient(
    chi: NDArray[np.floating],
    region: NDArray[np.bool_],
    free: NDArray[np.bool_],
    voxel_size_mm: tuple[float, float, float],
) -> float:
    flux = area = 0.0
    for axis, edge in enumerate(voxel_size_mm):
        face_mm2 = float(np.prod(voxel_size_mm)) / edge
        low = tuple(slice(None, -1) if other == axis else slice(None) for other in range(3))
        high = tuple(slice(1, None) if other == axis else slice(None) for other in range(3))
        for inner, outer in ((low, high), (high, low)):
            faces = region[inner] & free[outer]
            steps = chi[inner][faces].astype(np.float64) - chi[outer][faces]
            flux += face_mm2 * float(steps.sum()) / edge
            area += face_mm2 * int(np.count_nonzero(faces))
    return flux / area if area else np.nan
