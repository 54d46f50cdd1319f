"""Differences between groups, nucleus by nucleus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import gammaln
from scipy.stats import f as f_distribution
from scipy.stats import mannwhitneyu, nct, t

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.agreement import is_constant
from bids_dgmseg.stats.frames import Floats, each_group, false_discovery, need_columns, numbers, per_participant

_N_GROUP = 2

_NO_SPREAD = "not tested: the values do not vary within the groups"

_ROUNDING = 1e-24
"""Share of the squares of values below which their residuals are rounding."""

_COMPARED = (
    "reference",
    "group",
    "n_reference",
    "n_group",
    "n_missing",
    "n_no_group",
    "n_scans",
    "mean_reference",
    "mean_group",
    "std_reference",
    "std_group",
    "difference",
    "difference_low",
    "difference_high",
    "t",
    "df",
    "p_t",
    "q_t",
    "u",
    "p_mannwhitney",
    "q_mannwhitney",
    "hedges_g",
    "hedges_g_low",
    "hedges_g_high",
    "note",
)

_ADJUSTED = (
    "reference",
    "group",
    "n_reference",
    "n_group",
    "n_missing",
    "n_scans",
    "difference",
    "difference_low",
    "difference_high",
    "t",
    "df",
    "p",
    "q",
    "f_groups",
    "df_groups",
    "p_groups",
    "q_groups",
    "partial_eta2",
    "std",
    "note",
)


@dataclass(frozen=True)
class GroupOptions:
    """Which columns hold what."""

    reference: str
    """Group that the others are compared with, such as the controls."""
    group: str = "group"
    value: str = "mean_ppm"
    participant: str = "participant_id"
    by: tuple[str, ...] = ("abbreviation",)
    """Columns whose values are compared apart."""
    covariates: tuple[str, ...] = ("age", "sex")
    """Of the analysis of covariance; numbers as they are, text and booleans as categories."""
    level: float = 0.95


def compare_groups(table: pd.DataFrame, *, options: GroupOptions) -> pd.DataFrame:
    r"""Compare every group with the reference group by t and rank tests.

    Parameters
    ----------
    table : DataFrame
        One row a scan and nucleus; a participant's scans are averaged, so that everyone counts once.
    options : GroupOptions
        Columns and reference group.

    Returns
    -------
    DataFrame
        One row a nucleus and group: the columns of ``options.by``; ``reference`` and ``group``; ``n_reference`` and
        ``n_group`` participants used, ``n_missing`` of the two without a measure, ``n_no_group`` in no group,
        ``n_scans`` averaged; means, standard deviations and ``difference`` (group − reference) with limits in the
        measure's unit; Welch's ``t``, ``df``, ``p_t``; ``u`` and ``p_mannwhitney``; ``hedges_g`` with limits; ``q_t``
        and ``q_mannwhitney``, adjusted over the nuclei (and models) of the same two groups; ``note`` where fewer than 2
        participants are in a group or nothing varies, and the tests are missing.

    Raises
    ------
    InputError
        If a column is missing, nobody is in the reference group, there is no other group, or a participant is in two.

    Notes
    -----
    With :math:`m = n_1 + n_2 - 2` and the pooled standard deviation :math:`s`, Hedges' [1]_
    :math:`g = J(m)\,(\bar x_2 - \bar x_1)/s`, :math:`J(m) = \Gamma(m/2)/(\sqrt{m/2}\,\Gamma((m-1)/2))`; its limits are
    those of the noncentral t distribution, times :math:`J`. All p-values are two-sided. q is Benjamini and Hochberg's.

    References
    ----------
    .. [1] Hedges LV. Distribution theory for Glass's estimator of effect size and related estimators. J Educ Stat 6
       (1981) 107-128. doi:10.3102/10769986006002107
    """
    records = []
    people, others = _people(table, options, means=(options.value,), same=(options.group,))
    for key, rows in each_group(people, options.by):
        for other in others:
            records.append(key | _compare(rows, other, options))
    result = pd.DataFrame(records, columns=[*options.by, *_COMPARED])
    return _with_q(result, {"p_t": "q_t", "p_mannwhitney": "q_mannwhitney"})


def ancova(table: pd.DataFrame, *, options: GroupOptions) -> pd.DataFrame:
    """Compare every group with the reference group at equal age and sex (analysis of covariance).

    Parameters
    ----------
    table : DataFrame
        As in `compare_groups`; numeric covariates are averaged over a participant's scans.
    options : GroupOptions
        Columns, reference group and covariates.

    Returns
    -------
    DataFrame
        One row a nucleus and group: the columns of ``options.by``; ``reference`` and ``group``; ``n_reference`` and
        ``n_group`` participants used, ``n_missing`` of all groups without measure or covariate, ``n_scans`` averaged;
        the adjusted ``difference`` (group − reference) with limits, ``t``, ``df``, ``p``, ``q``; of all groups together
        ``f_groups``, ``df_groups``, ``p_groups``, ``q_groups``, ``partial_eta2``; ``std`` of the residuals; ``note``
        where nothing can be fitted or nothing varies, and all of these are missing. q is adjusted over the nuclei (and
        models).

    Raises
    ------
    InputError
        As in `compare_groups`, or if a category other than the group changes within a participant.

    Notes
    -----
    One linear model a nucleus with all groups in it and equal slopes in all; the groups' F-test compares it with the
    model without groups.
    """
    need_columns(table, *options.covariates)
    numeric = [name for name in options.covariates if _is_number(table[name])]
    categories = [name for name in options.covariates if name not in numeric]
    people, others = _people(table, options, means=(options.value, *numeric), same=(options.group, *categories))
    records = []
    for key, rows in each_group(people, options.by):
        records += [key | record for record in _ancova(rows, others, numeric, categories, options)]
    result = pd.DataFrame(records, columns=[*options.by, *_ADJUSTED])
    return _with_q(result, {"p": "q", "p_groups": "q_groups"})


def hedges_g(reference: Floats, group: Floats, *, level: float = 0.95) -> tuple[float, float, float]:
    """Hedges' g of group − reference and its limits; missing where neither varies.

    Parameters
    ----------
    reference, group : ndarray
        At least 2 finite values each.
    level : float
        Of the limits.
    """
    n_1, n_2 = reference.size, group.size
    m = n_1 + n_2 - 2
    pooled = math.sqrt(((n_1 - 1) * reference.var(ddof=1) + (n_2 - 1) * group.var(ddof=1)) / m)
    if pooled == 0:
        return math.nan, math.nan, math.nan
    d = (group.mean() - reference.mean()) / pooled
    correction = math.exp(gammaln(m / 2) - gammaln((m - 1) / 2)) / math.sqrt(m / 2)
    unit = math.sqrt(1 / n_1 + 1 / n_2)
    low, high = (_noncentrality(d / unit, m, quantile) for quantile in ((1 + level) / 2, (1 - level) / 2))
    return correction * d, correction * low * unit, correction * high * unit


def _noncentrality(observed: float, m: int, quantile: float) -> float:
    """Noncentrality whose t distribution has `observed` at `quantile`."""

    def excess(centre: float) -> float:
        share = float(nct.cdf(observed, m, centre))
        if math.isnan(share):  # far out, where the series underflows
            share = 1.0 if centre < observed else 0.0
        return share - quantile

    width = 10 + 3 * abs(observed)
    return float(brentq(excess, observed - width, observed + width))


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _people(
    table: pd.DataFrame, options: GroupOptions, *, means: tuple[str, ...], same: tuple[str, ...]
) -> tuple[pd.DataFrame, list[Any]]:
    """One row a participant and nucleus, and the groups beside the reference."""
    numbers(table, options.value)
    people = per_participant(table, participant=options.participant, by=options.by, means=means, same=same)
    groups = sorted(people[options.group].dropna().unique(), key=str)
    if options.reference not in groups:
        shown = ", ".join(map(str, groups)) or "none"
        raise InputError(
            f"participants.tsv: nobody has {options.group} {options.reference} (there are: {shown}); "
            "name the group to compare with"
        )
    others = [group for group in groups if group != options.reference]
    if not others:
        raise InputError(f"participants.tsv: everybody has {options.group} {options.reference}; nothing to compare")
    return people, others


def _compare(rows: pd.DataFrame, other: Any, options: GroupOptions) -> dict[str, Any]:
    """Test one nucleus between two groups."""
    group = rows[options.group]
    pair = rows[group.isin([options.reference, other])]
    there = pair.dropna(subset=[options.value])
    x, y = (
        there.loc[there[options.group] == name, options.value].to_numpy(np.float64)
        for name in (options.reference, other)
    )
    record: dict[str, Any] = {
        "reference": options.reference,
        "group": other,
        "n_reference": x.size,
        "n_group": y.size,
        "n_missing": len(pair) - len(there),
        "n_no_group": int(group.isna().sum()),
        "n_scans": int(there["n_scans"].sum()),
        "note": "",
    }
    if min(x.size, y.size) < _N_GROUP:
        return record | {"note": f"not compared: {x.size} and {y.size} participants, a group needs {_N_GROUP}"}
    record |= {
        "mean_reference": x.mean(),
        "mean_group": y.mean(),
        "std_reference": x.std(ddof=1),
        "std_group": y.std(ddof=1),
        "difference": y.mean() - x.mean(),
    }
    if is_constant(x) and is_constant(y):
        return record | {"note": _NO_SPREAD}
    ranks = mannwhitneyu(y, x)
    g, g_low, g_high = hedges_g(x, y, level=options.level)
    return (
        record
        | _welch(x, y, options.level)
        | {
            "u": ranks.statistic,
            "p_mannwhitney": ranks.pvalue,
            "hedges_g": g,
            "hedges_g_low": g_low,
            "hedges_g_high": g_high,
        }
    )


def _welch(x: Floats, y: Floats, level: float) -> dict[str, float]:
    """Difference of means without taking the variances for equal."""
    parts = np.array([values.var(ddof=1) / values.size for values in (x, y)])
    error = math.sqrt(parts.sum())
    free = parts.sum() ** 2 / (parts**2 / (np.array([x.size, y.size]) - 1)).sum()
    difference = float(y.mean() - x.mean())
    half = float(t.ppf((1 + level) / 2, free)) * error
    return {
        "difference_low": difference - half,
        "difference_high": difference + half,
        "t": difference / error,
        "df": float(free),
        "p_t": 2 * float(t.sf(abs(difference / error), free)),
    }


def _ancova(
    rows: pd.DataFrame, others: list[Any], numeric: list[str], categories: list[str], options: GroupOptions
) -> list[dict[str, Any]]:
    """Fit one nucleus; a record a group."""
    there = rows.dropna(subset=[options.value, options.group, *numeric, *categories])
    group = there[options.group].to_numpy(object)
    counts = {name: int((group == name).sum()) for name in (options.reference, *others)}
    records: list[dict[str, Any]] = [
        {
            "reference": options.reference,
            "group": name,
            "n_reference": counts[options.reference],
            "n_group": counts[name],
            "n_missing": int(rows[options.group].notna().sum()) - len(there),
            "n_scans": int(there["n_scans"].sum()),
            "note": "",
        }
        for name in others
    ]
    kept = [name for name in others if counts[name]]
    design = np.column_stack([_covariates(there, numeric, categories), *(group == name for name in kept)])
    y = there[options.value].to_numpy(np.float64)
    free = len(y) - design.shape[1]
    reason = ""
    if not counts[options.reference] or not kept:
        reason = "not fitted: participants of one group only"
    elif free < 1:
        reason = f"not fitted: {len(y)} participants for {design.shape[1]} terms"
    elif np.linalg.matrix_rank(design) < design.shape[1]:
        reason = "not fitted: groups and covariates cannot be told apart"
    elif all(is_constant(y[group == name]) for name in (options.reference, *kept)):
        reason = _NO_SPREAD
    elif _solve(design, y)[1] <= _ROUNDING * float((y**2).sum()):
        reason = "not tested: the values do not vary beyond groups and covariates"
    if reason:
        return [record | {"note": reason} for record in records]
    terms = _terms(design, y, n_tested=len(kept), level=options.level)
    return [
        record | (terms[kept.index(record["group"])] if record["group"] in kept else {"note": "nobody in the group"})
        for record in records
    ]


def _covariates(there: pd.DataFrame, numeric: list[str], categories: list[str]) -> Floats:
    """Intercept, numbers around their means, indicators; terms that do not vary are left out."""
    columns: list[Floats] = [np.ones(len(there))]
    for name in numeric:
        values = there[name].to_numpy(np.float64)
        if values.size and np.ptp(values) > 0:
            columns.append((values - values.mean()) / values.std())
    for name in categories:
        codes, levels = pd.factorize(there[name], sort=True)
        columns += [(codes == level).astype(np.float64) for level in range(1, len(levels))]
    return np.column_stack(columns)


def _terms(design: Floats, y: Floats, *, n_tested: int, level: float) -> list[dict[str, float]]:
    """Test the last columns of a design, one by one and together."""
    free = len(y) - design.shape[1]
    solution, rss = _solve(design, y)
    _, rss_without = _solve(design[:, :-n_tested], y)
    inverse = np.linalg.inv(design.T @ design)
    variance = rss / free
    f_groups = (rss_without - rss) / n_tested / variance if variance > 0 else math.nan
    together = {
        "df": free,
        "f_groups": f_groups,
        "df_groups": n_tested,
        "p_groups": float(f_distribution.sf(f_groups, n_tested, free)),
        "partial_eta2": (rss_without - rss) / rss_without if rss_without > 0 else math.nan,
        "std": math.sqrt(variance),
    }
    records = []
    for term in range(design.shape[1] - n_tested, design.shape[1]):
        error = math.sqrt(variance * inverse[term, term])
        statistic = solution[term] / error if error > 0 else math.nan
        half = float(t.ppf((1 + level) / 2, free)) * error
        records.append(
            together
            | {
                "difference": solution[term],
                "difference_low": solution[term] - half,
                "difference_high": solution[term] + half,
                "t": statistic,
                "p": 2 * float(t.sf(abs(statistic), free)),
            }
        )
    return records


def _solve(design: Floats, y: Floats) -> tuple[Floats, float]:
    solution: Floats = np.asarray(np.linalg.lstsq(design, y)[0])
    return solution, float(((y - design @ solution) ** 2).sum())


def _with_q(result: pd.DataFrame, columns: dict[str, str]) -> pd.DataFrame:
    """Adjust the p-values of the same two groups for the number of nuclei."""
    adjusted = result.copy()
    for group in result["group"].unique():
        rows = (result["group"] == group).to_numpy()
        for p, q in columns.items():
            adjusted.loc[rows, q] = false_discovery(result.loc[rows, p].to_numpy(np.float64))
    return adjusted
