"""How a grid is cut into what a network sees at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray


def cover(
    shape: Sequence[int], patch: Sequence[int], step: int = 0, slack: float = 0.0
) -> Iterator[tuple[slice, ...]]:
    """Cover a grid with patches.

    Parameters
    ----------
    shape, patch : sequence of int
        Voxels along each axis.
    step : int
        Voxels from one patch to the next, the last one shifted back to end with the grid; 0: as few as overlap by
        half or more.
    slack : float
        Part of the patch by which a window may be longer where one is then enough along an axis.
    """
    starts = []
    patch = [size if width < size <= (1 + slack) * width else width for size, width in zip(shape, patch, strict=True)]
    for size, width in zip(shape, patch, strict=True):
        room = max(size - width, 0)
        if step:
            starts.append([*range(0, room, step), room])
        else:
            count = int(np.ceil(room / (width / 2))) + 1
            starts.append(np.unique(np.linspace(0, room, count).round().astype(int)).tolist())
    for corner in product(*starts):
        yield tuple(slice(start, start + width) for start, width in zip(corner, patch, strict=True))


def middle_weight(shape: Sequence[int]) -> NDArray[np.float32]:
    """Gaussian with an SD of an eighth of the window: predictions near its edge have seen little."""
    profiles = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2) for size in shape]
    weight = np.einsum("i,j,k->ijk", *profiles).astype(np.float32)
    floored: NDArray[np.float32] = np.maximum(weight, np.float32(1e-4))
    return floored


def coronal_stacks(array: NDArray[np.float32], slices: int) -> NDArray[np.float32]:
    """Set each coronal slice among its neighbours; beyond the ends the last slice is repeated.

    Parameters
    ----------
    array : ndarray of shape (X, Y, Z)
        RAS+ axes.
    slices : int
        Odd; slices of a stack.

    Returns
    -------
    ndarray of shape (Y, slices, X, Z)
        The stack of slice y, from back to front.
    """
    half = slices // 2
    padded = np.pad(array, ((0, 0), (half, half), (0, 0)), mode="edge")
    stacks = np.lib.stride_tricks.sliding_window_view(padded, slices, axis=1)  # (X, Y, Z, slices)
    return np.ascontiguousarray(stacks.transpose(1, 3, 0, 2))
