"""Take the part that goes with a nucleus's size out of its susceptibility."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import linregress, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import Floats, each_group, numbers

N_CONTROLS = 5
"""Fewest participants a slope is taken from."""

_LEVEL = 0.95
"""Of the slope's limits."""

_COLUMNS = (
    "n_controls",
    "n_controls_missing",
    "mean_volume_controls",
    "slope",
    "slope_low",
    "slope_high",
    "intercept",
    "r",
    "p",
    "note",
)


@dataclass(frozen=True)
class SizeAdjustment:
    """Adjusted values and how they were had."""

    values: pd.Series
    """In the order and with the index of the table; NaN without measure, volume or slope."""
    coefficients: pd.DataFrame
    """One row a nucleus."""


def adjust_for_size(
    table: pd.DataFrame,
    *,
    controls: ArrayLike,
    value: str = "mean_ppm",
    volume: str = "volume_mm3",
    by: tuple[str, ...] = ("abbreviation",),
    participant: str | None = None,
) -> SizeAdjustment:
    r"""Adjust susceptibility for volume with the regression of the controls.

    Small nuclei have a larger share of voxels that hold their surroundings too, so that their mean depends on their
    size.

    Parameters
    ----------
    table : DataFrame
        One row a scan and nucleus; measure and volume are numbers, NaN where missing.
    controls : array_like of bool, shape (rows,)
        Which rows are of healthy controls.
    value, volume : str
        Columns of the measure and of the volume.
    by : tuple of str
        Columns whose values are regressed apart.
    participant : str, optional
        Column of the participants, who are counted in place of rows where a slope needs so many.

    Returns
    -------
    SizeAdjustment
        Adjusted values in the measure's unit; a row of coefficients a nucleus: the columns of `by`, ``n_controls``
        rows used, ``n_controls_missing``, ``mean_volume_controls``, ``slope`` (ppm/mm³) with limits of 95 %,
        ``intercept``, ``r``, ``p`` (two-sided, slope 0) and ``note``. Where fewer than 5 controls can be used or their
        volumes do not vary, the slope and the adjusted values are missing and the note says why.

    Raises
    ------
    InputError
        If there is no control or a column is missing.
    ValueError
        If `controls` is not a boolean a row.

    Notes
    -----
    With the slope :math:`b` of :math:`\chi` on :math:`V` and the mean volume :math:`\bar V`, both of the controls,

    .. math:: \chi_{adj} = \chi - b\,(V - \bar V),

    for everyone: our reading of the one sentence in [1]_. A disease that shrinks the nucleus and raises its iron is
    not confounded by this as it would be with a slope from all. Rows count as independent in the limits.

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
    plain = table.assign(**{column: numbers(table, column) for column in (value, volume)}, _control=mask)
    # positions in place of labels: an index may repeat
    plain = plain.reset_index(drop=True)
    adjusted = np.full(len(plain), np.nan)
    records = []
    for key, rows in each_group(plain, by):
        chi, size = rows[value].to_numpy(np.float64), rows[volume].to_numpy(np.float64)
        used = rows["_control"].to_numpy(bool) & np.isfinite(chi) & np.isfinite(size)
        n_people = int(used.sum()) if participant is None else rows.loc[used, participant].nunique()
        record = _regress(chi[used], size[used], n_people)
        record["n_controls_missing"] = int(rows["_control"].sum()) - record["n_controls"]
        adjusted[rows.index.to_numpy()] = chi - record["slope"] * (size - record["mean_volume_controls"])
        records.append(key | record)
    return SizeAdjustment(
        pd.Series(adjusted, index=table.index, name=f"{value}_adjusted"),
        pd.DataFrame(records, columns=[*by, *_COLUMNS]),
    )


def _regress(chi: Floats, size: Floats, n_people: int) -> dict[str, Any]:
    """Slope of one nucleus in the controls."""
    n = size.size
    record = dict.fromkeys(_COLUMNS, np.nan) | {
        "n_controls": n,
        "note": "",
        "mean_volume_controls": size.mean() if n else np.nan,
    }
    if n_people < N_CONTROLS:
        return record | {"note": f"not adjusted: {n_people} controls, a slope needs {N_CONTROLS}"}
    if np.ptp(size) == 0:
        return record | {"note": f"not adjusted: the volumes of all controls are {size[0]:g}"}
    line = linregress(size, chi)
    half = float(t.ppf((1 + _LEVEL) / 2, n - 2)) * line.stderr
    return record | {
        "slope": line.slope,
        "slope_low": line.slope - half,
        "slope_high": line.slope + half,
        "intercept": line.intercept,
        "r": line.rvalue,
        "p": line.pvalue,
    }
