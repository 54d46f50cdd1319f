"""From the total field to susceptibility: background field removal and dipole inversion.

All inversions take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, fast_size, frequencies_per_mm, zero_pad

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


def truncated_division(field: Tensor, kernel: Tensor, *, threshold: float) -> Tensor:
    r"""Thresholded k-space division (TKD).

    .. math:: \hat\chi = \hat f / D \ \text{where}\ |D| > t, \qquad \hat f\,\mathrm{sign}(D) / t \ \text{elsewhere}.

    References
    ----------
    Shmueli K, et al. Magn Reson Med 62 (2009) 1510-1522. doi:10.1002/mrm.22135
    Wharton S, Schaefer A, Bowtell R. Magn Reson Med 63 (2010) 1292-1304. doi:10.1002/mrm.22334
    """
    return apply_kernel(field, torch.sign(kernel) / kernel.abs().clamp(min=threshold))


def least_squares(
    field: Tensor, kernel: Tensor, *, strength: float, voxel_size_mm: Sequence[float] | None = None, ridge: float = 0.0
) -> Tensor:
    r"""Closed-form L2-regularized inversion.

    .. math:: \hat\chi = \frac{D}{D^2 + \lambda E^2 + \rho} \hat f

    minimizes :math:`|D\chi - f|^2 + \lambda |E\chi|^2 + \rho |\chi|^2`, where E is 1 or, given `voxel_size_mm`, the
    gradient per mm, which alone does not suppress slow streaks; the ridge ρ does.

    References
    ----------
    Bilgic B, et al. Magn Reson Med 72 (2014) 1444-1459. doi:10.1002/mrm.25029
    """
    penalty = 1.0 if voxel_size_mm is None else _gradient_squared(field, voxel_size_mm)
    return apply_kernel(field, kernel / (kernel**2 + strength * penalty + ridge).clamp(min=1e-12))


def conjugate_gradients(field: Tensor, kernel: Tensor, *, weight: Tensor, strength: float, iterations: int) -> Tensor:
    r"""Minimize :math:`|W(D\chi - f)|^2 + \lambda|\chi|^2` by conjugate gradients with early stopping.

    The weight W (X, Y, Z) is the reliability of the field: 0 outside the brain, about 1 inside. `strength` is λ; fewer
    iterations regularize more.

    References
    ----------
    de Rochefort L, et al. Magn Reson Med 63 (2010) 194-206. doi:10.1002/mrm.22187
    """
    squared = weight**2
    residual = apply_kernel(squared * field, kernel)
    chi, direction = torch.zeros_like(field), residual
    power = residual.square().sum()
    for _ in range(iterations):
        image = apply_kernel(squared * apply_kernel(direction, kernel), kernel) + strength * direction
        step = power / (direction * image).sum().clamp(min=1e-30)
        chi = chi + step * direction
        residual = residual - step * image
        power, previous = residual.square().sum(), power
        direction = residual + power / previous.clamp(min=1e-30) * direction
    return chi


def total_variation(
    field: Tensor,
    kernel: Tensor,
    *,
    strength: float,
    voxel_size_mm: Sequence[float],
    ridge: float = 0.0,
    iterations: int = 8,
) -> Tensor:
    r"""Total-variation inversion by the alternating direction method of multipliers (ADMM).

    .. math:: \min_\chi \tfrac12|D\chi - f|^2 + \lambda|\nabla\chi|_1 + \tfrac12\rho|\chi|^2

    yields piecewise constant maps; with few iterations they lie between this and `least_squares`.

    References
    ----------
    Bilgic B, et al. Magn Reson Med 72 (2014) 1444-1459. doi:10.1002/mrm.25029
    """
    coupling = 100 * strength
    inverse = 1 / (kernel**2 + coupling * _gradient_squared(field, voxel_size_mm) + ridge).clamp(min=1e-12)
    inverse[0, 0, 0] = 0.0
    data = torch.fft.rfftn(field) * kernel
    dual = torch.zeros((3, *field.shape), dtype=field.dtype, device=field.device)
    chi: Tensor = torch.fft.irfftn(data * inverse, s=field.shape)
    for _ in range(iterations):
        differences = [(chi.roll(-1, axis) - chi) / step for axis, step in enumerate(voxel_size_mm)]
        gradient = torch.stack(differences) + dual
        dual = gradient.clamp(min=-strength / coupling, max=strength / coupling)
        parts = zip(gradient - 2 * dual, voxel_size_mm, strict=True)
        # The adjoint of the forward difference, whose sum over the axes is the negative divergence.
        pull = torch.stack([(part.roll(1, axis) - part) / step for axis, (part, step) in enumerate(parts)]).sum(dim=0)
        chi = torch.fft.irfftn((data + coupling * torch.fft.rfftn(pull)) * inverse, s=field.shape)
    return chi


def _gradient_squared(field: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Squared modulus of the forward difference per mm, in Fourier space."""
    frequencies = frequencies_per_mm(field.shape, voxel_size_mm, device=field.device)
    squared = torch.zeros((), device=field.device)
    for k, step in zip(frequencies, voxel_size_mm, strict=True):
        squared = squared + (2 - 2 * torch.cos(2 * math.pi * k * step)) / step**2
    return squared
