"""How much too large or too small a network's nuclei are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RATE = 1.5
"""Of a shift to the logarithm of a volume: small enough for nuclei of which every voxel is doubtful."""
LARGEST_SHIFT, _LEAST_RATIO = 1.5, 0.7


def fit_shifts(
    maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]], *, n_iterations: int = 40
) -> Tensor:
    """Find what the logits of each nucleus lack for its median volume to be right.

    Parameters
    ----------
    maps : sequence of (Tensor, Tensor)
        Logits (n, classes) and true classes (n,) of the doubtful voxels of each map.
    nuclei : sequence of sequence of int
        Classes that share a shift: left and right.
    n_iterations : int
        In each all nuclei move, since they border on one another.

    Returns
    -------
    Tensor of shape (classes,)
        To be added to logits; 0 for the background, and no more than ±1.5: who lacks more is not found at all.
    """
    shifts = torch.zeros(maps[0][0].shape[1])
    for _ in range(n_iterations):
        for classes, error in zip(nuclei, volume_errors(maps, nuclei, shifts), strict=True):
            ratio = max(1 + error, _LEAST_RATIO)
            shifts[classes] = (shifts[classes] - _RATE * math.log(ratio)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    return shifts


def volume_errors(
    maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]], shifts: Tensor
) -> list[float]:
    """Measure by what part each nucleus is too large with shifted logits: the median of the maps that show it."""
    counts = torch.stack([
        torch.stack([(logits + shifts).argmax(dim=1).bincount(minlength=len(shifts)),
                     labels.bincount(minlength=len(shifts))])
        for logits, labels in maps
    ])  # fmt: skip
    errors = []
    for classes in nuclei:
        found, true = counts[:, :, classes].sum(dim=2).double().T
        ratios = (found / true)[true > 0]
        errors.append(float(ratios.quantile(0.5)) - 1 if len(ratios) else 0.0)
    return errors
