"""Age curves of all nuclei of a cohort, and change per year of participants with several sessions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import ttest_1samp

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.age_curves import (
    BETA_BOUNDS,
    CURVES,
    N_RESAMPLED,
    Curve,
    Fit,
    Interval,
    bands,
    bootstrap,
    fit_curve,
)
from bids_dgmseg.stats.agreement import is_constant
from bids_dgmseg.stats.group_tests import GroupOptions, adjust_within_groups, compare_groups
from bids_dgmseg.stats.long_table import iter_groups, numeric_column, require_columns

NOT_IDENTIFIED = "not identified"
"""Part of the note of a curve whose parameters cannot be estimated from the ages."""

_PARAMETERS = {"alpha": "alpha", "beta": "beta_per_year", "gamma": "gamma", "plateau": "plateau"}

_ROUND_AGES = np.arange(20.0, 81.0, 10.0)
"""Years at which curves are always computed, within the ages of the scans."""

WIDEST = 10
"""Limits of α, γ or α + γ wider than this multiple of the range of the values are not given."""

_COLUMNS = (
    *("curve", "n", "n_missing", "n_participants", "age_min", "age_max"),
    *(f"{column}{end}" for column in _PARAMETERS.values() for end in ("", "_low", "_high")),
    *("std", "r2", "aicc", "delta_aicc", "best", "note"),
)


@dataclass(frozen=True, kw_only=True)
class AgeingOptions:
    """Columns and settings of the age curves."""

    value: str = "mean_ppm"
    """Column of the measure."""
    age: str = "age"
    """Column of the ages at the scan, in years."""
    participant: str = "participant_id"
    by: tuple[str, ...] = ("abbreviation",)
    """Columns that define separate fits."""
    curves: tuple[Curve, ...] = CURVES
    level: float = 0.95
    beta_bounds: Interval = BETA_BOUNDS
    n_replicates: int = 0
    """Bootstrap replicates over participants; 0 for profile limits."""


def fit_age_curves(
    table: pd.DataFrame,
    *,
    options: AgeingOptions | None = None,
    ages: ArrayLike | None = None,
    rng: np.random.Generator | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit all curves to each nucleus and select one by the Akaike information criterion.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus, as in ``group_stats.tsv``; ages and measures are numeric, NaN where missing.
    options : AgeingOptions, optional
        Columns and settings.
    ages : array_like of shape (m,), optional
        Years at which to compute the curves; by default 101 from the youngest to the oldest of each nucleus, and 20,
        30, … 80 years between them.
    rng : Generator, optional
        Random generator for the bootstrap; only required for it.

    Returns
    -------
    parameters : DataFrame
        One row per nucleus and curve: the columns of ``options.by`` and those described in ``columns_group.tsv``. A
        curve that cannot be fitted (too few scans, no variance) has missing values and a ``note`` that states why.
        Limits are missing if the ages do not identify the parameters: β or its limits reach the bounds, or those of α,
        γ or the plateau α + γ (of γ for a curve without β) are wider than 10 times the range of the values.
    curves : DataFrame
        One row per age of each fitted curve: the columns of ``options.by``, ``curve`` and those of `bands`, with
        profile limits.

    Raises
    ------
    InputError
        If a column is missing or an age is below 0.
    ValueError
        If a bootstrap is requested without `rng`, or a numeric column contains text.

    See Also
    --------
    bids_dgmseg.stats.age_curves.fit_curve : Equations and sources of the curves.
    """
    options = options or AgeingOptions()
    if options.n_replicates and rng is None:
        raise ValueError("a bootstrap needs rng")
    require_columns(table, options.participant, options.value)
    given = numeric_column(table, options.age)
    if (given < 0).any():
        row = int(np.flatnonzero(given < 0)[0])
        name = table[options.participant].iloc[row]
        raise InputError(f"{name}: {options.age} is {given[row]:g}, expected years from 0; correct it")
    records, drawn = [], []
    for key, rows in iter_groups(table, options.by):
        numbers = {column: numeric_column(rows, column) for column in (options.age, options.value)}
        finite = np.flatnonzero(np.isfinite(np.column_stack([*numbers.values()])).all(axis=1))
        used = rows[[options.participant]].assign(**numbers).iloc[finite]
        counts = {
            "n": len(used),
            "n_missing": len(rows) - len(used),
            "n_participants": used[options.participant].nunique(),
            "age_min": used[options.age].min(),
            "age_max": used[options.age].max(),
        }
        fitted = []
        for curve in options.curves:
            fit, record = _fit(used, curve, options, rng, n_participants=counts["n_participants"])
            fitted.append(key | counts | record)
            if fit is not None:
                youngest, oldest = counts["age_min"], counts["age_max"]
                within = _ROUND_AGES[(youngest <= _ROUND_AGES) & (_ROUND_AGES <= oldest)]
                at = np.union1d(np.linspace(youngest, oldest, 101), within) if ages is None else ages
                drawn.append(bands(fit, at).assign(**key, curve=curve.name))
        lowest = min((record["aicc"] for record in fitted if "aicc" in record), default=np.nan)
        for record in fitted:
            aicc = record.get("aicc", np.nan)
            records.append(record | {"delta_aicc": aicc - lowest, "best": aicc == lowest})
    columns = [*options.by, "curve", "age", "fit", "low", "high", "prediction_low", "prediction_high"]
    curves = pd.concat(drawn, ignore_index=True)[columns] if drawn else pd.DataFrame(columns=columns)
    return pd.DataFrame(records, columns=[*options.by, *_COLUMNS]), curves


