"""NIfTI files: read with clear errors, check the header, write on the exact grid of another; images in memory."""

from __future__ import annotations

import gzip
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import DTypeLike, NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import atomic_write, describe_missing, describe_unfetched, is_pointer_file, write_bytes
from bids_dgmseg.resources import available_memory_gb

SMALLEST_VOXEL_MM, LARGEST_VOXEL_MM = 0.05, 20.0
"""Sizes beyond these come from headers in metres or micrometres."""

LARGEST_SIZE_DIFFERENCE = 0.01
"""Relative difference between the voxel sizes of pixdim and affine; rounding causes less."""

LARGEST_SHEAR_DEG = 3.0
"""Deviation of two axes from a right angle; at this limit volumes are 0.1 % too large and distances 5 % off."""

LARGEST_FORM_DIFFERENCE_MM = 1.0
"""Distance between the corners of the image by qform and by sform; rounding of a quaternion causes less."""

LARGEST_TILT_DEG = 1.0
"""Angle between the directions of B0 by qform and by sform; rounding of a quaternion causes less."""

LARGEST_OFFSET_MM = 1e4
"""Distance of an image from the origin of its coordinates; scanners stay below a few metres."""

_CHUNK = 1 << 20
"""Bytes to unpack at a time; as much may follow the voxels of a file, which some programs pad."""

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
"""What nibabel raises for damaged headers and data; a damaged shape can ask for any amount of memory."""

_GEOMETRY = (
    "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z"
).split()
"""Header fields that define the grid, besides the first four of pixdim."""


def load_image(path: str | Path) -> nib.Nifti1Image:
    """Open a NIfTI file without reading its data.

    Raises
    ------
    InputError
        If it is missing, unfetched, unreadable or not NIfTI, its affine is not invertible or far from the origin, or
        its voxel size is unknown.
    """
    path = Path(path)
    try:
        image = nib.load(path)
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except _UNREADABLE as error:
        if is_pointer_file(path):
            raise InputError(describe_unfetched(path)) from error
        if not os.access(path, os.R_OK):
            raise InputError(f"{path.name}: cannot be read (Permission denied); correct its permissions") from error
        if "w2 should be positive" in str(error):
            raise InputError(
                f"{path.name}: invalid quaternion in its qform and no sform, so the orientation is unknown; correct "
                "the header"
            ) from error
        raise InputError(f"{path.name}: cannot be read as NIfTI ({_reason(error, path)}); replace the file") from error
    if not isinstance(image, nib.Nifti1Image | nib.Nifti2Image):
        raise InputError(f"{path.name}: {type(image).__name__} is not NIfTI; convert it to .nii.gz")
    proxy: Any = image.dataobj
    if image.header.is_single and proxy.offset < image.header.single_vox_offset:
        raise InputError(
            f"{path.name}: the data start inside the header (vox_offset {proxy.offset}, expected at least "
            f"{image.header.single_vox_offset}); correct the header"
        )
    _check_affine(image, path.name)
    return image


def _check_affine(image: nib.Nifti1Image, name: str) -> None:
    """Check that position, orientation and size of the voxels are known."""
    if not np.isfinite(image.affine).all() or np.isnan(orientations.io_orientation(image.affine)).any():
        raise InputError(
            f"{name}: the affine is not invertible, so voxel size and orientation are unknown; correct the header"
        )
    offset_mm = float(np.abs(image.affine[:3, 3]).max())
    if offset_mm > LARGEST_OFFSET_MM:
        form = "srow" if image.header["sform_code"] else "qoffset"
        raise InputError(
            f"{name}: the image is {offset_mm:.2g} mm from the origin of its coordinates ({form}), expected less "
            f"than {LARGEST_OFFSET_MM:g}; correct the header"
        )
    if not image.header["sform_code"] and not (sizes_mm := _stored_pixdim(image)).all():
        raise InputError(
            f"{name}: pixdim is {_format_sizes(sizes_mm)} mm and there is no sform, so the voxel size is unknown; "
            "correct the header"
        )


def _stored_pixdim(image: nib.Nifti1Image) -> NDArray[np.float64]:
    """Return the voxel sizes in the header as it is stored; nibabel replaces 0 by 1 when it reads a file."""
    pixdim = image.header["pixdim"]
    if image.get_filename() and (pixdim[1:4] == 1).any():
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            pixdim = type(image).header_class.from_fileobj(file, check=False)["pixdim"]
    return np.abs(pixdim[1:4].astype(float))


