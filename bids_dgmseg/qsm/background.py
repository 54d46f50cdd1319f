"""Background field removal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, fast_size, zero_pad

_INSIDE = 1 - 1e-5
"""Mask average above which a sphere counts as inside: one voxel of the largest sphere weighs more than the rest."""


def v_sharp(
    field: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    radii_mm: Sequence[float] = (12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2),
    threshold: float = 0.05,
    periodic: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Remove the background field by spherical mean values of variable radius (V-SHARP).

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
        Total field in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Brain; values outside are ignored.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    radii_mm : sequence of float
        Radii of the spheres.
    threshold : float
        Truncation of the deconvolution: frequencies with a smaller response of the largest sphere are set to 0.
    periodic : bool
        Treat the grid as periodic; by default it is padded with zeros.

    Returns
    -------
    local : Tensor of shape (X, Y, Z)
        Local field, 0 outside the eroded mask.
    eroded : Tensor of shape (X, Y, Z), bool
        Voxels whose smallest sphere lies inside the mask.

    Notes
    -----
    A field whose sources lie outside a sphere is harmonic in it, so its value at the centre equals its mean over the
    sphere. With :math:`S_r` the mean over a sphere of radius r, what remains is :math:`(1 - S_{r(x)}) f`, where
    :math:`r(x)` is the largest radius whose sphere about x fits into the mask. Deconvolution with
    :math:`1 - \hat S_R`, R the largest radius, recovers the local field [1]_, [2]_.

    References
    ----------
    .. [1] Schweser F, et al. NeuroImage 54 (2011) 2789-2807. doi:10.1016/j.neuroimage.2010.10.070
    .. [2] Wu B, et al. Magn Reson Med 67 (2012) 137-147. doi:10.1002/mrm.23000
    """
    radii_mm = sorted(radii_mm, reverse=True)
    shape, inner = list(field.shape), tuple(slice(size) for size in field.shape)
    if not periodic:  # a margin on one side is enough: the opposite side borders on it as well
        shape = [fast_size(n + math.ceil(radii_mm[0] / step)) for n, step in zip(shape, voxel_size_mm, strict=True)]
        field, mask = zero_pad(field, shape), zero_pad(mask, shape)
    field = torch.where(mask, field, 0.0)
    spectrum, mask_spectrum = torch.fft.rfftn(field), torch.fft.rfftn(mask.to(field.dtype))
    remainder, eroded = torch.zeros_like(field), torch.zeros_like(mask)
    for radius_mm in radii_mm:
        mean = spherical_mean_kernel(shape, voxel_size_mm, radius_mm, device=field.device)
        fits = torch.fft.irfftn(mask_spectrum * mean, s=shape) > _INSIDE
        remainder = torch.where(fits & ~eroded, field - torch.fft.irfftn(spectrum * mean, s=shape), remainder)
        eroded |= fits
    sharp = 1 - spherical_mean_kernel(shape, voxel_size_mm, radii_mm[0], device=field.device)
    inverse = torch.where(sharp.abs() > threshold, 1 / sharp, 0.0)
    return torch.where(eroded, apply_kernel(remainder, inverse), 0.0)[inner], eroded[inner]


def spherical_mean_kernel(
    shape: Sequence[int], voxel_size_mm: Sequence[float], radius_mm: float, *, device: torch.device | None = None
) -> Tensor:
    """Compute the Fourier transform (X, Y, Z // 2 + 1) of the mean over a sphere about each voxel.

    The radius is at least 1.01 times the shortest voxel edge: with a sphere of one voxel nothing would remain.
    """
    radius_mm = max(radius_mm, 1.01 * min(voxel_size_mm))
    x, y, z = (
        torch.fft.fftfreq(int(size), 1 / (size * step), device=device)
        for size, step in zip(shape, voxel_size_mm, strict=True)
    )
    ball = (x.view(-1, 1, 1) ** 2 + y.view(1, -1, 1) ** 2 + z.view(1, 1, -1) ** 2 <= radius_mm**2).float()
    mean: Tensor = torch.fft.rfftn(ball / ball.sum()).real
    return mean
