"""Outliers within a site, by robust z-scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import median_abs_deviation

from bids_dgmseg.stats.long_table import iter_groups, numeric_column

N_SITE = 5
"""Minimum number of values for a median and a spread."""


def robust_z(
    table: pd.DataFrame, *, value: str = "mean_ppm", by: tuple[str, ...] = ("abbreviation", "site"), limit: float = 3.5
) -> pd.DataFrame:
    r"""Compute robust z-scores of each value within its nucleus and site.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; the measure is numeric, NaN where missing.
    value : str
        Column of the measure.
    by : tuple of str
        Columns that define the groups; rows without a site form one site.
    limit : float
        Absolute robust z-score above which a value is an outlier.

    Returns
    -------
    DataFrame
        In the order and with the index of `table`: ``n_site`` values in the group, their ``median``, ``robust_z``,
        ``outlier`` (False without a z-score) and ``note``, which states why there is no z-score: the value is missing,
        there are fewer than 5 values, or half of them are equal.

    Raises
    ------
    InputError
        If a column is missing.

    Notes
    -----
    :math:`z = (x - \text{median}) / (1.4826\,\text{MAD})`; the limit of 3.5 is that of [1]_.

    References
    ----------
    .. [1] Iglewicz B, Hoaglin DC. How to detect and handle outliers. ASQC Quality Press (1993).
    """
    plain = table.assign(**{value: numeric_column(table, value)}).reset_index(drop=True)
    n_site, median, z = np.zeros(len(plain), dtype=np.int64), np.full(len(plain), np.nan), np.full(len(plain), np.nan)
    note = np.full(len(plain), "", dtype=object)
    for _, rows in iter_groups(plain, by):
        index, values = rows.index.to_numpy(), rows[value].to_numpy(np.float64)
        known = np.isfinite(values)
        n_site[index] = known.sum()
        note[index[~known]] = "missing"
        if not known.any():
            continue
        median[index] = np.median(values[known])
        spread = median_abs_deviation(values[known], scale="normal")
        if known.sum() < N_SITE:
            note[index[known]] = f"no z: {known.sum()} values, a site needs {N_SITE}"
        elif spread == 0:
            note[index[known]] = "no z: half of the values are equal"
        else:
            z[index] = (values - median[index]) / spread
    return pd.DataFrame(
        {"n_site": n_site, "median": median, "robust_z": z, "outlier": np.abs(z) > limit, "note": note},
        index=table.index,
    )
