"""ComBat harmonization across sites, preserving covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.long_table import Floats, covariate_matrix, natural_spline

N_SITE = 3
"""Minimum number of participants to estimate the shift and scale of a site."""

_CONVERGED = 1e-10

_MAX_STEPS = 1000


@dataclass(frozen=True)
class Harmonized:
    """Harmonized measures and the site effects removed."""

    values: pd.DataFrame
    """NaN if the raw value, the site or a covariate is missing, or as noted in `sites`."""
    sites: pd.DataFrame
    """One row per site and nucleus: the estimated site effects."""
    variance: pd.DataFrame
    """One row per nucleus: variance between sites before and after."""


@dataclass(frozen=True)
class _Effects:
    """Site effects in units of the residual standard deviation; all of shape (sites, nuclei)."""

    shift: Floats
    variance: Floats
    shift_bayes: Floats
    variance_bayes: Floats


def harmonize(
    values: pd.DataFrame,
    *,
    site: pd.Series,
    covariates: pd.DataFrame | None = None,
    smooth: Sequence[str] = (),
    participant: pd.Series | None = None,
) -> Harmonized:
    r"""Remove the shift and scale of each site by ComBat with empirical Bayes.

    Parameters
    ----------
    values : DataFrame of shape (scans, nuclei)
        One measure, NaN where missing. All nuclei must have the same unit, since their site effects share a prior.
    site : Series of shape (scans,)
        Site or scanner of each scan, in the same order.
    covariates : DataFrame of shape (scans, covariates), optional
        Covariates to preserve, in the same order; text and booleans are categories.
    smooth : sequence of str
        Numeric covariates whose effect is a natural cubic spline with three degrees of freedom instead of a line.
    participant : Series of shape (scans,), optional
        Participant of each scan. Scans of one participant at one site are averaged for the estimates, which are then
        applied to each scan; by default each scan is of another participant.

    Returns
    -------
    Harmonized
        ``sites`` has the least-squares ``shift`` and ``scale``, and ``shift_bayes`` and ``scale_bayes`` as removed,
        with shifts in the unit of `values`; ``variance`` the variance of the site means adjusted for covariates,
        weighted by participants, and p of the F test of sites, before and after; the latter p is only descriptive,
        since the sites were fitted to the same data. All columns are described in ``columns_group.tsv``.

    Raises
    ------
    InputError
        If there is only one site, a site has usable scans of fewer than 3 participants, sites and covariates are
        confounded, or fewer than two nuclei can be harmonized.
    ValueError
        If the lengths differ.

    Notes
    -----
    With nucleus :math:`g`, site :math:`i`, participant :math:`j` [1]_,

    .. math:: Y_{ijg} = \alpha_g + X_{ij}\beta_g + \gamma_{ig} + \delta_{ig}\varepsilon_{ijg}, \qquad
       Y^*_{ijg} = \frac{\hat\sigma_g}{\delta^*_{ig}} (Z_{ijg} - \gamma^*_{ig}) + \hat\alpha_g + X_{ij}\hat\beta_g,

    where :math:`Z` are the residuals of :math:`\hat\alpha + X\hat\beta` divided by :math:`\hat\sigma`, and the starred
    effects are posterior means under a normal prior of :math:`\gamma` and an inverse gamma prior of :math:`\delta^2`
    over the nuclei, iterated to convergence. It was introduced for scanners by [2]_; smooth effects of
    age by [3]_. A nucleus with values of fewer than 3 participants at a site is missing there.

    References
    ----------
    .. [1] Johnson WE, Li C, Rabinovic A. Adjusting batch effects in microarray expression data using empirical Bayes
       methods. Biostatistics 8 (2007) 118-127. doi:10.1093/biostatistics/kxj037
    .. [2] Fortin JP, et al. Harmonization of cortical thickness measurements across scanners and sites. NeuroImage 167
       (2018) 104-120. doi:10.1016/j.neuroimage.2017.11.024
    .. [3] Pomponio R, et al. Harmonization of large MRI datasets for the analysis of brain imaging patterns throughout
       the lifespan. NeuroImage 208 (2020) 116450. doi:10.1016/j.neuroimage.2019.116450
    """
    given = covariates if covariates is not None else pd.DataFrame(index=values.index)
    blocks = {name: covariate_matrix(given[[name]]) for name in given if name not in smooth}
    blocks |= {name: natural_spline(given[name].to_numpy(np.float64, na_value=np.nan)) for name in smooth}
    x = np.hstack([np.zeros((len(given), 0)), *blocks.values()])
    person = np.arange(len(values)) if participant is None else pd.factorize(participant)[0]
    if len(site) != len(values) or len(x) != len(values) or len(person) != len(values):
        raise ValueError(
            f"{len(values)} scans, {len(site)} sites, {len(x)} rows of covariates and {len(person)} participants"
        )
    usable = site.notna().to_numpy() & np.isfinite(x).all(axis=1)
    names, indicator = _sites(site, person, usable)
    scans = np.where(np.isfinite(values) & usable[:, None], values.to_numpy(np.float64), np.nan)
    one_each = [person, indicator.argmax(axis=1), ~usable]  # one row per participant and site

    def average(rows: Floats) -> Floats:
        return pd.DataFrame(rows).groupby(one_each, sort=False).mean().to_numpy()

    raw, at_site, x_mean = average(scans), average(indicator), average(np.column_stack([np.ones(len(x)), x]))[:, 1:]
    owner = np.repeat(list(blocks), np.array([block.shape[1] for block in blocks.values()], int))
    _check_separable(at_site[at_site.any(axis=1)], x_mean[at_site.any(axis=1)], owner)
    y, reasons = _select(raw, at_site, x_mean)
    used = np.array([not reason for reason in reasons])
    centre, centre_mean, std = _standardize(y[:, used], at_site, x_mean, x)
    effects = _estimate((y[:, used] - centre_mean) / std, at_site)
    # A nucleus without values at a site has neither effects nor values there.
    shift = indicator @ np.nan_to_num(effects.shift_bayes)
    scale = np.sqrt(indicator @ np.nan_to_num(effects.variance_bayes, nan=1.0) + (indicator.sum(axis=1) == 0)[:, None])
    z = np.where(indicator @ np.isfinite(effects.shift) > 0, (scans[:, used] - centre) / std, np.nan)
    result = np.full(scans.shape, np.nan)
    result[:, used] = std * (z - shift) / scale + centre
    frame = pd.DataFrame(result, index=values.index, columns=values.columns)
    return Harmonized(
        frame,
        _site_table(frame, names, y=y, at_site=at_site, reasons=reasons, indicator=indicator, effects=effects, std=std),
        _variance_table(values.columns, before=y, after=average(result), indicator=at_site, x=x_mean),
    )


def sites_apart(age: pd.Series, site: pd.Series) -> list[Any]:
    """Return the sites whose ages hardly overlap those of any other.

    These are sites with less than half of the ages within the central 90 % of those of some other site: their effect
    depends on the assumed effect of age.
    """
    ages = {name: group.dropna().to_numpy(np.float64) for name, group in age.groupby(site)}
    ranges = {name: np.quantile(years, [0.05, 0.95]) for name, years in ages.items() if years.size}
    apart = []
    for name in ranges:
        within = [(low <= ages[name]) & (ages[name] <= high) for other, (low, high) in ranges.items() if other != name]
        if within and np.any(within, axis=0).mean() < 0.5:
            apart.append(name)
    return apart


def _sites(site: pd.Series, person: NDArray[np.intp], usable: NDArray[np.bool_]) -> tuple[list[Any], Floats]:
    """Names of the sites, and which usable scan is from which; shape (scans, sites)."""
    codes, levels = pd.factorize(site, sort=True)
    if len(levels) < 2:
        shown = ", ".join(map(str, levels)) or "none"
        raise InputError(f"participants.tsv: scans of only one site ({shown}); harmonization needs two")
    for number, name in enumerate(levels):
        n = len(np.unique(person[usable & (codes == number)]))
        if n < N_SITE:
            n_all = len(np.unique(person[codes == number]))
            lacking = f" ({n_all - n} more lack a covariate)" if n_all > n else ""
            raise InputError(
                f"participants.tsv: site {name} has {n} participants{lacking}, harmonization needs {N_SITE}; merge it "
                "with a site of the same scanner or leave it out"
            )
    indicator = np.zeros((len(site), len(levels)))
    indicator[np.flatnonzero(usable), codes[usable]] = 1
    return list(levels), indicator


def _check_separable(indicator: Floats, x: Floats, owner: NDArray[Any]) -> None:
    """Raise an `InputError` if covariates and sites are confounded; `owner` names the covariate of each column of x."""
    if _identifiable(indicator, x):
        return
    names = list(dict.fromkeys(owner.tolist()))
    # the covariates without which it would be possible; all if more than one of them has to go
    guilty = [name for name in names if _identifiable(indicator, x[:, owner != name])] or names
    shown = " and ".join(map(str, guilty))
    verb = "is" if len(guilty) == 1 else "are"
    raise InputError(
        f"participants.tsv: {shown} {verb} confounded with the sites (such as if constant within each), so that "
        f"harmonization would remove the effect of {shown}, too; compare within sites or add scans (covariates "
        f"without {shown} harmonizes nevertheless)"
    )


def _identifiable(indicator: Floats, x: Floats) -> bool:
    """Whether differences between sites are estimable in the presence of the covariates."""
    present = indicator[:, indicator.sum(axis=0) > 0]
    together = np.column_stack([np.ones(len(x)), x])
    rank = np.linalg.matrix_rank(np.column_stack([present, x]))
    return bool(rank == np.linalg.matrix_rank(together) + present.shape[1] - 1)


def _select(raw: Floats, indicator: Floats, x: Floats) -> tuple[Floats, list[str]]:
    """Values that can be harmonized, and why each nucleus cannot be (empty if it can)."""
    usable = np.isfinite(raw) & (indicator.sum(axis=1) > 0)[:, None]
    enough = indicator.T @ usable >= N_SITE
    selected = np.where(usable & (indicator @ enough > 0), raw, np.nan)
    reasons = []
    for y in selected.T:
        known = np.isfinite(y)
        reason = ""
        if (indicator[known].sum(axis=0) > 0).sum() < 2:
            reason = "no second site with enough values"
        elif not _identifiable(indicator[known], x[known]):
            reason = "sites and covariates are confounded"
        else:
            _, _, rss, rank = _least_squares(y, indicator, x)
            if known.sum() <= rank:
                reason = f"{known.sum()} values for {rank} terms of sites and covariates"
            elif rss <= np.finfo(float).eps * (y[known] ** 2).sum():
                reason = "values do not vary within sites"
        reasons.append(reason)
    if (n_used := reasons.count("")) < 2:
        shown = "; ".join(sorted({*reasons} - {""})) or "no more columns"
        raise InputError(
            f"group table: {n_used} nuclei can be harmonized ({shown}), ComBat needs 2; add scans or leave the "
            "covariates out"
        )
    selected[:, [bool(reason) for reason in reasons]] = np.nan
    return selected, reasons


def _least_squares(y: Floats, indicator: Floats, x: Floats) -> tuple[Floats, Floats, float, int]:
    """Site means (NaN without values) and coefficients of the covariates of one nucleus, its RSS and rank."""
    known = np.isfinite(y)
    present = indicator[known].sum(axis=0) > 0  # a site without values would make the design singular
    design = np.column_stack([indicator[known][:, present], x[known]])
    solution, _, rank, _ = np.linalg.lstsq(design, y[known])
    means: Floats = np.full(indicator.shape[1], np.nan)
    means[present] = solution[: present.sum()]
    coefficients: Floats = np.asarray(solution[present.sum() :])
    rss = float(((y[known] - design @ solution) ** 2).sum())
    return means, coefficients, rss, int(rank)


def _standardize(y: Floats, indicator: Floats, x_mean: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the expected values of scans and of participants at each site, and the residual standard deviations."""
    centre, centre_mean = np.empty((len(x), y.shape[1])), np.empty((len(x_mean), y.shape[1]))
    std = np.empty(y.shape[1])
    for nucleus, column in enumerate(y.T):
        known = np.isfinite(column)
        means, coefficients, rss, _ = _least_squares(column, indicator, x_mean)
        constant = np.nansum(indicator[known].sum(axis=0) / known.sum() * means)
        centre[:, nucleus], centre_mean[:, nucleus] = constant + x @ coefficients, constant + x_mean @ coefficients
        std[nucleus] = np.sqrt(rss / known.sum())
    return centre, centre_mean, std


