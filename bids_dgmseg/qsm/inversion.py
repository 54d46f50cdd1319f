"""From the total field to susceptibility: the methods, dipole inversions, and background removal with a first map.

Inversions take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    field_noise_sd,
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

    References
    ----------
    .. [1] Bilgic B, et al. Magn Reson Med 72 (2014) 1444-1459. doi:10.1002/mrm.25029
    .. [2] Milovic C, et al. Magn Reson Med 80 (2018) 814-821. doi:10.1002/mrm.27073
    """
    coupling = 100 * strength
    inverse = 1 / (kernel**2 + coupling * gradient_squared(field, voxel_size_mm) + ridge).clamp(min=1e-12)
    inverse[0, 0, 0] = 0.0
    limit = torch.as_tensor(edges, dtype=field.dtype, device=field.device) * (strength / coupling)
    data = torch.fft.rfftn(field) * kernel
    dual = torch.zeros((3, *field.shape), dtype=field.dtype, device=field.device)
    dual_field = torch.zeros(())
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
        chi = torch.fft.irfftn((data + torch.fft.rfftn(pull)) * inverse, s=field.shape)
    return chi


def invert(
    field: Tensor, mask: Tensor, magnitude: Tensor, *, kernel: Tensor, strength: float, voxel_size_mm: Sequence[float]
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

_COARSE_CHANGES_MM = 3.0
"""The same for first maps with other masks, of which only the change counts."""

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
    changes_ppm: NDArray[np.float32] | None
    """Changes (4, X, Y, Z) of the map, for either sign, with half and twice λ and with a mask smaller and larger by a
    layer of voxels; None with a single echo."""

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
    before the background is removed again, and added to what remains; there are three passes.

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
    b0_direction = acquisition.b0_direction
    removal: dict[str, Any] = {"voxel_size_mm": size_mm, "b0_direction": b0_direction, "weight": weight}

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
    chi, changes = subtract_mean(chi, mask), None
    if total.wider is not None:
        wider = [torch.from_numpy(array)[box] for array in total.wider]
        smaller = torch.from_numpy(ndimage.binary_erosion(inside.numpy()))
        parts, numbers = (chi, local, mask, inner), dict[str, Any](strength=regularization, noise_ppm=noise_ppm)
        changes = change_choices(inverter, *parts, [(field, smaller), (wider[0], wider[1])], signal, weight, **numbers)

    def on_whole_grid(part: Tensor) -> NDArray[Any]:
        whole = torch.zeros((*part.shape[:-3], *combined.shape), dtype=part.dtype)
        whole[..., *box] = part
        return whole.numpy()

    return LocalSources(
        chi_ppm=on_whole_grid(chi),
        mask=on_whole_grid(mask),
        local_field_ppm=on_whole_grid(local),
        changes_ppm=None if changes is None else on_whole_grid(changes),
        noise_ppm=noise_ppm,
        thermal_noise_ppm=thermal_ppm,
        misfit_ppm=misfit_ppm,
        regularization=regularization,
        n_adjustments=n_adjustments,
        interpolation=interpolation,
    )


def change_choices(
    inverter: _Inverter,
    chi: Tensor,
    local: Tensor,
    mask: Tensor,
    inner: Tensor,
    others: Sequence[tuple[Tensor, Tensor]],
    magnitude: Tensor,
    weight: Tensor,
    *,
    strength: float,
    noise_ppm: float,
) -> Tensor:
    """Compute how a map changes with half and twice λ, and with other masks of the brain.

    With another mask the background is removed twice more, starting from the field of the sources that are known; for
    this, voxels below 1.5 mm are joined in pairs.

    Parameters
    ----------
    inverter : _Inverter
    chi, local, mask, inner : Tensor of shape (X, Y, Z)
        Map, local field and mask of the reconstruction, and field of the sources before the background was removed.
    others : sequence of N tuples of Tensor
        Total fields, and masks of the brain in which they are reliable.
    magnitude, weight : Tensor of shape (X, Y, Z)
        Signal, and inverse SD of the field.
    strength, noise_ppm : float
        λ and the noise of the field.

    Returns
    -------
    Tensor of shape (2 + N, X, Y, Z)
        In ppm, 0 where either map has no value.
    """
    changes = [
        torch.where(mask, inverter.invert_with(factor * strength, local, mask, magnitude) - chi, 0.0)
        for factor in (0.5, 2.0)
    ]
    acquisition, shape = inverter.acquisition, chi.shape
    joined = _joined(acquisition.voxel_size_mm, _COARSE_MM)
    size_mm = [step * n for step, n in zip(acquisition.voxel_size_mm, joined, strict=True)]
    magnitude, weight, inner = (_join(array, joined) for array in (magnitude, weight, inner))
    local, mask = _join_within(local, mask, joined)
    if max(joined) > 1:
        inverter = _Inverter(inner.shape, replace(acquisition, voxel_size_mm=size_mm), Methods(), (1.0, 1.0, 1.0))
        chi = inverter.invert_with(strength, local, mask, magnitude)
    b0, coarse_mm = acquisition.b0_direction, _COARSE_CHANGES_MM
    removal: dict[str, Any] = {"voxel_size_mm": size_mm, "b0_direction": b0, "weight": weight}
    for whole, region in others:
        field, inside = _join_within(whole, region, joined)
        first, eroded = remove_background(field - inner, inside, erosion_mm=FIRST_EROSION_MM, **removal)
        first = torch.where(eroded, first + inner, 0.0)
        sources = inverter.first_field(first, eroded, magnitude, noise_ppm=noise_ppm, joined_below_mm=coarse_mm)
        last, eroded = remove_background(field - sources, inside, **removal)
        other = inverter.invert_with(strength, torch.where(eroded, last + sources, 0.0), eroded, magnitude)
        changes.append(_split(torch.where(eroded & mask, other - chi, 0.0), joined, shape))
    return torch.stack(changes)


def noise_of_mean(
    region: NDArray[np.bool_], r2star_per_s: float, *, steps: Mapping[str, Any], voxel_size_mm: Sequence[float]
) -> float:
    r"""Compute the SD in ppm of the mean of a map over a region that the noise of the field causes.

    Parameters
    ----------
    region : ndarray of bool, shape (X, Y, Z)
    r2star_per_s : float
        R2* of the region.
    steps : mapping
        Description of the reconstruction (`bids_dgmseg.qsm.reconstruct.describe_reconstruction`).
    voxel_size_mm : sequence of 3 float

    Notes
    -----
    Independent noise of SD :math:`\sigma`, with the decay of the region instead of that of the brain, is propagated
    through the linear inversion `least_squares` with the weight λ of the map:

    .. math:: \mathrm{SD}^2 = \sigma^2 \sum_x (G w)^2(x), \qquad \hat G = \frac{D}{D^2 + \lambda E^2 + \rho},

    where w is 1 over the number of voxels in the region, 0 outside.
    """
    shape, times_s = padded_shape(region.shape, voxel_size_mm), steps["EchoTime"]
    decays = torch.tensor([r2star_per_s, steps["R2starMedian"]], dtype=torch.float64)
    sds = field_noise_sd(decays, snr=1.0, echo_times_s=times_s, b0_tesla=steps["MagneticFieldStrength"])
    mean = zero_pad(torch.from_numpy(region / region.sum(dtype=np.float32)), shape)
    response = least_squares(
        mean,
        dipole_kernel(shape, voxel_size_mm, steps["B0Direction"]),
        strength=steps["RegularizationWeight"],
        voxel_size_mm=voxel_size_mm,
        ridge=_RIDGE,
    )
    # the noise of an interpolated image is in the acquired part of k-space only
    variance = (sds[0] / sds[1]).square() * math.prod(steps.get("Interpolation", ())) * response.square().sum()
    return float(steps["FieldNoise"] * variance.sqrt())


def _joined(voxel_size_mm: Sequence[float], below_mm: float) -> list[int]:
    """Return how many voxels are joined along each axis: pairs of those that are smaller."""
    return [2 if step < below_mm else 1 for step in voxel_size_mm]


def _join(array: Tensor, joined: Sequence[int]) -> Tensor:
    """Average blocks of voxels."""
    whole = [math.ceil(size / n) * n for size, n in zip(array.shape, joined, strict=True)]
    return functional.avg_pool3d(zero_pad(array, whole)[None, None], list(joined))[0, 0]


def _join_within(field: Tensor, mask: Tensor, joined: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average blocks of the voxels in a mask, and return where more than half of a block is inside."""
    share = _join(mask.to(field.dtype), joined)
    inside = share > 0.5
    return torch.where(inside, _join(torch.where(mask, field, 0.0), joined) / share.clamp(min=0.5), 0.0), inside


def _split(array: Tensor, joined: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Repeat averages over the voxels of their blocks."""
    for axis, n in enumerate(joined):
        array = array.repeat_interleave(n, axis)
    return array[tuple(slice(size) for size in shape)]


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

    def invert_with(self, strength: float, local: Tensor, mask: Tensor, magnitude: Tensor) -> Tensor:
        """Return the map of a weight λ."""
        arrays = [zero_pad(array, self.shape) for array in (local, mask, magnitude)]
        chi = invert(*arrays, kernel=self.kernel, strength=strength, voxel_size_mm=self.acquisition.voxel_size_mm)
        return subtract_mean(chi[self.inner], mask)

    def forward(self, chi: Tensor) -> Tensor:
        """Return the field of a map on the padded grid, in the box."""
        return apply_kernel(chi, self.kernel)[self.inner]

    def first_field(
        self, local: Tensor, mask: Tensor, magnitude: Tensor, *, noise_ppm: float, joined_below_mm: float = _COARSE_MM
    ) -> Tensor:
        """Return the field of a first map of the sources in a mask."""
        size_mm = self.acquisition.voxel_size_mm
        joined = _joined(size_mm, joined_below_mm)
        coarse_mm = [step * n for step, n in zip(size_mm, joined, strict=True)]
        field, inside = _join_within(local, mask, joined)
        padded = padded_shape(field.shape, coarse_mm)
        chi = invert(
            *(zero_pad(array, padded) for array in (field, inside, _join(magnitude, joined))),
            kernel=dipole_kernel(padded, coarse_mm, self.acquisition.b0_direction),
            # errors of neighbours are hardly independent: half the noise in voxels of twice the edge
            strength=regularization_weight(noise_ppm=noise_ppm, voxel_size_mm=size_mm),
            voxel_size_mm=coarse_mm,
        )[tuple(slice(size) for size in field.shape)]
        chi = _split(chi, joined, local.shape)
        return self.forward(zero_pad(subtract_mean(chi, mask), self.shape))


def padded_shape(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[int]:
    """Return the shape (X, Y, Z) of the grid of an inversion."""
    sizes = zip(shape, voxel_size_mm, strict=True)
    return [fast_size(size + 2 * math.ceil(_MARGIN_MM / step)) for size, step in sizes]
