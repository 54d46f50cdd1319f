"""From one grid to another in world space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from skimage import measure

from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.volume import Volume


@dataclass(frozen=True)
class Grid:
    """Where voxels lie: a shape and an affine (voxel indices to RAS+ mm)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def centres_mm(self, offset_voxels: ArrayLike = (0, 0, 0)) -> NDArray[np.float64]:
        """Compute the world coordinates (X, Y, Z, 3) of the voxel centres, moved by an offset along the grid's axes."""
        indices = np.stack(np.meshgrid(*(np.arange(size) for size in self.shape), indexing="ij"), axis=-1)
        points: NDArray[np.float64] = (indices + np.asarray(offset_voxels)) @ self.affine[:3, :3].T
        return points + self.affine[:3, 3]


def world_grid(box: Box, spacing_mm: tuple[float, float, float], shape: tuple[int, int, int] | None = None) -> Grid:
    """Lay a grid along the world's axes over a box, or along the head's over a tilted one, centred on it.

    Parameters
    ----------
    box : Box
        What to cover.
    spacing_mm : tuple of 3 float
        Distance of voxel centres.
    shape : tuple of 3 int, optional
        Number of voxels; by default the fewest that cover the box.
    """
    size_mm, axes = (box.tilt.size_mm, box.tilt.axes) if box.tilt else (box.size_mm, np.eye(3))
    if shape is None:
        x, y, z = (max(1, int(np.ceil(size / step - 1e-6))) for size, step in zip(size_mm, spacing_mm, strict=True))
        shape = (x, y, z)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm)
    affine[:3, 3] = np.asarray(box.centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def resample(
    volume: Volume, grid: Grid, *, order: int = 1, fill: float = 0.0, antialias: bool = False
) -> Volume:
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
        volume.array, to_source[:3, :3], to_source[:3, 3], output_shape=grid.shape, order=order,
        mode="grid-constant", cval=fill,
    )  # fmt: skip
    return Volume(sampled, grid.affine)


def antialiased(volume: Volume, grid: Grid) -> Volume:
    """Prepare a volume for sampling on a coarser grid.

    Average blocks of whole voxels, which is quick, then blur by what is still too fine for the grid.
    """
    extent_mm = np.linalg.norm(_directions(volume.affine).T @ grid.affine[:3, :3], axis=1)
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


def _directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the unit vectors of a grid's axes, one a column."""
    axes: NDArray[np.float64] = affine[:3, :3]
    unit: NDArray[np.float64] = axes / np.linalg.norm(axes, axis=0)
    return unit
