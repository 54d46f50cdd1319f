"""Bounding boxes in mm: the region of a map that a localizer passes to a predictor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bids_dgmseg.image.volume import Volume


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
        axes: NDArray[np.float64] = Rotation.from_rotvec(self.rotation_deg, degrees=True).as_matrix()
        return axes


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
    def centred(cls, centre_mm: NDArray[np.floating], size_mm: tuple[float, float, float]) -> Box:
        """Create a box of a given size around a point."""
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

    def expanded(self, margin_mm: float) -> Box:
        """Add a margin on every side.

        >>> Box((0, 0, 0), (1, 2, 3)).expanded(1).size_mm
        (3.0, 4.0, 5.0)
        """
        return _box(np.subtract(self.low_mm, margin_mm), np.add(self.high_mm, margin_mm))

    def shifted_to_cover(self, inner: Box) -> Box:
        """Shift the box as little as needed to cover another; centre it along axes where the other is larger.

        >>> Box((0, 0, 0), (10, 10, 10)).shifted_to_cover(Box((-2, 3, -5), (3, 12, 15))).low_mm
        (-2.0, 2.0, 0.0)
        """
        low, high = np.array(self.low_mm, float), np.array(self.high_mm, float)
        shift = np.minimum(np.subtract(inner.low_mm, low), 0) + np.maximum(np.subtract(inner.high_mm, high), 0)
        larger = np.greater(inner.size_mm, self.size_mm)
        shift[larger] = (np.subtract(inner.centre_mm, self.centre_mm))[larger]
        return _box(low + shift, high + shift)


def _box(low_mm: NDArray[np.floating], high_mm: NDArray[np.floating]) -> Box:
    (x0, y0, z0), (x1, y1, z1) = low_mm.tolist(), high_mm.tolist()
    return Box((x0, y0, z0), (x1, y1, z1))


def box_of_mask(mask: Volume) -> Box:
    """Enclose the voxels of a mask, outer edges included, on any oblique grid.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    found = [np.flatnonzero(mask.array.any(axis=across)) for across in ((1, 2), (0, 2), (0, 1))]
    if not len(found[0]):
        raise ValueError("the mask is empty")
    low, high = (np.array([indices[end] for indices in found]) for end in (0, -1))
    low, high = low - 0.5, high + 0.5
    corners = np.array(np.meshgrid(*np.stack([low, high], axis=1))).reshape(3, -1)
    world = mask.affine[:3, :3] @ corners + mask.affine[:3, 3:]
    return _box(world.min(axis=1), world.max(axis=1))
