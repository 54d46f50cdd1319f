"""From the total field to susceptibility: the methods, dipole inversions, and background removal with a first map.

Inversions take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.masks import masked_gaussian
from bids_dgmseg.qsm.background import FIRST_EROSION_MM, remove_background
from bids_dgmseg.qsm.field import (
    GYROMAGNETIC_MHZ_PER_T,
    apply_kernel,
    dipole_kernel,
    fast_size,
    frequencies_per_mm,
    interpolation_factors,
    noise_beyond_dipoles,
    subtract_mean,
    zero_pad,
)
from bids_dgmseg.qsm.phase import TotalField

_STRENGTH = 0.24
"""λ per noise of the field in ppm and mm of voxel size, by correlation with COSMOS and contrasts of nuclei on a real
head, and on simulated heads."""

_MIN_NOISE_PPM = 1e-4
"""Noise-free fields would not be regularized at all."""

_RIDGE = 5e-4

_TIE = 0.02
"""Coupling of voxels of equal susceptibility in ADMM: about the mean of the squared kernel."""

_EDGE_SHARE = 0.3
"""Fraction of the differences of the magnitude that are edges [Liu 2012]."""

_EDGE_COST = 0.1
"""Cost of the gradient of the map at the edges of the magnitude; 1 elsewhere. Tissues that differ in susceptibility
often differ in magnitude, too, but not all edges of the magnitude are such borders."""

_MAP_EDGE_SHARE, _MAP_EDGE_COST = 0.05, 0.0
"""The same for edges of the map itself: they are the borders of strong sources."""

_TRUSTED, _ERROR_SIGMA_MM = 3.0, 1.0
"""Errors of the field above this multiple of their median are those of strong sources; SD of the Gaussian that
averages their squares."""

_OUTSIDE_SHARE = 0.5
"""Fraction of the field of the map that is assumed outside the mask. With all of it contrasts are a little more
accurate, but the correlation with the truth is lower on a real head and on a simulated one with strong background."""


def regularization_weight(*, noise_ppm: float, voxel_size_mm: Sequence[float]) -> float:
    """Return the default weight λ of the gradient of the map.

    `voxel_size_mm` is that of the acquisition, before interpolation.
    """
    return _STRENGTH * max(noise_ppm, _MIN_NOISE_PPM) * math.prod(voxel_size_mm) ** (1 / 3)


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
    penalty = 1.0 if voxel_size_mm is None else gradient_squared(field, voxel_size_mm)
    return apply_kernel(field, kernel / (kernel**2 + strength * penalty + ridge).clamp(min=1e-12))


def total_variation(
    field: Tensor,
    kernel: Tensor,
    *,
    strength: float,
    voxel_size_mm: Sequence[float],
    ridge: float = 0.0,
    iterations: int = 8,
    edges: Tensor | float = 1.0,
    weight: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Tensor:
    r"""Total-variation inversion by the alternating direction method of multipliers (ADMM) [1]_.

    .. math:: \min_\chi \tfrac12|W(D\chi - f)|^2 + \lambda|E\nabla\chi|_1 + \tfrac12\rho|\chi|^2

    yields piecewise constant maps; with few iterations they lie between this and `least_squares`.

    Parameters
    ----------
    field, kernel, voxel_size_mm
        See the module.
    strength, ridge : float
        λ and ρ; the gradient is per mm.
    iterations : int
        Iterations of ADMM.
    edges : Tensor of shape (3, X, Y, Z), optional
        E: cost of the gradient, from 0 where it is not penalized to 1.
    weight : Tensor of shape (X, Y, Z), optional
        W, with a maximum near 1; by default 1 everywhere. The weighted misfit has its own multiplier [2]_.
    uniform : Tensor of shape (X, Y, Z), bool, optional
        Voxels of equal susceptibility, such as fluid.

    References
    ----------
    .. [1] Bilgic B, et al. Magn Reson Med 72 (2014) 1444-1459. doi:10.1002/mrm.25029
    .. [2] Milovic C, et al. Magn Reson Med 80 (2018) 814-821. doi:10.1002/mrm.27073
    """
    coupling, tie = 100 * strength, 0.0 if uniform is None else _TIE
    inverse = 1 / (kernel**2 + coupling * gradient_squared(field, voxel_size_mm) + ridge + tie).clamp(min=1e-12)
    inverse[0, 0, 0] = 0.0
    limit = torch.as_tensor(edges, dtype=field.dtype, device=field.device) * (strength / coupling)
    data = torch.fft.rfftn(field) * kernel
    dual = torch.zeros((3, *field.shape), dtype=field.dtype, device=field.device)
    dual_field, dual_uniform = torch.zeros(()), torch.zeros(())
    chi: Tensor = torch.fft.irfftn(data * inverse, s=field.shape)
    for _ in range(iterations):
        gradient = forward_differences(chi, voxel_size_mm).add_(dual)
        dual = gradient.clamp(-limit, limit)
        if weight is not None:
            modelled = apply_kernel(chi, kernel) + dual_field
            fitted = (weight**2 * field + modelled) / (weight**2 + 1)
            dual_field = modelled - fitted
            data = torch.fft.rfftn(fitted - dual_field) * kernel
        pull = negative_divergence(gradient.sub_(dual, alpha=2), voxel_size_mm).mul_(coupling)
        del gradient
        if uniform is not None:
            shifted = chi + dual_uniform
            equal = torch.where(uniform, shifted[uniform].mean(), shifted)
            dual_uniform = shifted - equal
            pull = pull + tie * (equal - dual_uniform)
        chi = torch.fft.irfftn((data + torch.fft.rfftn(pull)) * inverse, s=field.shape)
    return chi


def invert(
    field: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    *,
    kernel: Tensor,
    strength: float,
    voxel_size_mm: Sequence[float],
) -> Tensor:
    r"""Invert a local field in ppm by two-level total variation, after STAR-QSM [1]_.

    Strong sources are found with a large weight, and all others in what they do not explain with a small one:

    .. math:: \chi = \chi_1 + \chi_2, \quad \chi_1 = \mathrm{TV}(f, 8\lambda), \quad
              \chi_2 = \mathrm{TV}(f - D\chi_1, \lambda).

    The cost of the gradient is a tenth at the edges of the magnitude. With a cost at the borders of nuclei, they lose
    contrast in proportion to their surface over their volume. For :math:`\chi_2` it is therefore 0 at the edges of
    :math:`\chi_1`, the largest 5 % of its differences in the mask, and then, in a second solution, at those of
    :math:`\chi` [2]_.

    Outside the mask the field is unknown. It is taken as 0 for :math:`\chi_1`, then as half of that of :math:`\chi`
    within the mask: 0 would be an error as large as the field itself, and all of it would be certain of the map.

    Where :math:`\chi` leaves errors of more than three times their median, as around haemorrhages [3]_, the field of
    the second solution is in part that of :math:`\chi`, too: it has the weight :math:`w^2`, where :math:`1/w` is the
    local root mean square of the errors over three medians.

    Parameters
    ----------
    field, kernel, voxel_size_mm
        See the module.
    mask, magnitude : Tensor of shape (X, Y, Z)
        Where the field is known; signal in any unit.
    strength : float
        Weight λ of the regularization, see `regularization_weight`.

    References
    ----------
    .. [1] Wei H, et al. Streaking artifact reduction for quantitative susceptibility mapping of sources with large
       dynamic range. NMR Biomed 28 (2015) 1294-1303. doi:10.1002/nbm.3383
    .. [2] Candès EJ, Wakin MB, Boyd SP. Enhancing sparsity by reweighted l1 minimization. J Fourier Anal Appl 14 (2008)
       877-905. doi:10.1007/s00041-008-9045-x
    .. [3] After Liu T, et al. Nonlinear formulation of the magnetic field to source relationship for robust
       quantitative susceptibility mapping. Magn Reson Med 69 (2013) 467-476. doi:10.1002/mrm.24272
    """
    options: dict[str, Any] = {"voxel_size_mm": voxel_size_mm, "ridge": _RIDGE}
    edges = torch.where(find_flat(magnitude, mask, voxel_size_mm=voxel_size_mm), 1.0, _EDGE_COST)
    strong = total_variation(field, kernel, strength=8 * strength, edges=edges, **options)
    explained, chi = apply_kernel(strong, kernel), strong
    for weighted in (False, True):
        model = apply_kernel(subtract_mean(chi, mask), kernel)
        expected = torch.where(mask, model, _OUTSIDE_SHARE * model)
        trust = mask * (_trust(field - model, mask, voxel_size_mm=voxel_size_mm) if weighted else 1.0)
        rest = trust * field + (1 - trust) * expected - explained
        flat = find_flat(chi, mask, voxel_size_mm=voxel_size_mm, edge_share=_MAP_EDGE_SHARE)
        costs = torch.where(flat, edges, _MAP_EDGE_COST)
        chi = strong + total_variation(rest, kernel, strength=strength, edges=costs, **options)
    return chi


def _trust(error: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float]) -> Tensor:
    """Compute the weight of a field (X, Y, Z), 0 to 1, from the errors that a map leaves in a mask; see `invert`."""
    sigmas = [_ERROR_SIGMA_MM / step for step in voxel_size_mm]
    sums, share = masked_gaussian(error.square().numpy(), mask.numpy(), sigmas)
    local = torch.from_numpy(np.sqrt(np.maximum(sums, 0) / np.maximum(share, 1e-6))).to(error)
    return (_TRUSTED * local[mask].median() / local.clamp(min=1e-12)).clamp(max=1).square()


def find_flat(
    image: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float], edge_share: float = _EDGE_SHARE
) -> Tensor:
    """Find where an image has no edge along each axis: shape (3, X, Y, Z), True outside the mask.

    Edges are the differences of neighbours that are among the largest in the mask: by default 30 %, for magnitudes.
    """
    sizes = forward_differences(image, voxel_size_mm).abs_()
    within = sizes[mask.expand(3, *mask.shape)].numpy()
    return (sizes <= float(np.percentile(within, 100 * (1 - edge_share)))) | ~mask


def forward_differences(chi: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Forward differences per mm, of shape (3, X, Y, Z)."""
    gradient = torch.empty((3, *chi.shape), dtype=chi.dtype, device=chi.device)
    for axis, (part, step, size) in enumerate(zip(gradient, voxel_size_mm, chi.shape, strict=True)):
        torch.sub(chi.narrow(axis, 1, size - 1), chi.narrow(axis, 0, size - 1), out=part.narrow(axis, 0, size - 1))
        torch.sub(chi.narrow(axis, 0, 1), chi.narrow(axis, size - 1, 1), out=part.narrow(axis, size - 1, 1))
        part.div_(step)
    return gradient