def read_data(image: nib.Nifti1Image, path: str | Path, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Read the voxels of a 3D image in the file's own axes, with its scaling applied.

    Parameters
    ----------
    image : Nifti1Image
        From `load_image`; trailing axes of length one are dropped.
    path : path
        Its file, for error messages.
    dtype : dtype
        Type of the result; real values may be read as complex ones, but not the other way round.

    Raises
    ------
    InputError
        If the data are damaged, structured, complex for a real type, not three-dimensional, or larger than the
        available memory.
    """
    name = Path(path).name
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise InputError(f"{name}: has {len(shape)} dimensions {shape}, expected 3; provide one 3D map per file")
    needed_gb = math.prod(shape) * (image.get_data_dtype().itemsize + np.dtype(dtype).itemsize) / 1e9
    if needed_gb > (available_gb := available_memory_gb()):
        raise InputError(
            f"{name}: {format_shape(shape)} voxels need {needed_gb:.1f} GB of memory, {available_gb:.1f} GB are "
            "available; check the header, or crop or resample the image"
        )
    try:
        data = np.asanyarray(image.dataobj)
    except _UNREADABLE as error:
        raise InputError(_describe_damage(error, path)) from error
    if data.dtype.fields or (np.iscomplexobj(data) and np.dtype(dtype).kind != "c"):
        raise InputError(
            f"{name}: contains {data.dtype} values, expected one real number per voxel; save it as float32"
        )
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        return data.reshape(shape).astype(dtype)


def check_intact(path: str | Path) -> None:
    """Read a compressed file to its end, so that its checksum is verified; nibabel stops at the last voxel.

    Raises
    ------
    InputError
        If the file is truncated, a byte of it is wrong, or it unpacks to far more than its header describes.
    """
    if Path(path).suffix != ".gz":
        return
    image = load_image(path)
    proxy: Any = image.dataobj
    most = proxy.offset + math.prod(image.shape) * image.get_data_dtype().itemsize + _CHUNK
    n_read = 0
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                n_read += len(chunk)
                if n_read > most:
                    raise InputError(
                        f"{Path(path).name}: contains more data than the header's {format_shape(image.shape)} voxels; "
                        "replace the file"
                    )
    except _UNREADABLE as error:
        raise InputError(_describe_damage(error, path)) from error


def _describe_damage(error: Exception, path: str | Path) -> str:
    return f"{Path(path).name}: the data are damaged or truncated ({_reason(error, path)}); copy the file again"


def _reason(error: Exception, path: str | Path) -> str:
    """Format an error on one line that names the file without its folders."""
    return " ".join(str(error).replace(str(path), Path(path).name).split()) or type(error).__name__


def check_header(image: nib.Nifti1Image, name: str) -> tuple[str, ...]:
    """Check voxel size and orientation in a NIfTI header.

    Parameters
    ----------
    image : Nifti1Image
        3D image.
    name : str
        Name for messages.

    Returns
    -------
    tuple of str
        Warnings: no orientation, two different orientations, an invalid qform, or two different voxel sizes.

    Raises
    ------
    InputError
        If the voxel size is implausible, or the axes are not orthogonal.
    """
    sizes_mm = nib.affines.voxel_sizes(image.affine)
    if sizes_mm.min() < SMALLEST_VOXEL_MM or sizes_mm.max() > LARGEST_VOXEL_MM:
        raise InputError(
            f"{name}: voxel size {_format_sizes(sizes_mm)} mm, expected {SMALLEST_VOXEL_MM:g} to {LARGEST_VOXEL_MM:g} "
            "mm; correct the header"
        )
    axes = image.affine[:3, :3] / sizes_mm
    shear_deg = np.rad2deg(np.arcsin(np.abs(np.triu(axes.T @ axes, 1)).max().clip(max=1)))
    if shear_deg > LARGEST_SHEAR_DEG:
        raise InputError(
            f"{name}: the axes deviate from right angles by {shear_deg:.1f} degrees (sheared affine); resample the "
            "image to an orthogonal grid"
        )
    warnings = []
    pixdim_mm = _stored_pixdim(image)
    if not np.allclose(pixdim_mm, sizes_mm, rtol=LARGEST_SIZE_DIFFERENCE, atol=0):
        warnings.append(
            f"{name}: voxel size is {_format_sizes(pixdim_mm)} mm in pixdim but {_format_sizes(sizes_mm)} mm in the "
            "affine; the affine is used, check the voxel size"
        )
    sform = image.get_sform(coded=True)[0]
    try:
        qform = image.get_qform(coded=True)[0]
        damaged = qform is not None and not np.isfinite(qform).all()
    except ValueError:  # of nibabel 5.4, if the quaternion is longer than 1
        qform, damaged = None, True
    if damaged:
        warnings.append(f"{name}: the quaternion or offset of its qform is invalid; the sform is used")
    elif qform is None and sform is None:
        warnings.append(
            f"{name}: no orientation in the header (qform and sform codes are 0); the first axis is assumed to run "
            "from right to left, check left and right"
        )
    elif qform is not None and sform is not None:
        corners = np.array([[*corner, 1.0] for corner in product(*((0, size - 1) for size in image.shape[:3]))])
        apart_mm = np.linalg.norm(corners @ (qform - sform).T, axis=1).max()
        if apart_mm > LARGEST_FORM_DIFFERENCE_MM:
            apart = f"{apart_mm:.0f}" if apart_mm < LARGEST_OFFSET_MM else f"{apart_mm:.0e}"
            warnings.append(
                f"{name}: qform and sform differ by up to {apart} mm; the sform is used, check left and right"
            )
    return tuple(warnings)


def find_main_field(image: nib.Nifti1Image, name: str) -> tuple[tuple[float, float, float], tuple[str, ...]]:
    """Find the direction of B0, which is z of the scanner, along the axes of an image in RAS+ order.

    Of two orientations that differ, the one with the code of the scanner's coordinates (1) counts: tools that align an
    image with another change the sform. If both or neither have it, the sform does.

    Parameters
    ----------
    image : Nifti1Image
        3D image.
    name : str
        Name for warnings.

    Returns
    -------
    tuple of 3 float
        Unit vector.
    tuple of str
        Warnings: two different directions.
    """
    to_ras = orientations.io_orientation(image.affine)

    def direction(affine: NDArray[np.float64]) -> NDArray[np.float64]:
        ras: NDArray[np.float64] = affine @ orientations.inv_ornt_aff(to_ras, image.shape[:3])
        z = ras[2, :3] / nib.affines.voxel_sizes(ras)
        return np.asarray(z / np.linalg.norm(z))

    z, warnings = direction(image.affine), tuple[str, ...]()
    try:
        (qform, qform_code), (sform, sform_code) = image.get_qform(coded=True), image.get_sform(coded=True)
    except ValueError:  # of nibabel 5.4, if the quaternion is longer than 1
        qform = sform = None
    if qform is not None and sform is not None and np.isfinite(qform).all():
        by_qform = direction(qform)
        tilt_deg = float(np.rad2deg(np.arccos(np.clip(z @ by_qform, -1, 1))))
        if tilt_deg > LARGEST_TILT_DEG:
            used = "qform" if qform_code == 1 != sform_code else "sform"
            z = by_qform if used == "qform" else z
            why = ", whose code is that of the scanner" if (qform_code == 1) != (sform_code == 1) else ""
            warnings = (
                f"{name}: the direction of the main field differs by {tilt_deg:.0f} degrees between qform and sform; "
                f"that of the {used} is used{why}; if it is not the scanner's, correct the header",
            )
    return (float(z[0]), float(z[1]), float(z[2])), warnings


def format_shape(shape: Sequence[int]) -> str:
    """Format a number of voxels per axis.

    >>> format_shape((160, 160, 96))
    '160 x 160 x 96'
    """
    return " x ".join(map(str, shape))


def _format_sizes(sizes_mm: NDArray[np.float64]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes_mm)


def image_like(array: NDArray[Any], image: nib.Nifti1Image) -> nib.Nifti1Image:
    """Return an image of an RAS+ array on the exact grid of another image: shape, axes, affine, qform and sform.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z) or (X, Y, Z, C)
        In the axes that `Volume.read` returns for the file of `image`; the result has its dtype.
    image : Nifti1Image
        Image whose grid and header geometry are copied.

    Raises
    ------
    ValueError
        If the array is not on the grid of the image.
    """
    to_stored = orientations.ornt_transform(_RAS, orientations.io_orientation(image.affine))
    stored = orientations.apply_orientation(array, to_stored)
    if stored.shape[:3] != image.shape[:3]:
        raise ValueError(f"array has shape {stored.shape[:3]} in the axes of the image, expected {image.shape[:3]}")
    header = type(image).header_class()
    header.set_data_dtype(stored.dtype)
    for field in _GEOMETRY:
        header[field] = image.header[field]
    header["pixdim"][:4] = image.header["pixdim"][:4]
    header.set_xyzt_units("mm", "sec" if array.ndim == 4 else None)  # BIDS demands a unit of any fourth axis
    header.set_data_shape(stored.shape)
    # The header's own affine: any other would recompute, and round, the quaternion and the rows just copied.
    return type(image)(stored, header.get_best_affine(), header)


def write_like(array: NDArray[Any], reference: str | Path, out: str | Path, *, scale: float | None = None) -> Path:
    """Write an RAS+ array atomically on the exact grid of a file; see `image_like`.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z) or (X, Y, Z, C)
        In the axes that `Volume.read` returns for `reference`; the file gets its dtype.
    reference : path
        File whose grid and header geometry are copied.
    out : path
        File to write.
    scale : float, optional
        ``scl_slope`` of the file, by which readers multiply the stored integers.

    Raises
    ------
    ValueError
        If the array is not on the reference's grid.
    """
    written = image_like(array, load_image(reference))
    if scale is not None:
        written.header.set_slope_inter(scale, 0)  # nibabel drops the slope of the header an image is created with
    with atomic_write(Path(out)) as temporary:
        written.to_filename(temporary)
    return Path(out)


def write_surface(vertices: NDArray[np.float32], triangles: NDArray[np.int32], path: Path) -> list[Path]:
    """Write a surface in mm (RAS+) as ``path.surf.gii`` (GIFTI) and, with its space in the header, as ``path.stl``."""
    gifti: Any = nib.gifti  # untyped
    scanner = gifti.GiftiCoordSystem(1, 1, np.eye(4))  # NIFTI_XFORM_SCANNER_ANAT
    arrays = [
        gifti.GiftiDataArray(vertices, "NIFTI_INTENT_POINTSET", coordsys=scanner),
        gifti.GiftiDataArray(triangles, "NIFTI_INTENT_TRIANGLE"),
    ]
    corners = vertices[triangles]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    facets = np.zeros(len(triangles), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    facets["normal"], facets["corners"] = normals, corners
    stl = b"bids_dgmseg SPACE=RAS UNIT=mm".ljust(80) + np.uint32(len(facets)).tobytes() + facets.tobytes()
    contents = {".surf.gii": gifti.GiftiImage(darrays=arrays).to_bytes(), ".stl": stl}
    return [write_bytes(content, path.with_name(path.name + end)) for end, content in contents.items()]


Niimg: TypeAlias = str | os.PathLike[str] | nib.spatialimages.SpatialImage
"""A path or an image in memory: whatever `nilearn.image.load_img` accepts."""

_LARGEST_INT = np.iinfo(np.int32).max


@contextmanager
def as_file(img: Niimg, name: str) -> Iterator[Path]:
    """Yield the path of an image; images in memory are written to a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_image(img, Path(folder), name)


