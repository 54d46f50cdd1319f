"""A volume in one convention (RAS+, mm), and the exact way back to the file it came from."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import DTypeLike, NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, describe_pointer, is_pointer

_RAS = np.array([[0, 1], [1, 1], [2, 1]])

_UNREADABLE = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    nib.wrapstruct.WrapStructError,
    OSError,
    EOFError,
    zlib.error,
    ValueError,
    OverflowError,
    MemoryError,
)
"""What nibabel raises on damaged headers and data; a damaged size can ask for any amount of memory."""

_GEOMETRY = (
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)
"""Header fields that say where voxels lie, besides the first four of pixdim."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Volume:
    """An image whose axes run to the patient's right, front and top.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z)
        float32 for maps, an integer type for labels.
    affine : ndarray of shape (4, 4)
        Voxel indices to mm, RAS+; its columns are closest to x, y and z in this order and direction.
    stored : str
        Axes of the file that it was read from, such as ``LAS``.
    """

    array: NDArray[Any]
    affine: NDArray[np.float64]
    stored: str = "RAS"

    def __post_init__(self) -> None:
        if self.array.ndim != 3:
            raise ValueError(f"a Volume has 3 axes, got shape {self.array.shape}")
        if self.affine.shape != (4, 4):
            raise ValueError(f"an affine has shape (4, 4), got {self.affine.shape}")

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
        """Another image on the same grid; its first three axes must be the grid's."""
        if array.shape != self.array.shape:
            raise ValueError(f"array has shape {array.shape}, expected {self.array.shape}")
        return Volume(array, self.affine, self.stored)

    @classmethod
    def read(cls, path: str | Path, dtype: DTypeLike = np.float32) -> Volume:
        """Read a 3D NIfTI file and turn its axes to RAS+ (no resampling).

        Parameters
        ----------
        path : path
            ``.nii`` or ``.nii.gz``; a fourth axis of length one is dropped.
        dtype : dtype
            Type of the array; scaling in the header is applied first.

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


def load_image(path: str | Path) -> nib.Nifti1Image:
    """Open a NIfTI file without reading its data, refusing what no step could use.

    Raises
    ------
    InputError
        If it is missing, unreadable, not NIfTI, or its affine is not invertible.
    """
    name = Path(path).name
    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise InputError(describe_missing(Path(path))) from None
    except _UNREADABLE as error:
        if is_pointer(Path(path)):
            raise InputError(describe_pointer(Path(path))) from error
        if not os.access(path, os.R_OK):
            raise InputError(f"{name}: cannot be read (Permission denied); correct its permissions") from error
        raise InputError(f"{name}: cannot be read as NIfTI ({_reason(error, path)}); replace the file") from error
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
        raise InputError(f"{name}: {type(image).__name__} is not NIfTI; convert it to .nii.gz")
    proxy: Any = image.dataobj
    if image.header.is_single and proxy.offset < image.header.single_vox_offset:
        raise InputError(
            f"{name}: its voxels begin within the header (vox_offset {proxy.offset}, expected "
            f"{image.header.single_vox_offset} or more); correct the header"
        )
    affine = image.affine
    if not np.isfinite(affine).all() or np.isnan(orientations.io_orientation(affine)).any():
        raise InputError(f"{name}: its affine is not invertible, so sizes and sides are unknown; correct the header")
    return image


def check_whole(path: str | Path) -> None:
    """Read a compressed file to its end, so that its checksum is compared; reading the image alone stops before.

    Raises
    ------
    InputError
        If it is cut short or a byte of it is wrong.
    """
    if Path(path).suffix != ".gz":
        return
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK):
                pass
    except _UNREADABLE as error:
        raise InputError(_describe_damage(error, path)) from error


def _describe_damage(error: Exception, path: str | Path) -> str:
    return f"{Path(path).name}: the data are damaged or cut short ({_reason(error, path)}); copy the file again"


def _reason(error: Exception, path: str | Path) -> str:
    """Put an error into one line that names the file without its folders."""
    return " ".join(str(error).replace(str(path), Path(path).name).split()) or type(error).__name__


def read_data(image: nib.Nifti1Image, path: str | Path, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Read the voxels of an opened 3D image in the file's own axes, scaling applied.

    Raises
    ------
    InputError
        If the data are cut short or not three-dimensional.
    """
    name = Path(path).name
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{name}: has {len(shape)} dimensions {shape}, expected 3; give one 3D map a file")
    try:
        data = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise InputError(_describe_damage(error, path)) from error
    if np.iscomplexobj(data) or data.dtype.fields:
        raise InputError(f"{name}: holds {data.dtype} values, expected one real number a voxel; write it as float32")
    return data.reshape(shape).astype(dtype)


def write_like(array: NDArray[Any], reference: str | Path, out: str | Path, *, scale: float | None = None) -> Path:
    """Write an RAS+ array on the exact grid of a file: shape, axes, affine, qform and sform as there.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z) or (X, Y, Z, C)
        In the axes that `Volume.read` gave for `reference`; the file gets its type.
    reference : path
        The file whose grid and header geometry are taken.
    out : path
        Where to write; the caller chooses a temporary name and renames.
    scale : float, optional
        ``scl_slope`` of the file: a reader multiplies the stored integers by it.

    Raises
    ------
    ValueError
        If the array does not lie on the reference's grid.
    """
    image = load_image(reference)
    to_stored = orientations.ornt_transform(_RAS, orientations.io_orientation(image.affine))
    stored = orientations.apply_orientation(array, to_stored)
    if stored.shape[:3] != image.shape[:3]:
        raise ValueError(f"array has shape {stored.shape[:3]} in the axes of {reference}, expected {image.shape[:3]}")
    header = type(image).header_class()
    header.set_data_dtype(stored.dtype)
    for field in _GEOMETRY:
        header[field] = image.header[field]
    header["pixdim"][:4] = image.header["pixdim"][:4]
    header.set_xyzt_units("mm")
    # No affine here: setting one would recompute, and round, the quaternion and the rows just copied.
    written = type(image)(stored, None, header)
    if scale is not None:
        written.header.set_slope_inter(scale, 0)  # an image forgets the slope of the header it is made with
    written.to_filename(out)
    return Path(out)


_LARGEST = np.iinfo(np.int32).max


def read_labels(path: Path) -> Volume:
    """Read a label image as int32.

    Raises
    ------
    InputError
        If it cannot be read, is damaged anywhere, or holds fractions or numbers too large for a label.
    """
    volume = Volume.read(path, np.float64)
    check_whole(path)
    if not np.array_equal(volume.array, np.rint(volume.array)):
        part = volume.array[volume.array != np.rint(volume.array)][0]
        raise InputError(f"{path.name}: holds {part:.3g}, expected whole numbers; give a label image (dseg)")
    largest = float(np.abs(volume.array).max(initial=0))
    if largest > _LARGEST:
        what = f"holds {largest:.3g}, expected labels up to {_LARGEST}"
        raise InputError(f"{path.name}: {what}; give a label image (dseg)")
    return volume.with_array(volume.array.astype(np.int32))
