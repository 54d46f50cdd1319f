"""Scans that stand out from their site."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import median_abs_deviation

from bids_dgmseg.stats.frames import each_group, numbers

N_SITE = 5
"""Fewest values that a median and a spread are taken from."""


def robust_z(
    table: pd.DataFrame, *, value: str = "mean_ppm", by: tuple[str, ...] = ("abbreviation", "site"), limit: float = 3.5
) -> pd.DataFrame:
    r"""Compare each value with the median of its nucleus and site.

    Parameters
    ----------
    table : DataFrame
        One row a scan and nucleus; the measure is a number, NaN where missing.
    value : str
        Column of the measure.
    by : tuple of str
        Columns whose values are looked at apart; rows without a site are one site.
    limit : float
        Robust z beyond which a value is an outlier.

    Returns
    -------
    DataFrame
        In the order and with the index of `table`: ``n_site`` values looked at together, their ``median``,
        ``robust_z``, ``outlier`` (False where there is no z) and ``note``, which says why there is no z: the value is
        missing, fewer than 5 values, or half of them are equal.

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
    plain = table.assign(**{value: numbers(table, value)}).reset_index(drop=True)
    n_site, median, z = np.zeros(len(plain), dtype=np.int64), np.full(len(plain), np.nan), np.full(len(plain), np.nan)
    note = np.full(len(plain), "", dtype=object)
    for _, rows in each_group(plain, by):
        place, values = rows.index.to_numpy(), rows[value].to_numpy(np.float64)
        there = np.isfinite(values)
        n_site[place] = there.sum()
        note[place[~there]] = "missing"
        if not there.any():
            continue
        median[place] = np.median(values[there])
        spread = median_abs_deviation(values[there], scale="normal")
        if there.sum() < N_SITE:
            note[place[there]] = f"no z: {there.sum()} values, a site needs {N_SITE}"
        elif spread == 0:
            note[place[there]] = "no z: half of the values are equal"
        else:
            z[place] = (values - median[place]) / spread
    return pd.DataFrame(
        {"n_site": n_site, "median": median, "robust_z": z, "outlier": np.abs(z) > limit, "note": note},
        index=table.index,
    )
