"""Differences between groups per nucleus, also of their change per year: Welch's test, effect size, ANCOVA."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import gammaln, nctdtr
from scipy.stats import chi2_contingency, ttest_1samp, ttest_ind

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.stats.agreement import CONFIDENCE, is_constant
from bids_dgmseg.stats.regression import (
    Floats,
    average_repeated_scans,
    fit_covariates,
    is_number,
    iter_groups,
    numeric_column,
    require_columns,
)

_NO_SPREAD = "not tested: the values do not vary within the groups"

UNBALANCED = 0.05
"""p of the chi-square test of group by site below which groups are unbalanced over sites, see `check_sites`."""

_MIN_GROUP = 2
"""Participants of a group that is compared."""

_ROUNDING = 1e-24
"""Residual sum of squares, relative to that of the values, below which it is rounding."""

_COMPARED = (
    "reference group n_reference n_group n_missing n_no_group n_scans mean_reference mean_group std_reference "
    "std_group difference difference_low difference_high t df p_t hedges_g hedges_g_low hedges_g_high note"
).split()

_ADJUSTED = (
    "reference group n_reference n_group n_missing n_scans mean_reference mean_group difference difference_low "
    "difference_high t df p f_groups df_groups p_groups partial_eta2 std hedges_g hedges_g_low hedges_g_high note"
).split()


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Columns and settings of the comparisons."""

    reference: str
    """Reference group, such as the controls."""
    value: str = "mean_ppm"
    by: tuple[str, ...] = ("abbreviation",)
    """Columns that define separate comparisons."""
    covariates: tuple[str, ...] = ("age", "sex")
    """For the analysis of covariance; text and booleans are categories."""
    site: str | None = None
    """Column of sites; groups that are unbalanced over them are noted."""
    site_from: str = "column site"
    """Where the sites come from, for the notes."""


def compare_groups(table: pd.DataFrame, *, options: ComparisonOptions) -> pd.DataFrame:
    r"""Compare each group with the reference group by Welch's t test.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; the scans of a participant are averaged.
    options : ComparisonOptions
        Columns and reference group.

    Returns
    -------
    DataFrame
        One row per nucleus and group: the columns of ``options.by`` and those described in ``columns_group.tsv``, with
        confidence limits of ``difference`` (group − reference) and ``hedges_g``, and ``note``, which states why the
        test is missing, or that the groups are unbalanced over sites.

    Raises
    ------
    InputError
        If a column is missing, the reference group is empty, there is no other group, or a participant has two.

    Notes
    -----
    With :math:`m = n_1 + n_2 - 2` and the pooled standard deviation :math:`s`, Hedges' [1]_
    :math:`g = J(m)\,(\bar x_2 - \bar x_1)/s`, :math:`J(m) = \Gamma(m/2)/(\sqrt{m/2}\,\Gamma((m-1)/2))`; its limits
    are those of the noncentral t distribution, multiplied by :math:`J`. All p values are two-sided.

    References
    ----------
    .. [1] Hedges LV. Distribution theory for Glass's estimator of effect size and related estimators. J Educ Stat 6
       (1981) 107-128. doi:10.3102/10769986006002107
    """
    same = ("group", *([options.site] if options.site else []))
    participants, others = _participants(table, options, means=(options.value,), same=same)
    records = [
        key | _compare(rows, other, options) for key, rows in iter_groups(participants, options.by) for other in others
    ]
    return pd.DataFrame(records, columns=[*options.by, *_COMPARED])


def ancova(table: pd.DataFrame, *, options: ComparisonOptions) -> pd.DataFrame:
    r"""Compare each group with the reference group by analysis of covariance.

    Parameters
    ----------
    table : DataFrame
        As in `compare_groups`; numeric covariates are averaged over the scans of a participant.
    options : ComparisonOptions
        Columns, reference group and covariates.

    Returns
    -------
    DataFrame
        As in `compare_groups`: the adjusted means and their ``difference`` with its t test, the F test of all groups
        (``_groups``), ``std`` of the residuals and ``hedges_g``, the difference in units of it; ``n_missing`` counts
        all groups.

    Raises
    ------
    InputError
        As in `compare_groups`, or if a categorical covariate varies within a participant.

    Notes
    -----
    One linear model per nucleus with all groups and common slopes; the F test compares it with the model without them.
    A difference that groups and covariates do not determine together (all patients at a site without controls) is
    missing, with a note; those of other groups are estimated, but not the F test. A group of one participant is left
    out. Adjusted means are predictions at the means of the covariates over all participants of the model (of a
    category, the shares of its levels). ``hedges_g`` is :math:`J(m)\,b/s` with the difference :math:`b`, the residual
    standard deviation :math:`s` and its :math:`m` degrees of freedom (`compare_groups` has :math:`J`).
    """
    require_columns(table, *options.covariates)
    numeric = [name for name in options.covariates if is_number(table[name])]
    categories = [name for name in options.covariates if name not in numeric]
    means, same = (options.value, *numeric), ("group", *categories)
    participants, others = _participants(table, options, means=means, same=same)
    records = []
    for key, rows in iter_groups(participants, options.by):
        records += [key | record for record in _ancova(rows, others, options)]
    return pd.DataFrame(records, columns=[*options.by, *_ADJUSTED])


