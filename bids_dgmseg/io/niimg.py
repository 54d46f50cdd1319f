"""Images in memory as the files that every step reads, so that both give the same bits and messages."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from nilearn.image import load_img
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

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
    image = load_img(img)
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
    """Return one path per echo of a sequence of 3D images or one 4D image; see `name_echoes`."""
    if isinstance(images, str | os.PathLike | nib.spatialimages.SpatialImage):
        if isinstance(images, str | os.PathLike):
            images = expand(images)
            name = images.name
        image = load_img(images)
        images = [images] if len(image.shape) == 3 else [image.slicer[..., echo] for echo in range(image.shape[3])]
    return [write_image(image, folder, f"{name} (echo {number})") for number, image in enumerate(images, start=1)]


def name_echoes(message: str) -> str:
    """Remove the extensions of the temporary files of `write_echoes`, which users do not know, from a message."""
    return re.sub(r"(\(echo \d+\))\.nii\b", r"\1", message)
