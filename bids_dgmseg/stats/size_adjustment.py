"""Adjustment of susceptibility for nucleus volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import linregress, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import Floats, iter_groups, numeric_column

N_CONTROLS = 5
"""Minimum number of participants for a slope."""

_LEVEL = 0.95
"""Confidence level of the limits of the slope."""

_COLUMNS = ("n_controls n_controls_missing mean_volume_controls slope slope_low slope_high intercept r p note").split()


@dataclass(frozen=True)
class SizeAdjustment:
    """Adjusted values and regression coefficients."""

    values: pd.Series
    """In the order and with the index of the table; NaN without measure, volume or slope."""
    coefficients: pd.DataFrame
    """One row per nucleus."""


def adjust_for_size(
    table: pd.DataFrame,
    *,
    controls: ArrayLike,
    value: str = "mean_ppm",
    volume: str = "volume_mm3",
    by: tuple[str, ...] = ("abbreviation",),
    participant: str | None = None,
) -> SizeAdjustment:
    r"""Adjust susceptibility for nucleus volume by linear regression in the controls.

    A larger fraction of the voxels of a small nucleus contains surrounding tissue, so that its mean susceptibility
    depends on its size.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; measure and volume are numeric, NaN where missing.
    controls : array_like of bool, shape (rows,)
        Which rows are of healthy controls.
    value, volume : str
        Columns of the measure and of the volume.
    by : tuple of str
        Columns that define separate regressions.
    participant : str, optional
        Column of the participants, who are counted instead of rows for the minimum number of controls.

    Returns
    -------
    SizeAdjustment
        Adjusted values in the unit of the measure; one row of coefficients per nucleus: the columns of `by`,
        ``n_controls`` rows used, ``n_controls_missing``, ``mean_volume_controls``, ``slope`` (ppm/mm³) with 95 %
        limits, ``intercept``, ``r``, ``p`` (two-sided, slope 0) and ``note``. With fewer than 5 controls or without
        variation in their volumes, slope and adjusted values are missing and the note states why.

    Raises
    ------
    InputError
        If there is no control or a column is missing.
    ValueError
        If `controls` is not one boolean per row.

    Notes
    -----
    With the slope :math:`b` of :math:`\chi` on :math:`V` and the mean volume :math:`\bar V`, both of the controls,

    .. math:: \chi_{adj} = \chi - b\,(V - \bar V)

    for all scans: our reading of the one sentence in [1]_. Unlike a slope from all scans, this is not confounded by a
    disease that shrinks the nucleus and raises its iron. Rows count as independent in the limits.

    References
    ----------
    .. [1] Biswas S. Automated MRI-based mapping of dentate nucleus using advanced neural networks, on DentateSeg:
       "a linear regression-based adjustment factor derived from healthy controls".
    """
    mask = np.asarray(controls)
    if mask.dtype != bool or mask.shape != (len(table),):
        raise ValueError(f"controls is {mask.dtype} of shape {mask.shape}, expected bool of shape ({len(table)},)")
    if not mask.any():
        raise InputError("group table: no scan of a control; check the filter of the controls")
    plain = table.assign(**{column: numeric_column(table, column) for column in (value, volume)}, _control=mask)
    plain = plain.reset_index(drop=True)  # the index of the table may repeat
    adjusted = np.full(len(plain), np.nan)
    records = []
    for key, rows in iter_groups(plain, by):
        chi, size = rows[value].to_numpy(np.float64), rows[volume].to_numpy(np.float64)
        used = rows["_control"].to_numpy(bool) & np.isfinite(chi) & np.isfinite(size)
        n_participants = int(used.sum()) if participant is None else rows.loc[used, participant].nunique()
        record = _regress(chi[used], size[used], n_participants)
        record["n_controls_missing"] = int(rows["_control"].sum()) - record["n_controls"]
        adjusted[rows.index.to_numpy()] = chi - record["slope"] * (size - record["mean_volume_controls"])
        records.append(key | record)
    return SizeAdjustment(
        pd.Series(adjusted, index=table.index, name=f"{value}_adjusted"),
        pd.DataFrame(records, columns=[*by, *_COLUMNS]),
    )


def _regress(chi: Floats, size: Floats, n_participants: int) -> dict[str, Any]:
    """Regression of one nucleus in the controls."""
    n = size.size
    record = dict.fromkeys(_COLUMNS, np.nan) | {
        "n_controls": n,
        "note": "",
        "mean_volume_controls": size.mean() if n else np.nan,
    }
    if n_participants < N_CONTROLS:
        return record | {"note": f"not adjusted: {n_participants} controls, a slope needs {N_CONTROLS}"}
    if np.ptp(size) == 0:
        return record | {"note": f"not adjusted: the volumes of all controls are {size[0]:g}"}
    line = linregress(size, chi)
    half_width = float(t.ppf((1 + _LEVEL) / 2, n - 2)) * line.stderr
    return record | {
        "slope": line.slope,
        "slope_low": line.slope - half_width,
        "slope_high": line.slope + half_width,
        "intercept": line.intercept,
        "r": line.rvalue,
        "p": line.pvalue,
    }
