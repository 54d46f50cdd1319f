"""Smoothing of arrays (X, Y, Z), on the device where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def along(array: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply the lines of an array along an axis by a matrix (new size, old size)."""
    product: Tensor = torch.tensordot(matrix, array, dims=([1], [axis]))
    return product.movedim(0, axis).contiguous()


def blur(chi: Tensor, sigma_voxels: Sequence[float]) -> Tensor:
    """Gaussian blur by an SD along each axis, edges replicated."""
    for axis, sigma in enumerate(sigma_voxels):
        size = chi.shape[axis]
        radius = min(math.ceil(3 * sigma), size - 1)
        if radius < 1 or sigma < 0.05:
            continue
        # On the CPU, since a GPU adds up the repeated columns of an edge in any order.
        offsets = torch.arange(-radius, radius + 1, device="cpu")
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
        columns = (torch.arange(size, device="cpu")[:, None] + offsets).clamp(0, size - 1)
        matrix = torch.zeros((size, size), device="cpu")
        matrix.scatter_add_(1, columns, (taps / taps.sum()).expand(size, -1))
        chi = along(chi, matrix.to(chi.device), axis)
    return chi


def truncate_frequencies(chi: Tensor, kept: Sequence[float]) -> Tensor:
    """Keep, along each axis, this part of the frequencies, and set those beyond to 0 (Gibbs ringing)."""
    spectrum = torch.fft.rfftn(chi)
    for axis, (size, part) in enumerate(zip(chi.shape, kept, strict=True)):
        frequency = torch.fft.fftfreq(size, device=chi.device)[: spectrum.shape[axis]]
        shape = [1, 1, 1]
        shape[axis] = -1
        spectrum = spectrum * (frequency.abs() <= 0.5 * part).view(shape)
    truncated: Tensor = torch.fft.irfftn(spectrum, s=chi.shape)
    return truncated


def flatten(chi: Tensor, *, edge_ppm: float, steps: int) -> Tensor:
    """Smooth differences between neighbours that are small against `edge_ppm`, and keep the large ones.

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
        chi = chi + change / 7  # a weight of 1/7 for each of six neighbours and the voxel itself is stable
    return chi
