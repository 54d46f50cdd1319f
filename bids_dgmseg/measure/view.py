"""What a map shows: the measured part of its image, and how far a voxel lies from where that ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SMALLEST_GAP = 3
"""Voxels along each edge of the smallest hole that counts as an edge: a map that crosses 0 leaves single voxels."""


@dataclass(frozen=True)
class View:
    """The measured part of an image."""

    inside: NDArray[np.bool_]
    """Measured voxels and the small holes among them; shape (X, Y, Z)."""
    edge_mm: NDArray[np.float32]
    """Gap between a voxel and the nearest place outside, 0 where they touch; outside it is 0 too."""

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
            Beyond the image is outside, and so are holes that hold a cube of 3 voxels. A gap is measured from the
            voxel's surface to the surface of the voxel outside, so that thick slices do not make it larger.

        Examples
        --------
        >>> View.of(np.ones((9, 1, 1), bool), voxel_size_mm=(1.0, 1.0, 1.0)).edge_mm.max()
        np.float32(0.0)
        """
        margin = SMALLEST_GAP
        unmeasured = np.pad(~measured, margin, constant_values=True).view(np.uint8)
        deep = ndimage.minimum_filter(unmeasured, SMALLEST_GAP, mode="constant", cval=1)
        outside = ndimage.maximum_filter(deep, SMALLEST_GAP, mode="constant", cval=1).astype(bool)
        # The gap between two boxes is the distance of their centres once one of them has grown by a layer.
        grown = ndimage.maximum_filter(outside.view(np.uint8), 3, mode="constant", cval=1).astype(bool)
        distance_mm = ndimage.distance_transform_edt(~grown, sampling=voxel_size_mm)
        middle = (slice(margin, -margin),) * 3
        return cls(~outside[middle], distance_mm[middle].astype(np.float32))

    def cut(self, block: tuple[slice, slice, slice]) -> View:
        """Show a block of voxels only; distances stay those of the whole image."""
        return View(self.inside[block], self.edge_mm[block])
