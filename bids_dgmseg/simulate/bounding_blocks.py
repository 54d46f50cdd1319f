"""Which part of a scan may show a body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Block = tuple[slice, slice, slice]


def find_blocks(reaches: Sequence[tuple[Tensor, Tensor]], sparse_mm: Tensor, step: int) -> list[Block]:
    """Find the block of the scan that may show each body, waiting for a GPU once.

    Parameters
    ----------
    reaches : sequence of (Tensor, Tensor)
        Centre (3,) of each body and how far it reaches along each axis (3,), in mm of the template.
    sparse_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of every `step`-th voxel of the scan.
    step : int
        In voxels.

    Returns
    -------
    list of tuple of 3 slice
        Empty slices where the scan does not show a body.
    """
    shown = []
    for centre_mm, reach_mm in reaches:
        near = ((sparse_mm - centre_mm).abs() < reach_mm).all(dim=-1)
        shown.append(torch.cat([near.any(dim=others[0]).any(dim=others[1]) for others in ((2, 1), (2, 0), (1, 0))]))
    if not shown:
        return []
    parts = torch.split(torch.stack(shown).cpu(), list(sparse_mm.shape[:3]), dim=1)
    return [_block_of([part[number].numpy() for part in parts], step) for number in range(len(shown))]


def _block_of(shown: Sequence[NDArray[np.bool_]], step: int) -> Block:
    """Make a block of which slices along each axis show something; an empty one where none does."""
    ends = []
    for along in shown:
        hits = along.nonzero()[0]
        if not len(hits):
            return (slice(0, 0),) * 3
        ends.append(slice(max(0, (int(hits[0]) - 1) * step), (int(hits[-1]) + 1) * step + 1))
    return ends[0], ends[1], ends[2]
