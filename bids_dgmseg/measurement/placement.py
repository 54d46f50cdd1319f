"""Where the voxels of a nucleus lie: pieces apart from it, and voxels where another nucleus belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from bids_dgmseg.image.grids import fit_similarity
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.measurement.columns import PLACEMENT_COLUMNS
from bids_dgmseg.models.structures import Structure

MARGIN_MM = 5.0
"""A voxel is misplaced if another nucleus is closer than its own by more than this, in MNI152 space."""

MIN_NUCLEI = 6
"""Nuclei from which the position of the head is estimated; fewer give no measure of placement."""


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
        ``misplaced_volume_mm3`` also if fewer than six nuclei were found.

    Notes
    -----
    ``detached_volume_mm3`` is the volume outside of the largest face-connected piece.

    For ``misplaced_volume_mm3``, the similarity transform (least squares) from the centres of the nuclei to their
    typical positions maps voxels :math:`x` to MNI152 space. With the distance :math:`d_n(x)` to the typical course of
    nucleus :math:`n` (``mni_mm`` of structures.tsv), voxels of :math:`n` count for which another nucleus :math:`m` has
    :math:`d_m(x) < d_n(x) - 5` mm.
    """
    voxel_mm3 = float(np.prod(dseg.voxel_size_mm))
    boxes = ndimage.find_objects(dseg.array, max_label=max((one.index for one in structures), default=0))
    voxels_mm = {
        one.abbreviation: _voxels_mm(dseg, one.index, box) for one in structures if (box := boxes[one.index - 1])
    }
    centres = {name: points.mean(axis=0) for name, points in voxels_mm.items()}
    known = [one for one in structures if one.abbreviation in centres and one.mni_course_mm]
    to_mni = None
    if len(known) >= MIN_NUCLEI and len({one.hemisphere for one in known}) == 2:
        to_mni = fit_similarity(
            np.array([centres[one.abbreviation] for one in known]), np.array([_centre_mni(one) for one in known])
        )
    courses = {one.abbreviation: KDTree(np.array(one.mni_course_mm)) for one in structures if one.mni_course_mm}
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
        rows.append(row)
    return pd.DataFrame(rows, columns=["index", "abbreviation", *PLACEMENT_COLUMNS])


def _voxels_mm(dseg: Volume, index: int, box: tuple[slice, ...]) -> NDArray[np.float64]:
    """Return the centres of the voxels of a label in mm."""
    indices = np.argwhere(dseg.array[box] == index) + [part.start for part in box]
    points: NDArray[np.float64] = indices @ dseg.affine[:3, :3].T + dseg.affine[:3, 3]
    return points


def _centre_mni(structure: Structure) -> NDArray[np.float64]:
    """Return the mean of the typical course, which is closest to the centre of a long nucleus."""
    centre: NDArray[np.float64] = np.mean(structure.mni_course_mm, axis=0)
    return centre
