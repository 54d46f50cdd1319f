"""Plane between the hemispheres: the plane about which a map is most symmetric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch.nn import functional

from bids_dgmseg.image.grids import Grid, box_of_mask, resample, world_grid
from bids_dgmseg.image.masks import is_valid
from bids_dgmseg.image.volume import Volume

MIN_BRAIN_MM3 = 200_000.0
"""A fifth of a small adult brain: less is not a head, even if the field of view is cut."""


@dataclass(frozen=True)
class Midplane:
    """Plane between the hemispheres."""

    normal: NDArray[np.float64]
    """Unit vector towards the patient's right, RAS+."""
    offset_mm: float
    """``normal @ point`` for every point of the plane."""

    @classmethod
    def from_angles(cls, parameters: NDArray[np.float64]) -> Midplane:
        """Return the plane of a yaw and roll in degrees and an offset in mm."""
        yaw, roll = np.deg2rad(parameters[:2])
        normal = np.array([np.cos(yaw) * np.cos(roll), np.sin(yaw) * np.cos(roll), np.sin(roll)])
        return cls(normal, float(parameters[2]))

    def distance_mm(self, points_mm: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the distances of points (..., 3) from the plane: positive on the patient's right."""
        return points_mm @ self.normal - self.offset_mm

    def is_right(self, grid: Grid) -> NDArray[np.bool_]:
        """Return whether each voxel (X, Y, Z) of a grid is on the patient's right."""
        return self.distance_mm(grid.centres_mm()) >= 0


_SPACINGS_MM = (6.0, 3.0)

_ANGLES_DEG = (-18.0, -9.0, 0.0, 9.0, 18.0)

_SHIFTS_MM = (-15.0, -10.0, -5.0, 0.0, 5.0, 10.0, 15.0)
"""Starting points of the search; they cover the tilts of heads and the asymmetries of masks that occur."""

_CLIPPED_PPM = 0.15
"""Veins and streaks have larger values and are less symmetric than nuclei."""

_MIN_OVERLAP = 0.5
"""Minimum fraction of voxels with a mirror image; planes near the edge of the head would correlate trivially."""


def find_midplane(chi: Volume, regions: Volume | None = None) -> Midplane:
    """Find the plane about which a map is most symmetric.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite, 0 outside the brain; the head is tilted by at most 18 degrees.
    regions : Volume, optional
        Labels of head regions, 0 outside the brain, if they are at least 200 ml. Without them, tissue or noise around
        the brain may mislead.

    Returns
    -------
    Midplane
        Maximizes the correlation of the map and its mirror image over voxels that are valid on both sides, times their
        share, plus the mean Dice of regions and their mirror images.
    """
    mask = is_valid(chi.array)
    box, valid = box_of_mask(chi.with_array(mask)), chi.with_array(mask.astype(np.float32))
    masks = list[Volume]()
    if regions is not None and np.count_nonzero(regions.array) * np.prod(regions.voxel_size_mm) > MIN_BRAIN_MM3:
        box = box_of_mask(regions.with_array(regions.array > 0))
        present = np.unique(regions.array)
        masks = [regions.with_array((regions.array == label).astype(np.float32)) for label in present if label]
    start: NDArray[np.float64] = np.zeros(3)
    for spacing_mm in _SPACINGS_MM:
        grid = world_grid(box, (spacing_mm,) * 3)
        shown, measured, *parts = (resample(image, grid, antialias=True) for image in (chi, valid, *masks))
        if parts:
            inside = np.sum([part.array for part in parts], axis=0)
            measured = measured.with_array(measured.array * inside)
        mirror = _Mirror(shown, measured, [part.array for part in parts])
        if spacing_mm == _SPACINGS_MM[0]:
            starts = [np.array([0, 0, mirror.middle_mm]) + at for at in product(_ANGLES_DEG, _ANGLES_DEG, _SHIFTS_MM)]
            start = min(starts, key=mirror.asymmetry)
        steps = np.vstack([start, start + np.diag([4.0, 4.0, spacing_mm / 2])])
        result = optimize.minimize(
            mirror.asymmetry,
            start,
            method="Nelder-Mead",
            options={"initial_simplex": steps, "xatol": 0.02, "fatol": 1e-5, "maxfev": 200},
        )
        start = result.x
    return Midplane.from_angles(start)


class _Mirror:
    """A map and masks of regions, compared with their mirror images."""

    def __init__(self, chi: Volume, valid: Volume, regions: Sequence[NDArray[np.float32]] = ()) -> None:
        clipped = np.clip(chi.array, -_CLIPPED_PPM, _CLIPPED_PPM)
        inside = valid.array > 0.5
        self._points = Grid(chi.shape, chi.affine).centres_mm()[inside]
        self._values = clipped[inside]
        self._regions = np.array([region[inside] for region in regions])
        self._images = torch.from_numpy(np.stack([valid.array, clipped, *regions]))[None]
        # grid_sample expects coordinates of -1 and 1 at the outermost voxel centres.
        to_index, scale = np.linalg.inv(chi.affine), 2 / np.maximum(np.array(chi.shape) - 1, 1)
        self._matrix, self._start = scale[:, None] * to_index[:3, :3], scale * to_index[:3, 3] - 1
        self.middle_mm = float(self._points[:, 0].mean())

    def asymmetry(self, parameters: NDArray[np.float64]) -> float:
        """Return 0 for a map and regions like their mirror images, up to 2 or more for others."""
        plane = Midplane.from_angles(parameters)
        reflection = np.eye(3) - 2 * np.outer(plane.normal, plane.normal)
        start = self._start + self._matrix @ (2 * plane.offset_mm * plane.normal)
        mirrored = self._points @ (self._matrix @ reflection).T + start
        last_axis_first = torch.from_numpy(mirrored.astype(np.float32)).flip(1)[None, None, None]
        sampled = functional.grid_sample(self._images, last_axis_first, mode="bilinear", align_corners=True)
        valid, image, *regions = sampled[0, :, 0, 0].numpy()
        both = (valid > 0.5) & np.logical_and.reduce((np.abs(mirrored) <= 1).T)
        share = float(both.mean())
        if share < _MIN_OVERLAP:
            return 3.0
        # With less overlap, planes beside the true one may correlate better by chance.
        asymmetry = 1 - share * float(np.corrcoef(self._values[both], image[both])[0, 1])
        if regions:
            common = 2 * (self._regions * regions).sum(axis=1)
            asymmetry += 1 - float((common / (np.square(self._regions) + np.square(regions)).sum(axis=1)).mean())
        return asymmetry