def _estimate(z: Floats, indicator: Floats) -> _Effects:
    """Shift and variance of each site, and their posterior means."""
    shift, variance, shift_bayes, variance_bayes = np.full((4, indicator.shape[1], z.shape[1]), np.nan)
    for site in range(indicator.shape[1]):
        at_site = z[indicator[:, site] > 0]
        known = np.isfinite(at_site).any(axis=0)
        if not known.any():
            continue
        at_site = at_site[:, known]
        shift[site, known] = np.nanmean(at_site, axis=0)
        spread = np.nanvar(at_site, axis=0, ddof=1)
        variance[site, known] = np.where(spread == 0, 1, spread)
        shift_bayes[site, known], variance_bayes[site, known] = _posterior(
            at_site, shift[site, known], variance[site, known]
        )
    return _Effects(shift, variance, shift_bayes, variance_bayes)


def _posterior(z: Floats, shift: Floats, variance: Floats) -> tuple[Floats, Floats]:
    """Posterior means of one site, with priors by the method of moments over its nuclei."""
    if shift.size < 2:
        return shift, variance
    n = np.isfinite(z).sum(axis=0)
    prior_shift, prior_spread = shift.mean(), shift.var(ddof=1)
    mean, spread = variance.mean(), variance.var(ddof=1)
    if spread == 0:  # equal variances: the prior is that value
        return (prior_spread * n * shift + mean * prior_shift) / (prior_spread * n + mean), variance
    # Shape and rate of the inverse gamma distribution with this mean and variance.
    a, b = (2 * spread + mean**2) / spread, (mean * spread + mean**3) / spread
    new_shift, new_variance = shift, variance
    for _ in range(_MAX_STEPS):
        old = new_shift, new_variance
        new_shift = (prior_spread * n * shift + new_variance * prior_shift) / (prior_spread * n + new_variance)
        squares = np.nansum((z - new_shift) ** 2, axis=0)
        new_variance = (squares / 2 + b) / (n / 2 + a - 1)
        if max(np.abs(new_shift - old[0]).max(), np.abs(new_variance - old[1]).max()) < _CONVERGED:
            break
    return new_shift, new_variance


