"""Sampling of a head by a scanner: voxel grid, point spread, ringing, and smoothing of the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bids_dgmseg.image.resample import sample_points


@dataclass(frozen=True)
class ScanGrid:
    """Voxel grid of a scan over an array of smaller isotropic voxels.

    Parameters
    ----------
    shape : tuple of 3 int
        Size of the fine array.
    steps : tuple of 3 float
        Voxel size of the scan in fine voxels, at least 1.
    offsets : tuple of 3 float
        Shift of the scan's centre in its own voxels, along the axes with a step above 1.
    rotation : Tensor of shape (3, 3), optional
        Axes of the scan as columns, on the device of the arrays; by default those of the array.
    """

    shape: tuple[int, int, int]
    steps: tuple[float, float, float]
    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: Tensor | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels of the scan, enough to cover the array without rotation."""
        x, y, z = (math.ceil(n / step - 1e-6) + (step > 1) for n, step in zip(self.shape, self.steps, strict=True))
        return x, y, z

    def average(self, fine: Tensor) -> Tensor:
        """Average the array (X, Y, Z) over each voxel of the scan; faces are replicated."""
        if self.rotation is not None:
            fine = sample_points(fine[None], self._rotated_indices(self.rotation), extend=True)[0]
        for axis, (size, step) in enumerate(zip(self.size, self.steps, strict=True)):
            if size != self.shape[axis] or step > 1:
                edges = torch.arange(self.shape[axis] + 1, device=fine.device) - 0.5
                edges[0], edges[-1] = -math.inf, math.inf
                low = (self._first_centre(axis) + (torch.arange(size, device=fine.device) - 0.5) * step)[:, None]
                overlap = (edges[1:].minimum(low + step) - edges[:-1].maximum(low)).clamp(min=0) / step
                fine = multiply_along(fine, overlap, axis)
        return fine

    def interpolate(self, scan: Tensor) -> Tensor:
        """Resample the scan to the array by linear interpolation, as real maps are resampled."""
        if self.rotation is None:
            for axis, (size, step) in enumerate(zip(self.size, self.steps, strict=True)):
                if step > 1:
                    index = (torch.arange(self.shape[axis], device=scan.device) - self._first_centre(axis)) / step
                    distance = index.clamp(0, size - 1)[:, None] - torch.arange(size, device=scan.device)
                    scan = multiply_along(scan, (1 - distance.abs()).clamp(min=0), axis)
            return scan
        indices = self._rotated_indices(self.rotation.T)
        for axis in range(3):
            indices[..., axis] = (indices[..., axis] - self._first_centre(axis)) / self.steps[axis]
        return sample_points(scan[None], indices, extend=True)[0]

    def _first_centre(self, axis: int) -> float:
        """Centre of the scan's first voxel in fine voxels."""
        middle = (self.shape[axis] - 1) / 2
        offset = self.offsets[axis] if self.steps[axis] > 1 else 0.0
        return middle + (offset - (self.size[axis] - 1) / 2) * self.steps[axis]

    def _rotated_indices(self, rotation: Tensor) -> Tensor:
        """Rotate the indices of the fine voxels about the centre."""
        middle = torch.tensor(self.shape, device=rotation.device).sub(1).div(2)
        axes = [torch.arange(n, device=rotation.device) - m for n, m in zip(self.shape, middle, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ rotation.T + middle


def multiply_along(array: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply the lines of an array along an axis by a matrix (new size, old size)."""
    product: Tensor = torch.tensordot(matrix, array, dims=([1], [axis]))
    return product.movedim(0, axis).contiguous()


def blur(chi: Tensor, sigma_voxels: Sequence[float]) -> Tensor:
    """Apply a Gaussian filter with an SD per axis; faces are replicated."""
    for axis, sigma in enumerate(sigma_voxels):
        size = chi.shape[axis]
        radius = min(math.ceil(3 * sigma), size - 1)
        if radius < 1 or sigma < 0.05:
            continue
        # On the CPU, since a GPU adds the repeated columns at a face in any order.
        offsets = torch.arange(-radius, radius + 1, device="cpu")
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
        columns = (torch.arange(size, device="cpu")[:, None] + offsets).clamp(0, size - 1)
        matrix = torch.zeros((size, size), device="cpu")
        matrix.scatter_add_(1, columns, (taps / taps.sum()).expand(size, -1))
        chi = multiply_along(chi, matrix.to(chi.device), axis)
    return chi


def truncate_frequencies(chi: Tensor, kept: Sequence[float]) -> Tensor:
    """Set frequencies above a fraction of the Nyquist frequency, given per axis, to 0 (Gibbs ringing)."""
    spectrum = torch.fft.rfftn(chi)
    for axis, (size, part) in enumerate(zip(chi.shape, kept, strict=True)):
        frequency = torch.fft.fftfreq(size, device=chi.device)[: spectrum.shape[axis]]
        shape = [1, 1, 1]
        shape[axis] = -1
        spectrum = spectrum * (frequency.abs() <= 0.5 * part).view(shape)
    truncated: Tensor = torch.fft.irfftn(spectrum, s=chi.shape)
    return truncated


def diffuse_anisotropically(chi: Tensor, *, edge_ppm: float, steps: int) -> Tensor:
    """Smooth differences between neighbours well below `edge_ppm` and preserve larger ones.

    References
    ----------
    Perona P, Malik J. Scale-space and edge detection using anisotropic diffusion. IEEE Trans Pattern Anal Mach Intell
    12 (1990) 629-639. doi:10.1109/34.56205
    """
    for _ in range(steps):
        change = torch.zeros_like(chi)
        for axis, size in enumerate(chi.shape):
            difference = chi.narrow(axis, 1, size - 1) - chi.narrow(axis, 0, size - 1)
            flow = difference / (1 + (difference / edge_ppm) ** 2)
            change.narrow(axis, 0, size - 1).add_(flow)
            change.narrow(axis, 1, size - 1).sub_(flow)
        chi = chi + change / 7  # stable: a weight of 1/7 for each of six neighbours and the voxel itself
    return chi