def negative_divergence(gradient: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Apply the adjoint of `forward_differences`."""
    total = torch.zeros_like(gradient[0])
    for axis, (part, step, size) in enumerate(zip(gradient, voxel_size_mm, total.shape, strict=True)):
        total.narrow(axis, 1, size - 1).add_(part.narrow(axis, 0, size - 1), alpha=1 / step)
        total.narrow(axis, 0, 1).add_(part.narrow(axis, size - 1, 1), alpha=1 / step)
        total.sub_(part, alpha=1 / step)
    return total


def gradient_squared(field: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Squared modulus of the forward difference per mm, in Fourier space."""
    frequencies = frequencies_per_mm(field.shape, voxel_size_mm, device=field.device)
    squared = torch.zeros((), device=field.device)
    for k, step in zip(frequencies, voxel_size_mm, strict=True):
        squared = squared + (2 - 2 * torch.cos(2 * math.pi * k * step)) / step**2
    return squared


PHASE_SIGNS = {"auto": None, "positive": 1, "negative": -1}
"""How the phase follows the field → sign; None if the map decides."""

_MARGIN_MM = 20.0
"""Zero padding around the brain, against aliasing between its opposite faces."""

_COARSE_MM = 1.5
"""Smaller voxels are joined in pairs for the first map: the background, which it serves to find, is smooth."""

_PASSES = 3
"""How often the background is removed; contrasts of nuclei gain less than 1 ppb from a fourth."""

FITS_NOISE = 0.8
"""A map that explains the field better than to this fraction of its noise contains noise."""

_CORRECTION, _MAX_CORRECTIONS = 1.5, 4
"""By which factor the weight is then increased, and how often."""


@dataclass(frozen=True)
class Acquisition:
    """Echo times in s (ascending), B0 in T, voxel size in mm and the direction of B0 along the axes of the grid."""

    echo_times_s: Sequence[float]
    b0_tesla: float
    voxel_size_mm: Sequence[float]
    b0_direction: Sequence[float] = (0, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Options of a reconstruction; ValueError if a name is unknown or a number out of range."""

    phase_sign: str = "auto"
    """Key of `PHASE_SIGNS`: phase increases or decreases with the field; ``auto`` lets `decide_sign` judge."""
    regularization: float | None = None
    """Weight λ; by default in proportion to the noise of the field, and increased if the map fits noise."""
    erosion_mm: float | None = None
    """Depth below the border of the mask from which the map has values; by default one voxel."""

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        if self.phase_sign not in PHASE_SIGNS:
            raise ValueError(f"phase_sign: {self.phase_sign!r}, expected one of {', '.join(PHASE_SIGNS)}")
        if self.regularization is not None and not 0 < self.regularization < math.inf:
            raise ValueError(f"regularization: {self.regularization}, expected a positive number")
        if self.erosion_mm is not None and not 0 <= self.erosion_mm < math.inf:
            raise ValueError(f"erosion_mm: {self.erosion_mm}, expected a depth in mm")


@dataclass(frozen=True, kw_only=True)
class LocalSources:
    """Local field and susceptibility, for either sign of the phase; arrays have shape (X, Y, Z)."""

    chi_ppm: NDArray[np.float32]
    """Susceptibility with mean 0 over the mask; 0 outside."""
    mask: NDArray[np.bool_]
    """Tissue, eroded by background removal."""
    local_field_ppm: NDArray[np.float32]
    """Field of the sources in the brain; 0 outside the mask."""
    noise_ppm: float
    """SD of the errors of the field."""
    thermal_noise_ppm: float | None
    """Part of the noise that is of the receiver; None with a single echo."""
    misfit_ppm: float
    """SD of the part of the local field that the map does not explain."""
    regularization: float
    """Weight λ that was used."""
    n_adjustments: int
    """How often λ was increased because the map fitted noise."""
    interpolation: tuple[float, float, float]
    """Factors by which the images were interpolated along each axis."""

    @property
    def misfit(self) -> float:
        """Misfit over noise; 1 if the noise is unknown."""
        return self.misfit_ppm / self.noise_ppm if self.noise_ppm else 1.0


def find_local_sources(
    total: TotalField,
    phase: Tensor,
    magnitude: Tensor,
    combined: NDArray[Any],
    *,
    acquisition: Acquisition,
    methods: Methods,
) -> LocalSources:
    """Remove the background field and invert the local one, in the box around the reliable voxels.

    Background removal takes part of the local field for background. The field of a first map is therefore subtracted
    before the background is removed a second time, and added to what remains.

    Parameters
    ----------
    total : TotalField
    phase : Tensor of shape (X, Y, Z)
        Of the first echo, in rad.
    magnitude : Tensor of shape (E, X, Y, Z)
        Of all echoes, in any unit.
    combined : ndarray of shape (X, Y, Z)
        Root of the sum of their squares.
    acquisition : Acquisition
    methods : Methods

    Raises
    ------
    ValueError
        If no voxel is far enough from the border of the mask.
    """
    size_mm = acquisition.voxel_size_mm
    interpolation = interpolation_factors(phase, magnitude[0])
    box = ndimage.find_objects(total.reliable.astype("uint8"))[0]  # nothing outside of it has any effect
    field, inside, signal = (torch.from_numpy(array)[box] for array in (total.field_ppm, total.reliable, combined))
    echoes = magnitude[(slice(None), *box)]
    times = torch.tensor(acquisition.echo_times_s).view(-1, 1, 1, 1)
    weight = (echoes * times).square().sum(dim=0).sqrt()  # proportional to the inverse SD of the field
    inverter = _Inverter(field.shape, acquisition, methods, interpolation)
    removal: dict[str, Any] = {
        "voxel_size_mm": size_mm,
        "b0_direction": acquisition.b0_direction,
        "weight": weight,
    }

    def measure_noise(local: Tensor, mask: Tensor) -> tuple[float, float | None]:
        spectral = noise_beyond_dipoles(
            local, mask, voxel_size_mm=size_mm, b0_direction=acquisition.b0_direction, interpolation=interpolation
        )
        if total.signal_noise is None:
            return spectral, None
        sd_rad_per_s = total.signal_noise / float(weight[mask].median())
        thermal = sd_rad_per_s / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * acquisition.b0_tesla)
        return max(spectral, thermal), thermal  # the residual does not show the errors that all echoes share

    inner = torch.zeros_like(field)  # field of the sources in the brain, as known so far
    for _ in range(_PASSES - 1):
        local, mask = remove_background(field - inner, inside, erosion_mm=FIRST_EROSION_MM, **removal)
        if not mask.any():
            break
        local = torch.where(mask, local + inner, 0.0)
        inner = inverter.first_field(local, mask, signal, noise_ppm=measure_noise(local, mask)[0])
    local, mask = remove_background(field - inner, inside, erosion_mm=methods.erosion_mm, **removal)
    if not mask.any():
        raise ValueError("no voxel is far enough from the border of the mask")
    local = torch.where(mask, local + inner, 0.0)
    noise_ppm, thermal_ppm = measure_noise(local, mask)
    chi, misfit_ppm, regularization, n_adjustments = inverter.invert_to_noise(local, noise_ppm, mask, signal)
    parts = (subtract_mean(chi, mask), mask, local)
    whole_chi, whole_mask, whole_local = (torch.zeros(combined.shape, dtype=part.dtype) for part in parts)
    for whole, part in zip((whole_chi, whole_mask, whole_local), parts, strict=True):
        whole[box] = part
    return LocalSources(
        chi_ppm=whole_chi.numpy(),
        mask=whole_mask.numpy(),
        local_field_ppm=whole_local.numpy(),
        noise_ppm=noise_ppm,
        thermal_noise_ppm=thermal_ppm,
        misfit_ppm=misfit_ppm,
        regularization=regularization,
        n_adjustments=n_adjustments,
        interpolation=interpolation,
    )


class _Inverter:
    """Inversions of fields of one shape, in a box that is padded against aliasing."""

    def __init__(
        self, shape: Sequence[int], acquisition: Acquisition, methods: Methods, interpolation: Sequence[float]
    ) -> None:
        self.acquisition, self.methods, self.interpolation = acquisition, methods, interpolation
        self.shape = padded_shape(shape, acquisition.voxel_size_mm)
        self.kernel = dipole_kernel(self.shape, acquisition.voxel_size_mm, acquisition.b0_direction)
        self.inner = tuple(slice(size) for size in shape)

    def invert_to_noise(
        self, local: Tensor, noise_ppm: float, mask: Tensor, magnitude: Tensor
    ) -> tuple[Tensor, float, float, int]:
        """Return the map, the SD of the field that it leaves, the weight, and how often it was increased."""
        arrays = [zero_pad(array, self.shape) for array in (local, mask, magnitude)]
        size_mm, fixed = self.acquisition.voxel_size_mm, self.methods.regularization
        acquired_mm = [step * factor for step, factor in zip(size_mm, self.interpolation, strict=True)]
        weight = fixed or regularization_weight(noise_ppm=noise_ppm, voxel_size_mm=acquired_mm)
        n_adjustments = 0
        while True:
            chi = invert(*arrays, kernel=self.kernel, strength=weight, voxel_size_mm=size_mm)
            error = (self.forward(chi) - local)[mask]
            largest = float(np.percentile(error.abs().numpy(), 99))  # a haemorrhage is not the error of the brain
            misfit_ppm = float(error[error.abs() <= largest].std())
            if fixed or misfit_ppm >= FITS_NOISE * noise_ppm or n_adjustments == _MAX_CORRECTIONS:
                break
            weight, n_adjustments = _CORRECTION * weight, n_adjustments + 1
        return chi[self.inner], misfit_ppm, weight, n_adjustments

    def forward(self, chi: Tensor) -> Tensor:
        """Return the field of a map on the padded grid, in the box."""
        return apply_kernel(chi, self.kernel)[self.inner]

    def first_field(self, local: Tensor, mask: Tensor, magnitude: Tensor, *, noise_ppm: float) -> Tensor:
        """Return the field of a first map of the sources in a mask."""
        size_mm, shape = list(self.acquisition.voxel_size_mm), local.shape
        joined = [2 if step < _COARSE_MM else 1 for step in size_mm]
        coarse_mm = [step * n for step, n in zip(size_mm, joined, strict=True)]
        whole = [math.ceil(size / n) * n for size, n in zip(shape, joined, strict=True)]

        def average(array: Tensor) -> Tensor:
            return functional.avg_pool3d(zero_pad(array, whole)[None, None], joined)[0, 0]

        share = average(mask.to(local.dtype))
        inside = share > 0.5
        field = torch.where(inside, average(local) / share.clamp(min=0.5), 0.0)
        padded = padded_shape(field.shape, coarse_mm)
        chi = invert(
            *(zero_pad(array, padded) for array in (field, inside, average(magnitude))),
            kernel=dipole_kernel(padded, coarse_mm, self.acquisition.b0_direction),
            # errors of neighbours are hardly independent: half the noise in voxels of twice the edge
            strength=regularization_weight(noise_ppm=noise_ppm, voxel_size_mm=size_mm),
            voxel_size_mm=coarse_mm,
        )[tuple(slice(size) for size in field.shape)]
        for axis, n in enumerate(joined):
            chi = chi.repeat_interleave(n, axis)
        chi = chi[self.inner]
        return self.forward(zero_pad(subtract_mean(chi, mask), self.shape))


def padded_shape(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[int]:
    """Return the shape (X, Y, Z) of the grid of an inversion."""
    sizes = zip(shape, voxel_size_mm, strict=True)
    return [fast_size(size + 2 * math.ceil(_MARGIN_MM / step)) for size, step in sizes]
