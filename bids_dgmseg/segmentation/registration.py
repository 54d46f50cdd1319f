"""Find nuclei by registering the most similar of a few labelled reference maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box, box_of_mask
from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import atlas_files
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.hemispheres import find_midplane
from bids_dgmseg.segmentation.regions import valid_box, valid_mask

Matrix = NDArray[np.float64]

_RIGID_MM, _AFFINE_MM = 4.0, 2.5

RANGE_PPM = (-0.1, 0.2)
"""What registration sees; veins and bone beyond it would dominate."""

_PITCHES_DEG = (-12.0, 0.0, 12.0)

_BINS = 32

_SEED = 1


@dataclass(frozen=True)
class Atlas:
    """A map whose nuclei are known."""

    name: str
    chi: Volume
    labels: Volume
    """Numbers of structures.tsv on any grid of the same world."""


class Head:
    """A map as registration sees it; each part is made once, however many references are laid on it.

    Parameters
    ----------
    chi : Volume
        In ppm, finite, 0 outside the brain.
    """

    def __init__(self, chi: Volume) -> None:
        self.chi = chi
        self._images: dict[float, Any] = {}
        self._masks: dict[float, Any] = {}

    @cached_property
    def upright(self) -> Matrix:
        """From an upright head, its brain's middle at the origin and its midplane at x = 0, to the world."""
        plane = find_midplane(self.chi)
        upright = np.eye(4)
        upright[:3, :3] = Rotation.align_vectors([plane.normal], [[1, 0, 0]])[0].as_matrix()
        upright[:3, 3] = self.middle_mm - plane.distance_mm(self.middle_mm) * plane.normal
        return upright

    @cached_property
    def middle_mm(self) -> NDArray[np.float64]:
        """Centre of mass of what was measured."""
        measured = valid_mask(self.chi).array
        counts = [np.count_nonzero(measured, axis=across) for across in ((1, 2), (0, 2), (0, 1))]
        index = [np.average(np.arange(len(count)), weights=count) for count in counts]
        middle: NDArray[np.float64] = self.chi.affine[:3, :3] @ index + self.chi.affine[:3, 3]
        return middle

    def image(self, spacing_mm: float) -> Any:
        """Sample what was measured along the world's axes; ITK is given RAS+ coordinates and need not know."""
        if spacing_mm not in self._images:
            grid = self._grid(spacing_mm)
            array = np.clip(resample(self.chi, grid, antialias=True).array, *RANGE_PPM)
            self._images[spacing_mm] = to_itk(array, grid)
        return self._images[spacing_mm]

    def mask(self, spacing_mm: float) -> Any:
        """Mark the voxels of `image` that were measured for the most part."""
        if spacing_mm not in self._masks:
            grid, measured = self._grid(spacing_mm), valid_mask(self.chi)
            share = resample(measured.with_array(measured.array.astype(np.float32)), grid, antialias=True).array
            self._masks[spacing_mm] = to_itk((share > 0.5).astype(np.uint8), grid)
        return self._masks[spacing_mm]

    def _grid(self, spacing_mm: float) -> Grid:
        return world_grid(self._box.expanded(2 * spacing_mm), (spacing_mm,) * 3)

    @cached_property
    def _box(self) -> Box:
        return valid_box(self.chi)


@dataclass(frozen=True)
class Registration:
    """How a reference came to lie on a map.

    Parameters
    ----------
    to_map : ndarray of shape (4, 4)
        Atlas's world to the map's, RAS+ mm.
    similarity : float
        Mutual information in nats.
    """

    to_map: Matrix
    similarity: float


def read_atlases(model: Model, weights: Path | None = None) -> list[Atlas]:
    """Read the reference maps of a model's folder; else as `bids_dgmseg.models.model_folder.atlas_files`."""
    return [
        Atlas(chi.name.removesuffix("_Chimap.nii.gz"), _finite(Volume.read(chi)), Volume.read(labels, np.uint8))
        for chi, labels in atlas_files(model, weights)
    ]


