"""Differences between groups and changes per year, per nucleus, with errors that do not assume equal variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import gammaln, nctdtr

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.agreement import CONFIDENCE, is_constant
from bids_dgmseg.stats.regression import (
    ALONE,
    Floats,
    average_repeated_scans,
    fit_covariates,
    interval,
    iter_groups,
    leverages,
    numeric_column,
    require_columns,
    robust_contrasts,
    split_covariates,
)

MIN_GROUP = 3
"""Participants of a group that is compared."""

MIN_CHANGES = 5
"""Participants with a change whose mean is tested."""

_ROUNDING = 1e-24
"""Residual variance, relative to the mean square of the values, below which it is rounding."""

_RATIOS = (0, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""Variances of the true slopes, in mean error variances of a slope, among which the likeliest is chosen."""

_DIFFERENCES = (
    "reference group n_reference n_group n_missing n_scans mean_reference se_reference mean_group se_group difference "
    "difference_low difference_high t df p std hedges_g hedges_g_low hedges_g_high note"
).split()

_VALUES = ("participant_id", "group", "value", "value_adjusted", "residual")

_CHANGES = (
    "group n n_scans years_median change_per_year change_low change_high t df p reference difference difference_low "
    "difference_high p_difference note"
).split()


def compare_groups(
    table: pd.DataFrame,
    *,
    reference: str,
    value: str = "mean_ppm",
    by: tuple[str, ...] = ("abbreviation",),
    covariates: Sequence[str] = ("age", "sex"),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Compare each group with the reference group by analysis of covariance with HC3 errors.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; the scans of a participant are averaged, also in numeric covariates.
    reference : str
        Reference group, such as the controls.
    value : str
        Column of the measure.
    by : tuple of str
        Columns that define separate comparisons.
    covariates : sequence of str
        Text and booleans are categories.

    Returns
    -------
    differences : DataFrame
        One row per nucleus and group: the columns of `by` and those described in ``columns_group.tsv``, with the
        adjusted means and their standard errors, confidence limits of ``difference`` (group − reference) and
        ``hedges_g``, and ``note``, which states why there is no test.
    values : DataFrame
        One row per nucleus and participant of a model with tests: ``participant_id``, ``group``, ``value``,
        ``value_adjusted`` (at the means of the covariates) and ``residual``, divided by its standard error.

    Raises
    ------
    InputError
        If a column is missing, the reference group is empty, there is no other group, or a participant has two groups
        or two values of a categorical covariate.

    Notes
    -----
    One linear model per nucleus with all groups and common slopes. Standard errors are HC3 [1]_, which hold if the
    groups differ in spread, with t distributions (`robust_contrasts`). A difference that groups and covariates do not
    determine together (all patients at a site without controls) is missing; those of other groups are estimated.
    Groups of fewer than three participants, and participants alone at their site, are left out. Adjusted means are
    predictions at the means of the covariates over all participants of the model (of a category, the shares of its
    levels). With the difference :math:`b`, the residual standard deviation :math:`s` and its :math:`m` degrees of
    freedom, Hedges' [2]_ :math:`g = J(m)\,b/s`, :math:`J(m) = \Gamma(m/2)/(\sqrt{m/2}\,\Gamma((m-1)/2))`; its limits
    are those of the noncentral t distribution.

    References
    ----------
    .. [1] MacKinnon JG, White H. Some heteroskedasticity-consistent covariance matrix estimators with improved finite
       sample properties. J Econom 29 (1985) 305-325. doi:10.1016/0304-4076(85)90158-7
    .. [2] Hedges LV. Distribution theory for Glass's estimator of effect size and related estimators. J Educ Stat 6
       (1981) 107-128. doi:10.3102/10769986006002107
    """
    require_columns(table, "group", *covariates)
    numeric_column(table, value)
    numeric, categories = split_covariates(table, covariates)
    participants = average_repeated_scans(table, by=by, means=[value, *numeric], same=["group", *categories])
    groups = sorted(participants["group"].dropna().unique(), key=str)
    if reference not in groups or len(groups) < 2:
        shown = ", ".join(map(str, groups)) or "none"
        raise InputError(f"participants.tsv: no group to compare with {reference} (groups: {shown}); add participants")
    others = [group for group in groups if group != reference]
    records, parts, columns = [], [], [*by, *_VALUES]
    for key, rows in iter_groups(participants, by):
        differences, points = _compare(rows, value, [reference, *others], covariates)
        records += [key | record for record in differences]
        parts += [points.assign(**key)] if len(points) else []
    values = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return pd.DataFrame(records, columns=[*by, *_DIFFERENCES]), values


def _compare(
    rows: pd.DataFrame, value: str, groups: list[Any], covariates: Sequence[str]
) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Fit one nucleus: one record per group other than the first, the reference; values, if anything is tested."""
    reference, *others = groups
    complete, counts, kept = rows.dropna(subset=[value, "group", *covariates]), dict[Any, int](), others
    is_alone = np.full(len(complete), True)
    while is_alone.any() or not counts:  # without some participants, others may be alone at their site
        sizes = complete["group"].value_counts()
        counts |= {name: int(sizes.get(name, 0)) for name in (reference, *kept)}
        kept = [name for name in kept if counts[name] >= MIN_GROUP]
        complete = complete[complete["group"].isin([reference, *kept])]
        varying = fit_covariates(complete[[name for name in covariates if complete[name].nunique() > 1]])
        terms = {covariate.name: covariate.columns(complete[covariate.name]) for covariate in varying}
        terms[""] = np.ones((len(complete), 1))  # the intercept
        design = np.column_stack([*terms.values(), *(complete["group"] == name for name in kept)]).astype(np.float64)
        is_alone = leverages(design) > ALONE
        is_alone &= not is_alone.all()  # as many terms as participants
        complete = complete[~is_alone]
    y, rank = complete[value].to_numpy(np.float64), int(np.linalg.matrix_rank(design)) if len(design) else 0
    coefficients = np.linalg.lstsq(design, y)[0]
    residuals = y - design @ coefficients
    std = math.sqrt((residuals @ residuals) / (len(y) - rank)) if len(y) > rank else 0.0
    reasons = dict.fromkeys(others, "")
    for name in others:
        if min(counts[reference], counts[name]) < MIN_GROUP:
            shown = f"{counts[reference]} and {counts[name]} participants with all covariates"
            reasons[name] = f"not tested: {shown}, a group needs {MIN_GROUP}"
        elif len(y) <= rank:
            reasons[name] = f"not tested: {len(y)} participants for {rank} terms"
        elif std**2 <= _ROUNDING * float((y**2).mean()):
            reasons[name] = "not tested: the values do not vary beyond groups and covariates"
        elif rank < design.shape[1]:
            reasons[name] = _confounding(complete, name, kept, terms)
    n_others = design.shape[1] - len(kept)
    records, indicators = [], np.eye(design.shape[1])[n_others:]
    means = np.where(indicators.any(axis=0), 0, design.mean(axis=0)) if len(y) else np.zeros(design.shape[1])
    for name in others:
        used = complete[complete["group"].isin([reference, name])]
        record: dict[str, Any] = {"reference": reference, "group": name, "note": reasons[name]}
        record |= {"n_reference": counts[reference], "n_group": counts[name], "n_scans": int(used["n_scans"].sum())}
        record["n_missing"] = int(rows["group"].isin([reference, name]).sum()) - counts[reference] - counts[name]
        if not reasons[name]:
            shift = indicators[kept.index(name)]
            contrasts = np.array([shift, means, means + shift])
            (difference, *adjusted), (error, *errors), (df, *_) = map(
                np.ndarray.tolist, robust_contrasts(y, design, contrasts)
            )
            record |= interval("difference", difference, error, df) | {"t": difference / error, "df": df, "std": std}
            record |= _standardize(difference / std, unit=error / std, df=df, df_std=len(y) - rank)
            if not any(reasons[other] for other in kept):  # of confounded groups, adjusted means are arbitrary
                record |= dict(zip(("mean_reference", "mean_group"), adjusted, strict=True))
                record |= dict(zip(("se_reference", "se_group"), errors, strict=True))
        records.append(record)
    is_used = complete["group"].map({reference: not all(reasons.values())} | {name: not reasons[name] for name in kept})
    errors_of_residuals = max(std, math.sqrt(_ROUNDING)) * np.sqrt(np.maximum(1 - leverages(design), 1 - ALONE))
    columns = {
        "value": y,
        "value_adjusted": y - (design - means)[:, :n_others] @ coefficients[:n_others],
        "residual": residuals / errors_of_residuals,
    }
    return records, complete[["participant_id", "group"]].assign(**columns)[is_used.astype(bool)]


def _standardize(d: float, *, unit: float, df: float, df_std: int) -> dict[str, float]:
    """Return Hedges' g with its limits: a difference in SD, of standard error `unit`, adjusted for small samples."""
    if df_std < 2:  # not defined with one degree of freedom
        return {}
    factor = math.exp(gammaln(df_std / 2) - gammaln((df_std - 1) / 2)) / math.sqrt(df_std / 2)
    ratio = d / unit

    def excess(centre: float, quantile: float) -> float:
        probability = float(nctdtr(df, centre, ratio))  # scipy.stats.nct.cdf takes ten times as long
        if math.isnan(probability):  # the series underflows far from the centre
            probability = 1.0 if centre < ratio else 0.0
        return probability - quantile

    # The noncentralities of the t distributions that have the observed value at the quantiles.
    width = 10 + 3 * abs(ratio)
    low, high = (
        float(brentq(excess, ratio - width, ratio + width, args=(quantile,)))
        for quantile in ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2)
    )
    return {"hedges_g": factor * d, "hedges_g_low": low * unit, "hedges_g_high": high * unit}