def write_image(img: Niimg, folder: Path, name: str) -> Path:
    """Return the path of an image, written to `folder` without loss if it is in memory."""
    if isinstance(img, str | os.PathLike):
        return expand(img)
    from nilearn.image import load_img  # slow

    try:
        image = load_img(img)
    except TypeError:
        raise InputError(
            f"{name}: {type(img).__name__}, expected an image; pass a path or nibabel.Nifti1Image(array, affine)"
        ) from None
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind in "bui" and array.dtype.itemsize != 2:
        fits = np.can_cast(array.dtype, np.int32) or not array.size or _largest(array) <= _LARGEST_INT
        array = array.astype(np.int32 if fits else np.float64)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    if image.affine is None or not np.isfinite(image.affine).all():
        raise InputError(f"{name}: its affine is missing or not finite; pass an image with an affine in mm")
    if isinstance(image, nib.Nifti1Image):
        header = image.header.copy()
        header.set_data_dtype(array.dtype)
        # nibabel updates the header from an affine that was changed in place only when it writes a file.
        is_current = np.allclose(image.affine, header.get_best_affine())
        image = type(image)(array, None if is_current else image.affine, header)
    else:
        image = nib.Nifti1Image(array, image.affine)
    path = folder / f"{name}.nii"
    image.to_filename(path)
    return path


