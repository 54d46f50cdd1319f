"""A 3D image in one convention: RAS+ axes, mm."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage
from scipy.optimize import brentq

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import MappedArray
from bids_dgmseg.io.nifti import check_intact, load_image, read_data

_LARGEST_LABEL = np.iinfo(np.int32).max

_LARGEST_STEP, _ROUNDED_STEP = 0.5, 0.51
"""Step of scaled integers below which the nearest label is certain, and the fraction of a step that rounding causes."""

_SURFACE_SIGMA, _SURFACE_MARGIN = 0.7, 4
"""Smoothing of a mask before its surface is drawn, and the margin that this needs, in voxels."""

_LARGEST_SHIFT = 0.05
"""Voxels by which corners of equal grids may differ, by rounding of headers."""


@dataclass(frozen=True)
class Volume:
    """A 3D image whose axes point to the patient's right, anterior and superior.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z)
        float32 for maps, an integer type for labels.
    affine : ndarray of shape (4, 4)
        Voxel indices to mm, RAS+; its columns are closest to x, y and z in this order and direction.
    file_orientation : str
        Axis codes of the file that it was read from, such as ``LAS``.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    file_orientation: str = "RAS"

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise ValueError(f"a Volume has 3 axes, got shape {self.array.shape}")

    @property
    def voxel_size_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm."""
        x, y, z = nib.affines.voxel_sizes(self.affine)
        return float(x), float(y), float(z)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis."""
        x, y, z = self.array.shape
        return x, y, z

    def with_array(self, array: NDArray[Any]) -> Volume:
        """Return another image on the same grid."""
        if array.shape != self.array.shape:
            raise ValueError(f"array has shape {array.shape}, expected {self.array.shape}")
        return Volume(array, self.affine, self.file_orientation)

    def volume_ml(self, mask: NDArray[Any]) -> float:
        """Return the volume of the voxels of a mask on this grid that are not 0."""
        return float(np.count_nonzero(mask) * np.prod(self.voxel_size_mm)) / 1000

    @classmethod
    def read(cls, path: str | Path, dtype: DTypeLike = np.float32) -> Volume:
        """Read a 3D NIfTI file and reorient it to RAS+, without resampling.

        Parameters
        ----------
        path : path
            ``.nii`` or ``.nii.gz``; trailing axes of length one are dropped.
        dtype : dtype
            Type of the array, after scaling.

        Raises
        ------
        InputError
            If the file cannot be read, is not three-dimensional, or its affine is not invertible.
        """
        image = load_image(path)
        array = read_data(image, path, dtype)
        ornt = orientations.io_orientation(image.affine)
        affine = image.affine @ orientations.inv_ornt_aff(ornt, array.shape)
        ras = np.ascontiguousarray(orientations.apply_orientation(array, ornt))
        return cls(ras, affine, "".join(orientations.ornt2axcodes(ornt)))