def _confounding(complete: pd.DataFrame, name: Any, kept: list[Any], terms: dict[str, Floats]) -> str:
    """Return why the difference between a group and the reference group cannot be estimated; empty if it can."""
    group = complete["group"]

    def is_estimable(omitted: str | None = None) -> bool:
        others = [group == other for other in kept if other != name]
        columns = np.column_stack([*(term for key, term in terms.items() if key != omitted), *others])
        rank, rank_without = map(np.linalg.matrix_rank, (np.column_stack([columns, group == name]), columns))
        return bool(rank > rank_without)

    if is_estimable():
        return ""
    # the covariates without which it could be estimated; if several are needed for that, all
    guilty = [key for key in terms if key and is_estimable(key)] or [key for key in terms if key]
    where = ""
    if len(guilty) == 1 and len(values := complete.loc[group == name, guilty[0]].unique()) == 1:
        where = f" (all {name} have {guilty[0]} {values[0]})"
    columns = " and ".join(guilty)
    return f"group and {columns} are confounded{where}: add participants or leave {columns} out of the covariates"


def compare_changes(
    table: pd.DataFrame,
    *,
    time: str = "age",
    value: str = "mean_ppm",
    by: tuple[str, ...] = ("abbreviation",),
    reference: str | None = None,
) -> pd.DataFrame:
    r"""Estimate the mean change per year of all participants and of each group, and compare the groups.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``participant_id`` and, if known, ``group`` (one per participant) and ``site``;
        measures and times are numeric, NaN where missing. Participants scanned at several sites are left out: their
        change contains the difference between the sites.
    time : str
        Column of the age at the scan or the time since the first, in years.
    value : str
        Column of the measure.
    by : tuple of str
        Columns that define separate estimates.
    reference : str, optional
        Group that the others are compared with.

    Returns
    -------
    DataFrame
        One row per nucleus for all participants (``group`` all) and, with several groups, one for each: the columns
        described in ``columns_group.tsv``. Fewer than five changes have a plain mean and no test.

    Raises
    ------
    InputError
        If a column is missing, or no participant has scans at two times.

    Notes
    -----
    Each participant has a least-squares slope, whose variance is :math:`\tau^2 + \sigma^2/S` with the sum of squares
    :math:`S` of its times about their mean. The ratio of the variances is estimated by restricted maximum likelihood
    from slopes and residuals on a grid; slopes are weighted by the inverse variances. Errors are HC3 with t
    distributions (`robust_contrasts`), so that neither weights nor equal variances of the groups need to be right.
    """
    require_columns(table, "participant_id", *by)
    plain = table.assign(**{column: numeric_column(table, column) for column in (time, value)})
    slopes = _slopes(plain, [*by, "participant_id"], time=time, value=value)
    if slopes.empty:
        raise InputError(
            f"group table: no participant has scans at two time points ({time}); give each session a value in years"
        )
    groups: Any = table.groupby("participant_id")["group"].first() if "group" in table else {}
    slopes["group"] = slopes["participant_id"].astype(object).map(groups)
    names = sorted(slopes["group"].dropna().unique(), key=lambda name: (name != reference, str(name)))
    records, everybody = [], "all groups" if "all" in names else "all"
    for key, rows in iter_groups(slopes, by):
        arrays = {str(name): column.to_numpy() for name, column in rows.items()}
        parts = _mean_changes(arrays | {"group": np.full(len(rows), everybody)}, [everybody], None)
        parts += _mean_changes(arrays, names, reference) if len(names) > 1 else []
        records += [key | part for part in parts]
    return pd.DataFrame(records, columns=[*by, *_CHANGES])