def _fit(
    used: pd.DataFrame, curve: Curve, options: AgeingOptions, rng: np.random.Generator | None, *, n_participants: int
) -> tuple[Fit | None, dict[str, Any]]:
    """Fit one curve to one nucleus; also return its record."""
    ages, values = used[options.age], used[options.value]
    try:
        fit = fit_curve(ages, values, curve=curve, level=options.level, beta_bounds=options.beta_bounds)
    except ValueError as error:  # raised for unsuitable data
        return None, {"curve": curve.name, "note": f"not fitted: {error}"}
    notes: list[str] = []
    who, intervals = used[options.participant], fit.intervals
    if options.n_replicates and rng is not None:
        replicates = options.n_replicates
        intervals = bootstrap(fit, ages, values, rng=rng, participants=who.astype(str), n_replicates=replicates)
        if n_participants < N_RESAMPLED:
            notes.append(f"no limits: {n_participants} participants, a bootstrap needs {N_RESAMPLED}")
    elif n_participants < len(used):
        notes.append(
            "scans of one participant count as independent in the intervals (a bootstrap resamples participants)"
        )
    missing, reasons = _unidentified(fit, intervals, options.beta_bounds)
    record: dict[str, Any] = {"curve": curve.name, "note": "; ".join([*reasons, *notes])}
    for name, column in _PARAMETERS.items():
        low, high = (np.nan, np.nan) if name in missing else intervals[name]
        record |= {column: getattr(fit, name), f"{column}_low": low, f"{column}_high": high}
    return fit, record | {"std": fit.std, "r2": fit.r2, "aicc": fit.aicc}


def _unidentified(fit: Fit, intervals: dict[str, Interval], bounds: Interval) -> tuple[set[str], list[str]]:
    """Return the parameters whose limits are not given, and why."""
    wide = {name for name in ("alpha", "gamma", "plateau") if np.ptp(intervals[name]) > WIDEST * fit.spread}
    if not fit.curve.has_rate:
        wide -= {"alpha"}  # per year
        reason = f"limits of gamma are wider than {WIDEST} times the range of the values and not given"
        return wide, [reason] if wide else []
    if not fit.at_bound and not wide:
        return wide, []
    low, high = bounds
    reached = f"beta or its interval reaches {low:g} or {high:g} per year"
    too_wide = f"limits of alpha, gamma or plateau are wider than {WIDEST} times the range of the values"
    names = "alpha, beta, gamma and plateau" if "plateau" in wide else "alpha, beta, gamma"
    reason = f"{reached if fit.at_bound else too_wide}: {names} are {NOT_IDENTIFIED}"
    return wide | {"alpha", "beta", "gamma"}, [reason, "use the values of group_ageing_curves.tsv"]


_SLOPES = ("n_scans", "n_missing", "years", "first", "change_per_year", "site_change", "note")

_SUMMARY = (
    "group n n_single n_site_change n_scans years_median change_per_year change_low change_high std t df p q reference "
    "difference difference_low difference_high p_difference q_difference note"
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
        test; false discovery rates ``q`` over the nuclei. All columns are described in ``columns_group.tsv``.

    Raises
    ------
    InputError
        If a column is missing, or no participant has scans at two times.

    Notes
    -----
    The slopes of all participants have equal weight, regardless of the number and spacing of scans; a mixed model would
    weight them.
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
    summary = adjust_within_groups(pd.DataFrame(records), {"p": "q"})
    tested = slopes[~slopes["site_change"]].dropna(subset=["change_per_year", "group"])
    if reference in (groups := set(tested["group"].unique())) and len(groups) > 1:
        options = GroupOptions(
            reference=str(reference), value="change_per_year", participant=participant, by=by, level=level
        )
        welch = compare_groups(tested, options=options).rename(columns={"p_t": "p_difference", "q_t": "q_difference"})
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
