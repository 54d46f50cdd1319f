"""The dipole field of magnetized tissue, and its inversion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dipole_kernel(
    shape: Sequence[int], voxel_size_mm: Sequence[float], b0_direction: Sequence[float] = (0, 0, 1)
) -> Tensor:
    r"""Compute the Fourier transform of the unit dipole's field.

    .. math:: D(k) = 1/3 - (k \cdot b)^2 / |k|^2, \qquad D(0) = 0.

    Parameters
    ----------
    shape : sequence of 3 int
        Grid (X, Y, Z).
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    b0_direction : sequence of 3 float
        Direction of the main field along the grid's axes; need not have length 1.

    Returns
    -------
    Tensor of shape (X, Y, Z // 2 + 1)
        For `torch.fft.rfftn`; without unit.

    References
    ----------
    Marques JP, Bowtell R. Concepts Magn Reson B 25 (2005) 65-78. doi:10.1002/cmr.b.20034
    """
    x, y, z = (int(size) for size in shape)
    step_x, step_y, step_z = voxel_size_mm
    axes = (torch.fft.fftfreq(x, step_x), torch.fft.fftfreq(y, step_y), torch.fft.rfftfreq(z, step_z))
    kx, ky, kz = torch.meshgrid(*axes, indexing="ij")
    direction = torch.tensor(b0_direction, dtype=torch.float32)
    bx, by, bz = (direction / direction.norm()).tolist()
    squared = kx**2 + ky**2 + kz**2
    squared[0, 0, 0] = 1.0
    kernel: Tensor = 1 / 3 - (kx * bx + ky * by + kz * bz) ** 2 / squared
    kernel[0, 0, 0] = 0.0
    return kernel
