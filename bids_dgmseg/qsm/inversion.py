"""From the total field to susceptibility: the methods, dipole inversions, and background removal with a first map.

Inversions take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.background import BACKGROUNDS, FIRST_EROSION_MM, remove_background
from bids_dgmseg.qsm.field import (
    GYROMAGNETIC_MHZ_PER_T,
    apply_kernel,
    conjugate_gradients,
    dipole_kernel,
    fast_size,
    frequencies_per_mm,
    interpolation_factors,
    iterate_conjugate_gradients,
    noise_beyond_dipoles,
    subtract_mean,
    zero_pad,
)
from bids_dgmseg.qsm.phase import UNWRAPPINGS, TotalField

INVERSIONS = {
    "star": "two-level total variation with edges of the magnitude and of the map (STAR-like)",
    "medi": "morphology-enabled dipole inversion (MEDI)",
    "ilsqr": "least squares with streaks removed (iLSQR)",
}
"""Methods of `invert` and their parameters."""

_STRENGTHS = {"star": 0.23, "medi": 0.3}
"""λ per noise of the field in ppm and mm of voxel size, by correlation with COSMOS and contrasts of nuclei on a real
head, and on simulated heads."""

WEIGHTED = tuple(_STRENGTHS)
"""Methods with a weight λ."""

_MIN_NOISE_PPM = 1e-4
"""Noise-free fields would not be regularized at all."""

_RIDGE = 5e-4

_TIE = 0.02
"""Coupling of voxels of equal susceptibility in ADMM: about the mean of the squared kernel."""

_EDGE_SHARE = 0.3
"""Fraction of the differences of the magnitude that are edges [Liu 2012]."""

_EDGE_COST = 0.1
"""Cost of the gradient of the map at the edges of the magnitude, for ``star``; 1 elsewhere, 0 for ``medi``. Tissues
that differ in susceptibility often differ in magnitude, too, but not all edges of the magnitude are such borders."""

_MAP_EDGE_SHARE, _MAP_EDGE_COST = 0.05, 0.0
"""The same for edges of the map itself, for ``star``: they are the borders of strong sources."""

_OUTSIDE_SHARE = 0.5
"""Fraction of the field of the map that is assumed outside the mask. With all of it contrasts are a little more
accurate, but the correlation with the truth is lower on a real head and on a simulated one with strong background."""

_CONE = 0.1
"""Size of the kernel below which its inverse is ill-conditioned [Li 2015]."""


_FLUID_R2STAR_HZ, _FLUID_RADIUS_MM, _MIN_FLUID_MM3 = 5.0, 30.0, 100.0
"""Fluid decays slower than any tissue; that of the ventricles is near the centre of the brain [Liu 2018]."""

_MAX_FLUID_SHARE = 0.5
"""Largest fraction of the voxels near the centre; more is tissue whose decay the echoes do not show."""


def invert(
    field: Tensor,
    kernel: Tensor,
    *,
    method: str,
    strength: float | None,
    voxel_size_mm: Sequence[float],
    mask: Tensor,
    magnitude: Tensor,
    weight: Tensor | None = None,
    fluid: Tensor | None = None,
) -> Tensor:
    """Invert a local field in ppm with a method of `INVERSIONS`.

    Parameters
    ----------
    field, kernel, voxel_size_mm
        See the module.
    method : str
        Key of `INVERSIONS`.
    strength : float
        Weight λ of the regularization, see `regularization_weight`; None for methods without.
    mask : Tensor of shape (X, Y, Z), bool
        Where the field is known.
    magnitude, weight : Tensor of shape (X, Y, Z)
        Signal, for ``star`` and ``medi``; inverse SD of the field, for ``medi`` and ``ilsqr``; both in any unit.
    fluid : Tensor of shape (X, Y, Z), bool, optional
        Ventricles, for ``medi``.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Susceptibility in ppm.
    """
    options: dict[str, Any] = {"strength": strength, "voxel_size_mm": voxel_size_mm, "mask": mask}
    if method == "star":
        edges = torch.where(find_flat(magnitude, mask, voxel_size_mm=voxel_size_mm), 1.0, _EDGE_COST)
        return two_level_variation(field, kernel, ridge=_RIDGE, edges=edges, **options)
    reliability = mask if weight is None else mask * (weight / weight[mask].mean()).clamp(max=2.0)
    if method == "ilsqr":
        return least_squares_without_streaks(field, kernel, voxel_size_mm=voxel_size_mm, weight=reliability)
    return morphology_enabled(field, kernel, magnitude=magnitude, weight=reliability, fluid=fluid, **options)


def regularization_weight(method: str, *, noise_ppm: float, voxel_size_mm: Sequence[float]) -> float | None:
    """Return the default weight λ of the gradient of the map; None if the method has none.

    `voxel_size_mm` is that of the acquisition, before interpolation.
    """
    if method not in _STRENGTHS:
        return None
    return _STRENGTHS[method] * max(noise_ppm, _MIN_NOISE_PPM) * math.prod(voxel_size_mm) ** (1 / 3)


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
    inverse = 1 / (kernel**2 + coupling * _gradient_squared(field, voxel_size_mm) + ridge + tie).clamp(min=1e-12)
    inverse[0, 0, 0] = 0.0
    limit = torch.as_tensor(edges, dtype=field.dtype, device=field.device) * (strength / coupling)
    data = torch.fft.rfftn(field) * kernel
    dual = torch.zeros((3, *field.shape), dtype=field.dtype, device=field.device)
    dual_field, dual_uniform = torch.zeros_like(field), torch.zeros_like(field)
    chi: Tensor = torch.fft.irfftn(data * inverse, s=field.shape)
    for _ in range(iterations):
        gradient = _gradient(chi, voxel_size_mm).add_(dual)
        dual = gradient.clamp(-limit, limit)
        if weight is not None:
            modelled = apply_kernel(chi, kernel) + dual_field
            fitted = (weight**2 * field + modelled) / (weight**2 + 1)
            dual_field = modelled - fitted
            data = torch.fft.rfftn(fitted - dual_field) * kernel
        pull = _negative_divergence(gradient.sub_(dual, alpha=2), voxel_size_mm).mul_(coupling)
        del gradient
        if uniform is not None:
            shifted = chi + dual_uniform
            equal = torch.where(uniform, shifted[uniform].mean(), shifted)
            dual_uniform = shifted - equal
            pull = pull + tie * (equal - dual_uniform)
        chi = torch.fft.irfftn((data + torch.fft.rfftn(pull)) * inverse, s=field.shape)
    return chi


def two_level_variation(
    field: Tensor,
    kernel: Tensor,
    *,
    strength: float,
    voxel_size_mm: Sequence[float],
    mask: Tensor,
    ridge: float = 0.0,
    edges: Tensor | float = 1.0,
) -> Tensor:
    r"""Two-level total variation, after STAR-QSM [1]_.

    Strong sources are found with a large weight, and all others in what they do not explain with a small one:

    .. math:: \chi = \chi_1 + \chi_2, \quad \chi_1 = \mathrm{TV}(f, 8\lambda), \quad
              \chi_2 = \mathrm{TV}(f - D\chi_1, \lambda).

    The cost of the gradient is multiplied by `edges`, as in `total_variation`. With a cost at the borders of nuclei,
    they lose contrast in proportion to their surface over their volume. For :math:`\chi_2` it is therefore 0 at the
    edges of :math:`\chi_1`, the largest 5 % of its differences in the mask, and then, in a second solution, at those of
    :math:`\chi` [2]_.

    Outside the mask the field is unknown. It is taken as 0 for :math:`\chi_1`, then as half of that of :math:`\chi`
    within the mask: 0 would be an error as large as the field itself, and all of it would be certain of the map.

    References
    ----------
    .. [1] Wei H, et al. Streaking artifact reduction for quantitative susceptibility mapping of sources with large
       dynamic range. NMR Biomed 28 (2015) 1294-1303. doi:10.1002/nbm.3383
    .. [2] Candès EJ, Wakin MB, Boyd SP. Enhancing sparsity by reweighted l1 minimization. J Fourier Anal Appl 14 (2008)
       877-905. doi:10.1007/s00041-008-9045-x
    """
    options: dict[str, Any] = {"voxel_size_mm": voxel_size_mm, "ridge": ridge}
    strong = total_variation(field, kernel, strength=8 * strength, edges=edges, **options)
    explained, chi = apply_kernel(strong, kernel), strong
    for _ in range(2):
        outside = _OUTSIDE_SHARE * apply_kernel(subtract_mean(chi, mask), kernel)
        rest = torch.where(mask, field, outside) - explained
        flat = find_flat(chi, mask, voxel_size_mm=voxel_size_mm, edge_share=_MAP_EDGE_SHARE)
        costs = torch.where(flat, edges, _MAP_EDGE_COST)
        chi = strong + total_variation(rest, kernel, strength=strength, edges=costs, **options)
    return chi


def morphology_enabled(
    field: Tensor,
    kernel: Tensor,
    *,
    strength: float,
    voxel_size_mm: Sequence[float],
    mask: Tensor,
    magnitude: Tensor,
    weight: Tensor,
    fluid: Tensor | None = None,
) -> Tensor:
    r"""Morphology-enabled dipole inversion (MEDI), with uniform fluid if given (MEDI+0).

    The gradient is not penalized at the edges of the magnitude: the 30 % of the differences in the mask that are
    largest [1]_. The fluid (X, Y, Z) of the ventricles has one susceptibility, which becomes 0 [2]_. The cost is that
    of `total_variation`, with the linear misfit, minimized in 30 iterations.

    References
    ----------
    .. [1] Liu J, et al. NeuroImage 59 (2012) 2560-2568. doi:10.1016/j.neuroimage.2011.08.082
    .. [2] Liu Z, et al. Magn Reson Med 79 (2018) 2795-2803. doi:10.1002/mrm.26946
    """
    chi = total_variation(
        field,
        kernel,
        strength=strength,
        voxel_size_mm=voxel_size_mm,
        iterations=30,
        edges=find_flat(magnitude, mask, voxel_size_mm=voxel_size_mm).to(field.dtype),
        weight=weight,
        uniform=fluid,
    )
    return chi if fluid is None else chi - chi[fluid].mean()


def find_flat(
    image: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float], edge_share: float = _EDGE_SHARE
) -> Tensor:
    """Find where an image has no edge along each axis: shape (3, X, Y, Z), True outside the mask.

    Edges are the differences of neighbours that are among the largest in the mask: by default 30 %, for magnitudes.
    """
    sizes = _gradient(image, voxel_size_mm).abs_()
    within = sizes[mask.expand(3, *mask.shape)].numpy()
    return (sizes <= float(np.percentile(within, 100 * (1 - edge_share)))) | ~mask


def find_ventricles(r2star: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float]) -> Tensor | None:
    """Find the fluid in the centre of the brain: R2* below 5 1/s within 30 mm of the mask's centre.

    None if it is too little, or so much that R2* cannot separate it from tissue. Arrays have shape (X, Y, Z).
    Single voxels and thin sheets are not fluid.

    References
    ----------
    Liu Z, et al. MEDI+0: Morphology enabled dipole inversion with automatic uniform cerebrospinal fluid zero reference.
    Magn Reson Med 79 (2018) 2795-2803. doi:10.1002/mrm.26946
    """
    centre = ndimage.center_of_mass(mask.numpy())
    axes = np.ogrid[tuple(slice(size) for size in mask.shape)]
    parts = zip(axes, centre, voxel_size_mm, strict=True)
    squared_mm2 = np.asarray(sum(((index - middle) * step) ** 2 for index, middle, step in parts))
    near = mask.numpy() & (squared_mm2 < _FLUID_RADIUS_MM**2)
    fluid = ndimage.binary_opening(near & (r2star.numpy() < _FLUID_R2STAR_HZ))
    too_little = fluid.sum() * math.prod(voxel_size_mm) < _MIN_FLUID_MM3
    too_much = fluid.sum() > _MAX_FLUID_SHARE * near.sum()
    return None if too_little or too_much else torch.from_numpy(fluid)


def least_squares_without_streaks(
    field: Tensor, kernel: Tensor, *, voxel_size_mm: Sequence[float], weight: Tensor
) -> Tensor:
    r"""Least squares from which streaks are subtracted, after iLSQR.

    Streaks :math:`\chi_s` contain only frequencies near the cone where the kernel is 0, |D| < 0.1, and explain the
    gradients of the weighted least-squares map :math:`\chi_0` where tissue has none (G = 0 at edges):

    .. math:: \chi = \chi_0 - \chi_s, \qquad \chi_s = \arg\min |G\nabla(\chi_0 - \chi_s)|^2.

    The edges are those of a smooth map: G falls from 1 at the 60th to 0 at the 99.9th percentile of its gradient.

    References
    ----------
    Li W, et al. A method for estimating and removing streaking artifacts in quantitative susceptibility mapping.
    NeuroImage 108 (2015) 111-122. doi:10.1016/j.neuroimage.2014.12.043
    """
    first = conjugate_gradients(field, kernel, weight=weight, strength=1e-3, iterations=20)
    smooth = least_squares(field, kernel, strength=0.01, voxel_size_mm=voxel_size_mm, ridge=0.01)
    cone = (kernel.abs() < _CONE).to(field.dtype)

    sizes = _gradient(smooth, voxel_size_mm).abs()
    low, high = np.percentile(sizes.numpy()[:, (weight > 0).numpy()], (60, 99.9))
    flat = ((high - sizes) / max(high - low, 1e-12)).clamp(0, 1) ** 2

    def project(chi: Tensor) -> Tensor:
        """Return the gradient of the cost, limited to the cone."""
        return apply_kernel(_negative_divergence(flat * _gradient(chi, voxel_size_mm), voxel_size_mm), cone)

    return first - iterate_conjugate_gradients(project, torch.zeros_like(field), project(first), iterations=30)


def _gradient(chi: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Forward differences per mm, of shape (3, X, Y, Z)."""
    return torch.stack([(chi.roll(-1, axis) - chi) / step for axis, step in enumerate(voxel_size_mm)])


