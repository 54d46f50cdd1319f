"""Whether probabilities are what they say: of the voxels given 80 %, four in five should be right."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def expected_calibration_error(probability: ArrayLike, truth: ArrayLike, *, n_bins: int = 15) -> float:
    """Compute the mean distance between a class's probability and its frequency.

    Parameters
    ----------
    probability : array_like
        Of the class, 0 to 1.
    truth : array_like of the same shape, bool
        Whether the voxel is of the class.
    n_bins : int
        Bins of equal width over 0 to 1.

    Returns
    -------
    float
        0 is perfect; each bin weighs as many voxels as it holds. NaN without voxels.

    Notes
    -----
    Guo et al. 2017, On calibration of modern neural networks, eq. 3, for one class against all others.
    """
    values = np.asarray(probability, float).ravel()
    if not values.size:
        return float("nan")
    bins: NDArray[np.intp] = np.minimum((values * n_bins).astype(np.intp), n_bins - 1)
    said = np.bincount(bins, weights=values, minlength=n_bins)
    found = np.bincount(bins, weights=np.asarray(truth, float).ravel(), minlength=n_bins)
    return float(np.abs(said - found).sum() / values.size)
