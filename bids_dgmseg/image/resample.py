"""From one grid to another in world space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage import measure

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.volume import Volume

LARGEST_TURN_DEG = 10.0
"""Between the axes of a map and of a box: farther, a grid along the map's would leave the corners of the box."""


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: a shape and an affine (voxel indices to RAS+ mm)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def voxel_size_mm(self) -> tuple[float, float, float]:
        """Distances of voxel centres along the axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    def centres_mm(self, offset_voxels: ArrayLike = (0, 0, 0)) -> NDArray[np.float64]:
        """Compute the world coordinates (X, Y, Z, 3) of the voxel centres, moved by an offset along the grid's axes."""
        indices = np.stack(np.meshgrid(*(np.arange(size) for size in self.shape), indexing="ij"), axis=-1)
        points: NDArray[np.float64] = (indices + np.asarray(offset_voxels)) @ self.affine[:3, :3].T
        return points + self.affine[:3, 3]


def world_grid(box: Box, spacing_mm: tuple[float, float, float], shape: tuple[int, int, int] | None = None) -> Grid:
    """Lay a grid along the world's axes over a box, or along its own over a tilted one, centred on it.

    Parameters
    ----------
    box : Box
        What to cover.
    spacing_mm : tuple of 3 float
        Distance of voxel centres.
    shape : tuple of 3 int, optional
        Number of voxels; by default the fewest that cover the box.
    """
    size_mm, axes = box.frame
    if shape is None:
        shape = covering_shape(size_mm, spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm)
    affine[:3, 3] = np.asarray(box.centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def covering_shape(size_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Count the fewest voxels along each axis that cover a size."""
    x, y, z = (max(1, int(np.ceil(size / step - 1e-6))) for size, step in zip(size_mm, spacing_mm, strict=True))
    return x, y, z


def meeting_grid(box: Box, spacing_mm: tuple[float, float, float], own: Grid, tolerance: float) -> Grid:
    """Lay a grid over a box on which, as far as may be, a map need not be interpolated, nor what is computed there.

    Interpolated twice, thin walls and small bodies fade.

    Parameters
    ----------
    box : Box
        What to cover.
    spacing_mm : tuple of 3 float
        Distance of voxel centres.
    own : Grid
        The map's, its axes closest to x, y and z in this order.
    tolerance : float
        Where whole voxels of the map, or equal parts of one, differ from the spacing along an axis by no more than
        this, relative to it, the grid's voxels are these.

    Returns
    -------
    Grid
        Along the map's axes; as `world_grid` with no tolerance, and where the map's axes are more than 10 degrees from
        those.
    """
    size_mm, axes = box.frame
    if not tolerance or farthest_axis_deg(axes.T @ directions(own.affine)) > LARGEST_TURN_DEG:
        return world_grid(box, spacing_mm)
    ratio, meets = meet(spacing_mm, own.voxel_size_mm, tolerance)
    shape = covering_shape(size_mm, (ratio * own.voxel_size_mm).tolist())
    centre = np.linalg.solve(own.affine, [*box.centre_mm, 1.0])[:3]
    # The grid's first voxel, counted in voxels of the grid from the corner of the map's first.
    first = (centre + 0.5) / ratio - np.asarray(shape) / 2
    first = np.where(meets, np.round(first), first)
    affine = np.eye(4)
    affine[:3, :3] = own.affine[:3, :3] * ratio
    affine[:3, 3] = own.affine[:3, :3] @ ((first + 0.5) * ratio - 0.5) + own.affine[:3, 3]
    return Grid(shape, affine)


def meet(
    spacing_mm: Sequence[float], voxel_size_mm: Sequence[float], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Count the voxels of a map in one of a grid along each axis.

    Parameters
    ----------
    spacing_mm, voxel_size_mm : sequence of 3 float
        Edges of the grid's voxels that are wanted, and of the map's.
    tolerance : float
        By how much, relative to what is wanted, the grid's voxels may differ so that the map need not be interpolated.

    Returns
    -------
    ratio : ndarray of shape (3,)
        A whole number or one over it where that is within the tolerance, else the quotient of the edges.
    meets : ndarray of bool, shape (3,)
        Where it is.
    """
    spacing, voxel_mm = np.asarray(spacing_mm), np.asarray(voxel_size_mm)
    ratio = np.maximum(np.round(spacing / voxel_mm), 1) / np.maximum(np.round(voxel_mm / spacing), 1)
    meets = np.abs(ratio * voxel_mm / spacing - 1) <= tolerance
    return np.where(meets, ratio, spacing / voxel_mm), meets


def farthest_axis_deg(axes: NDArray[np.float64]) -> float:
    """Tell how far the farthest of three axes, unit vectors one a column, is from x, y or z, its own of them."""
    return float(np.rad2deg(np.arccos(np.clip(np.diag(axes), -1, 1))).max())


def resample(volume: Volume, grid: Grid, *, order: int = 1, fill: float = 0.0, antialias: bool = False) -> Volume:
    """Sample a volume at the voxel centres of a grid.

    Parameters
    ----------
    volume : Volume
        Source; must be finite.
    grid : Grid
        Target.
    order : int
        Spline order: 0 for labels, 1 linear, 3 cubic.
    fill : float
        Value outside the source.
    antialias : bool
        Average the source first over what a voxel of the target covers: whole voxels in blocks, the rest
        by a Gaussian (full widths at half maximum).

    Returns
    -------
    Volume
        On `grid`, of the source's dtype.
    """
    if antialias:
        volume = antialiased(volume, grid)
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    sampled = ndimage.affine_transform(
        volume.array,
        to_source[:3, :3],
        to_source[:3, 3],
        output_shape=grid.shape,
        order=order,
        mode="grid-constant",
        cval=fill,
    )
    return Volume(sampled, grid.affine)


def antialiased(volume: Volume, grid: Grid) -> Volume:
    """Prepare a volume for sampling on a coarser grid.

    Average blocks of whole voxels, which is quick, then blur by what is still too fine for the grid.
    """
    extent_mm = np.linalg.norm(directions(volume.affine).T @ grid.affine[:3, :3], axis=1)
    factors = np.maximum(np.floor(extent_mm / volume.voxel_size_mm + 1e-6).astype(int), 1)
    if (factors > 1).any():
        affine = volume.affine @ np.diag([*factors, 1.0])
        affine[:3, 3] = volume.affine[:3, :3] @ ((factors - 1) / 2) + volume.affine[:3, 3]
        spare = [(0, -size % factor) for size, factor in zip(volume.shape, factors.tolist(), strict=True)]
        whole = np.pad(volume.array, spare, mode="edge")
        volume = Volume(measure.block_reduce(whole, tuple(factors.tolist()), np.mean).astype(np.float32), affine)
    sigma = np.sqrt(np.maximum((extent_mm / volume.voxel_size_mm) ** 2 - 1, 0) / (8 * np.log(2)))
    if (sigma > 0.1).any():
        volume = volume.with_array(ndimage.gaussian_filter(volume.array, sigma))
    return volume


def covering_block(grid: Grid, box: Box) -> tuple[slice, slice, slice]:
    """Find the block of voxels that holds every voxel centre inside a box; empty slices where there is none."""
    corners = np.array(np.meshgrid(*zip(box.low_mm, box.high_mm, strict=True))).reshape(3, -1)
    to_index = np.linalg.inv(grid.affine)
    indices = to_index[:3, :3] @ corners + to_index[:3, 3:]
    low = np.clip(np.ceil(indices.min(axis=1) - 1e-6), 0, grid.shape).astype(int)
    high = np.clip(np.floor(indices.max(axis=1) + 1e-6) + 1, low, grid.shape).astype(int)
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return x, y, z


def block_affine(affine: NDArray[np.float64], block: Sequence[slice]) -> NDArray[np.float64]:
    """Give the affine of a block of voxels that is cut out of a grid.

    >>> block_affine(np.diag([2.0, 2.0, 3.0, 1.0]), (slice(1, 4), slice(0, 2), slice(5, 9)))[:3, 3].tolist()
    [2.0, 0.0, 15.0]
    """
    moved = affine.copy()
    moved[:3, 3] += moved[:3, :3] @ [along.start for along in block]
    return moved


def directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the unit vectors of a grid's axes, one a column."""
    axes: NDArray[np.float64] = affine[:3, :3]
    unit: NDArray[np.float64] = axes / np.linalg.norm(axes, axis=0)
    return unit


_SHIFT = 0.05
"""Corners of one grid may differ by this part of the shortest edge of a voxel: what headers round."""


def grids_differ(first: Volume, second: Volume) -> str | None:
    """Say in a few words how two grids in RAS+ differ, or None where they are one."""
    if first.shape != second.shape:
        return "other shape"
    ends = np.array([(0, size - 1) for size in first.shape], float)
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    between = (first.affine - second.affine)[:3] @ np.vstack([corners, np.ones(8)])
    apart_mm = float(np.linalg.norm(between, axis=0).max())
    return f"corners {apart_mm:.3g} mm apart" if apart_mm > _SHIFT * min(first.voxel_size_mm) else None