def _mean_changes(slopes: dict[str, Any], names: Sequence[Any], reference: Any) -> list[dict[str, Any]]:
    """Estimate the mean slope of each group in one nucleus, and its difference from the reference group."""
    records: dict[Any, dict[str, Any]] = {}
    for name in names:
        part = {column: values[slopes["group"] == name] for column, values in slopes.items()}
        n = len(part["slope"])
        records[name] = {"group": name, "n": n, "n_scans": int(part["n_scans"].sum()), "note": ""}
        if n:
            records[name] |= {"years_median": np.median(part["years"]), "change_per_year": part["slope"].mean()}
        if n < MIN_CHANGES or is_constant(part["slope"]):
            records[name]["note"] = f"not tested: {n} changes, or all the same ({MIN_CHANGES} are needed)"
    if tested := [name for name, record in records.items() if not record["note"]]:
        design = np.column_stack([slopes["group"] == name for name in tested]).astype(np.float64)
        kept, design = design.any(axis=1), design[design.any(axis=1)]
        used = {column: values[kept] for column, values in slopes.items()}
        identity = np.eye(len(tested))
        compared = [name for name in tested if reference in tested and name != reference]
        contrasts = [*identity, *(identity[tested.index(name)] - identity[0] for name in compared)]
        weights = _slope_weights(used, design)
        fit = robust_contrasts(used["slope"], design, np.array(contrasts), weights=weights)
        estimates = np.column_stack(fit).tolist()
        for name, (change, error, df) in zip(tested, estimates, strict=False):
            limits = interval("change", change, error, df)
            records[name] |= limits | {"change_per_year": change, "t": change / error, "df": df}
        for name, estimate in zip(compared, estimates[len(tested) :], strict=True):
            test = interval("difference", *estimate)
            records[name] |= {"reference": reference, **test, "p": records[name]["p"], "p_difference": test["p"]}
    return list(records.values())


