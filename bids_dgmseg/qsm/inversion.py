"""Dipole inversion: from the local field to susceptibility.

All methods take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, frequencies_per_mm


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

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
    kernel : Tensor of shape (X, Y, Z // 2 + 1)
    weight : Tensor of shape (X, Y, Z)
        W, the reliability of the field: 0 outside the brain, about 1 inside.
    strength : float
        Regularization λ.
    iterations : int
        Number of iterations; fewer iterations regularize more.

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
