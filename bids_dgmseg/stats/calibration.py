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
    n_voxels = np.asarray(probability).size
    if not n_voxels:
        return float("nan")
    return float(np.abs(overestimate(probability, truth, n_bins=n_bins)).sum() / n_voxels)


def overestimate(probability: ArrayLike, truth: ArrayLike, *, n_bins: int = 15) -> NDArray[np.float64]:
    """Count in each bin by how many voxels a class's probabilities say too much; else as `expected_calibration_error`.

    Sums over several maps give the error of all their voxels, in which what each has by chance averages out.
    """
    values = np.asarray(probability, float).ravel()
    bins: NDArray[np.intp] = np.minimum((values * n_bins).astype(np.intp), n_bins - 1)
    excess = values - np.asarray(truth, float).ravel()
    total: NDArray[np.float64] = np.bincount(bins, weights=excess, minlength=n_bins).astype(np.float64)
    return total