def _site_table(
    frame: pd.DataFrame,
    names: list[Any],
    *,
    y: Floats,
    at_site: Floats,
    reasons: list[str],
    indicator: Floats,
    effects: _Effects,
    std: Floats,
) -> pd.DataFrame:
    column_of = np.cumsum([not reason for reason in reasons]) - 1  # nuclei that are not harmonized have no column
    records = []
    for site, name in enumerate(names):
        scans = frame[indicator[:, site] > 0]
        for nucleus, label in enumerate(frame.columns):
            n = int(scans.iloc[:, nucleus].notna().sum())
            n_participants = int(np.isfinite(y[at_site[:, site] > 0, nucleus]).sum())
            record = {"site": name, "nucleus": label, "n": n, "n_participants": n_participants}
            record |= {"n_unused": len(scans) - n, "note": ""}
            if n:
                at, unit = (site, column_of[nucleus]), std[column_of[nucleus]]
                record |= {
                    "shift": effects.shift[at] * unit,
                    "scale": np.sqrt(effects.variance[at]),
                    "shift_bayes": effects.shift_bayes[at] * unit,
                    "scale_bayes": np.sqrt(effects.variance_bayes[at]),
                }
            else:
                record["note"] = f"not harmonized: {reasons[nucleus] or f'a site needs {N_SITE} values'}"
            records.append(record)
    columns = "site nucleus n n_participants n_unused shift scale shift_bayes scale_bayes note"
    return pd.DataFrame(records, columns=columns.split())


