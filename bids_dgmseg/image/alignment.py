"""Whether two images show the brain at the same place, judged by the outlines of their masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import faces_that_cut
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume

SPACING_MM = 2.0
"""Of the grid on which outlines are compared; their positions are found to a fraction of it."""

_MARGIN_MM = 10.0
"""Around both masks, and the largest distance between outlines that is measured."""

_CUT_MM = 6.0
"""Outlines within this distance of a plane that cuts a mask are not compared."""

_FEWEST = 500
"""Points of an outline that can be compared; fewer are those of a few slices."""

_ITERATIONS = 10


@dataclass(frozen=True)
class OutlineMatch:
    """How the outline of a brain differs from another one."""

    shift_mm: float
    """Mean displacement of the given points by the rigid motion between the outlines."""
    offset_mm: float
    """Distance by which the outline lies outside of the other all around; negative inside, as after erosion."""
    residual_mm: float
    """Median distance between the outlines after motion and offset are accounted for: another shape."""


def compare_outlines(reference: Volume, other: Volume, points_mm: NDArray[np.float64]) -> OutlineMatch | None:
    r"""Compare the outlines of two brain masks.

    Parameters
    ----------
    reference, other : Volume
        Masks on any grids. Planes that cut a mask, as ends of the field of view do, are no outline.
    points_mm : ndarray of shape (n, 3)
        World coordinates at which the displacement is judged.

    Returns
    -------
    OutlineMatch or None
        None if fewer than 500 points (2 mm apart) of the outline of `reference` can be compared.

    Notes
    -----
    With the signed distances :math:`d` from both outlines, positive inside, at the points :math:`x` of the outline of
    `reference` with inward normals :math:`g`, a rigid motion of `other` by a translation :math:`t` and a small rotation
    :math:`\omega` about their centre :math:`x_0`, and a margin :math:`c` all around cause

    .. math:: d_\text{other} - d_\text{ref} = c - g \cdot (t + \omega \times (x - x_0)).

    The seven numbers are fitted by least squares with Huber's weights, so that a hole or a piece of another mask has
    little influence, and an eroded mask is in place.
    """
    masks = (reference, other)
    corners = np.vstack([_corners_mm(mask) for mask in masks if mask.array.any()] or [np.zeros((1, 3))])
    low = corners.min(axis=0) - _MARGIN_MM
    shape = np.ceil((corners.max(axis=0) + _MARGIN_MM - low) / SPACING_MM).astype(int) + 1
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = low
    grid = Grid((int(shape[0]), int(shape[1]), int(shape[2])), affine)
    ours, theirs = (
        resample(mask.with_array(mask.array.astype(np.float32)), grid, antialias=True).array >= 0.5 for mask in masks
    )
    if not ours.any() or not theirs.any():
        return None
    distance, others = _signed_distance(ours), _signed_distance(theirs)
    outline = np.argwhere(ours & ~ndimage.binary_erosion(ours))
    x: NDArray[np.float64] = outline * SPACING_MM + low
    kept = _apart_from_cuts(reference, x) & _apart_from_cuts(other, x)
    outline, x = outline[kept], x[kept]
    if len(x) < _FEWEST:
        return None
    at = tuple(outline.T)
    normals = np.stack([np.asarray(slope)[at] for slope in np.gradient(distance)], axis=-1)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    difference = np.clip(others[at], -_MARGIN_MM, _MARGIN_MM) - distance[at]
    centre = x.mean(axis=0)
    design = np.hstack([np.ones((len(x), 1)), -normals, -np.cross(x - centre, normals)])
    weights = np.ones(len(x))
    for _ in range(_ITERATIONS):
        fit = np.linalg.lstsq(design * weights[:, None], difference * weights)[0]
        residual = np.abs(difference - design @ fit)
        scale = 1.4826 * np.median(residual) + 1e-3
        weights = np.sqrt(np.minimum(1, 1.345 * scale / np.maximum(residual, 1e-9)))
    moved = fit[1:4] + np.cross(fit[4:], points_mm - centre)
    return OutlineMatch(float(np.linalg.norm(moved, axis=1).mean()), float(fit[0]), float(np.median(residual)))


def _corners_mm(mask: Volume) -> NDArray[np.float64]:
    """Return the corners of the box around a mask in world space."""
    voxels = np.argwhere(mask.array)
    ends = np.stack([voxels.min(axis=0), voxels.max(axis=0)])
    indices = np.array([[ends[i, 0], ends[j, 1], ends[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners: NDArray[np.float64] = indices @ mask.affine[:3, :3].T + mask.affine[:3, 3]
    return corners


def _signed_distance(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the distance from the border between voxels in mm, positive inside."""
    inside, outside = (ndimage.distance_transform_edt(part, sampling=SPACING_MM) for part in (mask, ~mask))
    half = SPACING_MM / 2
    distance: NDArray[np.float64] = ndimage.gaussian_filter(np.where(mask, inside - half, half - outside), 1.0)
    return distance


def _apart_from_cuts(mask: Volume, x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points in mm lie far enough from the planes that cut a mask, and not beyond them."""
    voxels = np.argwhere(mask.array)
    low, high = voxels.min(axis=0), voxels.max(axis=0)
    box = mask.array[tuple(slice(first, last + 1) for first, last in zip(low, high, strict=True))]
    indices = (x - mask.affine[:3, 3]) @ np.linalg.inv(mask.affine[:3, :3]).T
    kept = np.ones(len(x), bool)
    for axis, (cuts_low, cuts_high) in enumerate(faces_that_cut(box)):
        margin = _CUT_MM / mask.voxel_size_mm[axis]
        if cuts_low:
            kept &= indices[:, axis] > low[axis] + margin
        if cuts_high:
            kept &= indices[:, axis] < high[axis] - margin
    return kept
