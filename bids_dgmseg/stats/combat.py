"""ComBat harmonization across sites, preserving covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import f as f_distribution

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.clinical import fit_random_intercept
from bids_dgmseg.stats.combat_model import CombatModel, SiteEffects, Term, design_matrix, estimate_effects, fit_terms
from bids_dgmseg.stats.long_table import Floats

N_SITE = 3
"""Minimum number of participants to estimate the shift and scale of a site."""

SITE_COLUMNS = (
    *("site", "nucleus", "n", "n_participants", "n_unused"),
    *("shift", "scale", "shift_bayes", "scale_bayes", "note"),
)
"""Of the table of the sites."""


@dataclass(frozen=True)
class Harmonized:
    """Harmonized measures and the site effects removed."""

    values: pd.DataFrame
    """NaN if the raw value, the site or a covariate is missing, or as noted in `sites`."""
    sites: pd.DataFrame
    """One row per site and nucleus: the estimated site effects."""
    variance: pd.DataFrame
    """One row per nucleus: variance between sites before and after, in the scans of the fit."""
    model: CombatModel
    """What was estimated, to be applied to other scans."""


def harmonize(
    values: pd.DataFrame,
    *,
    site: pd.Series,
    covariates: pd.DataFrame | None = None,
    smooth: Sequence[str] = (),
    participant: pd.Series | None = None,
    fit_on: NDArray[np.bool_] | None = None,
    longitudinal: bool = False,
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
    fit_on : ndarray of bool, shape (scans,), optional
        Scans that the effects are estimated from, such as those of controls; they are removed from all scans.
    longitudinal : bool
        Whether each participant has a random intercept in the model, instead of averaging repeated scans: longitudinal
        ComBat [4]_.

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

    In longitudinal ComBat, :math:`\alpha_g + X_{ij}\beta_g` is followed by :math:`\eta_{jg}`, normal with its own
    variance; it is predicted with the variances of the restricted maximum likelihood, and
    :math:`\hat\sigma_g` is the standard deviation of :math:`\varepsilon` within participants.

    References
    ----------
    .. [1] Johnson WE, Li C, Rabinovic A. Adjusting batch effects in microarray expression data using empirical Bayes
       methods. Biostatistics 8 (2007) 118-127. doi:10.1093/biostatistics/kxj037
    .. [2] Fortin JP, et al. Harmonization of cortical thickness measurements across scanners and sites. NeuroImage 167
       (2018) 104-120. doi:10.1016/j.neuroimage.2017.11.024
    .. [3] Pomponio R, et al. Harmonization of large MRI datasets for the analysis of brain imaging patterns throughout
       the lifespan. NeuroImage 208 (2020) 116450. doi:10.1016/j.neuroimage.2019.116450
    .. [4] Beer JC, et al. Longitudinal ComBat: a method for harmonizing longitudinal multi-scanner imaging data.
       NeuroImage 220 (2020) 117129. doi:10.1016/j.neuroimage.2020.117129
    """
    given = covariates if covariates is not None else pd.DataFrame(index=values.index)
    chosen = np.full(len(values), True) if fit_on is None else np.asarray(fit_on, bool)
    person = np.arange(len(values)) if participant is None else pd.factorize(participant)[0]
    if not len(values) == len(site) == len(given) == len(person) == len(chosen):
        raise ValueError(
            f"{len(values)} scans, {len(site)} sites, {len(given)} rows of covariates and {len(person)} participants"
        )
    terms = fit_terms(given[chosen], smooth=smooth)
    x = design_matrix(terms, given)
    usable = site.notna().to_numpy() & np.isfinite(x).all(axis=1)
    fitted = usable & chosen
    names, indicator = _sites(site.where(chosen), person, fitted)
    raw = np.where(np.isfinite(values) & usable[:, None], values.to_numpy(np.float64), np.nan)
    scans = _FittedScans(
        np.where(fitted[:, None], raw, np.nan), indicator, x, site.where(fitted), given, person, is_used=fitted
    )
    at_site, x_mean = scans.average(indicator), scans.average(np.column_stack([np.ones(len(x)), x]))[:, 1:]
    blocks = [term.columns(given[term.name]).shape[1] for term in terms]
    present = at_site.any(axis=1)
    _check_separable(at_site[present], x_mean[present], np.repeat([term.name for term in terms], np.array(blocks, int)))
    y, reasons = _select(scans.average(scans.y), at_site, x_mean)
    used = np.array([not reason for reason in reasons])
    scans = replace(scans, y=scans.y[:, used])
    n_participants = at_site.T @ np.isfinite(y[:, used])
    nothing = np.full((len(names), used.sum()), np.nan)
    no_effects = SiteEffects(tuple(names), nothing, nothing, nothing, nothing, n_participants)
    unfitted: _Unfitted = (tuple(map(str, values.columns[used])), terms, no_effects)
    model = _fit_repeated(scans, *unfitted) if longitudinal else _fit(y[:, used], at_site, x_mean, *unfitted)
    plain = pd.DataFrame(raw, values.index, list(map(str, values.columns)))
    frame = model.apply(plain, site=site, covariates=given, participant=pd.Series(person, values.index))
    frame = frame.set_axis(values.columns, axis=1)
    codes = np.where(usable, model.sites.codes(site), -1)
    after = scans.average(np.where(fitted[:, None], frame.to_numpy(), np.nan))
    return Harmonized(
        frame,
        _site_table(frame, model, y=y, at_site=at_site, reasons=reasons, codes=codes),
        _variance_table(values.columns, before=y, after=after, indicator=at_site, x=x_mean),
        model,
    )