@dataclass(frozen=True)
class Surface:
    """Closed surface of triangles, whose normals point outwards."""

    vertices: NDArray[np.float32]
    """(V, 3), in mm, RAS+."""
    triangles: NDArray[np.int32]
    """(T, 3), rows of `vertices`."""

    @property
    def volume_mm3(self) -> float:
        """Enclosed volume: the sum of the tetrahedra of the triangles and the origin."""
        a, b, c = np.moveaxis(self.vertices[self.triangles].astype(np.float64), 1, 0)
        return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def find_surface(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> Surface:
    """Find the surface of a mask (X, Y, Z) by marching cubes; it encloses the volume of the mask's voxels.

    The mask is smoothed by a Gaussian of 0.7 voxels, and the level chosen so that the volume stays the same.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    from skimage.measure import marching_cubes  # slow

    if not mask.any():
        raise ValueError("the mask is empty")
    block = ndimage.find_objects(mask.astype(np.uint8))[0]
    smooth = ndimage.gaussian_filter(np.pad(mask[block].astype(np.float32), _SURFACE_MARGIN), _SURFACE_SIGMA)
    start = np.array([part.start - _SURFACE_MARGIN for part in block])
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))

    def draw(level: float) -> Surface:
        vertices, triangles, _, _ = marching_cubes(smooth, level)
        placed = nib.affines.apply_affine(affine, vertices + start)
        outwards = triangles if np.linalg.det(affine) < 0 else triangles[:, ::-1]  # scikit-image's point inwards
        return Surface(placed.astype(np.float32), np.ascontiguousarray(outwards, np.int32))

    def excess(level: float) -> float:
        return draw(level).volume_mm3 / voxel_mm3 - mask.sum()

    return draw(brentq(excess, 0.01 * smooth.max(), 0.99 * smooth.max(), rtol=1e-3))


class StoredVolume(Volume):
    """A volume whose array is in a file; see `bids_dgmseg.io.files.store`."""

    array: Any = MappedArray()


def read_labels(path: Path) -> Volume:
    """Read a label image as int32.

    nibabel stores floating-point labels as scaled integers if the header is that of an integer image, as for an image
    of ``get_fdata()`` and the original header. Labels that differ from integers by this rounding alone are rounded.

    Raises
    ------
    InputError
        If it cannot be read, is damaged, or contains fractions or values too large for a label.
    """
    image = load_image(path)
    proxy: Any = image.dataobj
    is_exact = (proxy.slope, proxy.inter) == (1, 0) and np.can_cast(image.get_data_dtype(), np.int32)
    volume = Volume.read(path, np.int32 if is_exact else np.float64)
    check_intact(path)
    if is_exact:
        return volume
    step, whole = abs(float(proxy.slope)), np.rint(volume.array)
    rounding = _ROUNDED_STEP * step if step < _LARGEST_STEP else 0.0
    fractions = (volume.array != whole) & ~(np.abs(volume.array - whole) <= rounding)
    if fractions.any():
        value = volume.array[fractions][0]
        raise InputError(f"{path.name}: contains {value:.9g}, expected integers; provide a label image (dseg)")
    largest = float(np.abs(whole).max(initial=0))
    if largest > _LARGEST_LABEL:
        raise InputError(
            f"{path.name}: contains {largest:.3g}, expected labels up to {_LARGEST_LABEL}; provide a label image (dseg)"
        )
    return volume.with_array(whole.astype(np.int32))


def read_block(path: Path, grid: Volume) -> tuple[NDArray[np.float32], tuple[slice, slice, slice]]:
    """Read a 4D image on the grid of a volume, or on a block of it, such as probabilities.

    Parameters
    ----------
    path : path
        NIfTI file, its voxels are those of `grid` in any order of the axes.
    grid : Volume

    Returns
    -------
    ndarray of shape (C, x, y, z)
        float32, in RAS+ axes.
    tuple of 3 slice
        Position of the block in the array of `grid`.

    Raises
    ------
    InputError
        If the file cannot be read, is not four-dimensional, or its voxels are not those of `grid`.
    """
    image = load_image(path)
    if len(image.shape) != 4:
        raise InputError(f"{path.name}: has {len(image.shape)} axes, expected 4: one volume per nucleus")
    check_intact(path)
    ornt = orientations.io_orientation(image.affine)
    affine = image.affine @ orientations.inv_ornt_aff(ornt, image.shape[:3])
    to_grid = np.linalg.inv(grid.affine) @ affine
    start = np.rint(to_grid[:3, 3]).astype(int)
    array = orientations.apply_orientation(np.asarray(image.dataobj, np.float32), ornt)
    stop = start + array.shape[:3]
    corners = nib.affines.apply_affine(to_grid, np.array([np.zeros(3), stop - start - 1])) - [start, stop - 1]
    if np.abs(corners).max() > _LARGEST_SHIFT or (start < 0).any() or (stop > grid.shape).any():
        raise InputError(f"{path.name}: is not on the same grid as the map; resample it first")
    x, y, z = (slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
    return np.ascontiguousarray(np.moveaxis(array, -1, 0)), (x, y, z)