def _largest(array: NDArray[np.integer]) -> int:
    return max(int(array.max()), -int(array.min()))


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` expanded; InputError if it is empty, or there is no such user."""
    if not os.fspath(path):
        raise InputError("the path of an image is empty; pass the path of a NIfTI file")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: no home folder of that user; use an absolute path") from None


def write_echoes(images: Niimg | Sequence[Niimg], folder: Path, name: str) -> list[Path]:
    """Return one path per echo of a sequence of 3D images or one 4D image; see `name_arguments`."""
    from nilearn.image import load_img

    if isinstance(images, str | os.PathLike | nib.spatialimages.SpatialImage):
        if isinstance(images, str | os.PathLike):
            images = expand(images)
            name = images.name
        image = load_img(images)
        images = [images] if len(image.shape) == 3 else [image.slicer[..., echo] for echo in range(image.shape[3])]
    return [write_image(image, folder, f"{name} (echo {number})") for number, image in enumerate(images, start=1)]


def name_arguments(message: str, units: str = "units") -> str:
    """Name arguments of Python in a message, for the temporary files and sidecars that images in memory do not have.

    >>> name_arguments('img.nii: "Units" in its sidecar is rad')
    'img: `units` is rad'
    """
    named = re.sub(r"(\b(?:img|labels|mask)|\(echo \d+\))\.nii\b", r"\1", message)
    return named.replace('"Units" in its sidecar', f"`{units}`")
