"""Rigid, affine and deformable alignment of maps: of labelled atlases, and of the sessions of a participant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.grids import Box, Grid, resample, world_grid
from bids_dgmseg.image.masks import is_valid, valid_box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.registration.midplane import Midplane, find_midplane

sitk: Any = SimpleITK  # its functions have no types

Matrix = NDArray[np.float64]

_RIGID_MM, _AFFINE_MM = 4.0, 2.5

RANGE_PPM = (-0.1, 0.2)
"""Range to which maps are clipped; larger values, of veins and bone, would dominate the metric."""

_PITCHES_DEG = (-12.0, 0.0, 12.0)

_BINS = 32

_SEED = 1

_CORRELATION_SHARE = 0.3
"""Fraction of the voxels that are compared by correlation."""


@dataclass(frozen=True)
class Atlas:
    """A map with labelled nuclei."""

    name: str
    chi: Volume
    labels: Volume
    """Indices of structures.tsv, on any grid in the same space."""


class Head:
    """A map prepared for registration; images are computed once, however many atlases are registered to it.

    Parameters
    ----------
    chi : Volume
        In ppm, finite, 0 outside the brain.
    regions : Volume, optional
        Labels of head regions, for the plane between the hemispheres.
    """

    def __init__(self, chi: Volume, regions: Volume | None = None) -> None:
        self.chi, self._regions, self._box = chi, regions, valid_box(chi)
        self._images: dict[float, Any] = {}
        self._masks: dict[float, Any] = {}

    @cached_property
    def plane(self) -> Midplane:
        """Plane between the hemispheres."""
        return find_midplane(self.chi, self._regions)

    @cached_property
    def upright(self) -> Matrix:
        """Transform to the world from an upright head with its centre at the origin and its midplane at x = 0."""
        plane, upright = self.plane, np.eye(4)
        upright[:3, :3] = Rotation.align_vectors([plane.normal], [[1, 0, 0]])[0].as_matrix()
        upright[:3, 3] = self.middle_mm - plane.distance_mm(self.middle_mm) * plane.normal
        return upright

    @cached_property
    def middle_mm(self) -> NDArray[np.float64]:
        """Centre of mass of the valid voxels."""
        valid = is_valid(self.chi.array)
        counts = [np.count_nonzero(valid, axis=across) for across in ((1, 2), (0, 2), (0, 1))]
        index = [np.average(np.arange(len(count)), weights=count) for count in counts]
        return self.chi.affine[:3, :3] @ index + self.chi.affine[:3, 3]

    def image(self, spacing_mm: float) -> Any:
        """Return the map as a SimpleITK image along the world's axes, with RAS+ coordinates where ITK expects LPS+."""
        if spacing_mm not in self._images:
            grid = self._grid(spacing_mm)
            array = np.clip(resample(self.chi, grid, antialias=True).array, *RANGE_PPM)
            self._images[spacing_mm] = to_itk(array, grid)
        return self._images[spacing_mm]

    def mask(self, spacing_mm: float) -> Any:
        """Return the mask of `image`: voxels that are mostly valid."""
        if spacing_mm not in self._masks:
            grid, valid = self._grid(spacing_mm), is_valid(self.chi.array).astype(np.float32)
            share = resample(self.chi.with_array(valid), grid, antialias=True).array
            self._masks[spacing_mm] = to_itk((share > 0.5).astype(np.uint8), grid)
        return self._masks[spacing_mm]

    def _grid(self, spacing_mm: float) -> Grid:
        return world_grid(self._box.expanded(2 * spacing_mm), (spacing_mm,) * 3)


@dataclass(frozen=True)
class Registration:
    """Result of registering an atlas to a map."""

    to_map: Matrix
    """4×4, from the space of the atlas to that of the map, RAS+ mm."""
    similarity: float
    """Mutual information in nats."""


