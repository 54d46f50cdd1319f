"""From logits to one set of probabilities, whatever heads a network has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.grids import Grid

_LEAST = 1e-7
"""Float32 cannot tell a background of less from none."""

_LEAST_CALIBRATED = 0.01
"""Temperatures are fitted where there is a doubt. Far from it they turn none into a thousandth, which the voxels of a
whole head add up to more than a nucleus."""


def softmax_heads(logits: Tensor, groups: Sequence[Sequence[str]], *, temperatures: Sequence[float] = ()) -> Tensor:
    """Turn logits into probabilities, a softmax over each head's background and classes.

    Parameters
    ----------
    logits : Tensor of shape (B, channels, ...)
        For each head a background, then its classes.
    groups : sequence of sequence of str
        The classes of each head, as `bids_dgmseg.models.registry.Model.groups`.
    temperatures : sequence of float
        One a channel, by which the logits are divided before; what is then less than 0.01 goes to the background. None
        for neither.
    """
    logits = apply_temperature(logits, temperatures)
    probabilities = logits.clone()
    for part in _parts(groups):
        head = logits[:, part].softmax(dim=1)
        if temperatures:
            _drop_haze(head)
        probabilities[:, part] = head
    return probabilities


def _drop_haze(head: Tensor) -> None:
    """Give a head's background (channel 0) what its classes have where that is next to nothing."""
    classes = functional.threshold(head[:, 1:], _LEAST_CALIBRATED, 0.0, inplace=True)
    head[:, 0] = 1 - classes.sum(dim=1)


def apply_temperature(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Divide logits (B, channels, ...) by a temperature a channel; none leave them as they are."""
    if not temperatures:
        return logits
    return logits / torch.tensor(temperatures, device=logits.device).view(-1, *[1] * (logits.ndim - 2))


def merge_heads(probabilities: NDArray[np.float32], groups: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    r"""Join the probabilities of independent heads into one distribution.

    Parameters
    ----------
    probabilities : ndarray of shape (channels, X, Y, Z)
        For each head a background, then its classes.
    groups : sequence of sequence of str
        The classes of each head.

    Returns
    -------
    ndarray of shape (1 + classes, X, Y, Z)
        Background, then the classes of all heads; sums to 1. One head alone stays as it is.

    Notes
    -----
    Heads are taken for independent, on the condition that at most one of them is right: a voxel belongs to one
    nucleus or none. With class :math:`c` and background :math:`b` of a head :math:`h`, this is

    .. math:: q_c = \frac{p_c / p_{b(h)}}{1 + \sum_{h'} \sum_{c' \in h'} p_{c'} / p_{b(h')}}, \qquad
       q_0 = 1 - \sum_c q_c.

    For heads of one class each, the most probable class is the one whose head is surest, if that is above one half.
    """
    if len(groups) == 1:
        return probabilities
    odds = [
        probabilities[part][1:] / np.maximum(probabilities[part][:1], np.float32(_LEAST)) for part in _parts(groups)
    ]
    merged = np.concatenate([np.ones_like(odds[0][:1]), *odds])
    merged /= merged.sum(axis=0)
    return merged


def mirrored_channels(groups: Sequence[Sequence[str]]) -> list[int]:
    """Say, for each channel of all heads, which one it is in the mirror: left and right change places.

    >>> mirrored_channels([["DN_L", "DN_R"], ["RN"]])
    [0, 2, 1, 3, 4]
    """
    names = [name for head, group in enumerate(groups) for name in (f"background {head}", *group)]
    swap = {"_L": "_R", "_R": "_L"}
    return [
        names.index(name[:-2] + swap[name[-2:]]) if name[-2:] in swap else place for place, name in enumerate(names)
    ]


def _parts(groups: Sequence[Sequence[str]]) -> Iterator[slice]:
    start = 0
    for group in groups:
        yield slice(start, start := start + 1 + len(group))


def resample_back(
    probabilities: NDArray[np.float32], grid: Grid, own: Grid, slices: tuple[slice, slice, slice]
) -> NDArray[np.float32]:
    """Carry probabilities to a block of the map's grid, trilinear, averaged over voxels larger than the network's."""
    corner = np.eye(4)
    corner[:3, 3] = [piece.start for piece in slices]
    shape = tuple(piece.stop - piece.start for piece in slices)
    to_source = np.linalg.inv(grid.affine) @ own.affine @ corner
    source = torch.from_numpy(probabilities)[None]
    total = torch.zeros(source.shape[1], *shape)
    offsets = list(_offsets_inside_voxel(to_source))
    for offset in offsets:
        total += _sample(source, to_source, shape, offset)
    total /= len(offsets)
    total[0] = 1 - total[1:].sum(dim=0)  # beyond the network's grid all is background
    return total.numpy()


def _offsets_inside_voxel(to_source: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield points spread over a voxel, about one a voxel of the source."""
    widths = np.linalg.norm(to_source[:3, :3], axis=0)
    counts = np.maximum(np.round(widths).astype(int), 1)
    for position in np.ndindex(*counts):
        yield (np.array(position) + 0.5) / counts - 0.5


def _sample(source: Tensor, to_source: NDArray[np.float64], shape: tuple[int, ...], offset: NDArray[Any]) -> Tensor:
    """Sample all channels at the voxels of a block, moved by a part of a voxel; 0 outside the source."""
    size = np.array(source.shape[2:])
    # grid_sample wants coordinates from -1 to 1 over the outer edges, last axis first.
    scale = 2 / size
    matrix = (to_source[:3, :3].T * scale)[:, ::-1]
    start = ((to_source[:3, :3] @ offset + to_source[:3, 3] + 0.5) * scale - 1)[::-1]
    points = torch.tensor(start.copy())
    for width, step in zip(shape, matrix, strict=True):
        points = points.unsqueeze(-2) + torch.arange(width)[:, None] * torch.tensor(step.copy())
    sampled: Tensor = functional.grid_sample(source, points[None].float(), mode="bilinear", align_corners=False)
    return sampled[0]
