"""The grid on which a scanner samples a head, and the way back from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bids_dgmseg.image.resample import sample_points
from bids_dgmseg.simulate.smoothing import along


@dataclass(frozen=True)
class ScanGrid:
    """Voxels of a scan, laid over an array of smaller isotropic ones.

    Parameters
    ----------
    shape : tuple of 3 int
        Size of the fine array.
    steps : tuple of 3 float
        Edges of the scan's voxels, in fine voxels; not below 1.
    offsets : tuple of 3 float
        Shift of the scan's centre, in its own voxels, along the axes on which these are larger than the array's.
    rotation : Tensor of shape (3, 3), optional
        The scan's axes as columns, on the device of the arrays; without it they are the array's.
    """

    shape: tuple[int, int, int]
    steps: tuple[float, float, float]
    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: Tensor | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels of the scan: enough to cover the array, were it not rotated."""
        x, y, z = (math.ceil(n / step - 1e-6) + (step > 1) for n, step in zip(self.shape, self.steps, strict=True))
        return x, y, z

    def average(self, fine: Tensor) -> Tensor:
        """Average the array (X, Y, Z) over each voxel of the scan; values go on beyond its faces."""
        if self.rotation is not None:
            fine = sample_points(fine[None], self._turned(self.rotation), extend=True)[0]
        for axis in range(3):
            if self.size[axis] != self.shape[axis] or self.steps[axis] > 1:
                fine = along(fine, self._overlap(axis, fine.device), axis)
        return fine

    def interpolate(self, scan: Tensor) -> Tensor:
        """Bring values of the scan back to the array by linear interpolation, as real maps are resampled."""
        if self.rotation is None:
            for axis in range(3):
                if self.steps[axis] > 1:
                    scan = along(scan, self._hat(axis, scan.device), axis)
            return scan
        points = self._turned(self.rotation.T)
        for axis in range(3):
            points[..., axis] = (points[..., axis] - self._first(axis)) / self.steps[axis]
        return sample_points(scan[None], points, extend=True)[0]

    def _first(self, axis: int) -> float:
        """Find the centre of the scan's first voxel, in fine voxels."""
        middle = (self.shape[axis] - 1) / 2
        offset = self.offsets[axis] if self.steps[axis] > 1 else 0.0
        return middle + (offset - (self.size[axis] - 1) / 2) * self.steps[axis]

    def _turned(self, rotation: Tensor) -> Tensor:
        """Rotate the indices of the voxel centres about the middle."""
        middle = torch.tensor(self.shape, device=rotation.device).sub(1).div(2)
        axes = [torch.arange(n, device=rotation.device) - m for n, m in zip(self.shape, middle, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ rotation.T + middle

    def _overlap(self, axis: int, device: torch.device) -> Tensor:
        """Compute the part of each scan voxel (rows) that lies in each fine voxel (columns)."""
        edges = torch.arange(self.shape[axis] + 1, device=device) - 0.5
        edges[0], edges[-1] = -math.inf, math.inf
        step = self.steps[axis]
        low = (self._first(axis) + (torch.arange(self.size[axis], device=device) - 0.5) * step)[:, None]
        return (edges[1:].minimum(low + step) - edges[:-1].maximum(low)).clamp(min=0) / step

    def _hat(self, axis: int, device: torch.device) -> Tensor:
        """Compute the weight of each scan voxel (columns) for each fine voxel (rows)."""
        place = (torch.arange(self.shape[axis], device=device) - self._first(axis)) / self.steps[axis]
        place = place.clamp(0, self.size[axis] - 1)
        return (1 - (place[:, None] - torch.arange(self.size[axis], device=device)).abs()).clamp(min=0)