def hedges_g(reference: Floats, group: Floats) -> tuple[float, float, float]:
    """Compute Hedges' g of group − reference (2 or more finite values each) and its limits; NaN if neither varies.

    statsmodels approximates the factor and takes large-sample limits; these are exact.
    """
    n_1, n_2 = reference.size, group.size
    m = n_1 + n_2 - 2
    pooled = math.sqrt(((n_1 - 1) * reference.var(ddof=1) + (n_2 - 1) * group.var(ddof=1)) / m)
    if pooled == 0:
        return math.nan, math.nan, math.nan
    d = (group.mean() - reference.mean()) / pooled
    return _standardize(d, unit=math.sqrt(1 / n_1 + 1 / n_2), df=m)


def _standardize(d: float, *, unit: float, df: int) -> tuple[float, float, float]:
    """Correct a standardized difference for small samples; with limits. `unit` is its standard error for known SD."""
    if df < 2:  # not defined with one degree of freedom
        return math.nan, math.nan, math.nan
    factor = math.exp(gammaln(df / 2) - gammaln((df - 1) / 2)) / math.sqrt(df / 2)
    student = d / unit

    def excess(centre: float, quantile: float) -> float:
        probability = float(nctdtr(df, centre, student))  # scipy.stats.nct.cdf takes ten times as long
        if math.isnan(probability):  # the series underflows far from the centre
            probability = 1.0 if centre < student else 0.0
        return probability - quantile

    # The noncentralities of the t distributions that have the observed value at the quantiles.
    width = 10 + 3 * abs(student)
    low, high = (
        float(brentq(excess, student - width, student + width, args=(quantile,)))
        for quantile in ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2)
    )
    return factor * d, factor * low * unit, factor * high * unit


def _participants(
    table: pd.DataFrame, options: ComparisonOptions, *, means: tuple[str, ...], same: tuple[str, ...]
) -> tuple[pd.DataFrame, list[Any]]:
    """One row per participant and nucleus, and the groups other than the reference."""
    numeric_column(table, options.value)
    averaged = average_repeated_scans(table, by=options.by, means=means, same=same)
    columns = ["group", *([options.site] if options.site in same else [])]
    participants = averaged.astype(dict.fromkeys(columns, "category"))  # rows are selected by them many times
    groups = sorted(participants["group"].dropna().unique(), key=str)
    if options.reference not in groups:
        shown = ", ".join(map(str, groups)) or "none"
        raise InputError(
            f"participants.tsv: no participant has group {options.reference} (existing: {shown}); "
            "choose one of these as reference group"
        )
    others = [group for group in groups if group != options.reference]
    if not others:
        raise InputError(f"participants.tsv: all participants have group {options.reference}; nothing to compare")
    return participants, others


def _compare(rows: pd.DataFrame, other: Any, options: ComparisonOptions) -> dict[str, Any]:
    """Test one nucleus between two groups."""
    group = rows["group"]
    pair = rows[group.isin([options.reference, other])]
    complete = pair.dropna(subset=[options.value])
    x, y = (
        complete.loc[complete["group"] == name, options.value].to_numpy(np.float64)
        for name in (options.reference, other)
    )
    record: dict[str, Any] = {"reference": options.reference, "group": other, "n_reference": x.size, "n_group": y.size}
    record |= {"n_missing": len(pair) - len(complete), "n_no_group": int(group.isna().sum())}
    record |= {"n_scans": int(complete["n_scans"].sum()), "note": ""}
    if min(x.size, y.size) < 2:
        return record | {"note": f"not compared: {x.size} and {y.size} participants, a group needs 2"}
    record |= {"mean_reference": x.mean(), "mean_group": y.mean(), "difference": y.mean() - x.mean()}
    record |= {"std_reference": x.std(ddof=1), "std_group": y.std(ddof=1)}
    if is_constant(x) and is_constant(y):
        return record | {"note": _NO_SPREAD}
    record["note"], separable = check_sites(complete, other, options)
    if not separable and options.site in options.covariates:  # unless the user chose to ignore the sites
        return record
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without variance is not a loss of precision
        welch = ttest_ind(y, x, equal_var=False)
        low, high = welch.confidence_interval(CONFIDENCE)
    g, g_low, g_high = hedges_g(x, y)
    record |= {"difference_low": low, "difference_high": high}
    record |= {"t": welch.statistic, "df": welch.df, "p_t": welch.pvalue}
    return record | {"hedges_g": g, "hedges_g_low": g_low, "hedges_g_high": g_high}


