"""Warp of the normalization by ANTs' SyN, through Nipype's interface, where ANTs is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nipype.interfaces import ants
from numpy.typing import NDArray

from bids_dgmseg.image.grids import Grid
from bids_dgmseg.normalization.register import Channels
from bids_dgmseg.normalization.transform import FieldWarp, read_field

_ITERATIONS, _SHRINK, _SIGMAS_VOXELS = (100, 70, 30), (4, 2, 1), (2, 1, 0)

_STEP, _UPDATE_SIGMA, _TOTAL_SIGMA = 0.2, 3.0, 0.5
"""Parameters of SyN: gradient step, and variances of the Gaussians for updates and total field, in voxels."""


def syn(fixed: Sequence[Path], moving: Sequence[Path], mask: Path, *, weights: Sequence[float]) -> ants.Registration:
    """Return the interface that warps the channels of a scan to those of the standard space.

    Mean squares of all channels at once, without sampling, seeded and on one thread: the same input gives the same
    field.

    Examples
    --------
    >>> syn([Path("a.nii")], [Path("b.nii")], Path("c.nii"), weights=[1.0]).cmdline  # doctest: +SKIP
    'antsRegistration … --transform SyN[ 0.2, 3.0, 0.5 ] --metric MeanSquares[ a.nii, b.nii, 1, 0, None, 1 ] …'
    """
    n = len(fixed)
    return ants.Registration(
        dimension=3,
        fixed_image=[str(path) for path in fixed],
        moving_image=[str(path) for path in moving],
        fixed_image_masks=[str(mask)],
        transforms=["SyN"],
        transform_parameters=[(_STEP, _UPDATE_SIGMA, _TOTAL_SIGMA)],
        metric=[["MeanSquares"] * n],
        metric_weight=[[float(weight) for weight in weights]],
        radius_or_number_of_bins=[[0] * n],
        sampling_strategy=[["None"] * n],
        sampling_percentage=[[1.0] * n],
        number_of_iterations=[list(_ITERATIONS)],
        convergence_threshold=[1e-6],
        convergence_window_size=[10],
        shrink_factors=[list(_SHRINK)],
        smoothing_sigmas=[list(_SIGMAS_VOXELS)],
        sigma_units=["vox"],
        use_histogram_matching=[False],
        output_transform_prefix="syn_",
        interpolation="Linear",
        float=True,
        random_seed=1,
        num_threads=1,
    )


def find_warp(channels: Channels, grid: Grid, folder: Path) -> FieldWarp:
    """Find the warp from standard space to a scan whose channels are aligned by an affine transform."""
    fixed, moving = (
        [_write(image, grid, folder / f"{name}_{number}.nii") for number, image in enumerate(images)]
        for name, images in (("standard", channels.standard), ("scan", channels.scan))
    )
    mask = _write((channels.covered > 0.5).astype(np.uint8), grid, folder / "covered.nii")
    step = syn(fixed, moving, mask, weights=channels.weights.tolist())
    outputs = step.run(cwd=str(folder)).outputs
    (forward,), (backward,) = outputs.forward_transforms, outputs.reverse_transforms
    return FieldWarp(read_field(Path(forward)), read_field(Path(backward)), grid)


def _write(array: NDArray[Any], grid: Grid, path: Path) -> Path:
    nib.Nifti1Image(array, grid.affine).to_filename(path)
    return path
