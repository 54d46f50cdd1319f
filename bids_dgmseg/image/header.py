"""What a header says of sizes and sides: refused where it cannot be, doubted aloud where it may be wrong."""

from __future__ import annotations

from itertools import product

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

SMALLEST_VOXEL_MM, LARGEST_VOXEL_MM = 0.05, 20.0
"""Beyond lie headers in metres or micrometres."""

LARGEST_DIFFERENCE = 0.01
"""Of a voxel's edge by the header's pixdim and by its affine; rounding makes less."""

LARGEST_SHEAR_DEG = 3.0
"""By which two axes may miss a right angle: volumes are then 0.1 % too large, distances 5 % off."""

LARGEST_DISAGREEMENT_MM = 1.0
"""More than rounding of a quaternion makes at the corners of an image."""


def check_header(image: nib.Nifti1Image, name: str) -> tuple[str, ...]:
    """Look at voxel sizes and at the two places that a NIfTI header gives.

    Parameters
    ----------
    image : Nifti1Image
        Three axes in space.
    name : str
        What messages call it.

    Returns
    -------
    tuple of str
        Warnings: the header says no orientation, or two that differ, or two sizes of a voxel.

    Raises
    ------
    InputError
        If a voxel is smaller or larger than any in use, or is no box.
    """
    sizes_mm = nib.affines.voxel_sizes(image.affine)
    if sizes_mm.min() < SMALLEST_VOXEL_MM or sizes_mm.max() > LARGEST_VOXEL_MM:
        raise InputError(
            f"{name}: voxels of {_show(sizes_mm)} mm, expected {SMALLEST_VOXEL_MM:g} to {LARGEST_VOXEL_MM:g}; "
            "correct the header"
        )
    axes = image.affine[:3, :3] / sizes_mm
    shear_deg = np.rad2deg(np.arcsin(np.abs(np.triu(axes.T @ axes, 1)).max().clip(max=1)))
    if shear_deg > LARGEST_SHEAR_DEG:
        raise InputError(
            f"{name}: its axes miss the right angle by {shear_deg:.1f} degrees (a shear in the affine), so voxels have "
            "no edge lengths; resample it to a grid without"
        )
    return (*_warn_of_sizes(image, sizes_mm, name), *_warn_of_sides(image, name))


def _warn_of_sizes(image: nib.Nifti1Image, sizes_mm: NDArray[np.float64], name: str) -> tuple[str, ...]:
    pixdim_mm = np.array(image.header.get_zooms()[:3], float)
    if np.allclose(pixdim_mm, sizes_mm, rtol=LARGEST_DIFFERENCE, atol=0):
        return ()
    return (
        f"{name}: voxels of {_show(pixdim_mm)} mm by its pixdim, of {_show(sizes_mm)} mm by its affine; the affine "
        "is used, make sure of the sizes",
    )


def _show(sizes_mm: NDArray[np.float64]) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes_mm)


def _warn_of_sides(image: nib.Nifti1Image, name: str) -> tuple[str, ...]:
    qform, sform = image.get_qform(coded=True)[0], image.get_sform(coded=True)[0]
    if qform is None and sform is None:
        return (
            f"{name}: its header says no orientation (qform and sform codes are 0); the first axis is taken to run "
            "from right to left, so make sure of the sides",
        )
    if qform is None or sform is None:
        return ()
    corners = np.array([[*corner, 1.0] for corner in product(*((0, size - 1) for size in image.shape[:3]))])
    apart_mm = np.linalg.norm(corners @ (qform - sform).T, axis=1).max()
    if apart_mm <= LARGEST_DISAGREEMENT_MM:
        return ()
    said = f"its qform and sform differ by up to {apart_mm:.0f} mm"
    return (f"{name}: {said}; the sform is used, make sure of the sides",)
