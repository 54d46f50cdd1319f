"""Resample volumes to other grids, and sample tensors at points."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure

from bids_dgmseg.image.grids import Grid, axis_directions
from bids_dgmseg.image.masks import is_valid, outside_field_of_view
from bids_dgmseg.image.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor


def resample(volume: Volume, grid: Grid, *, order: int = 1, fill: float = 0.0, antialias: bool = False) -> Volume:
    """Sample a volume at the voxel centres of a grid.

    Parameters
    ----------
    volume : Volume
        Source, finite everywhere.
    grid : Grid
        Target.
    order : int
        Spline order: 0 for labels, 1 linear, 3 cubic.
    fill : float
        Value outside the source.
    antialias : bool
        Smooth the source first, as `smooth_for_grid` does.

    Returns
    -------
    Volume
        On `grid`, of the source's dtype.
    """
    if antialias:
        volume = smooth_for_grid(volume, grid)
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    matrix, steps = to_source[:3, :3], np.diag(to_source)[:3]
    parallel = order == 1 and np.array_equal(matrix, np.diag(steps))  # scipy has faster code for that
    sampled = ndimage.affine_transform(
        volume.array,
        steps if parallel else matrix,
        to_source[:3, 3],
        output_shape=grid.shape,
        order=order,
        mode="grid-constant",
        cval=fill,
    )
    return Volume(sampled, grid.affine)


def share_covered(chi: Volume, grid: Grid) -> NDArray[np.float32]:
    """Return the share of each voxel of a grid that a map in ppm covers."""
    inside = ~outside_field_of_view(is_valid(chi.array))
    return resample(chi.with_array(inside.astype(np.float32)), grid, antialias=True).array


def smooth_for_grid(volume: Volume, grid: Grid) -> Volume:
    """Smooth a volume before it is sampled on a coarser grid, to avoid aliasing.

    Blocks of voxels that fit into one voxel of the grid are averaged, which is fast and exact for integer ratios. For
    the rest of the ratio, a Gaussian supplies the missing width: full widths at half maximum add in quadrature.
    """
    extent_mm = np.linalg.norm(axis_directions(volume.affine).T @ grid.affine[:3, :3], axis=1)
    factors = np.maximum(np.floor(extent_mm / volume.voxel_size_mm + 1e-6).astype(int), 1)
    if (factors > 1).any():
        affine = volume.affine @ np.diag([*factors, 1.0])
        # The centre of a block of n voxels is (n - 1) / 2 voxels from the centre of its first.
        affine[:3, 3] = volume.affine[:3, :3] @ ((factors - 1) / 2) + volume.affine[:3, 3]
        padding = [(0, -size % factor) for size, factor in zip(volume.shape, factors.tolist(), strict=True)]
        padded = np.pad(volume.array, padding, mode="edge")
        volume = Volume(measure.block_reduce(padded, tuple(factors.tolist()), np.mean).astype(np.float32), affine)
    sigma = np.sqrt(np.maximum((extent_mm / volume.voxel_size_mm) ** 2 - 1, 0) / (8 * np.log(2)))
    if (sigma > 0.1).any():
        volume = volume.with_array(ndimage.gaussian_filter(volume.array, sigma))
    return volume


def sample_points(values: Tensor, indices: Tensor, *, nearest: bool = False, extend: bool = False) -> Tensor:
    """Sample images at fractional voxel indices, on the device of `values`.

    Parameters
    ----------
    values : Tensor of shape (C, X, Y, Z)
        Floating-point images on one grid.
    indices : Tensor of shape (A, B, D, 3)
        Voxel indices of the points; voxel centres are at integers.
    nearest : bool
        Take the nearest voxel instead of interpolating linearly.
    extend : bool
        Repeat the outermost voxels outside the image instead of 0.

    Returns
    -------
    Tensor of shape (C, A, B, D)
    """
    from torch import tensor
    from torch.nn import functional

    size = tensor(values.shape[1:], device=values.device)
    # grid_sample expects the last axis first, and coordinates from -1 to 1: with align_corners from the first to the
    # last voxel centre, else from edge to edge.
    scaled = indices / (size - 1).clamp(min=1) * 2 - 1 if extend else (2 * indices + 1) / size - 1
    sampled: Tensor = functional.grid_sample(
        values[None],
        scaled.flip(-1)[None],
        mode="nearest" if nearest else "bilinear",
        padding_mode="border" if extend else "zeros",
        align_corners=extend,
    )
    return sampled[0]
