"""Where left meets right: the head's midplane, found from the map's own symmetry."""

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
"""Where the search begins: heads lie less oblique than the steps' ends, and masks are less uneven."""

_LARGEST_PPM = 0.15
"""Veins and streaks are brighter and less symmetric than nuclei."""

_LEAST_OVERLAP = 0.5
"""A plane near the head's edge mirrors next to nothing, and that well."""


@dataclass(frozen=True)
class Midplane:
    """The plane between the halves of the head.

    Parameters
    ----------
    normal : ndarray of shape (3,)
        Unit vector to the patient's right, RAS+.
    offset_mm : float
        ``normal @ point`` of the plane's points.
    """

    normal: NDArray[np.float64]
    offset_mm: float

    def distance_mm(self, points_mm: NDArray[np.floating]) -> NDArray[np.float64]:
        """Tell how far to the patient's right points (..., 3) lie; negative on the left."""
        distance: NDArray[np.float64] = points_mm @ self.normal - self.offset_mm
        return distance


def find_midplane(chi: Volume) -> Midplane:
    """Find the plane about which the map is most like its mirror image.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain; the head's right is not more than 18 degrees from the world's.

    Returns
    -------
    Midplane
        Where the correlation of the map with its mirror image, over voxels measured on both sides, is largest.
    """
    measured = valid_mask(chi)
    box = box_of_mask(measured)
    start: NDArray[np.float64] = np.zeros(3)
    for spacing_mm in _SPACINGS_MM:
        grid = world_grid(box, (spacing_mm,) * 3)
        mirror = _Mirror(resample(chi, grid, antialias=True), resample(_as_float(measured), grid, antialias=True))
        if spacing_mm == _SPACINGS_MM[0]:
            places = [np.array([0, 0, mirror.middle_mm]) + at for at in product(_ANGLES_DEG, _ANGLES_DEG, _SHIFTS_MM)]
            start = min(places, key=mirror.unlikeness)
        steps = np.vstack([start, start + np.diag([4.0, 4.0, spacing_mm / 2])])
        found = optimize.minimize(
            mirror.unlikeness,
            start,
            method="Nelder-Mead",
            options={"initial_simplex": steps, "xatol": 0.02, "fatol": 1e-5, "maxfev": 200},
        )
        start = found.x
    return _plane(start)


def _as_float(mask: Volume) -> Volume:
    return mask.with_array(mask.array.astype(np.float32))


def _plane(place: NDArray[np.float64]) -> Midplane:
    """Make a plane of yaw and roll in degrees and offset in mm."""
    yaw, roll = np.deg2rad(place[:2])
    normal = np.array([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), np.sin(roll)])
    return Midplane(normal, float(place[2]))


class _Mirror:
    """Compares a map with its mirror images."""

    def __init__(self, chi: Volume, measured: Volume) -> None:
        clipped = np.clip(chi.array, -_LARGEST_PPM, _LARGEST_PPM)
        inside = measured.array > 0.5
        self._points = Grid(chi.shape, chi.affine).centres_mm()[inside]
        self._values = clipped[inside]
        self._images = torch.from_numpy(np.stack([measured.array, clipped]))[None]
        # grid_sample wants -1 and 1 at the outermost centres.
        to_index, scale = np.linalg.inv(chi.affine), 2 / np.maximum(np.array(chi.shape) - 1, 1)
        self._matrix, self._start = scale[:, None] * to_index[:3, :3], scale * to_index[:3, 3] - 1
        self.middle_mm = float(self._points[:, 0].mean())

    def unlikeness(self, place: NDArray[np.float64]) -> float:
        """Tell how little the map is like its image in a plane: 1 minus their correlation."""
        plane = _plane(place)
        reflection = np.eye(3) - 2 * np.outer(plane.normal, plane.normal)
        start = self._start + self._matrix @ (2 * plane.offset_mm * plane.normal)
        mirrored = self._points @ (self._matrix @ reflection).T + start
        measured, image = self._sample(mirrored)
        both = (measured > 0.5) & (np.abs(mirrored) <= 1).all(axis=1)
        if both.mean() < _LEAST_OVERLAP:
            return 2.0
        return 1 - float(np.corrcoef(self._values[both], image[both])[0, 1])

    def _sample(self, places: NDArray[np.float64]) -> NDArray[np.float32]:
        """Interpolate what was measured, and the map, at places (n, 3) from -1 to 1."""
        last_axis_first = torch.from_numpy(places.astype(np.float32)).flip(1)[None, None, None]
        sampled: NDArray[np.float32] = functional.grid_sample(
            self._images, last_axis_first, mode="bilinear", align_corners=True
        )[0, :, 0, 0].numpy()
        return sampled


def split_hemispheres(
    probabilities: NDArray[np.float32], grid: Grid, model: Model, plane: Midplane
) -> NDArray[np.float32]:
    """Divide nuclei without a side at the midplane.

    Parameters
    ----------
    probabilities : ndarray of shape (1 + classes, X, Y, Z)
        Background, then ``model.classes``.
    grid : Grid
        Where its voxels lie.
    model : Model
        Gives the channels of the result, ``model.labels``; classes that are labels stay as they are.
    plane : Midplane
        Between left and right.

    Returns
    -------
    ndarray of shape (1 + labels, X, Y, Z)
        Background, then ``model.labels``.
    """
    right = plane.distance_mm(grid.centres_mm()) >= 0
    divided = np.empty((1 + len(model.labels), *probabilities.shape[1:]), np.float32)
    divided[0] = probabilities[0]
    channels = {name: channel for channel, name in enumerate(model.classes, 1)}
    for channel, structure in enumerate(model.structures, 1):
        if structure.abbreviation in channels:
            divided[channel] = probabilities[channels[structure.abbreviation]]
        else:
            there = right if structure.hemisphere == "R" else ~right
            divided[channel] = probabilities[channels[structure.nucleus]] * there
    return divided
