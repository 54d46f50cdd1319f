"""The same image, stored with various affines and codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

SHAPE = (6, 7, 8)
TILT = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])  # a rotation: 0.96² + 0.28² = 1
AXES = {
    "RAS": np.eye(3),
    "LAS": np.diag([-1.0, 1, 1]),
    "LPS": np.diag([-1.0, -1, 1]),
    "PIR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),  # columns: to posterior, inferior, right
    "oblique": TILT,
    "anisotropic": np.diag([0.5, 1.0, 3.0]),
}


def affine_of(axes: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = (-2.0, 3.0, 5.0)
    return affine


def ramp(affine: np.ndarray, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Value x + 10 y + 100 z of each voxel's position in mm: any flip or swap changes it."""
    indices = np.moveaxis(np.indices(shape), 0, -1)
    world = indices @ affine[:3, :3].T + affine[:3, 3]
    return np.asarray(world @ (1.0, 10.0, 100.0))


@pytest.fixture(params=list(AXES))
def affine(request) -> np.ndarray:
    return affine_of(AXES[request.param])


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes an array (by default the ramp); a form with code 0 is left out."""

    def write(affine, array=None, *, name: str = "map.nii.gz", dtype=np.float32, qform=1, sform=1) -> Path:
        array = ramp(affine) if array is None else array
        image = nib.Nifti1Image(array.astype(dtype), affine)
        image.set_qform(affine, qform)
        image.set_sform(affine, sform)
        if not sform:  # the values of an unused form must not matter
            image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
        image.to_filename(tmp_path / name)
        return tmp_path / name

    return write
