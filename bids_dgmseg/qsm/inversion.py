"""Dipole inversion: from the local field to susceptibility.

All inversions take a field (X, Y, Z) on a periodic grid (pad it first) and the `dipole_kernel` of that grid, and return
susceptibility in the unit of the field. The kernel is 0 at frequency 0, so the mean is undetermined and returned as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, frequencies_per_mm, subtract_mean

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
    mask: Tensor | None = None,
    magnitude: Tensor | None = None,
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
        Where the field is known, for ``star``, ``medi`` and ``ilsqr``.
    magnitude, weight : Tensor of shape (X, Y, Z)
        Signal, for ``star`` and ``medi``; inverse SD of the field, for ``medi`` and ``ilsqr``; both in any unit.
    fluid : Tensor of shape (X, Y, Z), bool, optional
        Ventricles, for ``medi``.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Susceptibility in ppm.

    Raises
    ------
    ValueError
        If the method is unknown, or an argument that it needs is missing.
    """
    if method not in INVERSIONS:
        raise ValueError(f"inversion: {method!r}, expected one of {', '.join(INVERSIONS)}")
    if method == "ilsqr" and mask is not None and weight is not None:
        reliability = mask * (weight / weight[mask].mean()).clamp(max=2.0)
        return least_squares_without_streaks(field, kernel, voxel_size_mm=voxel_size_mm, weight=reliability)
    options: dict[str, Any] = {"strength": strength, "voxel_size_mm": voxel_size_mm}
    if method == "star" and strength is not None and mask is not None and magnitude is not None:
        flat = find_flat(magnitude, mask, voxel_size_mm=voxel_size_mm)
        edges = torch.where(flat, 1.0, _EDGE_COST)
        return two_level_variation(field, kernel, mask=mask, ridge=_RIDGE, edges=edges, **options)
    if method != "medi" or strength is None or mask is None or magnitude is None or weight is None:
        raise ValueError(f"inversion: {method} needs a strength, a mask, the magnitude or the weight")
    return morphology_enabled(field, kernel, mask=mask, magnitude=magnitude, weight=weight, fluid=fluid, **options)


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


def conjugate_gradients(
    field: Tensor,
    kernel: Tensor,
    *,
    weight: Tensor,
    strength: float,
    iterations: int,
    support: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    r"""Minimize :math:`|W(D\chi - f)|^2 + \lambda|\chi|^2` by conjugate gradients with early stopping.

    The weight W (X, Y, Z) is the reliability of the field: 0 outside the brain, about 1 inside. `strength` is λ; fewer
    iterations regularize more. χ is 0 where `support` is, and is sought from `start`, both (X, Y, Z).

    References
    ----------
    de Rochefort L, et al. Magn Reson Med 63 (2010) 194-206. doi:10.1002/mrm.22187
    """
    squared, inside = weight**2, 1.0 if support is None else support
    residual, chi = inside * apply_kernel(squared * field, kernel), torch.zeros_like(field)
    if start is not None:
        chi = inside * start
        residual = residual - inside * apply_kernel(squared * apply_kernel(chi, kernel), kernel) - strength * chi

    def normal(direction: Tensor) -> Tensor:
        return inside * apply_kernel(squared * apply_kernel(direction, kernel), kernel) + strength * direction

    return iterate_conjugate_gradients(normal, chi, residual, iterations=iterations)


def iterate_conjugate_gradients(
    operator: Callable[[Tensor], Tensor], solution: Tensor, residual: Tensor, *, iterations: int
) -> Tensor:
    """Improve the solution (X, Y, Z) of a linear system by conjugate gradients.

    The operator is symmetric and positive semidefinite; `residual` is the right side less the operator applied to the
    solution.
    """
    direction, power = residual, residual.square().sum()
    for _ in range(iterations):
        image = operator(direction)
        step = power / (direction * image).sum().clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * image
        power, previous = residual.square().sum(), power
        direction = residual + power / previous.clamp(min=1e-30) * direction
    return solution


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
        weight=mask * (weight / weight[mask].mean()).clamp(max=2.0),
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
