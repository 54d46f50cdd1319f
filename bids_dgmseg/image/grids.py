"""Geometry in RAS+ world space: bounding boxes, voxel grids, resampling, similarity transforms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.volume import Volume

if TYPE_CHECKING:
    from torch import Tensor


MAX_ROTATION_DEG = 10.0
"""Largest angle between the axes of a map and a box; beyond it, a grid along the map's axes misses its corners."""

_MAX_CORNER_SHIFT = 0.05
"""Corners of equal grids may differ by this fraction of the shortest voxel edge, by rounding of headers."""


@dataclass(frozen=True)
class OrientedBox:
    """A box inside a `Box`, with the same centre, along rotated axes.

    Parameters
    ----------
    rotation_deg : tuple of 3 float
        Rotation vector from the world's axes to the box's; along x it is the head's pitch, positive with the chin up.
    size_mm : tuple of 3 float
        Edge lengths along the box's axes: right, anterior, superior.
    """

    rotation_deg: tuple[float, float, float]
    size_mm: tuple[float, float, float]

    @classmethod
    def from_axes(cls, axes: NDArray[np.float64], size_mm: tuple[float, float, float]) -> OrientedBox:
        """Create a box along the axes of a right-handed system, unit vectors in columns."""
        x, y, z = Rotation.from_matrix(axes).as_rotvec(degrees=True).tolist()
        return cls((x, y, z), size_mm)

    @property
    def axes(self) -> NDArray[np.float64]:
        """Unit vectors of the box's axes in world space, in columns."""
        return Rotation.from_rotvec(self.rotation_deg, degrees=True).as_matrix()


