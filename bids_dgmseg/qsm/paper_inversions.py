"""Dipole inversions with which the maps of papers were made, MEDI+0 and iLSQR, for a local field from `reconstruct`.

`bids_dgmseg.qsm.inversion.invert` is the program's own method, which is more accurate on heads with a known answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.qsm.field import apply_kernel, conjugate_gradients, iterate_conjugate_gradients
from bids_dgmseg.qsm.inversion import (
    find_flat,
    forward_differences,
    least_squares,
    negative_divergence,
    total_variation,
)

_CONE = 0.1
"""Size of the kernel below which its inverse is ill-conditioned [Li 2015]."""

_FLUID_R2STAR_HZ, _FLUID_RADIUS_MM = 5.0, 30.0
"""Fluid decays slower than any tissue; that of the ventricles is near the centre of the brain [Liu 2018]."""


def medi(
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

    The cost is that of `total_variation`, with the linear misfit, minimized in 30 iterations. The gradient is not
    penalized at the edges of the magnitude: the 30 % of the differences in the mask that are largest [1]_. The fluid
    has one susceptibility, which becomes 0 [2]_.

    Parameters
    ----------
    field, kernel, voxel_size_mm
        As in `bids_dgmseg.qsm.inversion`.
    strength : float
        λ; the gradient is per mm.
    mask, magnitude, weight : Tensor of shape (X, Y, Z)
        Where the field is known; signal; W, the inverse SD of the field with a maximum near 1.
    fluid : Tensor of shape (X, Y, Z), bool, optional
        See `find_ventricles`.

    References
    ----------
    .. [1] Liu J, et al. NeuroImage 59 (2012) 2560-2568. doi:10.1016/j.neuroimage.2011.08.082
    .. [2] Liu Z, et al. Magn Reson Med 79 (2018) 2795-2803. doi:10.1002/mrm.26946
    """
    edges = find_flat(magnitude, mask, voxel_size_mm=voxel_size_mm).to(field.dtype)
    options: dict[str, Any] = {"strength": strength, "voxel_size_mm": voxel_size_mm, "iterations": 30, "edges": edges}
    chi = total_variation(field, kernel, weight=weight, uniform=fluid, **options)
    return chi if fluid is None else chi - chi[fluid].mean()


def find_ventricles(r2star: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float]) -> Tensor:
    """Find the fluid in the centre of the brain: R2* below 5 1/s within 30 mm of the centre of the mask (X, Y, Z).

    Single voxels and thin sheets are not fluid.
    """
    centre = ndimage.center_of_mass(mask.numpy())
    axes = np.ogrid[tuple(slice(size) for size in mask.shape)]
    parts = zip(axes, centre, voxel_size_mm, strict=True)
    near = np.asarray(sum(((index - middle) * step) ** 2 for index, middle, step in parts)) < _FLUID_RADIUS_MM**2
    return torch.from_numpy(ndimage.binary_opening(near & mask.numpy() & (r2star.numpy() < _FLUID_R2STAR_HZ)))


def ilsqr(field: Tensor, kernel: Tensor, *, voxel_size_mm: Sequence[float], weight: Tensor) -> Tensor:
    r"""Least squares from which streaks are subtracted, after iLSQR; arguments as in `medi`.

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
    sizes = forward_differences(smooth, voxel_size_mm).abs()
    low, high = np.percentile(sizes.numpy()[:, (weight > 0).numpy()], (60, 99.9))
    flat = ((high - sizes) / max(high - low, 1e-12)).clamp(0, 1) ** 2

    def project(chi: Tensor) -> Tensor:
        """Return the gradient of the cost, limited to the cone."""
        return apply_kernel(negative_divergence(flat * forward_differences(chi, voxel_size_mm), voxel_size_mm), cone)

    return first - iterate_conjugate_gradients(project, torch.zeros_like(field), project(first), iterations=30)
