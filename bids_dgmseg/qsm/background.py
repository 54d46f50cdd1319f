"""Remove the field of sources outside the brain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, enlarge, fast_size


def v_sharp(
    field: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    radii_mm: Sequence[float] = (12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2),
    threshold: float = 0.05,
    periodic: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Remove the background field by spherical means whose radius shrinks towards the rim (V-SHARP).

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
        Field, in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        The brain; only values inside are used.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    radii_mm : sequence of float
        Radii of the spheres.
    threshold : float
        Frequencies that the largest sphere changes less than by this part are set to 0.
    periodic : bool
        Whether the grid repeats itself; else nothing lies beyond it.

    Returns
    -------
    local : Tensor of shape (X, Y, Z)
        Field of sources inside, 0 outside the eroded mask.
    eroded : Tensor of shape (X, Y, Z), bool
        Voxels whose smallest sphere lies inside the mask.

    Notes
    -----
    A field whose sources lie outside a sphere equals, at its centre, its mean over it. With :math:`S_r` the mean over
    a sphere of radius r, what is left is :math:`(1 - S_{r(x)}) f`, :math:`r(x)` the largest radius whose sphere
    about x fits into the mask. Dividing by :math:`1 - \hat S_R`, R the largest radius, recovers the field [1]_, [2]_.

    References
    ----------
    .. [1] Schweser F, et al. NeuroImage 54 (2011) 2789-2807. doi:10.1016/j.neuroimage.2010.10.070
    .. [2] Wu B, et al. Magn Reson Med 67 (2012) 137-147. doi:10.1002/mrm.23000
    """
    if periodic:
        return _v_sharp(field, mask, voxel_size_mm, sorted(radii_mm, reverse=True), threshold)
    # One margin is enough: the opposite side lies beyond it.
    sizes = zip(field.shape, voxel_size_mm, strict=True)
    shape = [fast_size(size + math.ceil(max(radii_mm) / step)) for size, step in sizes]
    padded = enlarge(field, shape), enlarge(mask, shape)
    local, eroded = _v_sharp(*padded, voxel_size_mm, sorted(radii_mm, reverse=True), threshold)
    inner = tuple(slice(size) for size in field.shape)
    return local[inner], eroded[inner]


def _v_sharp(
    field: Tensor, mask: Tensor, voxel_size_mm: Sequence[float], radii_mm: Sequence[float], threshold: float
) -> tuple[Tensor, Tensor]:
    shape = tuple(field.shape)
    field = torch.where(mask, field, 0.0)
    spectrum, mask_spectrum = torch.fft.rfftn(field), torch.fft.rfftn(mask.to(field.dtype))
    remainder, done = torch.zeros_like(field), torch.zeros_like(mask)
    for radius_mm in radii_mm:
        mean = ball_mean(shape, voxel_size_mm, radius_mm, device=field.device)
        fits = torch.fft.irfftn(mask_spectrum * mean, s=shape) > _ALL
        new = fits & ~done
        remainder = torch.where(new, field - torch.fft.irfftn(spectrum * mean, s=shape), remainder)
        done |= fits
    sharp = 1 - ball_mean(shape, voxel_size_mm, radii_mm[0], device=field.device)
    inverse = torch.where(sharp.abs() > threshold, 1 / sharp, 0.0)
    return torch.where(done, apply_kernel(remainder, inverse), 0.0), done


_ALL = 1 - 1e-5
"""Part of a ball inside the mask that counts as the whole: one voxel of the largest ball weighs more than the rest."""


def ball_mean(
    shape: Sequence[int], voxel_size_mm: Sequence[float], radius_mm: float, *, device: torch.device | None = None
) -> Tensor:
    """Compute the Fourier transform (X, Y, Z // 2 + 1) of averaging over a ball about each voxel.

    The radius is at least 1.01 of a voxel's shortest edge: a ball of one voxel would leave nothing.
    """
    radius_mm = max(radius_mm, 1.01 * min(voxel_size_mm))
    distances = [
        torch.fft.fftfreq(int(size), 1 / (size * step), device=device)
        for size, step in zip(shape, voxel_size_mm, strict=True)
    ]
    x, y, z = distances
    ball = (x.view(-1, 1, 1) ** 2 + y.view(1, -1, 1) ** 2 + z.view(1, 1, -1) ** 2 <= radius_mm**2).float()
    mean: Tensor = torch.fft.rfftn(ball / ball.sum()).real
    return mean