@dataclass(frozen=True)
class Box:
    """A box along the axes of RAS+ world space.

    Parameters
    ----------
    low_mm, high_mm : tuple of 3 float
        Opposite corners (x, y, z) in mm, ``low_mm`` the smaller.
    oriented : OrientedBox, optional
        The region of interest inside the box if head or slices are rotated; grids then follow its axes.
    """

    low_mm: tuple[float, float, float]
    high_mm: tuple[float, float, float]
    oriented: OrientedBox | None = None

    def __post_init__(self) -> None:
        if not all(low < high for low, high in zip(self.low_mm, self.high_mm, strict=True)):
            raise ValueError(f"box has no extent: {self.low_mm} to {self.high_mm}")

    @classmethod
    def centred(
        cls,
        centre_mm: NDArray[np.floating],
        size_mm: tuple[float, float, float],
        axes: NDArray[np.float64] | None = None,
    ) -> Box:
        """Create a box of a given size around a point, along axes (unit vectors in columns) or the world's."""
        if axes is not None and not np.array_equal(axes, np.eye(3)):
            return cls.around(centre_mm, OrientedBox.from_axes(axes, size_mm))
        half = np.asarray(size_mm) / 2
        return _box(centre_mm - half, centre_mm + half)

    @classmethod
    def around(cls, centre_mm: NDArray[np.floating], oriented: OrientedBox) -> Box:
        """Enclose an oriented box at a point.

        >>> Box.around(np.zeros(3), OrientedBox((90.0, 0.0, 0.0), (2.0, 4.0, 6.0))).high_mm
        (1.0, 3.0, 2.0)
        """
        half = np.round(np.abs(oriented.axes) @ (np.asarray(oriented.size_mm) / 2), 9)
        enclosing = _box(centre_mm - half, centre_mm + half)
        return cls(enclosing.low_mm, enclosing.high_mm, oriented)

    @property
    def size_mm(self) -> tuple[float, float, float]:
        """Edge lengths in mm."""
        x, y, z = np.subtract(self.high_mm, self.low_mm)
        return float(x), float(y), float(z)

    @property
    def centre_mm(self) -> tuple[float, float, float]:
        """Centre in mm."""
        x, y, z = np.add(self.high_mm, self.low_mm) / 2
        return float(x), float(y), float(z)

    @property
    def frame(self) -> tuple[tuple[float, float, float], NDArray[np.float64]]:
        """Edge lengths in mm and axes (unit vectors in columns) of the region of interest."""
        return (self.oriented.size_mm, self.oriented.axes) if self.oriented else (self.size_mm, np.eye(3))

    def to_dict(self) -> dict[str, list[float]]:
        """Return the box as it is written to JSON: corners, and for an oriented box rotation and edge lengths.

        >>> Box((0.0, 0.0, 0.0), (1.0, 2.0, 3.0)).to_dict()
        {'low': [0.0, 0.0, 0.0], 'high': [1.0, 2.0, 3.0]}
        """
        corners = {"low": list(self.low_mm), "high": list(self.high_mm)}
        if self.oriented is None:
            return corners
        return corners | {"rotation_deg": list(self.oriented.rotation_deg), "rotated_size": list(self.oriented.size_mm)}

    @classmethod
    def enclosing(cls, boxes: Sequence[Box]) -> Box:
        """Enclose other boxes, along the world's axes.

        >>> Box.enclosing([Box((0, 0, 0), (1, 1, 1)), Box((-1, 0.5, 0), (0, 2, 1))]).low_mm
        (-1.0, 0.0, 0.0)
        """
        return _box(np.min([box.low_mm for box in boxes], axis=0), np.max([box.high_mm for box in boxes], axis=0))

    def expanded(self, margin_mm: float) -> Box:
        """Add a margin on every side, of an oriented box along its own axes.

        >>> Box((0, 0, 0), (1, 2, 3)).expanded(1).size_mm
        (3.0, 4.0, 5.0)
        """
        return self._grown(np.full(3, margin_mm))

    def at_least(self, size_mm: Sequence[float]) -> Box:
        """Extend the box about its centre to a least size along its axes, an oriented one along its own.

        >>> Box((0, 0, 0), (1, 2, 3)).at_least((2, 2, 2))
        Box(low_mm=(-0.5, 0.0, 0.0), high_mm=(1.5, 2.0, 3.0), oriented=None)
        """
        return self._grown(np.maximum(np.subtract(size_mm, self.frame[0]), 0) / 2)

    def _grown(self, more_mm: NDArray[np.floating]) -> Box:
        if self.oriented is None:
            return _box(np.subtract(self.low_mm, more_mm), np.add(self.high_mm, more_mm))
        size_mm = _triple((self.oriented.size_mm + 2 * more_mm).tolist())
        return Box.around(np.array(self.centre_mm), replace(self.oriented, size_mm=size_mm))

    def shifted_to_cover(self, inner: Box, *, grow: bool = False) -> Box:
        """Shift the box, an oriented one along its own axes, as little as needed to cover another.

        Along axes where the other is larger, the box is centred on it, or with `grow` extended to contain both.

        >>> Box((0, 0, 0), (10, 10, 10)).shifted_to_cover(Box((-2, 3, -5), (3, 12, 14))).low_mm
        (-2.0, 2.0, -0.5)
        >>> Box((0, 0, 0), (10, 10, 10)).shifted_to_cover(Box((-2, 3, -5), (3, 12, 14)), grow=True)
        Box(low_mm=(-2.0, 2.0, -5.0), high_mm=(8.0, 12.0, 14.0), oriented=None)
        """
        (low, high), (inner_low, inner_high) = self._extent(), inner._extent(self.frame[1] if self.oriented else None)
        shift = np.minimum(inner_low - low, 0) + np.maximum(inner_high - high, 0)
        larger = inner_high - inner_low > high - low
        if grow:
            low[larger] = np.minimum(low, inner_low)[larger]
            high[larger] = np.maximum(high, inner_high)[larger]
            shift[larger] = 0
        else:
            shift[larger] = ((inner_high + inner_low - high - low) / 2)[larger]
        low, high = low + shift, high + shift
        if self.oriented is None:
            return _box(low, high)
        return Box.around(
            self.frame[1] @ (low + high) / 2, replace(self.oriented, size_mm=_triple((high - low).tolist()))
        )

    def _extent(self, axes: NDArray[np.float64] | None = None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lowest and highest coordinates (3) along axes, by default along the box's own."""
        if axes is None and self.oriented is None:
            return np.array(self.low_mm, float), np.array(self.high_mm, float)
        size_mm, directions = self.frame
        axes = directions if axes is None else axes
        centre, half = axes.T @ self.centre_mm, np.abs(axes.T @ directions) @ (np.asarray(size_mm) / 2)
        return centre - half, centre + half


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = map(float, values)
    return x, y, z


def _box(low_mm: NDArray[np.floating], high_mm: NDArray[np.floating]) -> Box:
    (x0, y0, z0), (x1, y1, z1) = low_mm.tolist(), high_mm.tolist()
    return Box((x0, y0, z0), (x1, y1, z1))


def box_of_mask(mask: Volume, *, axes: NDArray[np.float64] | None = None) -> Box:
    """Enclose the voxels of a mask, outer edges included, on any oblique grid.

    On an oblique grid the box is that of the smallest block of voxels with the mask; with `axes` (unit vectors in
    columns), that of its voxels alone along these axes, which is smaller.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    occupied = [np.flatnonzero(mask.array.any(axis=across)) for across in ((1, 2), (0, 2), (0, 1))]
    if not len(occupied[0]):
        raise ValueError("the mask is empty")
    if axes is not None:
        along = axes.T @ mask.affine[:3]
        points = along[:, :3] @ np.argwhere(mask.array).T + along[:, 3:]
        reach = np.abs(along[:, :3]).sum(axis=1) / 2  # of a voxel's corners from its centre
        near, far = points.min(axis=1) - reach, points.max(axis=1) + reach
        if np.array_equal(axes, np.eye(3)):
            return _box(near, far)
        return Box.around(axes @ (near + far) / 2, OrientedBox.from_axes(axes, _triple((far - near).tolist())))
    low, high = (np.array([indices[end] for indices in occupied]) for end in (0, -1))
    low, high = low - 0.5, high + 0.5
    corners = np.array(np.meshgrid(*np.stack([low, high], axis=1))).reshape(3, -1)
    world = mask.affine[:3, :3] @ corners + mask.affine[:3, 3:]
    return _box(world.min(axis=1), world.max(axis=1))


@dataclass(frozen=True)
class Grid:
    """A shape and an affine (voxel indices to RAS+ mm)."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @property
    def voxel_size_mm(self) -> tuple[float, float, float]:
        """Distances between voxel centres along the axes."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return x, y, z

    def centres_mm(self) -> NDArray[np.float64]:
        """Compute world coordinates (X, Y, Z, 3) of the voxel centres."""
        indices = np.stack(np.meshgrid(*(np.arange(size) for size in self.shape), indexing="ij"), axis=-1)
        # Not nibabel's apply_affine: its reshaping changes the order of summation in BLAS, and so the last bit.
        points: NDArray[np.float64] = indices @ self.affine[:3, :3].T
        return points + self.affine[:3, 3]


def world_grid(box: Box, spacing_mm: tuple[float, float, float], shape: tuple[int, int, int] | None = None) -> Grid:
    """Create a grid centred on a box, along the world's axes or those of an oriented box.

    Parameters
    ----------
    box : Box
        Region to cover.
    spacing_mm : tuple of 3 float
        Distance between voxel centres.
    shape : tuple of 3 int, optional
        Number of voxels; by default the smallest that covers the box.
    """
    size_mm, axes = box.frame
    if shape is None:
        shape = shape_to_cover(size_mm, spacing_mm)
    affine = np.eye(4)
    affine[:3, :3] = axes * np.asarray(spacing_mm)
    affine[:3, 3] = np.asarray(box.centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine)


def shape_to_cover(size_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Compute the smallest number of voxels along each axis that covers a size, up to the rounding of headers."""
    x, y, z = (max(1, int(np.ceil(size / step - 1e-3))) for size, step in zip(size_mm, spacing_mm, strict=True))
    return x, y, z


def aligned_grid(box: Box, spacing_mm: tuple[float, float, float], native: Grid, tolerance: float) -> Grid:
    """Create a grid over a box that is aligned with the voxels of a map, if these nearly have the wanted spacing.

    Data are interpolated twice if the map's grid differs from the network's: when the map is passed to the network and
    when the probabilities are resampled back. Each interpolation blurs thin structures and small nuclei. On an aligned
    grid, voxels of the map are copied or averaged in blocks, so that neither step interpolates; only voxels larger than
    the grid's are interpolated, when the map is passed to the network.

    Parameters
    ----------
    box : Box
        Region to cover.
    spacing_mm : tuple of 3 float
        Wanted distance between voxel centres.
    native : Grid
        Grid of the map, its axes closest to x, y and z in this order.
    tolerance : float
        Largest relative difference from the wanted spacing, separately for each axis; 0 disables alignment.

    Returns
    -------
    Grid
        Along the map's axes. Same as `world_grid` if `tolerance` is 0 or the map's axes are rotated by more than 10
        degrees from the box's.
    """
    size_mm, axes = box.frame
    if not tolerance or max_axis_angle_deg(axes.T @ axis_directions(native.affine)) > MAX_ROTATION_DEG:
        return world_grid(box, spacing_mm)
    ratio, aligned = integer_ratio(spacing_mm, native.voxel_size_mm, tolerance)
    shape = shape_to_cover(size_mm, (ratio * native.voxel_size_mm).tolist())
    centre = np.linalg.solve(native.affine, [*box.centre_mm, 1.0])[:3]
    # Corner of the new grid, in new voxels from the corner of the map's first voxel. Voxel centres are at integers, so
    # corners are at -0.5: hence the halves here and below. Rounding this number lets the voxel edges coincide; the box
    # then is off centre by at most half a voxel.
    first = (centre + 0.5) / ratio - np.asarray(shape) / 2
    first = np.where(aligned, np.floor(first + 0.5), first)  # not to even, which depends on where the map begins
    affine = np.eye(4)
    affine[:3, :3] = native.affine[:3, :3] * ratio
    affine[:3, 3] = native.affine[:3, :3] @ ((first + 0.5) * ratio - 0.5) + native.affine[:3, 3]
    return Grid(shape, affine)


def integer_ratio(
    spacing_mm: Sequence[float], voxel_size_mm: Sequence[float], tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Find how many voxels of a map fit into one voxel of a grid, along each axis.

    Parameters
    ----------
    spacing_mm, voxel_size_mm : sequence of 3 float
        Voxel sizes of the grid (wanted) and of the map.
    tolerance : float
        Largest relative change of the grid's voxel size that makes the ratio an integer or its reciprocal.

    Returns
    -------
    ratio : ndarray of shape (3,)
        n or 1/n where that is within the tolerance, else ``spacing_mm / voxel_size_mm``.
    aligned : ndarray of bool, shape (3,)
        Whether the ratio is n or 1/n.
    """
    spacing, voxel_mm = np.asarray(spacing_mm), np.asarray(voxel_size_mm)
    ratio = np.maximum(np.round(spacing / voxel_mm), 1) / np.maximum(np.round(voxel_mm / spacing), 1)
    aligned = np.abs(ratio * voxel_mm / spacing - 1) <= tolerance
    return np.where(aligned, ratio, spacing / voxel_mm), aligned


def max_axis_angle_deg(axes: NDArray[np.float64]) -> float:
    """Compute the largest angle between three axes (unit vectors in columns) and x, y, z, each to its own."""
    return float(np.rad2deg(np.arccos(np.clip(np.diag(axes), -1, 1))).max())


def axis_directions(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the unit vectors of a grid's axes, in columns."""
    axes: NDArray[np.float64] = affine[:3, :3]
    return axes / np.linalg.norm(axes, axis=0)


def covering_block(grid: Grid, box: Box) -> tuple[slice, slice, slice]:
    """Find the block that contains every voxel centre inside a box; its slices are empty if there is none."""
    corners = np.array(np.meshgrid(*zip(box.low_mm, box.high_mm, strict=True))).reshape(3, -1)
    to_index = np.linalg.inv(grid.affine)
    indices = to_index[:3, :3] @ corners + to_index[:3, 3:]
    low = np.clip(np.ceil(indices.min(axis=1) - 1e-6), 0, grid.shape).astype(int)
    high = np.clip(np.floor(indices.max(axis=1) + 1e-6) + 1, low, grid.shape).astype(int)
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True))
    return x, y, z


