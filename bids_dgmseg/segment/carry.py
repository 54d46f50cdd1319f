"""From a network's grid back to the map's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.images.resample import Grid


def carry(
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
