"""From probabilities to labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.models import Model
from bids_dgmseg.segment.predict import Block

SMALLEST_PART = 0.25
"""Connected parts smaller than this share of the largest are dropped; the interposed nucleus has two of like size."""


def clean(block: Block, model: Model) -> NDArray[np.uint8]:
    """Label each voxel with its most probable nucleus and drop stray parts.

    Parameters
    ----------
    block : Block
        Probabilities, background first.
    model : Model
        Gives the channels' nuclei.

    Returns
    -------
    ndarray of shape (x, y, z)
        Numbers of structures.tsv, 0 for background.
    """
    numbers = np.array([0, *(structure.index for structure in model.structures)], np.uint8)
    dseg: NDArray[np.uint8] = numbers[block.probabilities.argmax(axis=0)]
    for number, place in zip(numbers[1:], _places(dseg, numbers[1:]), strict=True):
        if place is not None:
            part = dseg[place]
            part[_strays(part == number)] = 0
    return dseg


def label_grid(block: Block, model: Model, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Label a map's whole grid of that shape: `clean` inside the block, background elsewhere."""
    dseg = np.zeros(shape, np.uint8)
    dseg[block.slices] = clean(block, model)
    return dseg


def _places(dseg: NDArray[np.uint8], numbers: NDArray[np.uint8]) -> list[tuple[slice, ...] | None]:
    found = ndimage.find_objects(dseg, max_label=int(numbers.max(initial=1)))
    return [found[number - 1] for number in numbers]


def _strays(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Find the parts, connected over faces, edges or corners, that are too small beside the largest."""
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    strays: NDArray[np.bool_] = (sizes < SMALLEST_PART * sizes.max())[parts] & mask
    return strays