def block_affine(affine: NDArray[np.float64], block: Sequence[slice]) -> NDArray[np.float64]:
    """Compute the affine of a block of voxels.

    >>> block_affine(np.diag([2.0, 2.0, 3.0, 1.0]), (slice(1, 4), slice(0, 2), slice(5, 9)))[:3, 3].tolist()
    [2.0, 0.0, 15.0]
    """
    shifted = affine.copy()
    shifted[:3, 3] += shifted[:3, :3] @ [along.start for along in block]
    return shifted


def describe_grid_mismatch(first: Volume, second: Volume) -> str | None:
    """Describe how two grids in RAS+ differ; None if they are the same up to rounding of headers."""
    if first.shape != second.shape:
        return f"shape {first.shape} differs from {second.shape}"
    ends = np.array([(0, size - 1) for size in first.shape], float)
    corners = np.array(np.meshgrid(*ends)).reshape(3, -1)
    between = (first.affine - second.affine)[:3] @ np.vstack([corners, np.ones(8)])
    apart_mm = float(np.linalg.norm(between, axis=0).max())
    return f"corners are {apart_mm:.3g} mm apart" if apart_mm > _MAX_CORNER_SHIFT * min(first.voxel_size_mm) else None


def check_grid(
    path: Path | str, image: Volume, chi: Volume, *, other: str = "the map", advice: str = "resample it first"
) -> None:
    """Raise `InputError` if an image that was read from a file is not on the grid of the map, or of another image."""
    if difference := describe_grid_mismatch(chi, image):
        raise InputError(f"{Path(path).name}: is not on the same grid as {other} ({difference}); {advice}")


