"""Background field removal: the field of the sources inside the brain, out of that of all sources.

The functions take the total field (X, Y, Z) in any unit and the mask of the brain, outside of which values are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.field import FULL_TO, apply_kernel, conjugate_gradients, dipole_kernel, fast_size

FIRST_EROSION_MM = 2.0
"""Erosion of the mask of the first map; PDF cannot tell sources on either side of the border of the mask apart."""

_MARGIN_MM = 20.0
"""Space around the field for the sources of the background, and against aliasing."""


def remove_background(
    field: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float],
    weight: Tensor,
    erosion_mm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Remove the background field by `project_onto_dipoles`.

    Returns the local field, 0 outside the eroded mask, and the eroded mask: without its outermost layer of voxels, and
    without voxels less than `erosion_mm` from its border. `weight` is the reliability of the field (the inverse of its
    SD).
    """
    eroded = torch.from_numpy(ndimage.binary_erosion(mask.numpy()))  # beyond the image is outside the brain
    local = project_onto_dipoles(field, mask, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction, weight=weight)
    if erosion_mm is not None:
        padded = np.pad(mask.numpy(), 1)
        depth_mm = ndimage.distance_transform_edt(padded, sampling=voxel_size_mm)[1:-1, 1:-1, 1:-1]
        eroded = eroded & torch.from_numpy(depth_mm > erosion_mm)
    return torch.where(eroded, local, 0.0), eroded


def project_onto_dipoles(
    field: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    weight: Tensor | None = None,
) -> Tensor:
    r"""Remove the background field by projection onto dipole fields (PDF).

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
        Total field in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Brain.
    voxel_size_mm, b0_direction : sequence of 3 float
        Voxel size in mm, direction of B0 along the grid's axes.
    weight : Tensor of shape (X, Y, Z), optional
        Inverse SD of the field in any unit; by default 1.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Local field, 0 outside the mask; unreliable near its border.

    Notes
    -----
    The background is the field of the sources outside the mask M that explain the total field inside best,

    .. math:: f_b = D\chi_b, \qquad \chi_b = \arg\min_{\chi = 0 \text{ in } M} |W M (f - D\chi)|^2,

    since the fields of dipoles inside and outside are nearly orthogonal in M. Conjugate gradients at half resolution
    are the start of those at full resolution.

    References
    ----------
    Liu T, et al. A novel background field removal method for MRI using projection onto dipole fields (PDF). NMR Biomed
    24 (2011) 1129-1136. doi:10.1002/nbm.1670
    """
    steps = list(zip(field.shape, voxel_size_mm, strict=True))
    margin = [math.ceil(_MARGIN_MM / step) for _, step in steps]
    shape = [fast_size(size + 2 * width) for (size, _), width in zip(steps, margin, strict=True)]
    inner = tuple(slice(width, width + size) for (size, _), width in zip(steps, margin, strict=True))
    total, squared, outside = torch.zeros(shape), torch.zeros(shape), torch.ones(shape)
    total[inner] = torch.where(mask, field, 0.0)
    squared[inner] = mask * (torch.ones_like(field) if weight is None else weight) ** 2
    squared /= squared.max().clamp(min=1e-30)
    outside[inner] = (~mask).to(field.dtype)
    weights, sums, share = (
        functional.avg_pool3d(array[None, None], 2)[0, 0] for array in (squared, squared * total, outside)
    )
    beyond = (share > 0.5).to(field.dtype)
    coarse = conjugate_gradients(
        torch.where(weights > 0, sums / weights, 0.0),
        dipole_kernel(weights.shape, [2 * step for step in voxel_size_mm], b0_direction, full_to=FULL_TO),
        weight=(weights * (1 - beyond)).sqrt(),
        strength=0.0,
        iterations=80,
        support=beyond,
    )
    for axis in range(3):
        coarse = coarse.repeat_interleave(2, axis)
    kernel = dipole_kernel(shape, voxel_size_mm, b0_direction, full_to=FULL_TO)
    sources = conjugate_gradients(
        total, kernel, weight=squared.sqrt(), strength=0.0, iterations=10, support=outside, start=coarse
    )
    return torch.where(mask, field - apply_kernel(sources, kernel)[inner], 0.0)
