"""Pooling and cropping for grids of any size, shared by the papers' networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def max_pool(x: Tensor, factor: int) -> Tensor:
    """Max-pool by ``factor``; an incomplete group at the end of an axis counts too.

    Parameters
    ----------
    x : Tensor of shape (B, C, X, Z) or (B, C, X, Y, Z)
        Any size.
    factor : int
        Kernel size and stride.

    Returns
    -------
    Tensor
        Sizes divided by `factor` and rounded up, so that pooling twice by 2 equals pooling by 4 for every size.
    """
    pool = functional.max_pool2d if x.ndim == 4 else functional.max_pool3d
    with torch.autocast(x.device.type, enabled=False):  # autocast would convert x to float32 first
        pooled: Tensor = pool(x, factor, ceil_mode=True)
    return pooled


def crop_like(x: Tensor, reference: Tensor) -> Tensor:
    """Crop the ends of `x` to the grid of a reference.

    Parameters
    ----------
    x : Tensor of shape (B, C, ...)
        Upsampled from a grid that was rounded up, so at most a few values too long.
    reference : Tensor of shape (B, other C, ...)
        Not larger than `x` along any axis.
    """
    for axis in range(2, x.ndim):
        x = x.narrow(axis, 0, reference.shape[axis])
    return x