@dataclass(frozen=True)
class Similarity:
    """Map points (..., 3) to ``(points - centre) @ matrix + target``."""

    matrix: NDArray[np.float64]
    centre: NDArray[np.float64]
    target: NDArray[np.float64]

    def __call__(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Transform points."""
        return (points - self.centre) @ self.matrix + self.target


def fit_similarity(
    points: NDArray[np.float64],
    targets: NDArray[np.float64],
    weights: NDArray[np.float64] | None = None,
    *,
    mirrored: bool = False,
) -> Similarity:
    """Fit the similarity from points to targets by weighted least squares (Umeyama 1991, doi:10.1109/34.88573).

    Parameters
    ----------
    points, targets : ndarray of shape (n, 3)
        Corresponding points, not all on one line; with `mirrored` not all on one plane.
    weights : ndarray of shape (n,), optional
        Equal by default.
    mirrored : bool
        Allow reflections, as between arrays with different axis orders and directions.
    """
    shares = np.full(len(points), 1 / len(points)) if weights is None else weights / weights.sum()
    centre, target = shares @ points, shares @ targets
    centred = points - centre
    left, stretches, right = np.linalg.svd((centred * shares[:, None]).T @ (targets - target))
    signs = np.array([1.0, 1.0, 1.0 if mirrored else np.sign(np.linalg.det(left @ right))])
    scale = (stretches * signs).sum() / (shares @ (centred**2).sum(axis=1))
    return Similarity(scale * (left * signs) @ right, centre, target)


def resample(volume: Volume, grid: Grid, *, order: int = 1, fill: float = 0.0, antialias: bool = False) -> Volume:
    """Sample a volume at the voxel centres of a grid.

    Parameters
    ----------
    volume : Volume
        Source, finite everywhere.
    grid : Grid
        Target.
    order : int
        Spline order: 0 for labels, 1 linear, 3 cubic.
    fill : float
        Value outside the source.
    antialias : bool
        Smooth the source first, as `smooth_for_grid` does.

    Returns
    -------
    Volume
        On `grid`, of the source's dtype.
    """
    if antialias:
        volume = smooth_for_grid(volume, grid)
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    matrix, steps = to_source[:3, :3], np.diag(to_source)[:3]
    parallel = order == 1 and np.array_equal(matrix, np.diag(steps))  # scipy has faster code for that
    sampled = ndimage.affine_transform(
        volume.array,
        steps if parallel else matrix,
        to_source[:3, 3],
        output_shape=grid.shape,
        order=order,
        mode="grid-constant",
        cval=fill,
    )
    return Volume(sampled, grid.affine)


def smooth_for_grid(volume: Volume, grid: Grid) -> Volume:
    """Smooth a volume before it is sampled on a coarser grid, to avoid aliasing.

    Blocks of voxels that fit into one voxel of the grid are averaged, which is fast and exact for integer ratios. For
    the rest of the ratio, a Gaussian supplies the missing width: full widths at half maximum add in quadrature.
    """
    extent_mm = np.linalg.norm(axis_directions(volume.affine).T @ grid.affine[:3, :3], axis=1)
    factors = np.maximum(np.floor(extent_mm / volume.voxel_size_mm + 1e-6).astype(int), 1)
    if (factors > 1).any():
        from skimage.measure import block_reduce  # slow, and seldom needed

        affine = volume.affine @ np.diag([*factors, 1.0])
        # The centre of a block of n voxels is (n - 1) / 2 voxels from the centre of its first.
        affine[:3, 3] = volume.affine[:3, :3] @ ((factors - 1) / 2) + volume.affine[:3, 3]
        padding = [(0, -size % factor) for size, factor in zip(volume.shape, factors.tolist(), strict=True)]
        padded = np.pad(volume.array, padding, mode="edge")
        volume = Volume(block_reduce(padded, tuple(factors.tolist()), np.mean).astype(np.float32), affine)
    sigma = np.sqrt(np.maximum((extent_mm / volume.voxel_size_mm) ** 2 - 1, 0) / (8 * np.log(2)))
    if (sigma > 0.1).any():
        volume = volume.with_array(ndimage.gaussian_filter(volume.array, sigma))
    return volume


def sample_points(values: Tensor, indices: Tensor, *, nearest: bool = False, extend: bool = False) -> Tensor:
    """Sample images at fractional voxel indices, on the device of `values`.

    Parameters
    ----------
    values : Tensor of shape (C, X, Y, Z)
        Floating-point images on one grid.
    indices : Tensor of shape (A, B, D, 3)
        Voxel indices of the points; voxel centres are at integers.
    nearest : bool
        Take the nearest voxel instead of interpolating linearly.
    extend : bool
        Repeat the outermost voxels outside the image instead of 0.

    Returns
    -------
    Tensor of shape (C, A, B, D)
    """
    from torch import tensor
    from torch.nn import functional

    size = tensor(values.shape[1:], device=values.device)
    # grid_sample expects the last axis first, and coordinates from -1 to 1: with align_corners from the first to the
    # last voxel centre, else from edge to edge.
    scaled = indices / (size - 1).clamp(min=1) * 2 - 1 if extend else (2 * indices + 1) / size - 1
    sampled: Tensor = functional.grid_sample(
        values[None],
        scaled.flip(-1)[None],
        mode="nearest" if nearest else "bilinear",
        padding_mode="border" if extend else "zeros",
        align_corners=extend,
    )
    return sampled[0]
