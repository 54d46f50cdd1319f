"""Change per year of participants with several sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.agreement import is_constant
from bids_dgmseg.stats.hypothesis_tests import adjust_p_values
from bids_dgmseg.stats.long_table import iter_groups, numeric_column, require_columns

_SLOPES = ("n_scans", "n_missing", "years", "first", "change_per_year", "note")

_SUMMARY = ("n n_single n_scans years_median change_per_year change_low change_high std t df p q note").split()


@dataclass(frozen=True)
class Change:
    """Change per year of each participant, and summary over participants."""

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
    """Regress the scans of each participant on time, and test the mean slope against 0.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; measures and times are numeric, NaN where missing.
    time : str
        Column of the age at the scan or the time since the first, in years.
    value, participant : str
        Columns of the measure and of the participants.
    by : tuple of str
        Columns that define separate regressions.
    level : float
        Confidence level of the limits.

    Returns
    -------
    Change
        ``participants`` has one row per nucleus and participant: the columns of `by`, the participant, ``n_scans``
        used, ``n_missing`` without time or measure, ``years`` between first and last, ``first`` (measure at the first
        scan), ``change_per_year`` (least-squares slope) and ``note``; ``summary`` has one row per nucleus: ``n``
        participants with a slope, ``n_single`` without, ``n_scans`` in the slopes, ``years_median``, mean
        ``change_per_year`` with limits, ``std`` over participants, ``t``, ``df``, ``p`` (one-sample t test), ``q``
        (false discovery rate over the nuclei), ``note``.

    Raises
    ------
    InputError
        If a column is missing, or no participant has scans at two times.

    Notes
    -----
    The slopes of all participants have equal weight, regardless of the number and spacing of scans; a mixed model would
    weight them.
    """
    require_columns(table, participant, *by)
    plain = table.assign(**{column: numeric_column(table, column) for column in (time, value)})
    slopes = _slopes(plain, [*by, participant], time=time, value=value)
    if slopes["change_per_year"].isna().all():
        raise InputError(
            f"group table: no participant has scans at two values of {time}; give each session a value in years"
        )
    summary = pd.DataFrame(
        [key | _summarize(rows, level) for key, rows in iter_groups(slopes, by)], columns=[*by, *_SUMMARY]
    )
    return Change(slopes, summary.assign(q=adjust_p_values(summary["p"].to_numpy(np.float64), method="fdr")))


def _slopes(table: pd.DataFrame, keys: list[str], *, time: str, value: str) -> pd.DataFrame:
    """Slope of each participant and nucleus, vectorized: a cohort has a hundred thousand of them."""
    rows = table[[*keys, time, value]].replace([np.inf, -np.inf], np.nan).sort_values(time, kind="stable")
    known = rows.dropna(subset=[time, value])

    def grouped(frame: pd.DataFrame) -> Any:
        return frame.groupby(keys, sort=False, dropna=False, observed=True)

    # In the order of the table; participants without a usable scan have a row too.
    result: pd.DataFrame = grouped(table).size().rename("n_rows").to_frame()
    means = grouped(known)[[time, value]].transform("mean")
    years = known[time] - means[time]
    sums = grouped(known.assign(_xy=years * (known[value] - means[value]), _xx=years**2))[["_xy", "_xx"]].sum()
    times = grouped(known)[time]
    result["n_scans"] = times.size()
    result["n_scans"] = result["n_scans"].fillna(0).astype(int)
    result["n_missing"] = result["n_rows"] - result["n_scans"]
    result["years"] = times.max() - times.min()
    result["first"] = grouped(known)[value].first()
    has_slope = (result["years"] > 0) & (result["n_scans"] > 1)
    result["change_per_year"] = (sums["_xy"] / sums["_xx"].where(sums["_xx"] > 0)).where(has_slope)
    start = times.min().reindex(result.index)
    result["note"] = [
        "" if known_slope else f"no change: {n} scans" if n < 2 else f"no change: all scans at {year:g} years"
        for known_slope, n, year in zip(has_slope, result["n_scans"], start, strict=True)
    ]
    return result.reset_index()[[*keys, *_SLOPES]]


def _summarize(rows: pd.DataFrame, level: float) -> dict[str, Any]:
    """One-sample t test of the slopes of one nucleus."""
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
    if slopes.size < 2 or is_constant(slopes):
        return record | {"note": f"not tested: {slopes.size} participants with a change, or all the same"}
    test = ttest_1samp(slopes, 0)
    low, high = test.confidence_interval(level)
    return record | {
        "change_low": low,
        "change_high": high,
        "std": slopes.std(ddof=1),
        "t": test.statistic,
        "df": test.df,
        "p": test.pvalue,
        "note": "",
    }
