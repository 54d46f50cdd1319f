"""How far two segmentations agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.structures import Structure


def dice(
    reference: NDArray[np.integer], prediction: NDArray[np.integer], *, structures: Sequence[Structure]
) -> pd.DataFrame:
    r"""Compare two segmentations on one grid, nucleus by nucleus.

    Parameters
    ----------
    reference, prediction : ndarray of int, shape (X, Y, Z)
        Numbers of ``structures.tsv``; others are ignored.
    structures : sequence of Structure
        Nuclei to compare, one row each.

    Returns
    -------
    DataFrame
        ``index``, ``abbreviation``, ``n_reference``, ``n_prediction`` (voxels) and ``dice``, from 0 to 1, NaN where the
        nucleus is in neither.

    Raises
    ------
    ValueError
        If the shapes differ or an array is not of integers.

    Notes
    -----
    :math:`\text{dice} = 2\,|R \cap P| / (|R| + |P|)` [1]_.

    References
    ----------
    .. [1] Dice LR. Measures of the amount of ecologic association between species. Ecology 26 (1945) 297-302.
       doi:10.2307/1932409
    """
    if reference.shape != prediction.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, expected {reference.shape}")
    for name, array in (("reference", reference), ("prediction", prediction)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} holds {array.dtype}, expected integers")
    numbers = [structure.index for structure in structures]
    n_reference = _count(reference, numbers)
    n_prediction = _count(prediction, numbers)
    n_both = _count(reference[reference == prediction], numbers)
    total = n_reference + n_prediction
    return pd.DataFrame({
        "index": numbers,
        "abbreviation": [structure.abbreviation for structure in structures],
        "n_reference": n_reference,
        "n_prediction": n_prediction,
        "dice": np.divide(2 * n_both, total, out=np.full(len(numbers), np.nan), where=total > 0),
    })  # fmt: skip


def _count(labels: NDArray[np.integer], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Count the voxels of each number in one pass."""
    top = max(numbers, default=0)
    inside = labels[(labels > 0) & (labels <= top)]
    return np.bincount(inside.ravel(), minlength=top + 1)[list(numbers)].astype(np.int64)
