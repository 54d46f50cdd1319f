"""Bend one map onto another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.resample import Grid, resample, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.segment.atlas import RANGE_PPM, import_sitk, on_one_thread, to_itk

_LEVELS = ((4.0, 40), (2.0, 25))
"""Voxel size in mm and iterations, coarse to fine."""
_SMOOTHING_MM = 3.0
"""Standard deviation of the Gaussian that keeps displacements smooth."""
_PPB = 1000.0
"""The filter takes differences below 0.001 for none, so it is shown ppb."""


@dataclass(frozen=True)
class Deformation:
    """Where the points of one map lie in another.

    Parameters
    ----------
    displacement_mm : ndarray of shape (3, X, Y, Z)
        What to add to a point (RAS+) of the fixed map to reach the same place in the moving one.
    grid : Grid
        Where it is known, along the world's axes; it fades out beyond.
    """

    displacement_mm: NDArray[np.float64]
    grid: Grid

    def on_grid(self, grid: Grid) -> Deformation:
        """Sample it at the voxels of another grid."""
        parts = [resample(Volume(part, self.grid.affine), grid).array for part in self.displacement_mm]
        return Deformation(np.stack(parts), grid)

    def points_mm(self) -> NDArray[np.float64]:
        """Give the points (3, X, Y, Z) of the moving map that belong to the voxels of the grid."""
        return np.moveaxis(self.grid.centres_mm(), -1, 0) + self.displacement_mm


def deform(fixed: Volume, moving: Volume, box: Box) -> Deformation:
    """Bend a map onto another that it is aligned with, by symmetric demons at 4 and 2 mm; the same way each time.

    Parameters
    ----------
    fixed, moving : Volume
        Maps in ppm, finite, in one world.
    box : Box
        Where.

    Raises
    ------
    InputError
        If SimpleITK is not installed.

    Notes
    -----
    Each step moves a point by the difference of the intensities over their gradients, in both maps, then smooths all
    displacements [1]_.

    References
    ----------
    .. [1] Vercauteren T, et al. Diffeomorphic demons: efficient non-parametric image registration. NeuroImage 45
       (2009) S61-S72. doi:10.1016/j.neuroimage.2008.10.040
    """
    grid = world_grid(box, (_LEVELS[0][0],) * 3)
    found = Deformation(np.zeros((3, *grid.shape)), grid)
    for spacing_mm, iterations in _LEVELS:
        grid = world_grid(box, (spacing_mm,) * 3)
        found = _improve(found.on_grid(grid), _shown(fixed, grid), _shown(moving, grid), iterations)
    return found


@on_one_thread()
def _improve(begin: Deformation, fixed: Any, moving: Any, iterations: int) -> Deformation:
    sitk = import_sitk()
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(iterations)
    demons.SetMaximumRMSError(0.0)  # that many iterations, whatever the noise
    demons.SetStandardDeviations(_SMOOTHING_MM / begin.grid.affine[0, 0])
    start = sitk.GetImageFromArray(begin.displacement_mm.transpose(3, 2, 1, 0), isVector=True)
    start.CopyInformation(fixed)
    field = sitk.GetArrayFromImage(demons.Execute(fixed, moving, start))
    return Deformation(np.ascontiguousarray(field.transpose(3, 2, 1, 0)), begin.grid)


def _shown(chi: Volume, grid: Grid) -> Any:
    shown = np.clip(resample(chi, grid, antialias=True).array, *RANGE_PPM) * _PPB
    return to_itk(shown.astype(np.float64), grid)
