"""Alignment with MNI152NLin2009cAsym by labels: transforms, the standard space and its nuclei, resampled files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.config import MNI, parse_output_space
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import (
    Box,
    Grid,
    block_affine,
    box_of_mask,
    check_grid,
    covering_block,
    fit_similarity,
    resample,
    world_grid,
)
from bids_dgmseg.image.masks import is_valid, outside_field_of_view, reaching_the_border
from bids_dgmseg.image.units import has_both_signs
from bids_dgmseg.image.volume import Volume, read_block, read_labels
from bids_dgmseg.models.structures import STRUCTURES, join_parts
from bids_dgmseg.registration.align import (
    Matrix,
    on_one_thread,
    read_field,
    read_transform,
    set_transform,
    sitk,
    to_field,
    to_itk,
)

_VECTOR_INTENT = 1007  # NIFTI_INTENT_VECTOR, as ITK writes displacement fields

_RAS_TO_LPS = np.array([-1.0, -1.0, 1.0])


@dataclass(frozen=True)
class Normalization:
    """Transform between a standard space and the space of a scan, both RAS+ mm.

    Parameters
    ----------
    to_scan : ndarray of shape (4, 4)
        Affine part, from standard space to the scan.
    displacement_mm, inverse_mm : ndarray of shape (3, X, Y, Z)
        Displacement of points of standard space before the affine part, and its inverse; None for none.
    grid : Grid
        Grid of both, along the world's axes; displacements fade to 0 at its edges.
    """

    to_scan: NDArray[np.float64]
    grid: Grid
    displacement_mm: NDArray[np.float64] | None = None
    inverse_mm: NDArray[np.float64] | None = None

    def points_in_scan(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of standard space to the scan."""
        return np.asarray(apply_affine(self.to_scan, self._move(points_mm, self.displacement_mm)))

    def points_in_standard(self, points_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map points (N, 3) of the scan to standard space."""
        return self._move(np.asarray(apply_affine(np.linalg.inv(self.to_scan), points_mm)), self.inverse_mm)

    def _move(self, points_mm: NDArray[np.float64], field_mm: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if field_mm is None:
            return points_mm
        indices = apply_affine(np.linalg.inv(self.grid.affine), points_mm).T
        moved = [ndimage.map_coordinates(part, indices, order=1, mode="grid-constant") for part in field_mm]
        return np.asarray(points_mm + np.stack(moved, axis=-1))

    def field_mm(self, grid: Grid, *, inverse: bool = False) -> NDArray[np.float64]:
        """Compute the total displacement (X, Y, Z, 3) of the voxel centres of a grid.

        The grid lies in standard space, with `inverse` in the space of the scan.
        """
        points_mm = grid.centres_mm().reshape(-1, 3)
        moved = self.points_in_standard(points_mm) if inverse else self.points_in_scan(points_mm)
        return (moved - points_mm).reshape(*grid.shape, 3)

    def jacobian(self) -> NDArray[np.float64]:
        """Compute the Jacobian determinant (X, Y, Z) of the map to the scan by central differences."""
        parts = [np.gradient(self.field_mm(self.grid), step, axis=i) for i, step in enumerate(self.grid.voxel_size_mm)]
        return np.asarray(np.linalg.det(np.stack(parts, axis=-1) + np.eye(3)))


def write_field(displacement_mm: NDArray[np.float64], grid: Grid, path: Path) -> Path:
    """Write a displacement field as ITK and ANTs read it: five axes, vector intent, vectors in LPS+ mm."""
    vectors = (displacement_mm * _RAS_TO_LPS).astype(np.float32)[:, :, :, None, :]
    image = nib.Nifti1Image(vectors, grid.affine)
    image.header.set_intent(_VECTOR_INTENT, name="")
    image.set_qform(grid.affine, 1)
    image.set_sform(grid.affine, 1)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def scan_indices(normalization: Normalization, grid: Grid, affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """Compute where the voxel centres of a grid in standard space lie in a scan.

    Returns
    -------
    ndarray of shape (3, X, Y, Z)
        Voxel indices in an image of the scan with this affine.
    """
    to_index, indices = np.linalg.inv(affine), np.empty((3, *grid.shape), np.float32)
    for x in range(grid.shape[0]):  # plane by plane, which needs less memory
        start = grid.affine.copy()
        start[:3, 3] += x * start[:3, 0]
        points = Grid((1, *grid.shape[1:]), start).centres_mm().reshape(-1, 3)
        indices[:, x] = apply_affine(to_index, normalization.points_in_scan(points)).T.reshape(3, *grid.shape[1:])
    return indices


def warp_map(chi: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sample a map at voxel indices (3, X, Y, Z), linearly; 0 where it is not measured.

    Values that are not finite, and zeros, do not enter the interpolation: no value is mixed with the background. In
    maps of one sign, zeros inside the brain are values, since there may be no source.
    """
    valid = np.isfinite(chi) & (chi != 0)
    if not has_both_signs(chi):
        valid = np.isfinite(chi) & ~reaching_the_border(outside_field_of_view(is_valid(chi)))
    weight = _sample(valid.astype(np.float32), indices)
    value = _sample(np.where(valid, chi, 0).astype(np.float32), indices)
    return np.where(weight > 0.5, value / np.maximum(weight, 0.5), 0).astype(np.float32)


def warp_labels(labels: NDArray[np.integer], indices: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Sample labels at voxel indices (3, X, Y, Z): the label, or background, with the largest interpolated share."""
    warped = np.zeros(indices.shape[1:], np.uint8)
    block = block_of(labels > 0, indices)
    if block is None:
        return warped
    numbers = np.unique(labels)
    shares = np.stack([_sample((labels == number).astype(np.float32), indices[:, *block]) for number in numbers])
    warped[block] = numbers.astype(np.uint8)[shares.argmax(axis=0)]
    return warped


def warp_fractions(fractions: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sample a probability map at voxel indices (3, X, Y, Z), linearly."""
    warped = np.zeros(indices.shape[1:], np.float32)
    block = block_of(fractions > 0, indices)
    if block is not None:
        warped[block] = _sample(fractions.astype(np.float32), indices[:, *block])
    return warped


def block_of(mask: NDArray[np.bool_], indices: NDArray[np.floating]) -> tuple[slice, slice, slice] | None:
    """Find the block of voxels whose indices (3, X, Y, Z) lie in or next to the bounding box of a mask."""
    if not mask.any():
        return None
    inside = np.ones(indices.shape[1:], bool)
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        inside &= (indices[axis] > used[0] - 1) & (indices[axis] < used[-1] + 1)
    if not inside.any():
        return None
    x, y, z = (np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3))
    return slice(x[0], x[-1] + 1), slice(y[0], y[-1] + 1), slice(z[0], z[-1] + 1)


def _sample(values: NDArray[np.floating], indices: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(ndimage.map_coordinates(values, indices, order=1, mode="grid-constant"), np.float32)


_ORIGIN_MM = (-96.0, -132.0, -78.0)

_SHAPES_MM = {1: (193, 229, 193), 2: (97, 115, 97)}
"""Resolution → shape, as in TemplateFlow."""

_VENTRICLES_MM = ((-45.0, -60.0, 2.0), (45.0, 42.0, 38.0))
"""Box around the lateral ventricles; the third and the fourth lie below."""


def standard_grid(resolution: int | None = None) -> Grid:
    """Return the grid of MNI152NLin2009cAsym as in TemplateFlow, at 1 (default) or 2 mm."""
    step = float(resolution or 1)
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = _ORIGIN_MM
    return Grid(_SHAPES_MM[resolution or 1], affine)


@cache
def _balls() -> Mapping[str, NDArray[np.float64]]:
    table = pd.read_csv(str(files("bids_dgmseg").joinpath("data", "mni_shapes.tsv")), sep="\t")
    numbers = ["x_mm", "y_mm", "z_mm", "radius_mm"]
    return {str(name): rows[numbers].to_numpy(float) for name, rows in table.groupby("abbreviation")}


def nucleus_shape(abbreviation: str, grid: Grid) -> NDArray[np.float32]:
    """Draw a nucleus of the standard space as the fraction of each voxel inside it.

    Notes
    -----
    The shape is a union of balls (``data/mni_shapes.tsv``) computed from CIT168 in MNI152NLin2009cAsym and, for the
    cerebellar nuclei, from the Allen Human Reference Atlas in the symmetric space; both are CC BY 4.0.
    """
    balls, step = _balls()[abbreviation], min(grid.voxel_size_mm)
    drawn, reach = np.zeros(grid.shape, np.float32), balls[:, 3:] + step
    low, high = (balls[:, :3] - reach).min(axis=0), (balls[:, :3] + reach).max(axis=0)
    block = covering_block(grid, Box(tuple(low.tolist()), tuple(high.tolist())))
    centres = Grid(drawn[block].shape, block_affine(grid.affine, block)).centres_mm()
    depth = np.full(centres.shape[:3], -np.inf)
    for *centre, radius in balls:
        depth = np.maximum(depth, radius - np.linalg.norm(centres - centre, axis=-1))
    drawn[block] = np.clip(0.5 + depth / step, 0, 1)
    return drawn


@cache
def head_masks() -> Mapping[str, Volume]:
    """Masks of the brain and of the lateral ventricles at 2 mm, from the templates of nilearn.

    These are of the symmetric space MNI152NLin2009aSym, whose outlines differ from those of MNI152NLin2009cAsym by
    about 1 mm.
    """
    brain, gray, white = (
        load(resolution=2) for load in (load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template)
    )
    inside = np.asarray(brain.dataobj) > 0
    fluid = inside & (np.asarray(gray.get_fdata()) + np.asarray(white.get_fdata()) < 0.5)
    centres = Grid(inside.shape, brain.affine).centres_mm()
    low, high = _VENTRICLES_MM
    fluid &= ((centres > low) & (centres < high)).all(axis=-1)
    components, _ = ndimage.label(fluid)
    near = components[(np.abs(centres - (0.0, 0.0, 16.0)) < (14, 20, 8)).all(axis=-1)]
    largest = int(np.bincount(near)[1:].argmax()) + 1
    masks = {"brain": inside, "ventricles": components == largest}
    return {name: Volume(mask.astype(np.float32), brain.affine) for name, mask in masks.items()}


def head_mask(region: str, grid: Grid) -> NDArray[np.float32]:
    """Draw the brain or the lateral ventricles as the fraction of each voxel inside them."""
    return np.asarray(resample(head_masks()[region], grid, antialias=True).array, np.float32)


_MIN_NUCLEI, _MIN_VOXELS = 4, 5

_PRIOR = 0.02
"""Weight of the identity, relative to the positions of the nuclei, in the shape of the first affine transform."""

_MARGIN = 4
"""Voxels around the block of a mask."""

_HEAD_MM, _NUCLEI_MM = ((-92.0, -124.0, -76.0), (92.0, 96.0, 96.0)), ((-52.0, -84.0, -60.0), (52.0, 48.0, 48.0))
"""Opposite corners of the parts of standard space in which points are displaced coarsely and finely."""

_COARSE_MM, _FINE_MM, _FADE_MM = 4.0, 2.0, 6.0
"""Voxel sizes of both, and distance from its border over which the fine displacement fades to the coarse one."""

_ITERATIONS, _COARSE_SIGMA_MM, _FINE_SIGMA_MM = 40, 4.0, 2.0
"""Iterations of demons, and SD of the Gaussian that regularizes the displacement."""

_CODES = {"CN": 3.0, "PUT": -3.0, "GP": 3.0, "RN": 3.0, "SN": -3.0, "STN": 3.0, "DN": 3.0, "IN": -3.0}
"""Intensities of the nuclei in the images that are registered; neighbours have opposite signs."""

_BRAIN, _VENTRICLES = 0.5, -2.0
"""Intensities of the brain and of the lateral ventricles in it."""


def register(labels: Volume, regions: Mapping[str, Volume]) -> Normalization:
    """Align the labels of a scan with the nuclei of MNI152NLin2009cAsym.

    Parameters
    ----------
    labels : Volume
        Indices of structures.tsv, in any position and orientation.
    regions : mapping of str to Volume
        Masks ``brain`` and ``ventricles`` of the scan, as far as there are any.

    Returns
    -------
    Normalization
        Deterministic.

    Raises
    ------
    InputError
        If fewer than four nuclei are labelled.

    Notes
    -----
    An affine transform is fitted to the centres of the nuclei, then refined with images in which each nucleus, the
    brain and the ventricles have their own intensity. A displacement by diffeomorphic demons [1]_ of them follows.

    References
    ----------
    .. [1] Vercauteren T, et al. Diffeomorphic demons: efficient non-parametric image registration. NeuroImage 45
       (2009) S61-S72. doi:10.1016/j.neuroimage.2008.10.040
    """
    labels = labels.with_array(join_parts(labels.array))
    nuclei = [
        structure.abbreviation
        for structure in STRUCTURES
        if np.count_nonzero(labels.array == structure.index) >= _MIN_VOXELS
    ]
    if len(nuclei) < _MIN_NUCLEI:
        raise InputError(
            f"only {len(nuclei)} nuclei are labelled, at least {_MIN_NUCLEI} are needed to align the scan with {MNI}; "
            "check the map, or omit `output_space`"
        )
    to_scan = _align_centres(labels, nuclei)
    coarse, fine = _grid(_HEAD_MM, _COARSE_MM), _grid(_NUCLEI_MM, _FINE_MM)
    to_scan = to_scan @ _refine_affine(*_draw(labels, regions, nuclei, to_scan, coarse))
    smooth = _warp(*_draw(labels, regions, nuclei, to_scan, coarse), None, _COARSE_SIGMA_MM)
    sharp = _warp(*_draw(labels, regions, nuclei, to_scan, fine), smooth, _FINE_SIGMA_MM)
    grid = _grid(_HEAD_MM, _FINE_MM)
    total = _resample(smooth, to_itk(np.zeros(grid.shape, np.float32), grid))
    start = np.rint((fine.affine[:3, 3] - grid.affine[:3, 3]) / _FINE_MM).astype(int)
    part = tuple(slice(low, low + size) for low, size in zip(start.tolist(), fine.shape, strict=True))
    field_mm, fade = read_field(total), _fade(fine)
    field_mm[:, *part] += fade * (read_field(sharp) - field_mm[:, *part])
    return Normalization(to_scan, grid, field_mm, _invert(field_mm, grid))


def _fade(grid: Grid) -> NDArray[np.float64]:
    """Return a window (X, Y, Z) that falls from 1 to 0 towards the faces of a grid."""
    window = np.ones(grid.shape)
    for axis, (size, step_mm) in enumerate(zip(grid.shape, grid.voxel_size_mm, strict=True)):
        distance_mm = np.minimum(np.arange(size), np.arange(size)[::-1]) * step_mm
        window *= np.clip(distance_mm / _FADE_MM, 0, 1).reshape([-1 if i == axis else 1 for i in range(3)])
    return window


def _grid(corners_mm: tuple[Sequence[float], Sequence[float]], step_mm: float) -> Grid:
    low_mm, high_mm = corners_mm
    affine = np.diag([step_mm] * 3 + [1.0])
    affine[:3, 3] = low_mm
    x, y, z = (int((high - low) / step_mm) + 1 for low, high in zip(low_mm, high_mm, strict=True))
    return Grid((x, y, z), affine)


def _align_centres(labels: Volume, nuclei: list[str]) -> Matrix:
    """Fit an affine transform (4×4) from the centres of the nuclei in standard space to those in the scan.

    The linear part is drawn to a rotation with a uniform scale, the less the more nuclei there are in all directions.
    """
    grid = _grid(_NUCLEI_MM, _FINE_MM)
    points_mm = grid.centres_mm()
    source = np.array(
        [np.average(points_mm.reshape(-1, 3), axis=0, weights=nucleus_shape(name, grid).ravel()) for name in nuclei]
    )
    indices = [STRUCTURES.named(name).index for name in nuclei]
    target = apply_affine(labels.affine, np.array(ndimage.center_of_mass(labels.array > 0, labels.array, indices)))
    middle, other = source.mean(axis=0), target.mean(axis=0)
    a, b = source - middle, target - other
    ridge = _PRIOR * (a**2).sum() / 3 * np.eye(3)
    linear = np.linalg.solve(a.T @ a + ridge, a.T @ b + ridge @ fit_similarity(source, target).matrix).T
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, other - linear @ middle
    return matrix


def _draw(
    labels: Volume, regions: Mapping[str, Volume], nuclei: list[str], to_scan: Matrix, grid: Grid
) -> tuple[Any, Any]:
    """Draw nuclei, brain and ventricles of both spaces on a grid of standard space, equally smoothed.

    Where the scan has no voxels, both images are those of standard space.
    """
    points = apply_affine(to_scan, grid.centres_mm().reshape(-1, 3))
    step_mm = grid.voxel_size_mm[0]

    def sample(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        block, sizes = _block(mask), np.linalg.norm(affine[:3, :3], axis=0)
        values, affine = mask[block].astype(np.float32), block_affine(affine, block)
        sigma = np.sqrt(np.maximum((step_mm / sizes) ** 2 - 1, 0) / 12)  # variances of box functions
        indices = apply_affine(np.linalg.inv(affine), points).T.reshape(3, *grid.shape)
        smooth = ndimage.gaussian_filter(values, sigma) if (sigma > 0.1).any() else values
        return np.asarray(ndimage.map_coordinates(smooth, indices, order=1, mode="grid-constant"), np.float32)

    standard, scan = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
    for region, intensity in (("brain", _BRAIN), ("ventricles", _VENTRICLES)):
        mask = regions.get(region)
        if mask is not None and mask.array.any():
            standard += intensity * head_mask(region, grid)
            scan += intensity * sample(mask.array > 0, mask.affine)
    for nucleus in dict.fromkeys(STRUCTURES.named(name).nucleus for name in nuclei):
        sides = [STRUCTURES.named(name) for name in nuclei if STRUCTURES.named(name).nucleus == nucleus]
        shapes = [nucleus_shape(side.abbreviation, grid) for side in sides]
        standard += _CODES[nucleus] * np.sum(shapes, axis=0)
        scan += _CODES[nucleus] * sample(np.isin(labels.array, [side.index for side in sides]), labels.affine)
    indices = apply_affine(np.linalg.inv(labels.affine), points)
    covered = ((indices > 0) & (indices < np.array(labels.shape) - 1)).all(axis=-1).reshape(grid.shape)
    smooth = [ndimage.gaussian_filter(image, 0.7) for image in (standard, np.where(covered, scan, standard))]
    fixed, moving = (to_itk(image, grid) for image in smooth)
    return fixed, moving


def _block(mask: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """Return the block of a mask, with a margin."""
    x, y, z = (
        slice(max(axis.start - _MARGIN, 0), min(axis.stop + _MARGIN, size))
        for axis, size in zip(ndimage.find_objects(mask.astype(np.uint8))[0], mask.shape, strict=True)
    )
    return x, y, z


@on_one_thread()
def _refine_affine(fixed: Any, moving: Any) -> Matrix:
    """Fit an affine transform (4×4, within standard space) to the squared differences of two images."""
    transform = sitk.AffineTransform(3)
    set_transform(transform, np.eye(4), np.zeros(3))
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 0.01, 60, 0.5, 1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return read_transform(transform)


@on_one_thread()
def _warp(fixed: Any, moving: Any, start: Any, sigma_mm: float) -> Any:
    """Return the displacement field from a fixed to a moving image by diffeomorphic demons."""
    demons = sitk.DiffeomorphicDemonsRegistrationFilter()
    demons.SetNumberOfIterations(_ITERATIONS)
    demons.SetMaximumRMSError(0.0)  # always run all iterations
    demons.SetStandardDeviations(sigma_mm / fixed.GetSpacing()[0])
    return demons.Execute(fixed, moving) if start is None else demons.Execute(fixed, moving, _resample(start, fixed))


def _resample(field: Any, image: Any) -> Any:
    """Resample a displacement field to the grid of an image; 0 beyond."""
    return sitk.Resample(field, image, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkVectorFloat64)


@on_one_thread()
def _invert(field_mm: NDArray[np.float64], grid: Grid) -> NDArray[np.float64]:
    field = to_field(field_mm, to_itk(np.zeros(grid.shape, np.float32), grid))
    return read_field(sitk.InvertDisplacementField(field, 50, 0.02, 0.001))


def overlap(normalization: Normalization, labels: Volume) -> dict[str, float]:
    """Compute the Dice coefficient of each labelled nucleus with its shape in standard space, at 1 mm."""
    fine = Grid((101, 131, 107), np.array([[1.0, 0, 0, -50], [0, 1, 0, -84], [0, 0, 1, -60], [0, 0, 0, 1]]))
    warped = warp_labels(join_parts(labels.array), scan_indices(normalization, fine, labels.affine))
    dice = {}
    for structure in STRUCTURES:
        mask = warped == structure.index
        if mask.any():
            shape = nucleus_shape(structure.abbreviation, fine) > 0.5
            dice[structure.abbreviation] = round(float(2 * (mask & shape).sum() / (mask.sum() + shape.sum())), 3)
    return dice


_FIELD_MM = 2
"""Resolution of displacement fields."""

_STANDARD_CODE = 4  # NIFTI_XFORM_MNI_152

_PROBABILITY_STEP = 1 / 255

_MIN_DICE = 0.5

_MIN_JACOBIAN = 0.05


def normalize_files(
    chi: Path,
    dseg: Path,
    probseg: Path | None,
    regions: Mapping[str, NDArray[np.bool_]],
    *,
    output_space: str,
    folder: Path,
) -> tuple[list[Path], dict[str, Any], list[str]]:
    """Align a scan with MNI152NLin2009cAsym by its labels, and resample it.

    Parameters
    ----------
    chi : path
        Map in ppm, NaN or 0 where not measured.
    dseg, probseg : path
        Labels of structures.tsv on the grid of the map and, optionally, probabilities on it or a block of it.
    regions : mapping of str to ndarray of bool
        Masks ``brain`` and ``ventricles`` on the grid of the map, as far as there are any.
    output_space : str
        See `bids_dgmseg.config.parse_output_space`.
    folder : path
        Where the results are written.

    Returns
    -------
    files : list of path
        Map, labels, probabilities and the transforms in both directions, named as in `bids_dgmseg.bids.derivatives`.
    report : dict
        Space, resolution, limits of the Jacobian determinant, Dice of each nucleus with the standard space.
    warnings : list of str
        Doubts about the alignment.

    Raises
    ------
    InputError
        If the space is unknown, a grid differs from that of the map, or too few nuclei are labelled.
    """
    space, resolution = parse_output_space(output_space)
    source, labels = Volume.read(chi), read_labels(dseg)
    check_grid(dseg, labels, source)
    masks = {name: labels.with_array(mask.astype(np.int32)) for name, mask in regions.items()}
    if ventricles := masks.get("ventricles"):
        masks["ventricles"] = ventricles.with_array(np.where(labels.array == 0, ventricles.array, 0))
    normalization = register(labels, masks)
    grid, coarse = standard_grid(resolution), standard_grid(_FIELD_MM)
    indices = scan_indices(normalization, grid, source.affine)
    files = [
        _write(warp_map(source.array, indices), grid, folder / "standard_chi.nii.gz"),
        _write(warp_labels(labels.array, indices), grid, folder / "standard_dseg.nii.gz"),
        write_field(normalization.field_mm(coarse), coarse, folder / "to_standard_xfm.nii.gz"),
    ]
    if probseg is not None:
        fractions, block = read_block(probseg, source)
        whole = np.zeros((*grid.shape, len(fractions)), np.uint8, order="F")
        for channel, fraction in enumerate(fractions):
            padded = np.zeros(source.shape, np.float32)
            padded[block] = fraction
            whole[..., channel] = np.rint(warp_fractions(padded, indices) / _PROBABILITY_STEP).astype(np.uint8)
        files.append(_write(whole, grid, folder / "standard_probseg.nii.gz", scale=_PROBABILITY_STEP))
    grid = world_grid(box_of_mask(source.with_array(np.ones(source.shape, bool))), (float(_FIELD_MM),) * 3)
    inverse = normalization.field_mm(grid, inverse=True)
    files.append(write_field(inverse, grid, folder / "from_standard_xfm.nii.gz"))
    jacobian, dice = normalization.jacobian(), overlap(normalization, labels)
    low, high = float(jacobian.min()), float(jacobian.max())
    report = {
        "space": space,
        "output_space": output_space,
        "resolution_mm": resolution or 1,
        "method": "affine and diffeomorphic demons driven by the labels of the nuclei, brain and ventricles",
        "jacobian_min": round(low, 3),
        "jacobian_max": round(high, 3),
        "dice": dice,
    }
    warnings = []
    typical = float(np.median(list(dice.values()))) if dice else 0.0
    if typical < _MIN_DICE or low < _MIN_JACOBIAN:
        warnings.append(
            f"the alignment with {space} is doubtful (median Dice of the nuclei {typical:.2f}, smallest Jacobian "
            f"determinant {low:.2f}); look at the images in standard space before they are used"
        )
    return files, report, warnings


def _write(array: NDArray[Any], grid: Grid, path: Path, *, scale: float | None = None) -> Path:
    image = nib.Nifti1Image(array, grid.affine)
    image.set_qform(grid.affine, _STANDARD_CODE)
    image.set_sform(grid.affine, _STANDARD_CODE)
    image.header.set_xyzt_units("mm")
    if scale is not None:
        image.header.set_slope_inter(scale, 0)
    image.to_filename(path)
    return path
