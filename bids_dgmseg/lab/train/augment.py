"""Augmentation: where samples are read from a map, and how their values change.

There are two sets of transformations, since the papers' recipes and fine-tuning draw different numbers in a different
order: `Augmentation` (of a recipe: rotation, scale and shift of a window of voxels) and `Variation` (of fine-tuning:
shear, bending, intensities and mirroring as well, in mm about the localizer's box).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated

import msgspec
import numpy as np
import torch
from torch import Tensor

from bids_dgmseg.image.grids import Box
from bids_dgmseg.lab.simulate.anatomy import draw_head_points
from bids_dgmseg.lab.simulate.artefacts import blur
from bids_dgmseg.lab.simulate.ranges import HeadRanges, chance, smooth_noise, uniform
from bids_dgmseg.models.registry import Model, Positive
from bids_dgmseg.models.structures import exchange_side

Axis = Annotated[int, msgspec.Meta(ge=0, le=2)]

_SHIFT_MM = 6.0
"""Largest error of the localizer that fine-tuning prepares for."""


@dataclass(frozen=True)
class Augmentation:
    """Geometric augmentation of a recipe; the default is none."""

    axes: tuple[Axis, ...] = (0, 1, 2)
    """Axes along which samples are shifted and scaled; rotations are those within them."""
    shift: float = 0.0
    """Largest shift along each axis, in voxels."""
    rotation_deg: float = 0.0
    """Largest rotation about each axis."""
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Lowest and highest scale, drawn per axis."""

    @property
    def moves(self) -> bool:
        """Whether it does anything."""
        return bool(self.shift or self.rotation_deg or self.scale != (1.0, 1.0))

    def draw_points(
        self,
        start: tuple[int, int, int],
        size: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Rotate, scale and shift a window about its centre.

        `start` and `size` are its first voxel and number of voxels; rotations are those of the head, not of the array.
        Returns the fractional voxel indices (*size, 3) to read the map at.
        """
        angles, factors, shifts = torch.zeros(3), torch.ones(3), torch.zeros(3)
        for axis in self.axes:
            factors[axis] = uniform(generator, *self.scale)
            shifts[axis] = uniform(generator, -self.shift, self.shift)
        for axis in range(3):
            if {0, 1, 2} - {axis} <= set(self.axes):
                angles[axis] = np.deg2rad(uniform(generator, -self.rotation_deg, self.rotation_deg))
        centre = torch.tensor(start) + (torch.tensor(size) - 1) / 2
        grids = torch.meshgrid(
            *(torch.arange(first, first + n, dtype=torch.float32) for first, n in zip(start, size, strict=True)),
            indexing="ij",
        )
        spacing = torch.tensor(spacing_mm)
        # Reading closer to the centre makes things larger: hence the division.
        matrix = _rotation(angles) * (spacing / factors) / spacing[:, None]
        return (torch.stack(grids, dim=-1) - centre) @ matrix.T + centre - shifts


@dataclass(frozen=True)
class Variation:
    """Augmentation of fine-tuning; pairs are the lowest and highest value."""

    head: HeadRanges = field(
        default_factory=lambda: HeadRanges(
            scale=(0.9, 1.1),
            axis_scale=(0.95, 1.05),
            rotation_deg=(10.0, 8.0, 8.0),
            shear=0.06,
            shift_mm=(_SHIFT_MM, _SHIFT_MM, _SHIFT_MM),
            bends=((30.0, 3.0), (12.5, 1.0)),
        )
    )
    gain: tuple[float, float] = (0.8, 1.25)
    """Log-uniform factor."""
    shift_ppm: float = 0.01
    """Largest shift of the zero."""
    slow_ppm: float = 0.01
    """Largest amplitude of a slowly varying field."""
    noise_ppm: tuple[float, float] = (0.001, 0.015)
    """Log-uniform SD of white noise."""
    blur_mm: float = 0.8
    """Largest SD of smoothing along each axis, in a third of the samples."""
    mirrored: float = 0.5
    """Fraction of the samples whose left and right are exchanged."""

    def draw_points(
        self,
        box: Box,
        shape: tuple[int, int, int],
        spacing_mm: float,
        size_mm: tuple[float, float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw the world coordinates (*shape, 3) in mm of a sample, which lies anywhere in a larger box."""
        x, y, z = (
            shift + max(size - seen, 0) / 2
            for shift, size, seen in zip(self.head.shift_mm, box.frame[0], size_mm, strict=True)
        )
        ranges = replace(self.head, shift_mm=(x, y, z))
        points = draw_head_points(shape, spacing_mm, centre_mm=box.centre_mm, ranges=ranges, generator=generator)
        if box.oriented:  # the network sees boxes along their own axes
            centre_mm = torch.tensor(box.centre_mm, dtype=torch.float32)
            points = (points - centre_mm) @ torch.tensor(box.oriented.axes.T, dtype=torch.float32) + centre_mm
        return points

    def change_values(self, chi: Tensor, spacing_mm: float, generator: torch.Generator) -> Tensor:
        """Change values inside the brain as other scans and reconstructions would."""
        inside = chi != 0
        low, high = np.log(self.gain)
        changed = chi * float(np.exp(uniform(generator, low, high)))
        if chance(generator, 1 / 3):
            sigma = [uniform(generator, 0, self.blur_mm) / spacing_mm for _ in range(3)]
            changed = blur(changed, sigma)
        x, y, z = chi.shape
        slow = smooth_noise((x, y, z), 40 / spacing_mm, generator)[0]
        changed = changed + uniform(generator, 0, self.slow_ppm) * slow
        low, high = np.log(self.noise_ppm)
        changed += torch.randn(chi.shape, generator=generator) * float(np.exp(uniform(generator, low, high)))
        changed += uniform(generator, -self.shift_ppm, self.shift_ppm)
        return torch.where(inside, changed, chi)


def mirrored_labels(model: Model) -> Tensor:
    """Return a table of labels and auxiliary classes with left and right exchanged.

    A nucleus whose other side the model lacks becomes 0.
    """
    names = (*model.labels, *model.auxiliary)
    exchanged = map(exchange_side, names)
    return torch.tensor([0, *(names.index(name) + 1 if name in names else 0 for name in exchanged)], dtype=torch.uint8)


def _rotation(angles: Tensor) -> Tensor:
    """Return the matrix of rotations about x, then y, then z."""
    matrix = torch.eye(3)
    for axis, angle in enumerate(angles.tolist()):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix
