"""Change per year of participants with several sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.agreement import is_constant
from bids_dgmseg.stats.group_tests import ComparisonOptions, compare_groups
from bids_dgmseg.stats.long_table import iter_groups, numeric_column, require_columns

_SLOPES = ("n_scans", "n_missing", "years", "first", "change_per_year", "site_change", "note")

_SUMMARY = (
    "group n n_single n_site_change n_scans years_median change_per_year change_low change_high std t df p reference "
    "difference difference_low difference_high p_difference note"
).split()

ALL_GROUPS = "all"
"""Group of the rows of all participants; ``all groups`` if one of them has this name."""


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
    group: str | None = None,
    reference: str | None = None,
    site: str | None = None,
    level: float = 0.95,
) -> Change:
    """Regress the scans of each participant on time, test the mean slopes against 0 and compare them between groups.

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
    group : str, optional
        Column of the groups, one per participant, NaN where not known.
    reference : str, optional
        Group that the others are compared with.
    site : str, optional
        Column of the sites. Participants scanned at several sites have a slope, but are left out of the tests: it
        contains the difference between the sites.
    level : float
        Confidence level of the limits.

    Returns
    -------
    Change
        ``participants`` has one row per nucleus and participant with the least-squares slope ``change_per_year``.
        ``summary`` has one row per nucleus for all participants and, with `group`, one for each group: the mean slope,
        its limits and one-sample t test; ``difference`` from the reference group with limits and p value of Welch's
        test. All columns are described in ``columns_group.tsv``.

    Raises
    ------
    InputError
        If a column is missing, or no participant has scans at two times.

    Notes
    -----
    The slopes of all participants have equal weight, regardless of the number and spacing of scans.
    """
    columns = [column for column in (group, site) if column]
    require_columns(table, participant, *by, *columns)
    plain = table.assign(**{column: numeric_column(table, column) for column in (time, value)})
    slopes = _slopes(plain, [*by, participant], time=time, value=value, site=site)
    if slopes["change_per_year"].isna().all():
        raise InputError(
            f"group table: no participant has scans at two values of {time}; give each session a value in years"
        )
    slopes["group"] = slopes[participant].map(table.groupby(participant)[group].first()) if group else np.nan
    names = sorted(slopes["group"].dropna().unique(), key=lambda name: (name != reference, str(name)))
    pooled = ALL_GROUPS if ALL_GROUPS not in names else f"{ALL_GROUPS} groups"
    records = []
    for key, rows in iter_groups(slopes, by):
        records.append(key | {"group": pooled} | _test_change(rows, level))
        if len(names) > 1:
            records += [key | {"group": name} | _test_change(rows[rows["group"] == name], level) for name in names]
    summary = pd.DataFrame(records)
    tested = slopes[~slopes["site_change"]].dropna(subset=["change_per_year", "group"])
    if reference in (groups := set(tested["group"].unique())) and len(groups) > 1:
        options = ComparisonOptions(
            reference=str(reference), value="change_per_year", participant=participant, by=by, level=level
        )
        welch = compare_groups(tested, options=options).rename(columns={"p_t": "p_difference"})
        compared = [column for column in _SUMMARY if column in welch and column not in summary]
        welch = welch[[*by, "group", *compared]].assign(_note=welch["note"])
        summary = summary.merge(welch, on=[*by, "group"], how="left", validate="1:1")
        notes = summary[["note", "_note"]].fillna("").to_numpy().tolist()
        summary["note"] = ["; ".join(dict.fromkeys(filter(None, both))) for both in notes]
    return Change(slopes[[*by, participant, "group", *_SLOPES]], summary.reindex(columns=[*by, *_SUMMARY]))


def _test_change(rows: pd.DataFrame, level: float) -> dict[str, Any]:
    """Test the mean slope of one nucleus against 0."""
    changed_site = rows["site_change"] & rows["change_per_year"].notna()
    used = rows[~changed_site].dropna(subset=["change_per_year"])
    changes = used["change_per_year"].to_numpy(np.float64)
    n_site_change = int(changed_site.sum())
    record = {
        "n": changes.size,
        "n_single": len(rows) - changes.size - n_site_change,
        "n_site_change": n_site_change,
        "n_scans": int(used["n_scans"].sum()),
        "years_median": used["years"].median(),
        "p": np.nan,
        "change_per_year": changes.mean() if changes.size else np.nan,
        "note": f"not tested: {changes.size} participants with a change, or all the same",
    }
    if changes.size > 1 and not is_constant(changes):
        test = ttest_1samp(changes, 0)
        low, high = test.confidence_interval(level)
        record |= {"change_low": low, "change_high": high, "std": changes.std(ddof=1), "note": ""}
        record |= {"t": test.statistic, "df": test.df, "p": test.pvalue}
    return record


def _slopes(table: pd.DataFrame, keys: list[str], *, time: str, value: str, site: str | None) -> pd.DataFrame:
    """Slope of each participant and nucleus, vectorized: a cohort has a hundred thousand of them."""
    number = table.groupby(keys, sort=False, dropna=False, observed=True).ngroup()  # text is slow to group by: once
    # In the order of the table; participants without a usable scan have a row too.
    result = table.loc[~number.duplicated(), keys].reset_index(drop=True)
    sites = table[site] if site else np.nan
    scans = pd.DataFrame({"number": number, "time": table[time], "value": table[value], "site": sites})
    is_known = np.isfinite(scans[["time", "value"]].to_numpy(np.float64)).all(axis=1)
    known = scans.loc[is_known].sort_values("time", kind="stable")
    grouped = known.groupby("number")
    times = grouped["time"]
    years = known["time"] - times.transform("mean")
    products = {"xy": years * (known["value"] - grouped["value"].transform("mean")), "xx": years**2}
    sums = pd.DataFrame(products).groupby(known["number"]).sum()
    result["n_scans"] = times.size().reindex(result.index, fill_value=0)
    result["n_missing"] = np.bincount(number) - result["n_scans"]
    result["years"] = times.max() - times.min()
    result["first"] = grouped["value"].first()
    has_slope = (result["years"] > 0) & (result["n_scans"] > 1)
    result["change_per_year"] = (sums["xy"] / sums["xx"].where(sums["xx"] > 0)).where(has_slope)
    result["site_change"] = (grouped["site"].nunique() > 1).reindex(result.index, fill_value=False)
    start = times.min().reindex(result.index)
    result["note"] = [
        "" if known_slope else f"no change: {n} scans" if n < 2 else f"no change: all scans at {year:g} years"
        for known_slope, n, year in zip(has_slope, result["n_scans"], start, strict=True)
    ]
    result.loc[result["site_change"] & has_slope, "note"] = "site changes between sessions: not in the tests"
    return result
