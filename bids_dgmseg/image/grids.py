"""Voxel grids in RAS+ world space: around a box, aligned with a map, blocks of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume

MAX_ROTATION_DEG = 10.0
"""Largest angle between the axes of a map and a box; beyond it, a grid along the map's axes misses its corners."""

_MAX_CORNER_SHIFT = 0.05
"""Corners of equal grids may differ by this fraction of the shortest voxel edge, by rounding of headers."""


@dataclass(frozen=True)
class Grid:
    """A shape and an affine (voxel indices to RAS+ mm)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def voxel_size_mm(self) -> tuple[float, float, float]:
        """Distances between voxel centres along the axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    def centres_mm(self, offset_voxels: ArrayLike = (0, 0, 0)) -> NDArray[np.float64]:
        """Compute world coordinates (X, Y, Z, 3) of the voxel centres, shifted by an offset in voxels."""
        indices = np.stack(np.meshgrid(*(np.arange(size) for size in self.shape), indexing="ij"), axis=-1)
        # Not nibabel's apply_affine: its reshaping changes the order of summation in BLAS, and so the last bit.
        points: NDArray[np.float64] = (indices + np.asarray(offset_voxels)) @ self.affine[:3, :3].T
        return points + self.affine[:3, 3]


def world_grid(box: Box, spacing_mm: tuple[float, float, float], shape: tuple[int, int, int] | None = None) -> Grid:
    """Create a grid centred on a box, along the world's axes or those of an oriented box.

    Parameters
    ----------
    box : Box
        Region to cover.
    spacing_mm : tuple of 3 float
        Distance between voxel centres.
    shape : tuple of 3 int, optional
        Number of voxels; by default the smallest that covers the box.
    """
    size_mm, axes = box.frame
    if shape is None:
        shape = shape_to_cover(size_mm, spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm)
    affine[:3, 3] = np.asarray(box.centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def shape_to_cover(size_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Compute the smallest number of voxels along each axis that covers a size."""
    x, y, z = (max(1, int(np.ceil(size / step - 1e-6))) for size, step in zip(size_mm, spacing_mm, strict=True))
    return x, y, z


def aligned_grid(box: Box, spacing_mm: tuple[float, float, float], own: Grid, tolerance: float) -> Grid:
    """Create a grid over a box that is aligned with the voxels of a map, if these nearly have the wanted spacing.

    Data are interpolated twice if the map's grid differs from the network's: when the map is passed to the network and
    when the probabilities are resampled back. Each interpolation blurs thin structures and small nuclei. On an aligned
    grid, voxels of the map are copied, averaged in blocks or repeated, so that neither step interpolates.

    Parameters
    ----------
    box : Box
        Region to cover.
    spacing_mm : tuple of 3 float
        Wanted distance between voxel centres.
    own : Grid
        Grid of the map, its axes closest to x, y and z in this order.
    tolerance : float
        Largest relative difference from the wanted spacing, separately for each axis; 0 disables alignment.

    Returns
    -------
    Grid
        Along the map's axes. Same as `world_grid` if `tolerance` is 0 or the map's axes are rotated by more than 10
        degrees from the box's.
    """
    size_mm, axes = box.frame
    if not tolerance or max_axis_angle_deg(axes.T @ axis_directions(own.affine)) > MAX_ROTATION_DEG:
        return world_grid(box, spacing_mm)
    ratio, aligned = integer_ratio(spacing_mm, own.voxel_size_mm, tolerance)
    shape = shape_to_cover(size_mm, (ratio * own.voxel_size_mm).tolist())
    centre = np.linalg.solve(own.affine, [*box.centre_mm, 1.0])[:3]
    # Corner of the new grid, in new voxels from the corner of the map's first voxel. Voxel centres are at integers, so
    # corners are at -0.5: hence the halves here and below. Rounding this number lets the voxel edges coincide; the box
    # then is off centre by at most half a voxel.
    first = (centre + 0.5) / ratio - np.asarray(shape) / 2
    first = np.where(aligned, np.round(first), first)
    affine = np.eye(4)
    affine[:3, :3] = own.affine[:3, :3] * ratio
    affine[:3, 3] = own.affine[:3, :3] @ ((first + 0.5) * ratio - 0.5) + own.affine[:3, 3]
    return Grid(shape, affine)


def integer_ratio(
    spacing_mm: Sequence[float], voxel_size_mm: Sequence[float], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Find how many voxels of a map fit into one voxel of a grid, along each axis.

    Parameters
    ----------
    spacing_mm, voxel_size_mm : sequence of 3 float
        Voxel sizes of the grid (wanted) and of the map.
    tolerance : float
        Largest relative change of the grid's voxel size that makes the ratio an integer or its reciprocal.

    Returns
    -------
    ratio : ndarray of shape (3,)
        n or 1/n where that is within the tolerance, else ``spacing_mm / voxel_size_mm``.
    aligned : ndarray of bool, shape (3,)
        Whether the ratio is n or 1/n.
    """
    spacing, voxel_mm = np.asarray(spacing_mm), np.asarray(voxel_size_mm)
    ratio = np.maximum(np.round(spacing / voxel_mm), 1) / np.maximum(np.round(voxel_mm / spacing), 1)
    aligned = np.abs(ratio * voxel_mm / spacing - 1) <= tolerance
    return np.where(aligned, ratio, spacing / voxel_mm), aligned


def max_axis_angle_deg(axes: NDArray[np.float64]) -> float:
    """Compute the largest angle between three axes (unit vectors in columns) and x, y, z, each to its own."""
    return float(np.rad2deg(np.arccos(np.clip(np.diag(axes), -1, 1))).max())


def axis_directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the unit vectors of a grid's axes, in columns."""
    axes: NDArray[np.float64] = affine[:3, :3]
    unit: NDArray[np.float64] = axes / np.linalg.norm(axes, axis=0)
    return unit


def covering_block(grid: Grid, box: Box) -> tuple[slice, slice, slice]:
    """Find the block that contains every voxel centre inside a box; its slices are empty if there is none."""
    corners = np.array(np.meshgrid(*zip(box.low_mm, box.high_mm, strict=True))).reshape(3, -1)
    to_index = np.linalg.inv(grid.affine)
    indices = to_index[:3, :3] @ corners + to_index[:3, 3:]
    low = np.clip(np.ceil(indices.min(axis=1) - 1e-6), 0, grid.shape).astype(int)
    high = np.clip(np.floor(indices.max(axis=1) + 1e-6) + 1, low, grid.shape).astype(int)
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return x, y, z


def block_affine(affine: NDArray[np.float64], block: Sequence[slice]) -> NDArray[np.float64]:
    """Compute the affine of a block of voxels.

    >>> block_affine(np.diag([2.0, 2.0, 3.0, 1.0]), (slice(1, 4), slice(0, 2), slice(5, 9)))[:3, 3].tolist()
    [2.0, 0.0, 15.0]
    """
    shifted = affine.copy()
    shifted[:3, 3] += shifted[:3, :3] @ [along.start for along in block]
    return shifted


def describe_grid_mismatch(first: Volume, second: Volume) -> str | None:
    """Describe how two grids in RAS+ differ; None if they are the same up to rounding of headers."""
    if first.shape != second.shape:
        return f"shape {first.shape} differs from {second.shape}"
    ends = np.array([(0, size - 1) for size in first.shape], float)
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    between = (first.affine - second.affine)[:3] @ np.vstack([corners, np.ones(8)])
    apart_mm = float(np.linalg.norm(between, axis=0).max())
    return f"corners are {apart_mm:.3g} mm apart" if apart_mm > _MAX_CORNER_SHIFT * min(first.voxel_size_mm) else None
