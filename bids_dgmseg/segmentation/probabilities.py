"""Probabilities from logits: softmax per head, calibration, merging of heads, resampling to the map's grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.grids import Grid

_MIN_BACKGROUND = 1e-7
"""Below this, the background of a softmax in float32 is rounding error."""

_MIN_CALIBRATED = 0.01
"""Temperatures are fitted to doubtful voxels. Far from any nucleus they raise 0 to about a thousandth, which summed
over the voxels of a whole head exceeds the volume of a nucleus."""


def softmax_heads(logits: Tensor, groups: Sequence[Sequence[str]], *, temperatures: Sequence[float] = ()) -> Tensor:
    """Compute a softmax over the background and classes of each head.

    Parameters
    ----------
    logits : Tensor of shape (B, channels, ...)
        For each head a background, then its classes.
    groups : sequence of sequence of str
        Classes of each head, see `bids_dgmseg.models.registry.Model.groups`.
    temperatures : sequence of float
        One per channel, by which logits are divided first; probabilities below 0.01 are then assigned to the
        background. By default neither is done.
    """
    logits = apply_temperature(logits, temperatures)
    probabilities = logits.clone()
    for channels in _channels_of_heads(groups):
        head = logits[:, channels].softmax(dim=1)
        if temperatures:
            classes = functional.threshold(head[:, 1:], _MIN_CALIBRATED, 0.0, inplace=True)
            head[:, 0] = 1 - classes.sum(dim=1)
        probabilities[:, channels] = head
    return probabilities


def apply_temperature(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Divide logits (B, channels, ...) by one temperature per channel; without temperatures they stay unchanged."""
    if not temperatures:
        return logits
    return logits / torch.tensor(temperatures, device=logits.device).view(-1, *[1] * (logits.ndim - 2))


def merge_heads(probabilities: NDArray[np.float32], groups: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    r"""Merge the probabilities of independent heads into one distribution.

    Parameters
    ----------
    probabilities : ndarray of shape (channels, X, Y, Z)
        For each head a background, then its classes.
    groups : sequence of sequence of str
        Classes of each head.

    Returns
    -------
    ndarray of shape (1 + classes, X, Y, Z)
        Background, then the classes of all heads; sums to 1. The probabilities of a single head are returned unchanged.

    Notes
    -----
    Heads are independent classifiers that may contradict each other: two may be certain of different nuclei in the same
    voxel, and the plain product of their distributions would give combinations that do not exist. The merged
    distribution is that product conditioned on at most one head being right, because a voxel belongs to one nucleus or
    none. With class :math:`c` and background :math:`b` of head :math:`h`,

    .. math:: q_c = \frac{p_c / p_{b(h)}}{1 + \sum_{h'} \sum_{c' \in h'} p_{c'} / p_{b(h')}}, \qquad
       q_0 = 1 - \sum_c q_c.

    For heads with one class each, the most probable class is that of the most certain head, if its probability exceeds
    one half.
    """
    if len(groups) == 1:
        return probabilities
    # Odds against the head's own background; that of a certain head is 0 and would divide by zero.
    odds = [
        probabilities[channels][1:] / np.maximum(probabilities[channels][:1], np.float32(_MIN_BACKGROUND))
        for channels in _channels_of_heads(groups)
    ]
    merged = np.concatenate([np.ones_like(odds[0][:1]), *odds])
    merged /= merged.sum(axis=0)
    return merged


def mirrored_channels(groups: Sequence[Sequence[str]]) -> list[int]:
    """Return, for each channel of all heads, its counterpart in the mirror image: left and right are exchanged.

    >>> mirrored_channels([["DN_L", "DN_R"], ["RN"]])
    [0, 2, 1, 3, 4]
    """
    names = [name for head, group in enumerate(groups) for name in (f"background {head}", *group)]
    swap = {"_L": "_R", "_R": "_L"}
    return [
        names.index(name[:-2] + swap[name[-2:]]) if name[-2:] in swap else channel for channel, name in enumerate(names)
    ]


def _channels_of_heads(groups: Sequence[Sequence[str]]) -> Iterator[slice]:
    start = 0
    for group in groups:
        yield slice(start, start := start + 1 + len(group))


def resample_back(
    probabilities: NDArray[np.float32], grid: Grid, own: Grid, slices: tuple[slice, slice, slice]
) -> NDArray[np.float32]:
    """Resample probabilities from the network's grid to a block of the map's grid.

    Parameters
    ----------
    probabilities : ndarray of shape (C, X, Y, Z)
        Background first.
    grid, own : Grid
        Grids of the network and of the map.
    slices : tuple of 3 slice
        Block of the map's grid.

    Returns
    -------
    ndarray of shape (C, x, y, z)
        Interpolated linearly. In voxels larger than the network's, the mean over about as many points as they contain
        voxels of the network, so that sums of probabilities remain volumes. Background beyond the network's grid.
    """
    corner = np.eye(4)
    corner[:3, 3] = [part.start for part in slices]
    shape = tuple(part.stop - part.start for part in slices)
    to_source = np.linalg.inv(grid.affine) @ own.affine @ corner
    source = torch.from_numpy(probabilities)[None]
    total = torch.zeros(source.shape[1], *shape)
    widths = np.linalg.norm(to_source[:3, :3], axis=0)
    counts = np.maximum(np.round(widths).astype(int), 1)
    offsets = [(np.array(position) + 0.5) / counts - 0.5 for position in np.ndindex(*counts)]
    # grid_sample expects coordinates from -1 to 1 between the outer edges, last axis first; it returns 0 beyond.
    scale = 2 / np.array(source.shape[2:])
    matrix = (to_source[:3, :3].T * scale)[:, ::-1]
    for offset in offsets:
        start = ((to_source[:3, :3] @ offset + to_source[:3, 3] + 0.5) * scale - 1)[::-1]
        points = torch.tensor(start.copy())
        for width, step in zip(shape, matrix, strict=True):
            points = points.unsqueeze(-2) + torch.arange(width)[:, None] * torch.tensor(step.copy())
        total += functional.grid_sample(source, points[None].float(), mode="bilinear", align_corners=False)[0]
    total /= len(offsets)
    total[0] = 1 - total[1:].sum(dim=0)
    return total.numpy()
