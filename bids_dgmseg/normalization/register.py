"""Register the labels of a scan to a standard space: affine, then smooth and invertible warps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.affines import apply_affine
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.config import MNI
from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Grid, block_affine
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES, join_parts
from bids_dgmseg.normalization.standard_space import head_mask, nucleus_shape
from bids_dgmseg.normalization.transform import FieldWarp, Normalization, Warp, flow, scan_indices, warp_labels

_MIN_NUCLEI, _MIN_VOXELS = 4, 5

_PRIOR = 0.02
"""Weight of the identity, relative to the positions of the nuclei, in the shape of the first affine transform."""

_AFFINE_ITERATIONS = 12

_MARGIN = 4
"""Voxels around the block of a channel."""

_GAIN = 2.0
"""Factor of smoothed updates."""

_MIN_JACOBIAN, _MAX_SMOOTHINGS = 0.2, 20
"""Lower bound of the Jacobian determinant of each warp, and of that of its inverse."""

_HEAD_WEIGHT = 0.2
"""Weight of brain and ventricles relative to a nucleus: chi maps are eroded at the surface, ventricles vary."""


@dataclass(frozen=True)
class _Level:
    """One warp: the region of standard space it acts in, and how it is found."""

    low_mm: tuple[float, float, float]
    high_mm: tuple[float, float, float]
    spacing_mm: float
    iterations: int
    smoothing_mm: float
    """SD of the Gaussian that regularizes the velocity in each iteration."""
    update_mm: float
    """SD of the Gaussian that regularizes each update."""
    regions: tuple[str, ...] = ("brain", "ventricles")


_LEVELS = (
    _Level((-92, -124, -76), (92, 96, 96), 4.0, 20, 3.0, 8.0),
    _Level((-50, -84, -60), (50, 46, 46), 2.0, 25, 1.2, 4.0, ("ventricles",)),
)


@dataclass(frozen=True)
class Channels:
    """Images to be aligned, all on one grid."""

    standard: NDArray[np.float32]
    """Shape (C, X, Y, Z), fractions from 0 to 1."""
    scan: NDArray[np.float32]
    """The same of the scan, as far as it is aligned."""
    covered: NDArray[np.float32]
    """Shape (X, Y, Z): 1 where the scan has voxels."""
    weights: NDArray[np.float64]


_WHOLE_HEAD = _Level((-92, -124, -76), (92, 96, 96), 2.0, 0, 0.0, 0.0)
"""For a warp that another program finds."""


def register(
    labels: Volume, regions: Mapping[str, Volume], *, find_warp: Callable[[Channels, Grid], FieldWarp] | None = None
) -> Normalization:
    """Align the labels of a scan with the nuclei of MNI152NLin2009cAsym.

    Parameters
    ----------
    labels : Volume
        Indices of structures.tsv, in any position and orientation.
    regions : mapping of str to Volume
        Masks ``brain`` and ``ventricles`` of the scan, as far as there are any.
    find_warp : callable, optional
        Finds a warp of the whole head at 2 mm from the channels after the affine transform, instead of the two warps.

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
    An affine transform is fitted to the centres of the nuclei, then to the sum of squared differences of all labels
    (Gauss-Newton). Two warps follow, of the whole head at 4 mm and around the nuclei at 2 mm. Each is the flow of a
    stationary velocity field, found by log-domain demons [1]_ with one channel per nucleus (both sides), brain and
    ventricles.

    References
    ----------
    .. [1] Vercauteren T, et al. Symmetric log-domain diffeomorphic registration: a demons-based approach. MICCAI 2008.
       doi:10.1007/978-3-540-85988-8_90
    """
    labels = labels.with_array(join_parts(labels.array))
    nuclei = [one.abbreviation for one in STRUCTURES if np.count_nonzero(labels.array == one.index) >= _MIN_VOXELS]
    if len(nuclei) < _MIN_NUCLEI:
        raise InputError(
            f"only {len(nuclei)} nuclei are labelled, at least {_MIN_NUCLEI} are needed to align the scan with {MNI}; "
            "check the map, or omit `output_space`"
        )
    normalization = Normalization(_align_centres(labels, nuclei))
    channels = _read_channels(labels, regions, nuclei, normalization, _LEVELS[0])
    normalization = Normalization(normalization.to_scan @ _refine_affine(channels, _grid(_LEVELS[0])))
    if find_warp:
        channels = _read_channels(labels, regions, nuclei, normalization, _WHOLE_HEAD)
        return Normalization(normalization.to_scan, (find_warp(channels, _grid(_WHOLE_HEAD)),))
    for level in _LEVELS:
        channels = _read_channels(labels, regions, nuclei, normalization, level)
        warp = _find_warp(channels, level)
        normalization = Normalization(normalization.to_scan, (*normalization.warps, warp))
    return normalization


def _grid(level: _Level) -> Grid:
    affine = np.diag([level.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = level.low_mm
    x, y, z = (int((high - low) / level.spacing_mm) + 1 for low, high in zip(level.low_mm, level.high_mm, strict=True))
    return Grid((x, y, z), affine)


def _align_centres(labels: Volume, nuclei: list[str]) -> NDArray[np.float64]:
    """Fit an affine transform (4×4) from the centres of the nuclei in standard space to those in the scan.

    The linear part is drawn to a rotation with a uniform scale, the less the more nuclei there are in all directions.
    """
    grid = _grid(_LEVELS[-1])
    points_mm = grid.centres_mm()
    source = np.array(
        [np.average(points_mm.reshape(-1, 3), axis=0, weights=nucleus_shape(name, grid).ravel()) for name in nuclei]
    )
    indices = [STRUCTURES.named(name).index for name in nuclei]
    target = apply_affine(labels.affine, np.array(ndimage.center_of_mass(labels.array > 0, labels.array, indices)))
    middle, other = source.mean(axis=0), target.mean(axis=0)
    a, b = source - middle, target - other
    u, s, vt = np.linalg.svd(b.T @ a)
    signs = np.array([1, 1, np.sign(np.linalg.det(u @ vt))])
    similarity = (s * signs).sum() / (a**2).sum() * (u * signs) @ vt
    ridge = _PRIOR * (a**2).sum() / 3 * np.eye(3)
    linear = np.linalg.solve(a.T @ a + ridge, a.T @ b + ridge @ similarity.T).T
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = linear, other - linear @ middle
    return matrix


def _read_channels(
    labels: Volume, regions: Mapping[str, Volume], nuclei: list[str], normalization: Normalization, level: _Level
) -> Channels:
    """Draw the nuclei and regions of both spaces on the grid of a level, equally smoothed."""
    grid = _grid(level)
    points = normalization.points_in_scan(grid.centres_mm().reshape(-1, 3))

    def sample(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float32]:
        block, sizes = _block(mask), np.linalg.norm(affine[:3, :3], axis=0)
        values, affine = mask[block].astype(np.float32), block_affine(affine, block)
        sigma = np.sqrt(np.maximum((level.spacing_mm / sizes) ** 2 - 1, 0) / 12)  # variances of box functions
        indices = apply_affine(np.linalg.inv(affine), points).T.reshape(3, *grid.shape)
        smooth = ndimage.gaussian_filter(values, sigma) if (sigma > 0.1).any() else values
        return np.asarray(ndimage.map_coordinates(smooth, indices, order=1, mode="grid-constant"), np.float32)

    standard, scan, weights = [], [], []
    for nucleus in dict.fromkeys(STRUCTURES.named(name).nucleus for name in nuclei):
        sides = [STRUCTURES.named(name) for name in nuclei if STRUCTURES.named(name).nucleus == nucleus]
        standard.append(sum(nucleus_shape(side.abbreviation, grid) for side in sides))
        scan.append(sample(np.isin(labels.array, [side.index for side in sides]), labels.affine))
        weights.append(1.0)
    for region, mask in regions.items():
        if region in level.regions and mask.array.any():
            standard.append(head_mask(region, grid))
            scan.append(sample(mask.array > 0, mask.affine))
            weights.append(_HEAD_WEIGHT)
    to_index = np.linalg.inv(labels.affine)
    indices = apply_affine(to_index, points)
    covered = ((indices > 0) & (indices < np.array(labels.shape) - 1)).all(axis=-1).reshape(grid.shape)
    smoothed = [ndimage.gaussian_filter(image, (0, 0.7, 0.7, 0.7)) for image in (np.stack(standard), np.stack(scan))]
    volumes = smoothed[0].sum(axis=(1, 2, 3)) + 1.0
    scaled = np.array(weights) / np.sqrt(volumes / volumes.min())
    return Channels(smoothed[0], smoothed[1], covered.astype(np.float32), scaled)


def _refine_affine(channels: Channels, grid: Grid) -> NDArray[np.float64]:
    """Fit an affine transform (4×4, within standard space) to the weighted squared differences by Gauss-Newton."""
    points = grid.centres_mm().reshape(-1, 3)
    middle = points.mean(axis=0)
    design = np.concatenate([(points - middle) / 50, np.ones((len(points), 1))], axis=1)
    matrix, best, lowest = np.eye(4), np.eye(4), np.inf
    for _ in range(_AFFINE_ITERATIONS):
        moved = apply_affine(matrix, points)
        indices = apply_affine(np.linalg.inv(grid.affine), moved).T.reshape(3, *grid.shape)
        covered = ndimage.map_coordinates(channels.covered, indices, order=1).ravel()
        hessian, gradient, cost = np.zeros((12, 12)), np.zeros(12), 0.0
        for standard, scan, weight in zip(channels.standard, channels.scan, channels.weights, strict=True):
            warped = ndimage.map_coordinates(scan, indices, order=1, mode="grid-constant")
            slopes = np.stack(np.gradient(warped, *grid.voxel_size_mm), axis=-1).reshape(-1, 3)
            residual = (standard - warped).ravel() * covered
            used = np.abs(slopes).sum(axis=1) > 1e-4
            jacobian = (slopes[used, :, None] * design[used, None, :]).reshape(-1, 12)
            hessian += weight * jacobian.T @ (jacobian * covered[used, None])
            gradient += weight * jacobian.T @ residual[used]
            cost += weight * float((residual**2).sum())
        if cost < lowest:
            best, lowest = matrix, cost
        step = np.linalg.solve(hessian + 1e-3 * np.trace(hessian) / 12 * np.eye(12), gradient).reshape(3, 4)
        update = np.eye(4)
        update[:3, :3] += step[:, :3] / 50
        update[:3, 3] = step[:, 3] - step[:, :3] @ middle / 50
        matrix = matrix @ update
    return best


def _find_warp(channels: Channels, level: _Level) -> Warp:
    """Find a velocity field by demons in the log domain."""
    grid, step = _grid(level), level.spacing_mm
    indices = np.indices(grid.shape, dtype=np.float64)
    velocity_mm = np.zeros((3, *grid.shape))
    fade = _fade(grid, 3 * step)
    # Each channel acts in a small block only: forces elsewhere are 0.
    blocks = [_block(pair) for pair in np.maximum(channels.standard, channels.scan)]
    for _ in range(level.iterations):
        moved = indices + flow(velocity_mm, grid) / step
        force, norm = np.zeros((3, *grid.shape)), np.full(grid.shape, 1e-4)
        for standard, scan, weight, block in zip(
            channels.standard, channels.scan, channels.weights, blocks, strict=True
        ):
            points = moved[:, *block]
            warped = ndimage.map_coordinates(scan, points, order=1, mode="grid-constant")
            residual = (standard[block] - warped) * ndimage.map_coordinates(channels.covered, points, order=1)
            slopes = np.stack(np.gradient((standard[block] + warped) / 2, step))
            force[:, *block] += weight * residual * slopes
            norm[block] += weight * ((slopes**2).sum(axis=0) + residual**2 / step**2)
        update = _smooth(force / norm, level.update_mm / step)
        # Smoothing spreads a force that acts only at surfaces: the largest update is half a voxel at most.
        largest = float(np.linalg.norm(update, axis=0).max())
        update *= min(_GAIN, 0.5 * step / max(largest, 1e-9))
        velocity_mm = _smooth(velocity_mm + update, level.smoothing_mm / step) * fade
    # More smoothing where the grid would nearly fold or tear: a bound on the Jacobian determinant, and on its inverse.
    for _ in range(_MAX_SMOOTHINGS):
        jacobian = Warp(velocity_mm, grid).jacobian
        if jacobian.min() >= _MIN_JACOBIAN and jacobian.max() <= 1 / _MIN_JACOBIAN:
            break
        velocity_mm = _smooth(velocity_mm, 1.0) * fade
    return Warp(velocity_mm, grid)


def _block(image: NDArray[Any]) -> tuple[slice, slice, slice]:
    """Return the block where an image is not 0, with a margin."""
    found = ndimage.find_objects((image > 0.01).astype(np.uint8))
    box = found[0] if found else tuple(slice(0, size) for size in image.shape)
    x, y, z = (
        slice(max(axis.start - _MARGIN, 0), min(axis.stop + _MARGIN, size))
        for axis, size in zip(box, image.shape, strict=True)
    )
    return x, y, z


def _smooth(vectors: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return np.stack([ndimage.gaussian_filter(part, sigma, mode="constant") for part in vectors])


def _fade(grid: Grid, width_mm: float) -> NDArray[np.float64]:
    """Return a window that falls from 1 to 0 at the edges of a grid."""
    window = np.ones(grid.shape)
    for axis, (size, step) in enumerate(zip(grid.shape, grid.voxel_size_mm, strict=True)):
        distance = np.minimum(np.arange(size), np.arange(size)[::-1]) * step
        shape = [1, 1, 1]
        shape[axis] = size
        window = window * np.clip(distance / width_mm, 0, 1).reshape(shape)
    return window


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
