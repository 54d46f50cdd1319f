"""Deformable registration of maps by demons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.image.grids import Box, Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.registration.linear import RANGE_PPM, on_one_thread, read_field, sitk, to_field, to_itk

LEVELS = ((4.0, 40), (2.0, 25))
"""Voxel size in mm and number of iterations, coarse to fine."""

_SMOOTHING_MM = 3.0
"""SD of the Gaussian that regularizes displacements."""

_PPB = 1000.0
"""The filter ignores differences below 0.001, so it gets ppb."""


@dataclass(frozen=True)
class Deformation:
    """Displacement field between two maps."""

    displacement_mm: NDArray[np.float64]
    """Vectors (3, X, Y, Z; RAS+) from points of the fixed map to the corresponding points of the moving map."""
    grid: Grid
    """Along the world's axes; displacements fade to 0 beyond."""

    def on_grid(self, grid: Grid) -> Deformation:
        """Resample the field to another grid."""
        parts = [resample(Volume(part, self.grid.affine), grid).array for part in self.displacement_mm]
        return Deformation(np.stack(parts), grid)

    def sample(self, moving: Volume, *, order: int = 1) -> NDArray[Any]:
        """Sample a volume in the space of the moving map on the grid of the field; 0 outside the volume."""
        points_mm = np.moveaxis(self.grid.centres_mm(), -1, 0) + self.displacement_mm
        to_index = np.linalg.inv(moving.affine)
        indices = np.tensordot(to_index[:3, :3], points_mm, axes=1) + to_index[:3, 3, None, None, None]
        sampled: NDArray[Any] = ndimage.map_coordinates(moving.array, indices, order=order, mode="constant", cval=0)
        return sampled


@on_one_thread()
def deform(fixed: Volume, moving: Volume, box: Box, *, levels: Sequence[tuple[float, int]] = LEVELS) -> Deformation:
    """Register a finite map in ppm deformably, inside a box, to another in the same space.

    Symmetric demons, deterministic; `levels` are voxel sizes in mm and numbers of iterations, coarse to fine.

    Notes
    -----
    Each step moves points by the difference of intensities over the gradients of both maps, then smooths the field
    [1]_.

    References
    ----------
    .. [1] Vercauteren T, et al. Diffeomorphic demons: efficient non-parametric image registration. NeuroImage 45
       (2009) S61-S72. doi:10.1016/j.neuroimage.2008.10.040
    """
    grid = world_grid(box, (levels[0][0],) * 3)
    deformation = Deformation(np.zeros((3, *grid.shape)), grid)
    for spacing_mm, iterations in levels:
        grid = world_grid(box, (spacing_mm,) * 3)
        demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
        demons.SetNumberOfIterations(iterations)
        demons.SetMaximumRMSError(0.0)  # always run all iterations
        demons.SetStandardDeviations(_SMOOTHING_MM / grid.affine[0, 0])
        images = []
        for chi in (fixed, moving):
            clipped = np.clip(resample(chi, grid, antialias=True).array, *RANGE_PPM) * _PPB
            images.append(to_itk(clipped.astype(np.float64), grid))
        displacement_mm = deformation.on_grid(grid).displacement_mm
        field = demons.Execute(*images, to_field(displacement_mm, images[0]))
        deformation = Deformation(read_field(field), grid)
    return deformation
