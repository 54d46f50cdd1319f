"""What a map shows: the measured part of its image, and how far a region lies from where that ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

from bids_dgmseg.images.measured import find_outside


@dataclass(frozen=True)
class View:
    """The measured part of an image."""

    inside: NDArray[np.bool_]
    """Measured voxels and the small holes among them; shape (X, Y, Z)."""
    ends: NDArray[np.intp]
    """Voxels (N, 3) of it that touch what was not measured: a gap is the distance of centres to the nearest."""
    voxel_size_mm: tuple[float, float, float]

    @classmethod
    def of(cls, measured: NDArray[np.bool_], *, voxel_size_mm: tuple[float, float, float]) -> View:
        """Find the view of a map.

        Parameters
        ----------
        measured : ndarray of bool, shape (X, Y, Z)
            Voxels with a measurement, on the whole grid of the map.
        voxel_size_mm : tuple of 3 float
            Edge lengths of a voxel in mm.

        Returns
        -------
        View
            Beyond the image is outside, and so are holes that hold a cube of 3 voxels.
        """
        outside = find_outside(measured)
        # The gap between two boxes is the distance of their centres once one of them has grown by a layer.
        grown = ndimage.maximum_filter(outside, 3, mode="constant", cval=True)
        return cls(~outside, np.argwhere(grown & ~outside), voxel_size_mm)

    def cut(self, block: tuple[slice, slice, slice]) -> View:
        """Show a block of voxels only; it ends where the whole image does."""
        starts = [piece.start for piece in block]
        return View(self.inside[block], self.ends - starts, self.voxel_size_mm)

    def measure_gap(self, region: NDArray[np.bool_]) -> float:
        """Measure how far a region lies from where the measurement ends.

        Parameters
        ----------
        region : ndarray of bool, shape (X, Y, Z)
            On the grid of `inside`.

        Returns
        -------
        float
            Smallest gap in mm between a voxel of the region and a place outside, 0 where they touch, from surface to
            surface, so that thick slices do not make it larger. NaN for an empty region.

        Examples
        --------
        >>> shown = View.of(np.ones((9, 9, 9), bool), voxel_size_mm=(1.0, 1.0, 1.0))
        >>> region = np.zeros((9, 9, 9), bool)
        >>> region[4, 4, 2:7] = True
        >>> shown.measure_gap(region)
        2.0
        """
        if not region.any():
            return np.nan
        if (region & ~self.inside).any():
            return 0.0
        points = np.argwhere(region) * self.voxel_size_mm
        ends = self.ends * np.asarray(self.voxel_size_mm)
        # Only the ends within reach of the nearest one so far can be nearer; a tree of all of them is slow to ask.
        middle = points.mean(axis=0)
        reach = np.linalg.norm(points - middle, axis=1).max()
        away = np.linalg.norm(ends - middle, axis=1)
        nearest = np.linalg.norm(points - ends[away.argmin()], axis=1).min()
        gaps, _ = KDTree(points).query(ends[away <= nearest + reach + 1e-6])
        return float(gaps.min())
