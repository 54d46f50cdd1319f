"""Relations with clinical variables: partial correlation and regression, mixed models of repeated scans."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from bids_dgmseg.stats.agreement import is_constant
from bids_dgmseg.stats.hypothesis_tests import adjust_p_values
from bids_dgmseg.stats.long_table import Floats, average_repeated_scans, covariate_matrix, iter_groups, require_columns

_COLUMNS = (
    "n n_missing n_scans r r_low r_high slope slope_low slope_high t df p q mixed_n_scans mixed_slope mixed_low "
    "mixed_high mixed_z mixed_p mixed_q note"
).split()

_CHANGE_COLUMNS = (
    "group n n_scans change_per_year change_low change_high z p q std_between std_within reference difference "
    "difference_low difference_high p_difference q_difference note"
).split()

_EXACT = 1 - 1e-12
"""Correlations beyond it have no confidence interval."""

_VALUES = ("participant_id", "group", "x", "value", "value_adjusted")


@dataclass(frozen=True, kw_only=True)
class ClinicalOptions:
    """Columns and settings."""

    variable: str
    """Column of the clinical variable, numbers."""
    value: str = "mean_ppm"
    participant: str = "participant_id"
    by: tuple[str, ...] = ("abbreviation",)
    covariates: tuple[str, ...] = ("age", "sex", "site")
    """Text and booleans are categories."""
    group: str | None = "group"
    level: float = 0.95


def correlate(table: pd.DataFrame, *, options: ClinicalOptions) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Relate a measure to a clinical variable at equal covariates, per nucleus.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus. For the partial correlation, numbers are averaged over the scans of a participant.
    options : ClinicalOptions

    Returns
    -------
    relations : DataFrame
        One row per nucleus: the partial correlation ``r`` with its limits, the ``slope`` (unit of the measure per unit
        of the variable) with limits, t test and false discovery rate over the nuclei. If participants have several
        scans, ``mixed_`` are the slope and its Wald test in a mixed model of all scans.
    values : DataFrame
        One row per nucleus and participant: the variable ``x``, the measure ``value`` and ``value_adjusted``, the
        measure at the means of the covariates.

    Notes
    -----
    With the t statistic of the variable in the least-squares regression :math:`y \sim x + Z` and its :math:`m` degrees
    of freedom, :math:`r = t/\sqrt{t^2 + m}` (the correlation of the residuals of y and x on Z). The limits are those of
    Fisher's z with standard error :math:`1/\sqrt{n - k - 3}` for :math:`k` columns of Z without the intercept [1]_. The
    mixed model has the same fixed effects and a random intercept per participant, see `fit_random_intercept`.

    References
    ----------
    .. [1] Fisher RA. The distribution of the partial correlation coefficient. Metron 3 (1924) 329-332.
    """
    names = (options.variable, *options.covariates)
    require_columns(table, *names, options.value, options.participant, *options.by)
    numeric = [name for name in names if _is_number(table[name])]
    same = [name for name in (*options.covariates, options.group) if name and name not in numeric]
    people = average_repeated_scans(
        table, participant=options.participant, by=options.by, means=(options.value, *numeric), same=same
    )
    who = table[options.participant]  # of whom one session may lack what another states
    known = {name: who.astype(object).map(table.groupby(who)[name].first()) for name in same}
    scans = dict(_complete(table.assign(**known), names, options))
    with_variable = {
        tuple(key.values()): rows.loc[rows[options.variable].notna(), options.participant].nunique()
        for key, rows in iter_groups(table, options.by)
    }
    records, parts = [], []
    for key, rows in iter_groups(people, options.by):
        record, values = _correlate(rows, options)
        record["n_missing"] = with_variable[tuple(key.values())] - record["n"]
        mixed = _correlate_scans(scans.get(tuple(key.values())), options) if "slope" in record else {}
        records.append(key | record | mixed)
        if values is not None:
            parts.append(values.assign(**key))
    result = pd.DataFrame(records, columns=[*options.by, *_COLUMNS])
    for p, q in (("p", "q"), ("mixed_p", "mixed_q")):
        result[q] = adjust_p_values(result[p].to_numpy(np.float64), method="fdr")
    columns = [*options.by, *_VALUES]
    return result, pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _complete(table: pd.DataFrame, names: Sequence[str], options: ClinicalOptions) -> list[tuple[Any, pd.DataFrame]]:
    """Return the scans of each nucleus that have everything, by the values of the columns that define it."""
    known = table.dropna(subset=[options.value, *names])
    return [(tuple(key.values()), rows) for key, rows in iter_groups(known, options.by)]