_Unfitted = tuple[tuple[str, ...], tuple[Term, ...], SiteEffects]
"""Nuclei, covariates, and sites without effects."""


@dataclass(frozen=True)
class _FittedScans:
    """Scans that the effects are estimated from, among others without values."""

    y: Floats
    indicator: Floats
    x: Floats
    site: pd.Series
    covariates: pd.DataFrame
    person: NDArray[np.intp]
    is_used: NDArray[np.bool_]

    def average(self, rows: Floats) -> Floats:
        """Average the rows of each participant at each site."""
        one_each = [self.person, self.indicator.argmax(axis=1), ~self.is_used]
        return pd.DataFrame(rows).groupby(one_each, sort=False).mean().to_numpy()


def _fit(
    y: Floats, at_site: Floats, x: Floats, nuclei: tuple[str, ...], terms: tuple[Term, ...], sites: SiteEffects
) -> CombatModel:
    """Fit means per participant and site."""
    model = CombatModel(nuclei, terms, *_standardize(y, at_site, x), sites)
    effects = estimate_effects((y - model.constant - x @ model.coefficients) / model.std, at_site)
    return replace(model, sites=SiteEffects(sites.names, *effects, sites.n_participants))


def _fit_repeated(
    scans: _FittedScans, nuclei: tuple[str, ...], terms: tuple[Term, ...], sites: SiteEffects
) -> CombatModel:
    """Fit scans with a random intercept per participant."""
    enough = scans.indicator @ (sites.n_participants > 0) > 0
    y = np.where(enough, scans.y, np.nan)
    parts = _standardize_repeated(y, scans.indicator, scans.x, scans.person)
    model = CombatModel(nuclei, terms, *parts[:3], sites, *parts[3:])
    z, _ = model.standardized(y, site=scans.site, covariates=scans.covariates, participant=scans.person)
    effects = estimate_effects(z, scans.indicator)
    return replace(model, sites=SiteEffects(sites.names, *effects, sites.n_participants))


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


