"""Transform between a standard space and a scan: an affine, then a smooth and invertible displacement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.image.masks import is_valid, outside_field_of_view, reaching_the_border
from bids_dgmseg.image.units import has_both_signs

_VECTOR_INTENT = 1007  # NIFTI_INTENT_VECTOR, as ITK writes displacement fields

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Normalization:
    """Transform between a standard space and the space of a scan, both RAS+ mm.

    Parameters
    ----------
    to_scan : ndarray of shape (4, 4)
        Affine part, from standard space to the scan.
    displacement_mm, inverse_mm : ndarray of shape (3, X, Y, Z)
        Displacement of points of standard space before the affine part, and its inverse; None for none.
    grid : Grid
        Grid of both, along the world's axes; displacements fade to 0 at its edges.
    """

    to_scan: NDArray[np.float64]
    grid: Grid
    displacement_mm: NDArray[np.float64] | None = None
    inverse_mm: NDArray[np.float64] | None = None

    def points_in_scan(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of standard space to the scan."""
        return np.asarray(apply_affine(self.to_scan, self._move(points_mm, self.displacement_mm)))

    def points_in_standard(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of the scan to standard space."""
        return self._move(np.asarray(apply_affine(np.linalg.inv(self.to_scan), points_mm)), self.inverse_mm)

    def _move(self, points_mm: NDArray[np.float64], field_mm: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if field_mm is None:
            return points_mm
        indices = apply_affine(np.linalg.inv(self.grid.affine), points_mm).T
        moved = [ndimage.map_coordinates(part, indices, order=1, mode="grid-constant") for part in field_mm]
        return np.asarray(points_mm + np.stack(moved, axis=-1))

    def field_mm(self, grid: Grid, *, inverse: bool = False) -> NDArray[np.float64]:
        """Compute the total displacement (X, Y, Z, 3) of the voxel centres of a grid.

        The grid lies in standard space, with `inverse` in the space of the scan.
        """
        points_mm = grid.centres_mm().reshape(-1, 3)
        moved = self.points_in_standard(points_mm) if inverse else self.points_in_scan(points_mm)
        return (moved - points_mm).reshape(*grid.shape, 3)

    def jacobian(self) -> NDArray[np.float64]:
        """Compute the Jacobian determinant (X, Y, Z) of the map to the scan by central differences."""
        parts = [np.gradient(self.field_mm(self.grid), step, axis=i) for i, step in enumerate(self.grid.voxel_size_mm)]
        return np.asarray(np.linalg.det(np.stack(parts, axis=-1) + np.eye(3)))


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
