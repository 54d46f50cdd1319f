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

Niimg: TypeAlias = str | os.PathLike[str] | nib.spatialimages.SpatialImage
"""A path or an image in memory: whatever `nilearn.image.load_img` accepts."""


@contextmanager
def as_file(img: Niimg, name: str) -> Iterator[Path]:
    """Yield the path of an image; images in memory are written to a temporary file."""
    with tempfile.TemporaryDirectory() as folder:
        yield write_image(img, Path(folder), name)


def write_image(img: Niimg, folder: Path, name: str) -> Path:
    """Return the path of an image, written to `folder` without loss if it is in memory."""
    if isinstance(img, str | os.PathLike):
        return Path(img).expanduser()
    image = load_img(img)
    array = np.asanyarray(image.dataobj)
    if array.dtype.kind in "bui" and array.dtype.itemsize != 2:
        array = array.astype(np.int32)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
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


def write_echoes(images: Niimg | Sequence[Niimg], folder: Path, name: str) -> list[Path]:
    """Return one path per echo of a sequence of 3D images or one 4D image; see `name_echoes`."""
    if isinstance(images, str | os.PathLike | nib.spatialimages.SpatialImage):
        name = Path(images).name if isinstance(images, str | os.PathLike) else name
        image = load_img(images)
        images = [images] if len(image.shape) == 3 else [image.slicer[..., echo] for echo in range(image.shape[3])]
    return [write_image(image, folder, f"{name} (echo {number})") for number, image in enumerate(images, start=1)]


def name_echoes(message: str) -> str:
    """Remove the extensions of the temporary files of `write_echoes`, which users do not know, from a message."""
    return re.sub(r"(\(echo \d+\))\.nii\b", r"\1", message)