def find_by_atlas(chi: Volume, references: list[Atlas], model: Model) -> Box:
    """Lay a box about the nuclei of the most similar reference, carried to the map.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain.
    references : list of Atlas
        Each is aligned rigidly; the one with the largest mutual information is then aligned by an affine map.
    model : Model
        Whose nuclei, and with which margin.

    Returns
    -------
    Box
        Holds all voxels of the model's nuclei and the margin, and at least a patch.

    Raises
    ------
    InputError
        If the map is 0 everywhere, a reference has no nucleus of the model, or SimpleITK is not installed.
    """
    masks = [_mark_nuclei(reference, model) for reference in references]
    head = Head(chi)
    rigid = [align_rigidly(head, reference) for reference in references]
    best = max(range(len(references)), key=lambda place: rigid[place].similarity)
    to_map = align_affinely(head, references[best], rigid[best]).to_map
    box = box_of_mask(Volume(masks[best].array, to_map @ masks[best].affine)).expanded(model.localizer.margin_mm)
    x, y, z = np.maximum(box.size_mm, model.input.patch_mm).tolist()
    return Box.centred(np.array(box.centre_mm), (x, y, z))


def _mark_nuclei(reference: Atlas, model: Model) -> Volume:
    wanted = np.isin(reference.labels.array, [structure.index for structure in model.structures])
    if not wanted.any():
        raise InputError(f"{reference.name}_dseg.nii.gz: has no {model.labels[0]}; correct the reference's labels")
    return reference.labels.with_array(wanted)


def align_rigidly(head: Head, reference: Atlas) -> Registration:
    """Register a reference to a map at 8 and 4 mm.

    The midplanes of both heads leave one angle open, the pitch: the best of several beginnings is taken.
    """
    other = Head(reference.chi)
    from_map = _inverse(head.upright)
    beginnings = [other.upright @ _pitched(degrees) @ from_map for degrees in _PITCHES_DEG]
    transform = import_sitk().Euler3DTransform
    found = [_register(head, other, transform(), begin, _RIGID_MM, share=1.0) for begin in beginnings]
    return max(found, key=lambda one: one.similarity)


def align_affinely(head: Head, reference: Atlas, start: Registration) -> Registration:
    """Register a reference to a map at 5 and 2.5 mm, from where it lies already."""
    transform = import_sitk().AffineTransform(3)
    return _register(head, Head(reference.chi), transform, _inverse(start.to_map), _AFFINE_MM, share=0.5)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Let ITK work on one thread: sums of several differ in their last bits from run to run.

    A filter's own number of threads does not reach all that it calls inside; the global default does.
    """
    settings = import_sitk().ProcessObject
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
    """Improve a linear transform, map's world to the reference's, by mutual information; the same way each time."""
    sitk = import_sitk()
    middle = head.middle_mm
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(begin[:3, :3].ravel().tolist())
    transform.SetTranslation((begin[:3, :3] @ middle + begin[:3, 3] - middle).tolist())
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
    return Registration(_inverse(_matrix(transform)), -method.GetMetricValue())


def _pitched(degrees: float) -> Matrix:
    pitched = np.eye(4)
    pitched[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
    return pitched


def _matrix(transform: Any) -> Matrix:
    """Write a linear transform as a matrix of world coordinates."""
    matrix, centre = np.eye(4), np.array(transform.GetCenter())
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = centre + transform.GetTranslation() - matrix[:3, :3] @ centre
    return matrix


def _inverse(matrix: Matrix) -> Matrix:
    return np.linalg.inv(matrix).astype(np.float64)


def to_itk(array: NDArray[Any], grid: Grid) -> Any:
    """Make a SimpleITK image of an array on a grid along the world's axes, in RAS+ mm."""
    image = import_sitk().GetImageFromArray(array.T)  # SimpleITK counts axes from the last
    image.SetOrigin(grid.affine[:3, 3].tolist())
    image.SetSpacing(grid.affine.diagonal()[:3].tolist())
    return image


def _finite(chi: Volume) -> Volume:
    return chi.with_array(np.nan_to_num(chi.array, copy=False, nan=0.0, posinf=0.0, neginf=0.0))


def import_sitk() -> Any:
    """Import SimpleITK.

    Raises
    ------
    InputError
        If it is not installed.
    """
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError("SimpleITK: not installed; run `pip install SimpleITK` or choose another --model") from error
    return SimpleITK


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
