"""Transforms between a standard space and a scan: affine, then smooth and invertible warps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import is_valid, outside_field_of_view, reaching_the_border
from bids_dgmseg.image.units import has_both_signs

_LARGEST_STEP_VOXELS = 0.25

_VECTOR_INTENT = 1007  # NIFTI_INTENT_VECTOR, as ITK writes displacement fields

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Warp:
    """A diffeomorphism: the flow of a stationary velocity field over one unit of time.

    Its inverse is the flow of the negative field.

    Parameters
    ----------
    velocity_mm : ndarray of shape (3, X, Y, Z)
        Vectors in mm, RAS+, that fade to 0 at the edges of the grid.
    grid : Grid
        Along the world's axes.
    """

    velocity_mm: NDArray[np.float64]
    grid: Grid

    @cached_property
    def displacement_mm(self) -> NDArray[np.float64]:
        """Displacement (3, X, Y, Z) of the voxel centres by the warp."""
        return flow(self.velocity_mm, self.grid)

    @property
    def jacobian(self) -> NDArray[np.float64]:
        """Jacobian determinant (X, Y, Z) at the voxel centres."""
        return _jacobian(np.moveaxis(self.displacement_mm, 0, -1), self.grid)

    @cached_property
    def inverse(self) -> Warp:
        """The inverse warp."""
        return Warp(-self.velocity_mm, self.grid)

    def __call__(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move points (N, 3)."""
        return _move(points_mm, self.displacement_mm, self.grid)


