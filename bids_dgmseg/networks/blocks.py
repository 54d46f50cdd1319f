"""What several of the papers' networks do to grids of odd size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def max_pool(x: Tensor, factor: int) -> Tensor:
    """Keep the largest of every ``factor`` values along each axis; a last, shorter group counts too.

    Parameters
    ----------
    x : Tensor of shape (B, C, X, Z) or (B, C, X, Y, Z)
        Any size.
    factor : int
        Width of a group.

    Returns
    -------
    Tensor
        Sizes divided by `factor`, rounded up, so that pooling by 2 twice is pooling by 4 for every size.
    """
    pool = functional.max_pool2d if x.ndim == 4 else functional.max_pool3d
    with torch.autocast(x.device.type, enabled=False):  # which would turn all of x to float32 first
        pooled: Tensor = pool(x, factor, ceil_mode=True)
    return pooled


def crop_like(x: Tensor, reference: Tensor) -> Tensor:
    """Cut the far ends of `x` off until its grid is the reference's.

    Parameters
    ----------
    x : Tensor of shape (B, C, ...)
        Enlarged from a grid that was rounded up, so at most a few values too long.
    reference : Tensor of shape (B, other C, ...)
        Not larger than `x` along any axis.
    """
    for axis in range(2, x.ndim):
        x = x.narrow(axis, 0, reference.shape[axis])
    return x
