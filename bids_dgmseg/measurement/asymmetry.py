"""How much the left side of a nucleus differs from the right."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from bids_dgmseg.measurement.columns import COMPARED


def asymmetry_index(left: ArrayLike, right: ArrayLike) -> NDArray[np.float64]:
    r"""Compare left with right.

    Parameters
    ----------
    left, right : array-like
        The same measure on both sides, in the same unit.

    Returns
    -------
    ndarray
        From -2 (nothing on the left) over 0 (equal) to 2 (nothing on the right), without unit. NaN where a side is
        missing or below 0, or both are 0: then the mean of the sides is no scale for their difference.

    Notes
    -----
    :math:`A = (L - R) / ((L + R) / 2)`. Left is the patient's left. The index of a susceptibility depends on the
    map's reference, which is a number added to both sides.

    Examples
    --------
    >>> asymmetry_index([110.0], [90.0])
    array([0.2])
    """
    first, second = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    middle = (first + second) / 2
    valid = (first >= 0) & (second >= 0) & (middle > 0)
    index: NDArray[np.float64] = np.divide(first - second, middle, out=np.full(middle.shape, np.nan), where=valid)
    return index


def measure_asymmetry(stats: pd.DataFrame) -> pd.DataFrame:
    """Compare the sides of each nucleus of one scan.

    Parameters
    ----------
    stats : DataFrame
        Rows and columns of `bids_dgmseg.measurement.nuclei.measure_regions`; columns that it lacks are left out.

    Returns
    -------
    DataFrame
        One row a nucleus, in the order of its first side: ``nucleus`` and the columns of `COMPARED`. NaN where a side
        was not measured.
    """
    nuclei = stats["abbreviation"].str.removesuffix("_L").str.removesuffix("_R")
    sides = {side: stats[stats["hemisphere"] == side].set_index(nuclei[stats["hemisphere"] == side]) for side in "LR"}
    table = pd.DataFrame({"nucleus": pd.unique(nuclei)})
    for measure, name in COMPARED.items():
        if measure in stats:
            left, right = (sides[side][measure].reindex(table["nucleus"]).to_numpy(np.float64) for side in "LR")
            table[name] = asymmetry_index(left, right)
    return table