def align_rigidly(head: Head, atlas: Atlas) -> Registration:
    """Register an atlas to a map rigidly, at 8 and 4 mm.

    Aligning the midplanes of both heads leaves one angle unknown, the pitch: several starting values are tried.
    """
    other, from_map = Head(atlas.chi), _inverse(head.upright)
    results = []
    for degrees in _PITCHES_DEG:
        pitch = np.eye(4)
        pitch[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
        start, transform = other.upright @ pitch @ from_map, sitk.Euler3DTransform()
        results.append(_register(head, other, transform, start, _RIGID_MM, share=1.0))
    return max(results, key=lambda result: result.similarity)


def align_affinely(head: Head, atlas: Atlas, start: Registration) -> Registration:
    """Register an atlas to a map affinely, at 5 and 2.5 mm, starting from a rigid registration."""
    transform, begin = sitk.AffineTransform(3), _inverse(start.to_map)
    return _register(head, Head(atlas.chi), transform, begin, _AFFINE_MM, share=0.5)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Limit ITK to one thread: with several, the last bits of sums differ from run to run.

    The number of threads of a filter does not apply to the filters that it uses; the global default does.
    """
    settings = sitk.ProcessObject
    before = settings.GetGlobalDefaultNumberOfThreads()
    settings.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        settings.SetGlobalDefaultNumberOfThreads(before)


@on_one_thread()
def _register(
    head: Head, other: Head, transform: Any, begin: Matrix, spacing_mm: float, *, share: float
) -> Registration:
    """Optimize a linear transform from map to atlas by mutual information; deterministic."""
    set_transform(transform, begin, head.middle_mm)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(head.mask(spacing_mm))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(share, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.01, 200, 0.6, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(head.image(spacing_mm), other.image(spacing_mm))
    return Registration(_inverse(read_transform(transform)), -method.GetMetricValue())


@on_one_thread()
def optimize_by_correlation(fixed: Head, moving: Head, start: Matrix, spacing_mm: float) -> Matrix:
    """Improve a rigid transform (4×4) from one map to another by their correlation; deterministic."""
    transform = sitk.Euler3DTransform()
    set_transform(transform, start, fixed.middle_mm)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetMetricFixedMask(fixed.mask(spacing_mm))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(_CORRELATION_SHARE, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100, 0.6, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed.image(spacing_mm), moving.image(spacing_mm))
    return read_transform(transform)


def set_transform(transform: Any, matrix: Matrix, centre_mm: NDArray[np.float64]) -> None:
    """Set a linear transform of SimpleITK, which turns around a centre, to a 4×4 matrix."""
    transform.SetCenter(centre_mm.tolist())
    transform.SetMatrix(matrix[:3, :3].ravel().tolist())
    transform.SetTranslation((matrix[:3, :3] @ centre_mm + matrix[:3, 3] - centre_mm).tolist())


def read_transform(transform: Any) -> Matrix:
    """Return the 4×4 matrix of a linear transform of SimpleITK."""
    matrix, centre = np.eye(4), np.array(transform.GetCenter())
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = centre + transform.GetTranslation() - matrix[:3, :3] @ centre
    return matrix


def _inverse(matrix: Matrix) -> Matrix:
    return np.linalg.inv(matrix).astype(np.float64)


def to_itk(array: NDArray[Any], grid: Grid) -> Any:
    """Return a SimpleITK image of an array on a grid along the world's axes, in RAS+ mm."""
    image = sitk.GetImageFromArray(array.T)  # SimpleITK reverses the order of axes
    image.SetOrigin(grid.affine[:3, 3].tolist())
    image.SetSpacing(grid.affine.diagonal()[:3].tolist())
    return image


def to_field(vectors_mm: NDArray[np.float64], image: Any) -> Any:
    """Return a SimpleITK displacement field of vectors (3, X, Y, Z) on the grid of an image."""
    field = sitk.GetImageFromArray(vectors_mm.transpose(3, 2, 1, 0), isVector=True)
    field.CopyInformation(image)
    return field


def read_field(field: Any) -> NDArray[np.float64]:
    """Return the vectors (3, X, Y, Z) of a SimpleITK displacement field."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(field).transpose(3, 2, 1, 0))


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
        return ndimage.map_coordinates(moving.array, indices, order=order, mode="constant", cval=0)


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