def _slope_weights(slopes: dict[str, Any], design: Floats) -> Floats:
    """Return the inverse variances of the slopes, up to a factor, for the most likely ratio of `_RATIOS` (REML)."""
    y, errors = slopes["slope"], 1 / slopes["times"]
    df = len(y) - design.shape[1] + (slopes["n_scans"] - 2).sum()
    candidates = []
    for ratio in _RATIOS:
        weights = 1 / (ratio * errors.mean() + errors)
        products = design.T @ (weights[:, None] * design)
        residuals = y - design @ np.linalg.solve(products, design.T @ (weights * y))
        squares = slopes["residual"].sum() + weights @ residuals**2
        deviance = df * np.log(squares) - np.log(weights).sum() + np.linalg.slogdet(products)[1]
        candidates.append((deviance, weights))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _slopes(table: pd.DataFrame, keys: list[str], *, time: str, value: str) -> pd.DataFrame:
    """Return the slope of each participant and nucleus, vectorized: a cohort has a hundred thousand of them.

    There are only rows of participants with scans at two times and one site; ``times`` and ``residual`` are sums of
    squares of the times and of the values about the line.
    """
    number = table.groupby(keys, sort=False, dropna=False, observed=True).ngroup()  # text is slow to group by: once
    sites = table["site"] if "site" in table else np.nan
    scans = pd.DataFrame({"number": number, "x": table[time], "y": table[value], "site": sites})
    scans = scans[np.isfinite(scans[["x", "y"]].to_numpy(np.float64)).all(axis=1)]
    grouped = scans.groupby("number")
    x, y = (scans[column] - grouped[column].transform("mean") for column in "xy")
    sums = pd.DataFrame({"xx": x * x, "xy": x * y, "yy": y * y}).groupby(scans["number"]).sum()
    result = pd.DataFrame({"times": sums["xx"], "slope": sums["xy"] / sums["xx"], "n_scans": grouped.size()})
    result["residual"] = (sums["yy"] - sums["xy"] * result["slope"]).clip(lower=0)
    result["years"] = grouped["x"].max() - grouped["x"].min()
    result = result[(result["years"] > 0) & (grouped["site"].nunique() < 2)]
    return table.loc[~number.duplicated(), keys].reset_index(drop=True).join(result, how="inner")