@dataclass(frozen=True)
class FieldWarp:
    """A warp and its inverse that another program has found, as displacements (3, X, Y, Z) in mm, RAS+."""

    displacement_mm: NDArray[np.float64]
    inverse_mm: NDArray[np.float64]
    grid: Grid
    """Along the world's axes."""

    @property
    def jacobian(self) -> NDArray[np.float64]:
        """Jacobian determinant (X, Y, Z) at the voxel centres."""
        return _jacobian(np.moveaxis(self.displacement_mm, 0, -1), self.grid)

    @property
    def inverse(self) -> FieldWarp:
        """The inverse warp."""
        return FieldWarp(self.inverse_mm, self.displacement_mm, self.grid)

    def __call__(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move points (N, 3)."""
        return _move(points_mm, self.displacement_mm, self.grid)


def _move(points_mm: NDArray[np.float64], displacement_mm: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    indices = apply_affine(np.linalg.inv(grid.affine), points_mm).T
    moved = [ndimage.map_coordinates(part, indices, order=1, mode="grid-constant") for part in displacement_mm]
    displaced: NDArray[np.float64] = points_mm + np.stack(moved, axis=-1)
    return displaced


def flow(velocity_mm: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Integrate a stationary velocity field by scaling and squaring.

    Parameters
    ----------
    velocity_mm : ndarray of shape (3, X, Y, Z)
    grid : Grid
        Along the world's axes.

    Returns
    -------
    ndarray of shape (3, X, Y, Z)
        Displacement in mm after one unit of time.

    References
    ----------
    .. [1] Arsigny V, et al. A log-Euclidean framework for statistics on diffeomorphisms. MICCAI 2006.
       doi:10.1007/11866565_113
    """
    largest = float(np.linalg.norm(velocity_mm, axis=0).max(initial=0)) / min(grid.voxel_size_mm)
    squarings = max(0, int(np.ceil(np.log2(max(largest, 1e-9) / _LARGEST_STEP_VOXELS))))
    spacing_mm = grid.affine.diagonal()[:3].reshape(3, 1, 1, 1)
    indices = np.indices(grid.shape, dtype=np.float64)
    displacement_mm: NDArray[np.float64] = velocity_mm / 2**squarings
    for _ in range(squarings):
        moved = indices + displacement_mm / spacing_mm
        displacement_mm = displacement_mm + np.stack(
            [ndimage.map_coordinates(part, moved, order=1, mode="grid-constant") for part in displacement_mm]
        )
    return displacement_mm


@dataclass(frozen=True)
class Normalization:
    """Transform between a standard space and the space of a scan, both RAS+ mm."""

    to_scan: NDArray[np.float64]
    """4×4, the affine part, from standard space to the scan."""
    warps: tuple[Warp | FieldWarp, ...] = ()
    """Applied to points of standard space before the affine part, the last first."""

    def points_in_scan(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of standard space to the scan."""
        for warp in reversed(self.warps):
            points_mm = warp(points_mm)
        return np.asarray(apply_affine(self.to_scan, points_mm))

    def points_in_standard(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of the scan to standard space."""
        points_mm = np.asarray(apply_affine(np.linalg.inv(self.to_scan), points_mm))
        for warp in self.warps:
            points_mm = warp.inverse(points_mm)
        return points_mm

    def field_mm(self, grid: Grid, *, inverse: bool = False) -> NDArray[np.float64]:
        """Compute the total displacement (X, Y, Z, 3) of the voxel centres of a grid.

        The grid lies in standard space, with `inverse` in the space of the scan.
        """
        points_mm = grid.centres_mm().reshape(-1, 3)
        moved = self.points_in_standard(points_mm) if inverse else self.points_in_scan(points_mm)
        return (moved - points_mm).reshape(*grid.shape, 3)

    def jacobian(self, grid: Grid) -> NDArray[np.float64]:
        """Compute the Jacobian determinant (X, Y, Z) of the map from standard space to the scan."""
        return _jacobian(self.field_mm(grid), grid)


def _jacobian(displacement_mm: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    """Compute the Jacobian determinant (X, Y, Z) of a displacement (X, Y, Z, 3) by central differences."""
    parts = [np.gradient(displacement_mm, step, axis=axis) for axis, step in enumerate(grid.voxel_size_mm)]
    gradients = np.stack(parts, axis=-1)
    return np.asarray(np.linalg.det(gradients + np.eye(3)))


def write_field(displacement_mm: NDArray[np.float64], grid: Grid, path: Path) -> Path:
    """Write a displacement field as ITK and ANTs read it: five axes, vector intent, vectors in LPS+ mm."""
    vectors = (displacement_mm * _RAS_TO_LPS).astype(np.float32)[:, :, :, None, :]
    image = nib.Nifti1Image(vectors, grid.affine)
    image.header.set_intent(_VECTOR_INTENT, name="")
    image.set_qform(grid.affine, 1)
    image.set_sform(grid.affine, 1)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def read_field(path: Path) -> NDArray[np.float64]:
    """Read a displacement field as ITK and ANTs write it; return displacements (3, X, Y, Z) in mm, RAS+."""
    vectors = np.asarray(nib.Nifti1Image.from_filename(path).dataobj, np.float64)
    return np.moveaxis(vectors[:, :, :, 0, :] * _RAS_TO_LPS, -1, 0)


def scan_indices(normalization: Normalization, grid: Grid, affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Compute where the voxel centres of a grid in standard space lie in a scan.

    Returns
    -------
    ndarray of shape (3, X, Y, Z)
        Voxel indices in an image of the scan with this affine.
    """
    to_index, indices = np.linalg.inv(affine), np.empty((3, *grid.shape), np.float32)
    for x in range(grid.shape[0]):  # plane by plane, which needs less memory
        start = grid.affine.copy()
        start[:3, 3] += x * start[:3, 0]
        points = Grid((1, *grid.shape[1:]), start).centres_mm().reshape(-1, 3)
        indices[:, x] = apply_affine(to_index, normalization.points_in_scan(points)).T.reshape(3, *grid.shape[1:])
    return indices


def warp_map(chi: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sample a map at voxel indices (3, X, Y, Z), linearly; 0 where it is not measured.

    Values that are not finite, and zeros, do not enter the interpolation: no value is mixed with the background. In
    maps of one sign, zeros inside the brain are values, since there may be no source.
    """
    valid = np.isfinite(chi) & (chi != 0)
    if not has_both_signs(chi):
        valid = np.isfinite(chi) & ~reaching_the_border(outside_field_of_view(is_valid(chi)))
    weight = _sample(valid.astype(np.float32), indices)
    value = _sample(np.where(valid, chi, 0).astype(np.float32), indices)
    return np.where(weight > 0.5, value / np.maximum(weight, 0.5), 0).astype(np.float32)


def warp_labels(labels: NDArray[np.integer], indices: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Sample labels at voxel indices (3, X, Y, Z): the label, or background, with the largest interpolated share."""
    warped = np.zeros(indices.shape[1:], np.uint8)
    block = block_of(labels > 0, indices)
    if block is None:
        return warped
    numbers = np.unique(labels)
    shares = np.stack([_sample((labels == number).astype(np.float32), indices[:, *block]) for number in numbers])
    warped[block] = numbers.astype(np.uint8)[shares.argmax(axis=0)]
    return warped


def warp_fractions(fractions: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sample a probability map at voxel indices (3, X, Y, Z), linearly."""
    warped = np.zeros(indices.shape[1:], np.float32)
    block = block_of(fractions > 0, indices)
    if block is not None:
        warped[block] = _sample(fractions.astype(np.float32), indices[:, *block])
    return warped


def block_of(mask: NDArray[np.bool_], indices: NDArray[np.floating]) -> tuple[slice, slice, slice] | None:
    """Find the block of voxels whose indices (3, X, Y, Z) lie in or next to the bounding box of a mask."""
    if not mask.any():
        return None
    inside = np.ones(indices.shape[1:], bool)
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        inside &= (indices[axis] > used[0] - 1) & (indices[axis] < used[-1] + 1)
    if not inside.any():
        return None
    x, y, z = (np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return slice(x[0], x[-1] + 1), slice(y[0], y[-1] + 1), slice(z[0], z[-1] + 1)


def _sample(values: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(ndimage.map_coordinates(values, indices, order=1, mode="grid-constant"), np.float32)
