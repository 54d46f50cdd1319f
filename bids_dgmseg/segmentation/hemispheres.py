"""Split labels without a side at the midplane of the head, which is found from the symmetry of the map."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch.nn import functional

from bids_dgmseg.image.boxes import box_of_mask
from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.regions import valid_mask

_SPACINGS_MM = (6.0, 3.0)

_ANGLES_DEG = (-18.0, -9.0, 0.0, 9.0, 18.0)

_SHIFTS_MM = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)
"""Starting points of the search; they cover the tilts of heads and the asymmetries of masks that occur."""

_LARGEST_PPM = 0.15
"""Veins and streaks have larger values and are less symmetric than nuclei, so they are clipped."""

_MIN_OVERLAP = 0.5
"""Minimum fraction of voxels with a mirror image; planes near the edge of the head would correlate trivially."""


@dataclass(frozen=True)
class Midplane:
    """Plane between the hemispheres.

    Parameters
    ----------
    normal : ndarray of shape (3,)
        Unit vector towards the patient's right, RAS+.
    offset_mm : float
        ``normal @ point`` for every point of the plane.
    """

    normal: NDArray[np.float64]
    offset_mm: float

    def distance_mm(self, points_mm: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the distances of points (..., 3) from the plane: positive on the patient's right."""
        distance: NDArray[np.float64] = points_mm @ self.normal - self.offset_mm
        return distance


def find_midplane(chi: Volume) -> Midplane:
    """Find the plane about which a map is most symmetric.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain; the head is tilted by at most 18 degrees.

    Returns
    -------
    Midplane
        Maximizes the correlation of the map and its mirror image over voxels that are valid on both sides.
    """
    valid = valid_mask(chi)
    box, valid = box_of_mask(valid), valid.with_array(valid.array.astype(np.float32))
    start: NDArray[np.float64] = np.zeros(3)
    for spacing_mm in _SPACINGS_MM:
        grid = world_grid(box, (spacing_mm,) * 3)
        mirror = _Mirror(resample(chi, grid, antialias=True), resample(valid, grid, antialias=True))
        if spacing_mm == _SPACINGS_MM[0]:
            starts = [np.array([0, 0, mirror.middle_mm]) + at for at in product(_ANGLES_DEG, _ANGLES_DEG, _SHIFTS_MM)]
            start = min(starts, key=mirror.asymmetry)
        steps = np.vstack([start, start + np.diag([4.0, 4.0, spacing_mm / 2])])
        found = optimize.minimize(
            mirror.asymmetry,
            start,
            method="Nelder-Mead",
            options={"initial_simplex": steps, "xatol": 0.02, "fatol": 1e-5, "maxfev": 200},
        )
        start = found.x
    return _plane(start)


def _plane(parameters: NDArray[np.float64]) -> Midplane:
    """Return the plane of a yaw and roll in degrees and an offset in mm."""
    yaw, roll = np.deg2rad(parameters[:2])
    normal = np.array([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), np.sin(roll)])
    return Midplane(normal, float(parameters[2]))


class _Mirror:
    """Correlation of a map with its mirror images."""

    def __init__(self, chi: Volume, valid: Volume) -> None:
        clipped = np.clip(chi.array, -_LARGEST_PPM, _LARGEST_PPM)
        inside = valid.array > 0.5
        self._points = Grid(chi.shape, chi.affine).centres_mm()[inside]
        self._values = clipped[inside]
        self._images = torch.from_numpy(np.stack([valid.array, clipped]))[None]
        # grid_sample expects coordinates of -1 and 1 at the outermost voxel centres.
        to_index, scale = np.linalg.inv(chi.affine), 2 / np.maximum(np.array(chi.shape) - 1, 1)
        self._matrix, self._start = scale[:, None] * to_index[:3, :3], scale * to_index[:3, 3] - 1
        self.middle_mm = float(self._points[:, 0].mean())

    def asymmetry(self, parameters: NDArray[np.float64]) -> float:
        """Return 1 minus the correlation of the map and its mirror image."""
        plane = _plane(parameters)
        reflection = np.eye(3) - 2 * np.outer(plane.normal, plane.normal)
        start = self._start + self._matrix @ (2 * plane.offset_mm * plane.normal)
        mirrored = self._points @ (self._matrix @ reflection).T + start
        last_axis_first = torch.from_numpy(mirrored.astype(np.float32)).flip(1)[None, None, None]
        sampled = functional.grid_sample(self._images, last_axis_first, mode="bilinear", align_corners=True)
        valid, image = sampled[0, :, 0, 0].numpy()
        both = (valid > 0.5) & (np.abs(mirrored) <= 1).all(axis=1)
        if both.mean() < _MIN_OVERLAP:
            return 2.0
        return 1 - float(np.corrcoef(self._values[both], image[both])[0, 1])


def split_hemispheres(
    probabilities: NDArray[np.float32], grid: Grid, model: Model, plane: Midplane
) -> NDArray[np.float32]:
    """Split nuclei without a side into left and right at the midplane.

    Parameters
    ----------
    probabilities : ndarray of shape (1 + classes, X, Y, Z)
        Background, then ``model.classes``.
    grid : Grid
        Grid of the probabilities.
    model : Model
        ``labels`` are the channels of the result; classes that are labels already stay unchanged.
    plane : Midplane
        From `find_midplane`.

    Returns
    -------
    ndarray of shape (1 + labels, X, Y, Z)
        Background, then ``model.labels``.
    """
    right = plane.distance_mm(grid.centres_mm()) >= 0
    split = np.empty((1 + len(model.labels), *probabilities.shape[1:]), np.float32)
    split[0] = probabilities[0]
    channels = {name: channel for channel, name in enumerate(model.classes, 1)}
    for channel, structure in enumerate(model.structures, 1):
        if structure.abbreviation in channels:
            split[channel] = probabilities[channels[structure.abbreviation]]
        else:
            side = right if structure.hemisphere == "R" else ~right
            split[channel] = probabilities[channels[structure.nucleus]] * side
    return split
