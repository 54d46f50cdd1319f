"""From one grid to another in world space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

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
    """Lay a grid along the world's axes over a box, centred on it.

    Parameters
    ----------
    box : Box
        What to cover.
    spacing_mm : tuple of 3 float
        Distance of voxel centres.
    shape : tuple of 3 int, optional
        Number of voxels; by default the fewest that cover the box.
    """
    if shape is None:
        x, y, z = (max(1, int(np.ceil(size / step - 1e-6))) for size, step in zip(box.size_mm, spacing_mm, strict=True))
        shape = (x, y, z)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = np.asarray(box.centre_mm) - (np.asarray(shape) - 1) / 2 * spacing_mm
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
        Blur the source first along axes that the target samples more coarsely, with the Gaussian
        that turns a voxel of the source into one of the target (full widths at half maximum).

    Returns
    -------
    Volume
        On `grid`, of the source's dtype.
    """
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    array = volume.array
    if antialias:
        extent_mm = np.linalg.norm(_directions(volume.affine).T @ grid.affine[:3, :3], axis=1)
        sigma = np.sqrt(np.maximum((extent_mm / volume.voxel_size_mm) ** 2 - 1, 0) / (8 * np.log(2)))
        if (sigma > 0).any():
            array = ndimage.gaussian_filter(array, sigma)
    sampled = ndimage.affine_transform(
        array, to_source[:3, :3], to_source[:3, 3], output_shape=grid.shape, order=order,
        mode="grid-constant", cval=fill,
    )  # fmt: skip
    return Volume(sampled, grid.affine)


def resample_channels(
    channels: NDArray[np.float32], source: Grid, target: Grid, *, fill: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Carry (C, X, Y, Z) channels to another grid, trilinear, `fill[c]` outside.

    Only the part of the target that the source reaches is computed.
    """
    out = np.empty((len(channels), *target.shape), np.float32)
    out[:] = fill[:, None, None, None]
    part = _reached(source, target)
    if part is None:
        return out
    corner = np.eye(4)
    corner[:3, 3] = [piece.start for piece in part]
    to_source = np.linalg.inv(source.affine) @ target.affine @ corner
    shape = tuple(piece.stop - piece.start for piece in part)
    for channel, target_channel, value in zip(channels, out, fill, strict=True):
        ndimage.affine_transform(
            channel, to_source[:3, :3], to_source[:3, 3], output_shape=shape, output=target_channel[part],
            order=1, mode="grid-constant", cval=float(value),
        )  # fmt: skip
    return out


def _reached(source: Grid, target: Grid) -> tuple[slice, slice, slice] | None:
    """Find the block of target voxels that holds every voxel inside the source, or None."""
    ends = np.array([(-0.5, size - 0.5) for size in source.shape])
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    to_target = np.linalg.inv(target.affine) @ source.affine
    indices = to_target[:3, :3] @ corners + to_target[:3, 3:]
    low = np.clip(np.floor(indices.min(axis=1)), 0, target.shape).astype(int)
    high = np.clip(np.ceil(indices.max(axis=1)) + 1, 0, target.shape).astype(int)
    if (high <= low).any():
        return None
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return x, y, z


def _directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the unit vectors of a grid's axes, one a column."""
    axes: NDArray[np.float64] = affine[:3, :3]
    unit: NDArray[np.float64] = axes / np.linalg.norm(axes, axis=0)
    return unit