def _negative_divergence(gradient: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
    """Apply the adjoint of `_gradient`."""
    parts = zip(gradient, voxel_size_mm, strict=True)
    return torch.stack([(part.roll(1, axis) - part) / step for axis, (part, step) in enumerate(parts)]).sum(dim=0)


def _gradient_squared(field: Tensor, voxel_size_mm: Sequence[float]) -> Tensor:
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
    """Methods of a reconstruction; ValueError if a name is unknown or a number out of range."""

    phase_sign: str = "auto"
    """Key of `PHASE_SIGNS`: phase increases or decreases with the field; ``auto`` lets `decide_sign` judge."""
    unwrapping: str = "region-growing"
    """Key of `bids_dgmseg.qsm.phase.UNWRAPPINGS`."""
    background: str = "auto"
    """Key of `bids_dgmseg.qsm.background.BACKGROUNDS`; ``auto`` is ``pdf`` for several echoes with a mask of the user,
    else ``vsharp``, which tolerates errors of the mask and of the phase better."""
    inversion: str = "star"
    """Key of `bids_dgmseg.qsm.inversion.INVERSIONS`."""
    regularization: float | None = None
    """Weight λ; by default in proportion to the noise of the field, and increased if the map fits noise."""
    erosion_mm: float | None = None
    """Depth below the border of the mask from which the map has values; by default that of the background removal."""

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        for name, choices in (
            ("phase_sign", PHASE_SIGNS),
            ("unwrapping", UNWRAPPINGS),
            ("background", {"auto": "", **BACKGROUNDS}),
            ("inversion", INVERSIONS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: {value!r}, expected one of {', '.join(choices)}")
        if self.regularization is not None and self.inversion not in WEIGHTED:
            raise ValueError(f"regularization: {self.inversion} has no weight; leave it out")
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
    regularization: float | None
    """Weight λ that was used; None if the inversion has none."""
    n_adjustments: int
    """How often λ was increased because the map fitted noise."""
    interpolation: tuple[float, float, float]
    """Factors by which the images were interpolated along each axis."""


def find_local_sources(
    total: TotalField,
    phase: Tensor,
    magnitude: Tensor,
    combined: NDArray[Any],
    r2star: Tensor | None,
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
    r2star : Tensor of shape (X, Y, Z), optional
        R2* in 1/s.
    acquisition : Acquisition
    methods : Methods

    Raises
    ------
    ValueError
        If no voxel is far enough from the border of the mask.
    """
    size_mm, n_echoes = acquisition.voxel_size_mm, len(acquisition.echo_times_s)
    interpolation = interpolation_factors(phase, magnitude[0])
    box = ndimage.find_objects(total.reliable.astype("uint8"))[0]  # nothing outside of it has any effect
    field, inside, signal = (torch.from_numpy(array)[box] for array in (total.field_ppm, total.reliable, combined))
    echoes = magnitude[(slice(None), *box)]
    times = torch.tensor(acquisition.echo_times_s).view(-1, 1, 1, 1)
    weight = (echoes * times).square().sum(dim=0).sqrt()  # proportional to the inverse SD of the field
    inverter = _Inverter(field.shape, acquisition, methods, interpolation)
    removal: dict[str, Any] = {
        "method": methods.background,
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

    first = torch.zeros_like(field)
    local, mask = remove_background(field, inside, erosion_mm=FIRST_EROSION_MM, **removal)
    if mask.any():
        first = inverter.first_field(local, mask, signal, noise_ppm=measure_noise(local, mask)[0])
    local, mask = remove_background(field - first, inside, erosion_mm=methods.erosion_mm, **removal)
    if not mask.any():
        raise ValueError("no voxel is far enough from the border of the mask")
    local = torch.where(mask, local + first, 0.0)
    noise_ppm, thermal_ppm = measure_noise(local, mask)
    fluid = None
    if methods.inversion == "medi" and r2star is not None and n_echoes > 2:
        fluid = find_ventricles(r2star[box], mask, voxel_size_mm=size_mm)
    prior = {"magnitude": signal, "weight": weight, "fluid": fluid}
    chi, misfit_ppm, regularization, n_adjustments = inverter.invert_to_noise(local, noise_ppm, mask, prior)
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
        self, local: Tensor, noise_ppm: float, mask: Tensor, prior: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, float, float | None, int]:
        """Return the map, the SD of the field that it leaves, the weight, and how often it was increased."""
        padded: dict[str, Any] = {
            key: array if array is None else zero_pad(array, self.shape) for key, array in prior.items()
        }
        field, inside = zero_pad(local, self.shape), zero_pad(mask, self.shape)
        size_mm = self.acquisition.voxel_size_mm
        acquired_mm = [step * factor for step, factor in zip(size_mm, self.interpolation, strict=True)]
        weight = regularization_weight(self.methods.inversion, noise_ppm=noise_ppm, voxel_size_mm=acquired_mm)
        if weight is not None and self.methods.regularization is not None:
            weight = self.methods.regularization
        n_adjustments = 0
        while True:
            chi = invert(
                field,
                self.kernel,
                method=self.methods.inversion,
                strength=weight,
                voxel_size_mm=size_mm,
                mask=inside,
                **padded,
            )
            misfit_ppm = float((self.forward(chi) - local)[mask].std())
            is_fixed = self.methods.regularization is not None
            if weight is None or is_fixed or misfit_ppm >= FITS_NOISE * noise_ppm or n_adjustments == _MAX_CORRECTIONS:
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
            zero_pad(field, padded),
            dipole_kernel(padded, coarse_mm, self.acquisition.b0_direction),
            method="star",
            # errors of neighbours are hardly independent: half the noise in voxels of twice the edge
            strength=regularization_weight("star", noise_ppm=noise_ppm, voxel_size_mm=size_mm),
            voxel_size_mm=coarse_mm,
            mask=zero_pad(inside, padded),
            magnitude=zero_pad(average(magnitude), padded),
        )[tuple(slice(size) for size in field.shape)]
        for axis, n in enumerate(joined):
            chi = chi.repeat_interleave(n, axis)
        chi = chi[self.inner]
        return self.forward(zero_pad(subtract_mean(chi, mask), self.shape))


def padded_shape(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[int]:
    """Return the shape (X, Y, Z) of the grid of an inversion."""
    sizes = zip(shape, voxel_size_mm, strict=True)
    return [fast_size(size + 2 * math.ceil(_MARGIN_MM / step)) for size, step in sizes]