def _correlate(rows: pd.DataFrame, options: ClinicalOptions) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Fit one nucleus."""
    from statsmodels.regression.linear_model import OLS  # slow to import

    known = rows.dropna(subset=[options.value, options.variable, *options.covariates])
    x, y = (known[name].to_numpy(np.float64) for name in (options.variable, options.value))
    record: dict[str, Any] = {"n": len(known), "n_scans": int(known["n_scans"].sum()), "note": ""}
    if len(known) < 4 or is_constant(x) or is_constant(y):
        return record | {"note": f"not tested: {len(known)} participants, or all values are the same"}, None
    others = _others(known, options)
    design = np.column_stack([(x - x.mean()) / x.std(), np.ones(len(x)), others])
    rank, rank_without = (int(np.linalg.matrix_rank(part)) for part in (design, design[:, 1:]))
    if rank == rank_without:
        names = " and ".join(options.covariates)
        return record | {"note": f"not tested: {options.variable} is determined by {names}"}, None
    if len(y) - rank < 1:
        return record | {"note": f"not tested: {len(y)} participants for {rank} terms"}, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # redundant columns of covariates do not change the slope
        fit = OLS(y, design).fit()
    if not fit.ssr > 1e-24 * float((y**2).sum()):
        return record | {"note": "not tested: the covariates determine the values"}, None
    scale, t = float(x.std()), float(fit.tvalues[0])
    low, high = (float(limit) / scale for limit in fit.conf_int(1 - options.level)[0])
    df = int(fit.df_resid)
    r = t / math.sqrt(t**2 + df)
    record |= {"r": r, "slope": float(fit.params[0]) / scale, "slope_low": low, "slope_high": high}
    record |= {"t": t, "df": df, "p": float(fit.pvalues[0])}
    if abs(r) < _EXACT and (free := len(y) - (rank_without - 1) - 3) > 0:
        half = norm.ppf((1 + options.level) / 2) / math.sqrt(free)
        record |= {"r_low": math.tanh(math.atanh(r) - half), "r_high": math.tanh(math.atanh(r) + half)}
    record["note"] = _pooled_groups(known, options)
    centred = others - others.mean(axis=0)
    values = pd.DataFrame(
        {
            "participant_id": known[options.participant].to_numpy(object),
            "group": known[options.group].to_numpy(object) if options.group else None,
            "x": x,
            "value": y,
            "value_adjusted": y - centred @ fit.params[2:],
        }
    )
    return record, values


def _others(known: pd.DataFrame, options: ClinicalOptions) -> Floats:
    """Return the covariates as columns, without those that do not vary."""
    columns = covariate_matrix(known[list(options.covariates)].reset_index(drop=True))
    return columns[:, np.ptp(columns, axis=0) > 0] if len(known) else columns


def _with_covariates(terms: Floats, rows: pd.DataFrame, covariates: Sequence[str]) -> Floats:
    """Return the terms and the columns of the covariates, without those that terms and other covariates determine."""
    design = np.column_stack([np.ones(len(rows)), terms])
    for column in covariate_matrix(rows[list(covariates)].reset_index(drop=True)).T:
        wider = np.column_stack([design, column])
        if np.linalg.matrix_rank(wider) > np.linalg.matrix_rank(design):
            design = wider
    return design[:, 1:]


def _pooled_groups(known: pd.DataFrame, options: ClinicalOptions) -> str:
    """Note that participants of several groups are pooled, unless the group is a covariate."""
    if not options.group or options.group in options.covariates:
        return ""
    sizes = known[options.group].value_counts()
    if len(sizes) < 2:
        return ""
    shown = ", ".join(f"{name} ({n})" for name, n in sizes.items())
    return f"groups are pooled: {shown}; a relation may be their difference, unless group is among the covariates"


def _correlate_scans(rows: pd.DataFrame | None, options: ClinicalOptions) -> dict[str, Any]:
    """Fit all scans of one nucleus by a mixed model, if any participant has several."""
    if rows is None or not rows[options.participant].duplicated().any():
        return {}
    x = rows[options.variable].to_numpy(np.float64)
    if is_constant(x):
        return {}
    terms = _with_covariates(x[:, None], rows, options.covariates)
    fit = fit_random_intercept(rows[options.value].to_numpy(np.float64), terms, rows[options.participant])
    if fit is None:
        return {"mixed_n_scans": len(rows)}
    low, high = fit.interval(0, options.level)
    return {
        "mixed_n_scans": len(rows),
        "mixed_slope": float(fit.slopes[0]),
        "mixed_low": low,
        "mixed_high": high,
        "mixed_z": float(fit.slopes[0] / fit.errors[0]),
        "mixed_p": fit.p(0),
    }


@dataclass(frozen=True)
class RandomIntercept:
    """A mixed model with a random intercept per participant: slopes of the terms in their order."""

    slopes: Floats
    errors: Floats
    std_between: float
    std_within: float

    def interval(self, place: int, level: float) -> tuple[float, float]:
        """Return the Wald limits of a slope."""
        half = float(norm.ppf((1 + level) / 2) * self.errors[place])
        return float(self.slopes[place]) - half, float(self.slopes[place]) + half

    def p(self, place: int) -> float:
        """Return the two-sided p value of a slope."""
        return float(2 * norm.sf(abs(self.slopes[place] / self.errors[place])))


def fit_random_intercept(y: Floats, terms: Floats, who: pd.Series) -> RandomIntercept | None:
    r"""Fit :math:`y = a + Xb + u_i + e` by restricted maximum likelihood; None if it cannot be fitted.

    With one random intercept the likelihood has one parameter to search for, the ratio
    :math:`\lambda = \sigma_u^2/\sigma_e^2`: a participant's :math:`n_i` values minus
    :math:`1 - 1/\sqrt{1 + n_i\lambda}` times their mean are independent, with equal variance. Their sums of products
    are those of the deviations from the participants' means, plus the means' divided by :math:`1 + n_i\lambda`. Errors
    are those of generalized least squares, as in lme4. statsmodels' MixedLM, with which the tests compare it, takes a
    second per nucleus of a large study.
    """
    spread, sizes = float(y.std()), terms.std(axis=0)
    design = np.column_stack([np.ones(len(y)), (terms - terms.mean(axis=0)) / np.where(sizes > 0, sizes, 1)])
    codes, people = pd.factorize(who)
    n, p = design.shape
    if not spread > 0 or n <= p + 1 or len(people) < 3:
        return None
    scaled = (y - y.mean()) / spread
    start, _, rank, _ = np.linalg.lstsq(design, scaled, rcond=None)
    if rank < p:
        return None
    data = np.column_stack([design, scaled - design @ start])  # of small residuals no digits are lost
    counts = np.bincount(codes)
    means = np.column_stack([np.bincount(codes, weights=column) for column in data.T]) / counts[:, None]
    deviations = data - means[codes]
    within, between = deviations.T @ deviations, {}
    for size in np.unique(counts):
        own = means[counts == size]
        between[int(size)] = size * own.T @ own

    def deviance(ratio: float) -> float:
        products = within + sum(own / (1 + size * ratio) for size, own in between.items())
        sign, logs = np.linalg.slogdet(products[:p, :p])
        if not sign > 0:
            return math.inf
        rss = products[p, p] - products[p, :p] @ np.linalg.solve(products[:p, :p], products[:p, p])
        return float((n - p) * np.log(max(rss, 1e-300)) + np.log(1 + counts * ratio).sum() + logs)

    grid = np.linspace(-12, 12, 49)
    best = float(grid[int(np.argmin([deviance(math.exp(u)) for u in grid]))])
    found = minimize_scalar(lambda u: deviance(math.exp(u)), bounds=(best - 0.5, best + 0.5), method="bounded")
    ratio = math.exp(found.x) if deviance(math.exp(found.x)) < deviance(0.0) else 0.0
    share = 1 - 1 / np.sqrt(1 + counts * ratio)
    whitened = data - share[codes, None] * means[codes]
    inverse = np.linalg.inv(whitened[:, :p].T @ whitened[:, :p])
    change = inverse @ whitened[:, :p].T @ whitened[:, p]
    variance = float(((whitened[:, p] - whitened[:, :p] @ change) ** 2).sum() / (n - p))
    if not variance > 1e-20:
        return None
    errors = np.sqrt(variance * np.diag(inverse))
    slopes, errors = (part[1:] * spread / sizes for part in (start + change, errors))
    std_within = spread * math.sqrt(variance)
    return RandomIntercept(slopes, errors, std_within * math.sqrt(ratio), std_within)


def mixed_changes(
    table: pd.DataFrame,
    *,
    time: str = "years",
    value: str = "mean_ppm",
    participant: str = "participant_id",
    by: tuple[str, ...] = ("abbreviation",),
    covariates: Sequence[str] = (),
    group: str | None = None,
    reference: str | None = None,
    level: float = 0.95,
    pooled: str = "all",
) -> pd.DataFrame:
    """Estimate the change per year of all scans by mixed models, over all participants and per group.

    Unlike the mean of the participants' slopes, it gives those with more and further spaced scans more weight, and uses
    single scans. Fixed effects are the time since each participant's first scan, its own mean by the random intercept,
    the covariates (numbers at the first scan) and, for the rows of groups, group and group by time.

    Returns
    -------
    DataFrame
        One row per nucleus for all participants (group `pooled`) and, with `group`, one per group.
    """
    start = table.groupby(participant)[time].transform("min")
    first = table.sort_values(time, kind="stable").groupby(participant)
    # Values that are mapped from categories can be categories: ages would count as names, not as numbers.
    people = table[participant].astype(object)
    own = (*covariates, *([group] if group else []))  # a session may lack what another states
    plain = table.assign(_time=table[time] - start, **{name: people.map(first[name].first()) for name in own})
    records = []
    for key, rows in iter_groups(plain.dropna(subset=["_time", value, *covariates]), by):
        if not (rows.groupby(participant)["_time"].nunique() > 1).any():
            continue
        records += [
            key | record
            for record in _mixed_change(rows, value, participant, covariates, group, reference, level, pooled)
        ]
    result = pd.DataFrame(records, columns=[*by, *_CHANGE_COLUMNS])
    for name in result["group"].unique():
        chosen = (result["group"] == name).to_numpy()
        for p, q in (("p", "q"), ("p_difference", "q_difference")):
            result.loc[chosen, q] = adjust_p_values(result.loc[chosen, p].to_numpy(np.float64), method="fdr")
    return result


def _mixed_change(
    rows: pd.DataFrame,
    value: str,
    participant: str,
    covariates: Sequence[str],
    group: str | None,
    reference: str | None,
    level: float,
    pooled: str,
) -> list[dict[str, Any]]:
    """Fit one nucleus: all participants, and each group with the reference group."""

    def fit(chosen: pd.DataFrame, extra: Sequence[Floats] = ()) -> RandomIntercept | None:
        times = np.column_stack([chosen["_time"].to_numpy(np.float64), *extra])
        terms = _with_covariates(times, chosen, covariates)
        return fit_random_intercept(chosen[value].to_numpy(np.float64), terms, chosen[participant])

    def describe(chosen: pd.DataFrame, name: Any) -> dict[str, Any]:
        record = {"group": name, "n": chosen[participant].nunique(), "n_scans": len(chosen), "note": ""}
        found = fit(chosen)
        if found is None:
            return record | {"note": "not fitted: too few scans, or no variation"}
        low, high = found.interval(0, level)
        record |= {"change_per_year": float(found.slopes[0]), "change_low": low, "change_high": high}
        record |= {"z": float(found.slopes[0] / found.errors[0]), "p": found.p(0)}
        return record | {"std_between": found.std_between, "std_within": found.std_within}

    records = [describe(rows, pooled)]
    names = sorted(rows[group].dropna().unique(), key=str) if group else []
    if len(names) < 2:
        return records
    fitted: set[Any] = set()
    for name in sorted(names, key=lambda other: (other != reference, str(other))):
        record = describe(rows[rows[group] == name], name)
        fitted |= {name} if "p" in record else set()
        if name != reference and {name, reference} <= fitted:
            pair = rows[rows[group].isin([reference, name])]
            is_group = (pair[group] == name).to_numpy(np.float64)
            found = fit(pair, [is_group * pair["_time"].to_numpy(np.float64), is_group])
            if found is not None:
                low, high = found.interval(1, level)
                record |= {"reference": reference, "difference": float(found.slopes[1])}
                record |= {"difference_low": low, "difference_high": high, "p_difference": found.p(1)}
        records.append(record)
    return records