def check_sites(rows: pd.DataFrame, other: Any, options: ComparisonOptions) -> tuple[str, bool]:
    r"""Note whether two groups are unbalanced over sites, and whether any site has both.

    `rows` are the participants of both groups, with one site each.

    Notes
    -----
    Shifts of :math:`S` sites of similar size with variance :math:`\tau^2` multiply the variance of the difference of
    means by about :math:`1 + (\tau/\sigma)^2 \chi^2 / S`, with the chi-square statistic of group by site
    (:math:`\chi^2 = N V^2`, Cramér's V) and the variance :math:`\sigma^2` within sites. Whether a test is biased
    therefore depends on :math:`\chi^2`, not on V alone; groups drawn regardless of site have :math:`\chi^2` around
    :math:`S - 1`, and are called unbalanced in 5 % of the studies.
    """
    if options.site is None:
        return "", True
    counts = rows.groupby(["group", options.site], observed=True).size().unstack(fill_value=0)
    counts = counts.reindex([options.reference, other], fill_value=0)
    if counts.shape[1] < 2:
        return "", True
    if unknown := [str(name) for name in counts.index if not counts.loc[name].any()]:
        whose = " and ".join(unknown)
        return f"groups are compared regardless of site: no site of {whose} is known ({options.site_from})", True
    if not (counts > 0).all().any():
        sites = counts.columns[counts.loc[other] > 0].astype(str)
        where = f"all {other} are at site {list_some(sites)}"
        remedy = f"compare within sites or add {options.reference} there"
        return f"group and site are confounded ({options.site_from}, {where}): {remedy}", False
    if chi2_contingency(counts, False).pvalue >= UNBALANCED:
        return "", True
    remedy = "use" if options.site in options.covariates else f"name {options.site} among the covariates and use"
    return f"groups are unbalanced over sites ({options.site_from}): {remedy} the ancova_ columns", True


def _ancova(rows: pd.DataFrame, others: list[Any], options: ComparisonOptions) -> list[dict[str, Any]]:
    """Fit one nucleus; one record per group."""
    complete = rows.dropna(subset=[options.value, "group", *options.covariates])
    group = complete["group"].to_numpy(object)
    counts = {name: int((group == name).sum()) for name in (options.reference, *others)}
    n_missing = int(rows["group"].notna().sum()) - len(complete)
    shared = {"reference": options.reference, "n_reference": counts[options.reference], "n_missing": n_missing}
    shared |= {"n_scans": int(complete["n_scans"].sum()), "note": ""}
    records: list[dict[str, Any]] = [shared | {"group": name, "n_group": counts[name]} for name in others]
    kept = [name for name in others if counts[name] >= _MIN_GROUP]
    fitted_rows = np.isin(group, [options.reference, *kept])
    complete, group = complete[fitted_rows], group[fitted_rows]
    covariates = fit_covariates(complete[[name for name in options.covariates if complete[name].nunique() > 1]])
    terms = {covariate.name: covariate.columns(complete[covariate.name]) for covariate in covariates}
    terms[""] = np.ones((len(complete), 1))  # the intercept
    design = np.column_stack([*terms.values(), *(group == name for name in kept)]).astype(np.float64)
    y = complete[options.value].to_numpy(np.float64)
    reason, rank = "", int(np.linalg.matrix_rank(design))
    if counts[options.reference] < _MIN_GROUP or not kept:
        shown = " and ".join(str(counts[name]) for name in (options.reference, *others))
        reason = f"not fitted: {shown} participants with all covariates, a group needs {_MIN_GROUP}"
    elif len(y) <= rank:
        reason = f"not fitted: {len(y)} participants for {rank} terms"
    elif all(is_constant(y[group == name]) for name in (options.reference, *kept)):
        reason = _NO_SPREAD
    if reason:
        return [record | {"note": reason} for record in records]
    is_full = rank == design.shape[1]
    confounded = {name: "" if is_full else _confounding(complete, name, kept, terms, options) for name in kept}
    few = {name: f"not compared: {counts[name]} participant(s), a group needs {_MIN_GROUP}" for name in others}
    notes = few | confounded
    if all(notes.values()):
        return [record | {"note": notes[record["group"]]} for record in records]
    common, fitted = _fit_groups(y, design, n_groups=len(kept))
    if not fitted:
        note = "not tested: the values do not vary beyond groups and covariates"
        return [record | {"note": note} for record in records]
    means: dict[str, dict[str, float]] = {name: {} for name in others}
    if any(confounded.values()):  # some of the groups cannot be tested together
        common = {name: common[name] for name in ("df", "std")}
    else:
        shifts = {name: fit["difference"] for name, fit in zip(kept, fitted, strict=True)}
        mean = float(y.mean()) - sum(shift * float((group == name).mean()) for name, shift in shifts.items())
        means |= {name: {"mean_reference": mean, "mean_group": mean + shift} for name, shift in shifts.items()}
    return [
        record | (common | means[name] | fitted[kept.index(name)] if not notes[name] else {"note": notes[name]})
        for name, record in zip(others, records, strict=True)
    ]