def _variance_table(
    nuclei: pd.Index[Any], *, before: Floats, after: Floats, indicator: Floats, x: Floats
) -> pd.DataFrame:
    records = []
    for nucleus, label in enumerate(nuclei):
        record: dict[str, Any] = {"nucleus": label, "n": int(np.isfinite(before[:, nucleus]).sum())}
        for when, y in (("before", before[:, nucleus]), ("after", after[:, nucleus])):
            record[f"site_variance_{when}"], record[f"p_site_{when}"] = _site_variance(y, indicator, x)
        first, second = record["site_variance_before"], record["site_variance_after"]
        record["reduction"] = 1 - second / first if first > 0 else np.nan
        records.append(record)
    columns = "nucleus n site_variance_before site_variance_after reduction p_site_before p_site_after"
    return pd.DataFrame(records, columns=columns.split())


def _site_variance(y: Floats, indicator: Floats, x: Floats) -> tuple[float, float]:
    """Variance of the site means adjusted for covariates, weighted by participants, and p of the F test of sites."""
    known = np.isfinite(y)
    if not known.any():
        return np.nan, np.nan
    means, _, rss, rank = _least_squares(y, indicator, x)
    share = indicator[known].sum(axis=0) / known.sum()
    centre = np.nansum(share * means)
    variance = float(np.nansum(share * (means - centre) ** 2))
    _, _, rss_together, rank_together = _least_squares(y, np.ones((len(y), 1)), x)
    free = known.sum() - rank
    if free < 1 or rss == 0:
        return variance, np.nan
    ratio = (rss_together - rss) / (rank - rank_together) / (rss / free)
    return variance, float(f_distribution.sf(ratio, rank - rank_together, free))