def _standardize(y: Floats, indicator: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the constants, the coefficients of the covariates and the residual standard deviations of the nuclei."""
    constant, coefficients, std = np.empty(y.shape[1]), np.empty((x.shape[1], y.shape[1])), np.empty(y.shape[1])
    for nucleus, column in enumerate(y.T):
        known = np.isfinite(column)
        means, coefficients[:, nucleus], rss, _ = _least_squares(column, indicator, x)
        constant[nucleus] = np.nansum(indicator[known].sum(axis=0) / known.sum() * means)
        std[nucleus] = np.sqrt(rss / known.sum())
    return constant, coefficients, std


def _standardize_repeated(
    scans: Floats, indicator: Floats, x: Floats, person: NDArray[np.intp]
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return constants, coefficients, deviations within and between participants, and effects of the sites."""
    n_sites, n_nuclei = indicator.shape[1], scans.shape[1]
    constant, within, between = np.empty((3, n_nuclei))
    coefficients, offset = np.empty((x.shape[1], n_nuclei)), np.full((n_sites, n_nuclei), np.nan)
    for nucleus, column in enumerate(scans.T):
        known = np.isfinite(column)
        present = indicator[known].sum(axis=0) > 0
        design = np.column_stack([indicator[known][:, present], x[known]])
        centred = design - design.mean(axis=0)
        basis, sizes, _ = np.linalg.svd(centred, full_matrices=False)  # the columns may be redundant
        who = person[known]
        found = None
        if len(np.unique(who)) < known.sum():
            independent = basis[:, sizes > 1e-9 * sizes.max()]
            found = fit_random_intercept(column[known], independent, pd.Series(who))
        if found is None:
            raise InputError(
                "group table: no variance within participants can be estimated; longitudinal ComBat needs repeated "
                "scans at several times (omit `combat_longitudinal`)"
            )
        within[nucleus], between[nucleus] = found.std_within, found.std_between
        codes = np.unique(who, return_inverse=True)[1]
        n = np.bincount(codes)
        share = 1 - 1 / np.sqrt(1 + n * (found.std_between / found.std_within) ** 2)
        data = np.column_stack([column[known], design])
        means = np.column_stack([np.bincount(codes, weights=part) for part in data.T]) / n[:, None]
        whitened = data - share[codes, None] * means[codes]
        solution = np.linalg.lstsq(whitened[:, 1:], whitened[:, 0])[0]
        at = solution[: present.sum()]
        constant[nucleus] = (indicator[known][:, present].sum(axis=0) / known.sum() * at).sum()
        offset[present, nucleus] = at - constant[nucleus]
        coefficients[:, nucleus] = solution[present.sum() :]
    return constant, coefficients, within, between, offset


def _site_table(
    frame: pd.DataFrame,
    model: CombatModel,
    *,
    y: Floats,
    at_site: Floats,
    reasons: list[str],
    codes: NDArray[np.intp],
) -> pd.DataFrame:
    column_of = np.cumsum([not reason for reason in reasons]) - 1  # nuclei that are not harmonized have no column
    records = []
    for site, name in enumerate(model.sites.names):
        scans = frame[codes == site]
        for nucleus, label in enumerate(frame.columns):
            n = int(scans.iloc[:, nucleus].notna().sum())
            n_participants = int(np.isfinite(y[at_site[:, site] > 0, nucleus]).sum())
            record = {"site": name, "nucleus": label, "n": n, "n_participants": n_participants}
            record |= {"n_unused": len(scans) - n, "note": ""}
            if n:
                record |= describe_effects(model, site, column_of[nucleus])
            else:
                record["note"] = f"not harmonized: {reasons[nucleus] or f'a site needs {N_SITE} values'}"
            records.append(record)
    return pd.DataFrame(records, columns=list(SITE_COLUMNS))


def describe_effects(model: CombatModel, site: int, nucleus: int) -> dict[str, float]:
    """Return the effects of a site on a nucleus, shifts in the unit of the measure, as in the table of the sites."""
    effects, unit = model.sites, model.std[nucleus]
    return {
        "shift": effects.shift[site, nucleus] * unit,
        "scale": float(np.sqrt(effects.variance[site, nucleus])),
        "shift_bayes": effects.shift_bayes[site, nucleus] * unit,
        "scale_bayes": float(np.sqrt(effects.variance_bayes[site, nucleus])),
    }


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
