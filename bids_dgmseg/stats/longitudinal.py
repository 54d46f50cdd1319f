"""Change between the sessions of a participant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import each_group, false_discovery, need_columns, numbers

_SLOPES = ("n_scans", "n_missing", "years", "first", "change_per_year", "note")

_SUMMARY = (
    "n",
    "n_single",
    "n_scans",
    "years_median",
    "change_per_year",
    "change_low",
    "change_high",
    "std",
    "t",
    "df",
    "p",
    "q",
    "note",
)


@dataclass(frozen=True)
class Change:
    """Change per year, for each participant and over them."""

    participants: pd.DataFrame
    summary: pd.DataFrame


def change_per_year(
    table: pd.DataFrame,
    *,
    time: str = "age",
    value: str = "mean_ppm",
    participant: str = "participant_id",
    by: tuple[str, ...] = ("abbreviation",),
    level: float = 0.95,
) -> Change:
    """Regress each participant's scans on time.

    Parameters
    ----------
    table : DataFrame
        One row a scan and nucleus; measures and times are numbers, NaN where missing.
    time : str
        Column of the age at the scan or the time since the first, in years.
    value, participant : str
        Columns of the measure and of the participants.
    by : tuple of str
        Columns whose values are regressed apart.
    level : float
        Of the confidence limits.

    Returns
    -------
    Change
        ``participants`` has a row a nucleus and participant: the columns of `by`, the participant, ``n_scans`` used,
        ``n_missing`` without time or measure, ``years`` between first and last, ``first`` (measure at the first scan),
        ``change_per_year`` (slope of least squares, unit a year) and ``note``; ``summary`` has a row a nucleus: ``n``
        participants with a slope, ``n_single`` without, ``n_scans`` in the slopes, ``years_median``, mean
        ``change_per_year`` with limits, ``std`` over participants, ``t``, ``df``, ``p`` against no change, ``q`` over
        the nuclei, ``note``.

    Raises
    ------
    InputError
        If a column is missing, or nobody has scans at two times.

    Notes
    -----
    Every participant's slope counts alike, whatever the number and spacing of scans; a mixed model would weigh them.
    """
    need_columns(table, participant, *by)
    plain = table.assign(**{column: numbers(table, column) for column in (time, value)})
    slopes = _slopes(plain, [*by, participant], time=time, value=value)
    if slopes["change_per_year"].isna().all():
        raise InputError(f"group table: nobody has scans at two values of {time}; give it a value a session in years")
    summary = pd.DataFrame(
        [key | _summarize(rows, level) for key, rows in each_group(slopes, by)], columns=[*by, *_SUMMARY]
    )
    return Change(slopes, summary.assign(q=false_discovery(summary["p"].to_numpy(np.float64))))


def _slopes(table: pd.DataFrame, keys: list[str], *, time: str, value: str) -> pd.DataFrame:
    """Slope of each participant and nucleus, all at once: a cohort has a hundred thousand of them."""
    rows = table[[*keys, time, value]].replace([np.inf, -np.inf], np.nan).sort_values(time, kind="stable")
    there = rows.dropna(subset=[time, value])

    def grouped(frame: pd.DataFrame) -> Any:
        return frame.groupby(keys, sort=False, dropna=False, observed=True)

    # in the order of the table; participants without a usable scan have their row too
    result: pd.DataFrame = grouped(table).size().rename("n_rows").to_frame()
    means = grouped(there)[[time, value]].transform("mean")
    years = there[time] - means[time]
    sums = grouped(there.assign(_xy=years * (there[value] - means[value]), _xx=years**2))[["_xy", "_xx"]].sum()
    times = grouped(there)[time]
    result["n_scans"] = times.size()
    result["n_scans"] = result["n_scans"].fillna(0).astype(int)
    result["n_missing"] = result["n_rows"] - result["n_scans"]
    result["years"] = times.max() - times.min()
    result["first"] = grouped(there)[value].first()
    spread = (result["years"] > 0) & (result["n_scans"] > 1)
    result["change_per_year"] = (sums["_xy"] / sums["_xx"].where(sums["_xx"] > 0)).where(spread)
    at = times.min().reindex(result.index)
    result["note"] = [
        "" if varies else f"no change: {n} scans" if n < 2 else f"no change: all scans at {year:g} years"
        for varies, n, year in zip(spread, result["n_scans"], at, strict=True)
    ]
    return result.reset_index()[[*keys, *_SLOPES]]


def _summarize(rows: pd.DataFrame, level: float) -> dict[str, Any]:
    used = rows.dropna(subset=["change_per_year"])
    slopes = used["change_per_year"].to_numpy(np.float64)
    record: dict[str, Any] = {
        "n": slopes.size,
        "n_single": len(rows) - slopes.size,
        "n_scans": int(used["n_scans"].sum()),
        "years_median": used["years"].median(),
        "p": np.nan,
        "change_per_year": slopes.mean() if slopes.size else np.nan,
    }
    if slopes.size < 2 or np.ptp(slopes) == 0:
        return record | {"note": f"not tested: {slopes.size} participants with a change, or all the same"}
    mean, free, error = slopes.mean(), slopes.size - 1, slopes.std(ddof=1) / np.sqrt(slopes.size)
    half = float(t.ppf((1 + level) / 2, free)) * error
    return record | {
        "change_low": mean - half,
        "change_high": mean + half,
        "std": slopes.std(ddof=1),
        "t": mean / error,
        "df": free,
        "p": 2 * float(t.sf(abs(mean / error), free)),
        "note": "",
    }