def _confounding(
    complete: pd.DataFrame, name: Any, kept: list[Any], terms: dict[str, Floats], options: ComparisonOptions
) -> str:
    """Return why the difference between a group and the reference group cannot be estimated; empty if it can."""
    group = complete["group"]

    def estimable(omitted: str | None = None) -> bool:
        others = [group == other for other in kept if other != name]
        columns = np.column_stack([*(term for key, term in terms.items() if key != omitted), *others])
        rank, rank_without = map(np.linalg.matrix_rank, (np.column_stack([columns, group == name]), columns))
        return bool(rank > rank_without)

    if estimable():
        return ""
    # the covariates without which it could be estimated; if several are needed for that, all
    guilty = [key for key in terms if key and estimable(key)] or [key for key in terms if key]
    pair = complete[group.isin([options.reference, name])]
    if options.site in guilty and not (checked := check_sites(pair, name, options))[1]:
        return checked[0]
    where = ""
    if len(guilty) == 1 and len(values := complete.loc[group == name, guilty[0]].unique()) == 1:
        where = f" (all {name} have {guilty[0]} {values[0]})"
    columns = " and ".join(guilty)
    return f"group and {columns} are confounded{where}: add participants or leave {columns} out of the covariates"


def _fit_groups(y: Floats, design: Floats, *, n_groups: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """F test of the last `n_groups` columns of a design and a t test of each; none without residual variance."""
    from statsmodels.regression.linear_model import OLS  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # redundant columns do not change the differences that are reported
        fit, without_groups = OLS(y, design).fit(), OLS(y, design[:, :-n_groups]).fit()
    if fit.ssr <= _ROUNDING * float((y**2).sum()):
        return {}, []
    f_groups, p_groups, df_groups = fit.compare_f_test(without_groups)
    common = {"df": int(fit.df_resid), "f_groups": f_groups, "df_groups": int(df_groups), "p_groups": p_groups}
    common |= {"partial_eta2": (without_groups.ssr - fit.ssr) / without_groups.ssr, "std": math.sqrt(fit.mse_resid)}
    limits = fit.conf_int(1 - CONFIDENCE)
    names = ("difference", "difference_low", "difference_high", "t", "p")
    values = np.column_stack([fit.params, limits, fit.tvalues, fit.pvalues])[-n_groups:].tolist()
    std, effects = math.sqrt(fit.mse_resid), ("hedges_g", "hedges_g_low", "hedges_g_high")
    standardized = [
        _standardize(shift / std, unit=error / std, df=int(fit.df_resid))
        for shift, error in zip(fit.params[-n_groups:].tolist(), fit.bse[-n_groups:].tolist(), strict=True)
    ]
    return common, [
        dict(zip(names, row, strict=True)) | dict(zip(effects, effect, strict=True))
        for row, effect in zip(values, standardized, strict=True)
    ]


_SLOPES = ("n_scans", "n_missing", "years", "first", "change_per_year", "site_change", "note")

_SUMMARY = (
    "group n n_single n_site_change n_scans years_median change_per_year change_low change_high std t df p reference "
    "difference difference_low difference_high p_difference note"
).split()


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
    by: tuple[str, ...] = ("abbreviation",),
    reference: str | None = None,
) -> Change:
    """Regress the scans of each participant on time, test the mean slopes against 0 and compare them between groups.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``participant_id`` and, if known, ``group`` (one per participant) and ``site``;
        measures and times are numeric, NaN where missing. Participants scanned at several sites have a slope, but are
        left out of the tests: it contains the difference between the sites.
    time : str
        Column of the age at the scan or the time since the first, in years.
    value : str
        Column of the measure.
    by : tuple of str
        Columns that define separate regressions.
    reference : str, optional
        Group that the others are compared with.

    Returns
    -------
    Change
        ``participants`` has one row per nucleus and participant with the least-squares slope ``change_per_year``.
        ``summary`` has one row per nucleus for all participants and, with several groups, one for each: the mean slope,
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
    require_columns(table, "participant_id", *by)
    plain = table.assign(**{column: numeric_column(table, column) for column in (time, value)})
    slopes = _slopes(plain, [*by, "participant_id"], time=time, value=value)
    if slopes["change_per_year"].isna().all():
        raise InputError(
            f"group table: no participant has scans at two values of {time}; give each session a value in years"
        )
    groups: Any = table.groupby("participant_id")["group"].first() if "group" in table else {}
    slopes["group"] = slopes["participant_id"].map(groups)
    names = sorted(slopes["group"].dropna().unique(), key=lambda name: (name != reference, str(name)))
    records = []
    for key, rows in iter_groups(slopes, by):
        records.append(key | {"group": "all groups" if "all" in names else "all"} | _test_change(rows))
        if len(names) > 1:
            records += [key | {"group": name} | _test_change(rows[rows["group"] == name]) for name in names]
    summary = pd.DataFrame(records)
    tested = slopes[~slopes["site_change"]].dropna(subset=["change_per_year", "group"])
    if reference in (tested_groups := set(tested["group"].unique())) and len(tested_groups) > 1:
        options = ComparisonOptions(reference=str(reference), value="change_per_year", by=by)
        welch = compare_groups(tested, options=options).rename(columns={"p_t": "p_difference"})
        compared = [column for column in _SUMMARY if column in welch and column not in summary]
        welch = welch[[*by, "group", *compared]].assign(_note=welch["note"])
        summary = summary.merge(welch, on=[*by, "group"], how="left", validate="1:1")
        notes = summary[["note", "_note"]].fillna("").to_numpy().tolist()
        summary["note"] = ["; ".join(dict.fromkeys(filter(None, both))) for both in notes]
    return Change(slopes[[*by, "participant_id", "group", *_SLOPES]], summary.reindex(columns=[*by, *_SUMMARY]))


def _test_change(rows: pd.DataFrame) -> dict[str, Any]:
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
        low, high = test.confidence_interval(CONFIDENCE)
        record |= {"change_low": low, "change_high": high, "std": changes.std(ddof=1), "note": ""}
        record |= {"t": test.statistic, "df": test.df, "p": test.pvalue}
    return record


def _slopes(table: pd.DataFrame, keys: list[str], *, time: str, value: str) -> pd.DataFrame:
    """Slope of each participant and nucleus, vectorized: a cohort has a hundred thousand of them."""
    number = table.groupby(keys, sort=False, dropna=False, observed=True).ngroup()  # text is slow to group by: once
    # In the order of the table; participants without a usable scan have a row too.
    result = table.loc[~number.duplicated(), keys].reset_index(drop=True)
    sites = table["site"] if "site" in table else np.nan
    scans = pd.DataFrame({"number": number, "time": table[time], "value": table[value], "site": sites})
    is_complete = np.isfinite(scans[["time", "value"]].to_numpy(np.float64)).all(axis=1)
    complete = scans.loc[is_complete].sort_values("time", kind="stable")
    grouped = complete.groupby("number")
    times = grouped["time"]
    years = complete["time"] - times.transform("mean")
    products = {"xy": years * (complete["value"] - grouped["value"].transform("mean")), "xx": years**2}
    sums = pd.DataFrame(products).groupby(complete["number"]).sum()
    result["n_scans"] = times.size().reindex(result.index, fill_value=0)
    result["n_missing"] = np.bincount(number) - result["n_scans"]
    result["years"] = times.max() - times.min()
    result["first"] = grouped["value"].first()
    has_slope = (result["years"] > 0) & (result["n_scans"] > 1)
    result["change_per_year"] = (sums["xy"] / sums["xx"].where(sums["xx"] > 0)).where(has_slope)
    result["site_change"] = (grouped["site"].nunique() > 1).reindex(result.index, fill_value=False)
    start = times.min().reindex(result.index)
    result["note"] = [
        "" if has_change else f"no change: {n} scans" if n < 2 else f"no change: all scans at {year:g} years"
        for has_change, n, year in zip(has_slope, result["n_scans"], start, strict=True)
    ]
    result.loc[result["site_change"] & has_slope, "note"] = "site changes between sessions: not in the tests"
    return result
