"""Sessions of one participant: rigid alignment in a mid-space that favours none, and one box for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import Box, resample, world_grid
from bids_dgmseg.image.masks import is_valid, share_covered, valid_box
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.registration.align import Head, Matrix, optimize_by_correlation
from bids_dgmseg.segmentation.localize import SharedSpace, to_mid_space
from bids_dgmseg.segmentation.predict import Location
from bids_dgmseg.segmentation.segment import SegmentedMap, clean, localize, segment_map

_COARSE_MM = (8.0, 4.0)
"""Voxel sizes of the images for the first alignment; sessions differ by less than 30 degrees."""

_ROUNDS, _SPACING_MM = 2, 2.0
"""Alignments of all maps to their mean, and voxel size of the images."""

_MEAN_MM = 1.0

_RANGE_PPM = 0.2
"""Larger values, of veins and bone, would dominate the correlation."""

_MIN_COARSE_CORRELATION, _MIN_CORRELATION = 0.3, 0.6
"""Correlation of a map with the mean of the others: two people have up to 0.45, sessions of one above 0.9."""

_MAX_SIZE_RATIO = 1.1
"""Ratio of the voxel sizes of two sessions along one axis, beyond which their edges cannot be compared."""


@dataclass(frozen=True)
class AlignedSessions:
    """Maps of a participant in their mid-space."""

    to_maps: tuple[Matrix, ...]
    """4×4 per map, from the mid-space to its space, RAS+ mm."""
    correlations: tuple[float, ...]
    """Correlation of each map with the mean of the others, within the brain."""
    mean: Volume
    """Mean of the maps in ppm, in the mid-space at 1 mm."""
    maps: tuple[Volume, ...]
    """The maps with their affines in the mid-space; holes are filled, 0 outside the brain."""


def align_sessions(maps: Sequence[Volume], *, names: Sequence[str] = ()) -> AlignedSessions:
    """Align the maps of one participant rigidly.

    Parameters
    ----------
    maps : sequence of Volume
        At least two, in ppm, in any pose and on any grids; 0, NaN or noise outside the brain.
    names : sequence of str
        Names of the maps for messages.

    Returns
    -------
    AlignedSessions
        In the order of `maps`; deterministic.

    Raises
    ------
    InputError
        If a map shows no head or is too unlike the others, as if it were that of another person.

    Notes
    -----
    All maps are aligned to the first, then twice to the mean of all by their correlation. After each step the mid-space
    is moved so that the transforms to the maps have the identity as mean rotation and translation: no map is favoured
    [1]_.

    References
    ----------
    .. [1] Reuter M, et al. Within-subject template estimation for unbiased longitudinal image analysis. Neuroimage 61
       (2012) 1402-1418. doi:10.1016/j.neuroimage.2012.02.084
    """
    names = list(names) or [f"map {number}" for number in range(1, len(maps) + 1)]
    cleaned = [clean(chi) for chi in maps]
    heads = [Head(chi) for chi in cleaned]
    to_maps = _centre([np.eye(4), *(_align_with_first(heads[0], head) for head in heads[1:])])
    _check(_correlate(cleaned, to_maps), names, _MIN_COARSE_CORRELATION)
    for _ in range(_ROUNDS):
        coarse = Head(_average(cleaned, to_maps, spacing_mm=_SPACING_MM))
        to_maps = _centre(
            [
                optimize_by_correlation(coarse, head, matrix, _SPACING_MM)
                for head, matrix in zip(heads, to_maps, strict=True)
            ]
        )
    correlations = _correlate(cleaned, to_maps)
    _check(correlations, names, _MIN_CORRELATION)
    moved = tuple(to_mid_space(chi, matrix) for chi, matrix in zip(cleaned, to_maps, strict=True))
    mean = _average(cleaned, to_maps, spacing_mm=_MEAN_MM)
    return AlignedSessions(tuple(to_maps), tuple(correlations), mean, moved)


def warn_of_voxels(maps: Sequence[Volume]) -> str:
    """Explain that the sessions have different voxels, whose edges look like changes of volume; empty if they do not.

    >>> first, second = (Volume(np.zeros((2, 2, 2)), np.diag([1.0, 1, size, 1])) for size in (1, 3))
    >>> warn_of_voxels([first, second])
    'voxel sizes differ between sessions (1 × 1 × 1 mm, 1 × 1 × 3 mm), which can mimic a change of volume'
    >>> warn_of_voxels([first, first])
    ''
    """
    sizes = np.array([chi.voxel_size_mm for chi in maps])
    if (sizes.max(axis=0) <= _MAX_SIZE_RATIO * sizes.min(axis=0)).all():
        return ""
    listed = dict.fromkeys(f"{' × '.join(f'{edge:.3g}' for edge in size)} mm" for size in sizes)
    return f"voxel sizes differ between sessions ({', '.join(listed)}), which can mimic a change of volume"


def find_shared_spaces(
    aligned: AlignedSessions, model: Model, *, weights: Path | None = None, device: str = "cpu"
) -> list[SharedSpace]:
    """Localize the nuclei on the mean of the sessions; return the box in their mid-space and the pose, per map.

    `weights` and `device` are those of `bids_dgmseg.segmentation.segment.localize`.
    """
    location = localize(aligned.mean, model, weights=weights, device=device)
    return [SharedSpace(matrix, Location(location.box, plane=location.plane)) for matrix in aligned.to_maps]


def segment_mean(
    aligned: AlignedSessions, model: Model, location: Location, *, weights: Path | None = None, device: str = "cpu"
) -> SegmentedMap:
    """Segment the mean of the sessions, in whose nuclei changes of volume are measured.

    `location` is that of `find_shared_spaces`; `weights` and `device` are those of `segment_map`.
    """
    shared = SharedSpace(np.eye(4), location)
    return segment_map(aligned.mean, model, weights=weights, device=device, shared=shared)


def _centre(to_maps: Sequence[Matrix]) -> list[Matrix]:
    """Move the mid-space so that the mean rotation and the mean translation to the maps are the identity."""
    rotations = Rotation.from_matrix([matrix[:3, :3] for matrix in to_maps])
    middle = np.eye(4)
    middle[:3, :3] = rotations.mean().as_matrix()
    middle[:3, 3] = np.mean([matrix[:3, 3] for matrix in to_maps], axis=0)
    return [matrix @ np.linalg.inv(middle) for matrix in to_maps]


def _average(maps: Sequence[Volume], to_maps: Sequence[Matrix], *, spacing_mm: float) -> Volume:
    """Average maps on a grid in the mid-space that contains the heads of all, as one may be cut.

    Where some are cut, the mean is of the others.
    """
    moved = [to_mid_space(chi, matrix) for chi, matrix in zip(maps, to_maps, strict=True)]
    head = Box.enclosing([valid_box(chi) for chi in moved])
    grid = world_grid(head.expanded(4 * spacing_mm), (spacing_mm,) * 3)
    images = np.stack([resample(chi, grid, antialias=True).array for chi in moved])
    shown = np.stack([share_covered(chi, grid) > 0.5 for chi in moved])
    shown |= ~shown.any(axis=0)
    return Volume(images.mean(axis=0, dtype=np.float32, where=shown), grid.affine)


def _correlate(maps: Sequence[Volume], to_maps: Sequence[Matrix]) -> list[float]:
    """Correlate each map with the mean of the others where all are valid."""
    moved = [to_mid_space(chi, matrix) for chi, matrix in zip(maps, to_maps, strict=True)]
    grid = world_grid(valid_box(moved[0]), (_SPACING_MM,) * 3)
    images = np.stack([resample(chi, grid, antialias=True).array for chi in moved])
    shares = [resample(chi.with_array(is_valid(chi.array).astype(np.float32)), grid, antialias=True) for chi in moved]
    inside = np.min([share.array for share in shares], axis=0) > 0.9
    if not inside.any():
        return [0.0] * len(maps)
    values = np.clip(images[:, inside], -_RANGE_PPM, _RANGE_PPM).astype(np.float64)
    others = (values.sum(axis=0) - values) / (len(maps) - 1)
    return [float(np.corrcoef(value, other)[0, 1]) for value, other in zip(values, others, strict=True)]


def _check(correlations: Sequence[float], names: Sequence[str], least: float) -> None:
    """Raise `InputError` if the map that is least like the others is too unlike them."""
    name, correlation = min(zip(names, correlations, strict=True), key=lambda pair: pair[1])
    if correlation < least:
        raise InputError(
            f"{name}: cannot be aligned with the other sessions of the participant (correlation {correlation:.2f}); "
            "check that all sessions are of the same participant, or exclude it"
        )


def _align_with_first(first: Head, other: Head) -> Matrix:
    """Return the transform from the first map to another, from their centres of mass and coarse images."""
    to_map = np.eye(4)
    to_map[:3, 3] = other.middle_mm - first.middle_mm
    for spacing_mm in _COARSE_MM:
        to_map = optimize_by_correlation(first, other, to_map, spacing_mm)
    return to_map
