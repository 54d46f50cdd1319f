"""Find nuclei by registering the most similar of a few labelled reference maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.boxes import Box, box_of_mask
from bids_dgmseg.images.resample import Grid, resample, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import Model
from bids_dgmseg.segment.folder import reference_files
from bids_dgmseg.segment.measured import find_measured, measured_box
from bids_dgmseg.segment.sides import find_midplane

Matrix = NDArray[np.float64]

_RIGID_MM, _AFFINE_MM = 4.0, 2.5
RANGE_PPM = (-0.1, 0.2)
"""What registration sees; veins and bone beyond it would dominate."""
_PITCHES_DEG = (-12.0, 0.0, 12.0)
_BINS = 32
_SEED = 1


@dataclass(frozen=True)
class Reference:
    """A map whose nuclei are known."""

    name: str
    chi: Volume
    labels: Volume
    """Numbers of structures.tsv on any grid of the same world."""


@dataclass(frozen=True)
class Registration:
    """How a reference came to lie on a map.

    Parameters
    ----------
    to_map : ndarray of shape (4, 4)
        Reference's world to the map's, RAS+ mm.
    similarity : float
        Mutual information in nats.
    """

    to_map: Matrix
    similarity: float


def read_references(model: Model, weights: Path | None = None) -> list[Reference]:
    """Read the reference maps of a model's folder; else as `bids_dgmseg.segment.folder.reference_files`."""
    return [
        Reference(chi.name.removesuffix("_Chimap.nii.gz"), _finite(Volume.read(chi)), Volume.read(labels, np.uint8))
        for chi, labels in reference_files(model, weights)
    ]


def find_by_atlas(chi: Volume, references: list[Reference], model: Model) -> Box:
    """Lay a box about the nuclei of the most similar reference, carried to the map.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain.
    references : list of Reference
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
    upright = find_upright(chi)
    rigid = [align_rigidly(chi, reference, upright) for reference in references]
    best = max(range(len(references)), key=lambda place: rigid[place].similarity)
    to_map = align_affinely(chi, references[best], rigid[best]).to_map
    box = box_of_mask(Volume(masks[best].array, to_map @ masks[best].affine)).grown(model.localizer.margin_mm)
    x, y, z = np.maximum(box.size_mm, model.input.patch_mm).tolist()
    return Box.centred(np.array(box.centre_mm), (x, y, z))


def _mark_nuclei(reference: Reference, model: Model) -> Volume:
    wanted = np.isin(reference.labels.array, [structure.index for structure in model.structures])
    if not wanted.any():
        raise InputError(f"{reference.name}_dseg.nii.gz: has no {model.labels[0]}; correct the reference's labels")
    return reference.labels.with_array(wanted)


def align_rigidly(chi: Volume, reference: Reference, upright: Matrix) -> Registration:
    """Register a reference to a map at 8 and 4 mm.

    The midplanes of both heads (`upright` is `find_upright` of the map) leave one angle open, the pitch: the best of
    several beginnings is taken.
    """
    from_map, to_reference = _inverse(upright), find_upright(reference.chi)
    beginnings = [to_reference @ _pitched(degrees) @ from_map for degrees in _PITCHES_DEG]
    transform = import_sitk().Euler3DTransform
    found = [_register(chi, reference, transform(), begin, _RIGID_MM, share=1.0) for begin in beginnings]
    return max(found, key=lambda one: one.similarity)


def align_affinely(chi: Volume, reference: Reference, start: Registration) -> Registration:
    """Register a reference to a map at 5 and 2.5 mm, from where it lies already."""
    transform = import_sitk().AffineTransform(3)
    return _register(chi, reference, transform, _inverse(start.to_map), _AFFINE_MM, share=0.5)


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
    chi: Volume, reference: Reference, transform: Any, begin: Matrix, spacing_mm: float, *, share: float
) -> Registration:
    """Improve a linear transform, map's world to the reference's, by mutual information; the same way each time."""
    sitk = import_sitk()
    middle = _middle_mm(chi)
    transform.SetCenter(middle.tolist())
    transform.SetMatrix(begin[:3, :3].ravel().tolist())
    transform.SetTranslation((begin[:3, :3] @ middle + begin[:3, 3] - middle).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(_mask_image(chi, spacing_mm))
    method.SetMetricSamplingStrategy(method.REGULAR)
    method.SetMetricSamplingPercentage(share, _SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(2.0, 0.01, 200, 0.6, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(_image(chi, spacing_mm), _image(reference.chi, spacing_mm))
    return Registration(_inverse(_matrix(transform)), -method.GetMetricValue())


def find_upright(chi: Volume) -> Matrix:
    """Give the map from an upright head, its brain's middle at the origin and its midplane at x = 0, to the world."""
    plane, middle = find_midplane(chi), _middle_mm(chi)
    upright = np.eye(4)
    upright[:3, :3] = Rotation.align_vectors([plane.normal], [[1, 0, 0]])[0].as_matrix()
    upright[:3, 3] = middle - plane.distance_mm(middle) * plane.normal
    return upright


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


def _image(chi: Volume, spacing_mm: float) -> Any:
    """Sample what was measured along the world's axes; ITK is given RAS+ coordinates and need not know."""
    grid = world_grid(measured_box(chi).grown(2 * spacing_mm), (spacing_mm,) * 3)
    return to_itk(np.clip(resample(chi, grid, antialias=True).array, *RANGE_PPM), grid)


def _mask_image(chi: Volume, spacing_mm: float) -> Any:
    """Mark the voxels of `_image` that were measured for the most part."""
    measured = find_measured(chi)
    grid = world_grid(measured_box(chi).grown(2 * spacing_mm), (spacing_mm,) * 3)
    share = resample(measured.with_array(measured.array.astype(np.float32)), grid, antialias=True).array
    return to_itk((share > 0.5).astype(np.uint8), grid)


def to_itk(array: NDArray[Any], grid: Grid) -> Any:
    """Make a SimpleITK image of an array on a grid along the world's axes, in RAS+ mm."""
    image = import_sitk().GetImageFromArray(array.T)  # SimpleITK counts axes from the last
    image.SetOrigin(grid.affine[:3, 3].tolist())
    image.SetSpacing(grid.affine.diagonal()[:3].tolist())
    return image


def _middle_mm(chi: Volume) -> NDArray[np.float64]:
    """Find the centre of mass of what was measured."""
    indices = np.argwhere(find_measured(chi).array).mean(axis=0)
    middle: NDArray[np.float64] = chi.affine[:3, :3] @ indices + chi.affine[:3, 3]
    return middle


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
