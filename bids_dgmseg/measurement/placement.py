"""Where the nuclei lie: detached and misplaced voxels, caudates in the ventricle, and the size of the head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import minimize_scalar
from scipy.spatial import KDTree

from bids_dgmseg.image.grids import Similarity, fit_similarity
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import PLACEMENT_COLUMNS
from bids_dgmseg.models.structures import Structure, join_parts, whole_of

MARGIN_MM = 5.0
"""A voxel is misplaced if another nucleus is closer than its own by more than this, in MNI152 space."""

MEDIAL_MM = 6.0
"""A voxel of the caudate is medial if it is beyond the typical course by more than this, in MNI152 space."""

MIN_NUCLEI = 6
"""Nuclei from which the position of the head is estimated; fewer give no measure of placement."""

_NUCLEI_OF_SCALE = ("DN", "IN", "RN", "SN", "STN", "CN", "PUT", "GP")
"""Nuclei that the scale along one axis is estimated from, whatever else a model labels: limits were set with them."""

_MIN_FOR_SCALE, _MIN_HEIGHT_MM = 8, 35.0
"""Nuclei, and range of their typical heights, from which the scale along one axis is estimated: without those of the
cerebellum, it varies by twice as much. With six nuclei, caudates vary by 1.5 times as much towards the midline."""


def measure_placement(dseg: Volume, *, structures: Sequence[Structure]) -> pd.DataFrame:
    r"""Measure detached and misplaced voxels of each nucleus.

    Parameters
    ----------
    dseg : Volume
        Labels on the whole grid of the map, or on a block of it.
    structures : sequence of Structure
        The nuclei of the model.

    Returns
    -------
    DataFrame
        ``index``, ``abbreviation`` and the columns of `PLACEMENT_COLUMNS`; NaN for nuclei without a voxel, and
        ``misplaced_volume_mm3`` also if fewer than six nuclei were found, ``medial_volume_mm3`` fewer than eight.
        ``medial_volume_mm3`` and ``caudate_ratio`` are those of the caudate only.

    Notes
    -----
    ``detached_volume_mm3`` is the volume outside of the largest face-connected piece.

    For ``misplaced_volume_mm3``, the similarity transform (least squares) from the centres of the nuclei to their
    typical positions maps voxels :math:`x` to MNI152 space. With the distance :math:`d_n(x)` to the typical course of
    nucleus :math:`n` (``mni_mm`` of structures.tsv), voxels of :math:`n` count for which another nucleus :math:`m` has
    :math:`d_m(x) < d_n(x) - 5` mm.

    ``medial_volume_mm3`` is the volume, in MNI152 space, of the voxels that are closer to the midline by more than 6 mm
    than the typical course, which is interpolated along y. ``caudate_ratio`` is the volume of both caudates relative to
    that of both putamina and pallida; NaN if one of the six is missing.
    """
    voxel_mm3 = float(np.prod(dseg.voxel_size_mm))
    boxes = ndimage.find_objects(dseg.array, max_label=max((one.index for one in structures), default=0))
    voxels_mm = _voxels_mm(dseg, structures, boxes)
    to_mni = _fit_to_mni(voxels_mm, structures)
    courses = {one.abbreviation: KDTree(np.array(one.mni_course_mm)) for one in structures if one.mni_course_mm}
    ratio = _caudate_ratio(voxels_mm, structures)
    rows = []
    for one in structures:
        row: dict[str, Any] = {"index": one.index, "abbreviation": one.abbreviation}
        if box := boxes[one.index - 1]:
            pieces, n_pieces = ndimage.label(dseg.array[box] == one.index)
            sizes = np.bincount(pieces.ravel(), minlength=n_pieces + 1)[1:]
            row["detached_volume_mm3"] = float(sizes.sum() - sizes.max()) * voxel_mm3
            if to_mni is not None and one.abbreviation in courses:
                points = to_mni(voxels_mm[one.abbreviation])
                own, _ = courses[one.abbreviation].query(points)
                others = [course.query(points)[0] for name, course in courses.items() if name != one.abbreviation]
                row["misplaced_volume_mm3"] = float((np.min(others, axis=0) < own - MARGIN_MM).sum()) * voxel_mm3
                if one.nucleus == "CN" and len(voxels_mm) >= _MIN_FOR_SCALE:
                    n_medial = np.count_nonzero(_beyond_course_mm(points, one) > MEDIAL_MM)
                    row["medial_volume_mm3"] = n_medial * voxel_mm3 * float(np.linalg.det(to_mni.matrix))
            if one.nucleus == "CN":
                row["caudate_ratio"] = ratio
        rows.append(row)
    return pd.DataFrame(rows, columns=["index", "abbreviation", *PLACEMENT_COLUMNS])


def measure_head_size(dseg: Volume, *, structures: Sequence[Structure]) -> float:
    """Return the size of the head relative to MNI152, from the distances between its nuclei.

    It is the scale of the similarity transform of `measure_placement`; NaN if that is missing.
    """
    boxes = ndimage.find_objects(dseg.array, max_label=max((one.index for one in structures), default=0))
    to_mni = _fit_to_mni(_voxels_mm(dseg, structures, boxes), structures)
    return np.nan if to_mni is None else float(np.linalg.det(to_mni.matrix) ** (-1 / 3))


def measure_slice_scale(dseg: Volume, *, structures: Sequence[Structure]) -> float:
    r"""Return how far apart the nuclei lie along the slice axis, relative to the other axes and to MNI152.

    Parameters
    ----------
    dseg : Volume
        Labels on the grid of the map; the slice axis is that of the longest edge of a voxel, of equal ones the last.
    structures : sequence of Structure
        The nuclei of the model.

    Returns
    -------
    float
        NaN with fewer than eight nuclei or of one side only, or without nuclei of both cerebellum and basal ganglia.

    Notes
    -----
    The centres of the nuclei :math:`x_n` are compressed by :math:`k` along the slice axis :math:`u`, :math:`y_n = x_n +
    (1/k - 1)\, (u \cdot x_n)\, u`; the result is the :math:`k` with which they are most similar to the typical
    positions: that with the smallest residual of the similarity transform, relative to its scale. With slices that are
    stated too thick by a factor, :math:`k` is larger by it; the tilt of the slices and the size of the head do not
    matter. Nuclei that are labelled in parts count as wholes.
    """
    dseg, structures = dseg.with_array(join_parts(dseg.array)), tuple(dict.fromkeys(map(whole_of, structures)))
    boxes = ndimage.find_objects(dseg.array, max_label=max((one.index for one in structures), default=0))
    voxels_mm = _voxels_mm(dseg, structures, boxes)
    known = [one for one in structures if one.abbreviation in voxels_mm and one.nucleus in _NUCLEI_OF_SCALE]
    typical = np.array([_centre_mni(one) for one in known]).reshape(-1, 3)
    if len(known) < _MIN_FOR_SCALE or len({one.hemisphere for one in known}) != 2:
        return np.nan
    if np.ptp(typical[:, 2]) < _MIN_HEIGHT_MM:
        return np.nan
    centres = np.array([voxels_mm[one.abbreviation].mean(axis=0) for one in known])
    axis = 2 - int(np.argmax(np.round(dseg.voxel_size_mm[::-1], 3)))
    direction = dseg.affine[:3, axis] / np.linalg.norm(dseg.affine[:3, axis])
    along = ((centres - centres.mean(axis=0)) @ direction)[:, None] * direction

    def residual(log_scale: float) -> float:
        compressed = centres + (np.exp(-log_scale) - 1) * along
        to_scan = fit_similarity(typical, compressed)
        return float(np.linalg.norm(to_scan(typical) - compressed) / np.cbrt(np.linalg.det(to_scan.matrix)))

    return float(np.exp(minimize_scalar(residual, bounds=(-1, 1), method="bounded").x))


def _fit_to_mni(voxels_mm: Mapping[str, NDArray[np.float64]], structures: Sequence[Structure]) -> Similarity | None:
    """Fit the centres of the nuclei to their typical positions; None for too few nuclei."""
    known = [one for one in structures if one.abbreviation in voxels_mm and one.mni_course_mm]
    if len(known) < MIN_NUCLEI or len({one.hemisphere for one in known}) != 2:
        return None
    centres = np.array([voxels_mm[one.abbreviation].mean(axis=0) for one in known])
    return fit_similarity(centres, np.array([_centre_mni(one) for one in known]))


def _beyond_course_mm(points_mni: NDArray[np.float64], structure: Structure) -> NDArray[np.float64]:
    """Return how much closer to the midline points are than the typical course at their y."""
    x, y, _ = np.array(sorted(structure.mni_course_mm, key=lambda point: point[1])).T
    beyond: NDArray[np.float64] = np.sign(x[0]) * (np.interp(points_mni[:, 1], y, x) - points_mni[:, 0])
    return beyond


def _caudate_ratio(voxels_mm: Mapping[str, NDArray[np.float64]], structures: Sequence[Structure]) -> float:
    """Return the number of voxels of the caudates relative to putamina and pallida, whole or in parts."""
    n_voxels: Counter[str] = Counter()
    for one in structures:
        n_voxels[whole_of(one).abbreviation] += len(voxels_mm.get(one.abbreviation, ()))
    six = np.array([[n_voxels[f"{nucleus}_{side}"] for side in "LR"] for nucleus in ("CN", "PUT", "GP")])
    return float(six[0].sum() / six[1:].sum()) if six.all() else np.nan


def _voxels_mm(
    dseg: Volume, structures: Sequence[Structure], boxes: Sequence[tuple[slice, ...] | None]
) -> dict[str, NDArray[np.float64]]:
    """Return the centres of the voxels of each nucleus that has any, in mm, by abbreviation."""
    voxels = {}
    for one in structures:
        if box := boxes[one.index - 1]:
            indices = np.argwhere(dseg.array[box] == one.index) + [part.start for part in box]
            voxels[one.abbreviation] = indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    return voxels


def _centre_mni(structure: Structure) -> NDArray[np.float64]:
    """Return the mean of the typical course, which is closest to the centre of a long nucleus."""
    centre: NDArray[np.float64] = np.mean(structure.mni_course_mm, axis=0)
    return centre
