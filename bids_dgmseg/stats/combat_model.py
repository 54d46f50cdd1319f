"""A fitted ComBat as a record: covariates, variances and site effects, to be applied to other scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from bids_dgmseg.stats.long_table import Floats

N_MATCHED = 10
"""Minimum number of participants at a new site, if they are compared with what is expected of their covariates."""

N_TRAVELLING = 5
"""Minimum number of participants at a new site who were also scanned at a site of the fit."""

_CONVERGED = 1e-10

_MAX_STEPS = 1000

_N_KNOTS = 4

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Term:
    """How a covariate becomes columns of numbers, as it was in the scans of the fit."""

    name: str
    kind: Literal["line", "spline", "category"]
    centre: float = 0.0
    low: float = float("nan")
    high: float = float("nan")
    """Least and largest number in the scans of the fit."""
    knots: tuple[float, ...] = ()
    levels: tuple[Any, ...] = ()
    """Categories; the first has no column."""

    def columns(self, values: pd.Series) -> Floats:
        """Return one row per scan, NaN where the covariate is missing or a category was not in the fit.

        Splines are lines beyond the outer knots.
        """
        if self.kind == "category":
            codes = pd.Index(list(self.levels), dtype=object).get_indexer(values.astype(object))
            if len(self.levels) < 2:  # constant, but a scan without it is excluded
                return np.where(codes < 0, np.nan, 0.0)[:, None]
            shown = [np.where(codes < 0, np.nan, codes == level) for level in range(1, len(self.levels))]
            return np.column_stack(shown)
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        if self.kind == "line":
            return (numbers - self.centre)[:, None]
        knots = np.array(self.knots)
        spline = CubicSpline(knots, np.eye(knots.size), bc_type="natural")
        inside = np.clip(numbers, knots[0], knots[-1])
        basis: Floats = spline(inside) + spline(inside, 1) * (numbers - inside)[:, None]
        return basis[:, 1:]


def fit_terms(covariates: pd.DataFrame, *, smooth: Sequence[str] = ()) -> tuple[Term, ...]:
    """Describe covariates: text and booleans are categories, numbers in `smooth` natural splines, others lines.

    The four knots of a spline are at equidistant quantiles.
    """
    terms = []
    for name in map(str, covariates):
        column = covariates[name]
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
            levels = pd.factorize(column, sort=True)[1]
            terms.append(Term(name, "category", levels=tuple(levels.tolist())))
            continue
        numbers = column.to_numpy(np.float64, na_value=np.nan)
        numbers = numbers[np.isfinite(numbers)]
        if not numbers.size:
            terms.append(Term(name, "line"))
            continue
        low, high = float(numbers.min()), float(numbers.max())
        knots = np.unique(np.quantile(numbers, np.linspace(0, 1, _N_KNOTS))) if name in smooth else np.zeros(0)
        if knots.size > 2:
            terms.append(Term(name, "spline", low=low, high=high, knots=tuple(knots.tolist())))
        else:
            terms.append(Term(name, "line", centre=float(numbers.mean()), low=low, high=high))
    return tuple(terms)


def design_matrix(terms: Sequence[Term], covariates: pd.DataFrame) -> Floats:
    """Return the columns of all terms, one row per scan."""
    return np.hstack([np.zeros((len(covariates), 0)), *(term.columns(covariates[term.name]) for term in terms)])


@dataclass(frozen=True)
class SiteEffects:
    """Effects of the sites in units of the residual standard deviation; arrays of shape (sites, nuclei).

    They are NaN where a nucleus had too few values at a site.
    """

    names: tuple[Any, ...]
    shift: Floats
    variance: Floats
    shift_bayes: Floats
    variance_bayes: Floats
    n_participants: Floats
    """Participants in the estimates."""

    def codes(self, site: pd.Series) -> NDArray[np.intp]:
        """Return the row of each scan's site, -1 for one that is not among them."""
        return np.asarray(pd.Index(list(self.names), dtype=object).get_indexer(site.astype(object)), np.intp)

    def joined(self, other: SiteEffects) -> SiteEffects:
        """Return the effects of these and other sites."""
        return SiteEffects(
            (*self.names, *other.names),
            *(
                np.vstack([getattr(self, name), getattr(other, name)])
                for name in ("shift", "variance", "shift_bayes", "variance_bayes", "n_participants")
            ),
        )


@dataclass(frozen=True)
class CombatModel:
    r"""A fitted ComBat of one measure.

    With the notation of `bids_dgmseg.stats.combat.harmonize`, ``constant`` is :math:`\hat\alpha_g`, ``coefficients``
    (columns of the terms, nuclei) :math:`\hat\beta_g` and ``std`` :math:`\hat\sigma_g`.
    """

    nuclei: tuple[str, ...]
    terms: tuple[Term, ...]
    constant: Floats
    coefficients: Floats
    std: Floats
    sites: SiteEffects
    std_between: Floats | None = None
    """Standard deviation of the participants' random intercepts, of longitudinal ComBat."""
    offset: Floats | None = None
    """Of longitudinal ComBat, the sites' fixed effects in the mixed model, of shape (sites, nuclei)."""

    def expected(self, covariates: pd.DataFrame) -> Floats:
        """Return the values expected without site effects, of shape (scans, nuclei)."""
        return np.asarray(self.constant + design_matrix(self.terms, covariates) @ self.coefficients)

    def standardized(
        self, values: Floats, *, site: pd.Series, covariates: pd.DataFrame, participant: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        """Return the values minus what is expected of the scan, divided by the standard deviation, and the latter."""
        expected = self.expected(covariates)
        if self.std_between is not None and self.offset is not None:
            codes = self.sites.codes(site)
            at_site = np.where(codes[:, None] >= 0, self.offset[codes], np.nan)
            ratio = (self.std_between / self.std) ** 2
            expected = expected + predict_intercepts(values - expected - at_site, participant, ratio)
        return (values - expected) / self.std, expected

    def apply(
        self,
        values: pd.DataFrame,
        *,
        site: pd.Series,
        covariates: pd.DataFrame,
        participant: pd.Series | None = None,
    ) -> pd.DataFrame:
        """Remove the effects of the sites.

        Parameters
        ----------
        values : DataFrame of shape (scans, nuclei)
            The columns may be some of the nuclei in any order.
        site : Series of shape (scans,)
        covariates : DataFrame of shape (scans, covariates)
            The names of `terms` must be among the columns.
        participant : Series of shape (scans,), optional
            Needed by longitudinal ComBat; by default each scan is of another participant.

        Returns
        -------
        DataFrame
            With the index and columns of `values`, NaN without a value, a covariate or the effects of its site.
        """
        raw = values.reindex(columns=list(self.nuclei)).to_numpy(np.float64)
        who = np.arange(len(values)) if participant is None else pd.factorize(participant)[0]
        z, expected = self.standardized(raw, site=site, covariates=covariates, participant=who)
        codes = self.sites.codes(site)
        known = codes[:, None] >= 0
        shift = np.where(known, self.sites.shift_bayes[codes], np.nan)
        scale = np.sqrt(np.where(known, self.sites.variance_bayes[codes], np.nan))
        result = self.std * (z - shift) / scale + expected
        return pd.DataFrame(result, values.index, list(self.nuclei)).reindex(columns=values.columns)

    def beyond(self, covariates: pd.DataFrame) -> Mapping[str, Bools]:
        """Return for each covariate with numbers which scans lie beyond those of the fit."""
        found = {}
        for term in self.terms:
            if term.kind != "category":
                numbers = pd.to_numeric(covariates[term.name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
                found[term.name] = (numbers < term.low) | (numbers > term.high)
        return found


def predict_intercepts(residuals: Floats, participant: NDArray[np.intp], ratio: Floats) -> Floats:
    r"""Predict the random intercept of each scan's participant from the residuals, of shape (scans, nuclei).

    With the :math:`n` values of a participant and the ratio :math:`\lambda` of the variances between and within
    participants, it is :math:`n\lambda/(1 + n\lambda)` times their mean residual.
    """
    known = np.isfinite(residuals)
    frame = pd.DataFrame(np.where(known, residuals, 0.0)).groupby(participant).transform("sum").to_numpy()
    n = pd.DataFrame(known.astype(np.float64)).groupby(participant).transform("sum").to_numpy()
    return np.asarray(ratio * frame / (1 + n * ratio))


@dataclass(frozen=True)
class NewSite:
    """How the effects of a site that was not in the fit were estimated."""

    name: Any
    method: Literal["", "travelling", "matched"]
    """Empty if they were not."""
    n_participants: int
    n_travelling: int


def add_sites(
    model: CombatModel,
    values: pd.DataFrame,
    *,
    site: pd.Series,
    covariates: pd.DataFrame,
    participant: pd.Series,
    fit_on: Bools | None = None,
) -> tuple[CombatModel, list[NewSite]]:
    r"""Estimate the effects of sites that were not in the fit, which remains as it is.

    Parameters
    ----------
    model : CombatModel
    values, site, covariates, participant
        As for `CombatModel.apply`.
    fit_on : ndarray of bool, shape (scans,), optional
        Scans to estimate from, such as those of controls; by default all.

    Returns
    -------
    model : CombatModel
        With the sites that could be estimated.
    sites : list of NewSite
        All new sites, in alphabetical order.

    Notes
    -----
    With at least 5 participants who were also scanned at a site of the fit, the shift is their mean difference from
    their harmonized values there, in standard deviations, and the scale remains 1. Otherwise, with at least 10
    participants at the new site, shift and scale are estimated like those of the other sites from what the fit
    expects of their covariates, with priors over the nuclei of that site, as neuroHarmonize does.

    In longitudinal ComBat, with as many participants of either kind, the fixed effect of the site is that of
    generalized least squares with the variances of the fit, from all scans of its participants; then shift and scale
    follow as those of the other sites.
    """
    raw = values.reindex(columns=list(model.nuclei)).to_numpy(np.float64)
    chosen = np.full(len(values), True) if fit_on is None else np.asarray(fit_on, bool)
    z = np.where(chosen[:, None], (raw - model.expected(covariates)) / model.std, np.nan)
    who = pd.factorize(participant)[0]
    known = model.sites.codes(site)
    at_known = np.where(known[:, None] >= 0, model.sites.shift_bayes[known], np.nan)
    scale = np.sqrt(np.where(known[:, None] >= 0, model.sites.variance_bayes[known], np.nan))
    home = pd.DataFrame((z - at_known) / scale).groupby(who).mean().to_numpy()  # by the participant's number
    found = []
    for name in sorted({*site.dropna()} - {*model.sites.names}, key=str):
        own = (site == name).to_numpy()
        people = pd.DataFrame(z[own]).groupby(who[own]).mean()
        people = people.loc[np.isfinite(people.to_numpy()).any(axis=1)]
        differences = people.to_numpy() - home[people.index]
        n_travelling = int(np.isfinite(differences).any(axis=1).sum())
        has_enough = n_travelling >= N_TRAVELLING or len(people) >= N_MATCHED
        if model.std_between is not None and has_enough:
            fitted = np.where(chosen[:, None], raw, np.nan)
            method: Literal["travelling", "matched"] = "travelling" if n_travelling >= N_TRAVELLING else "matched"
            least = {"travelling": N_TRAVELLING, "matched": N_MATCHED}[method]
            model = _add_longitudinal_site(model, name, fitted, least, site=site, covariates=covariates, who=who)
            found.append(NewSite(name, method, len(people), n_travelling))
        elif model.std_between is not None:
            found.append(NewSite(name, "", len(people), n_travelling))
        elif n_travelling >= N_TRAVELLING:
            n = np.isfinite(differences).sum(axis=0).astype(np.float64)
            shift = np.where(n >= N_TRAVELLING, np.nansum(differences, axis=0) / np.maximum(n, 1), np.nan)
            one = np.where(np.isfinite(shift), 1.0, np.nan)
            effects = SiteEffects((name,), *(part[None] for part in (shift, one, shift, one, n)))
            model = replace(model, sites=model.sites.joined(effects))
            found.append(NewSite(name, "travelling", len(people), n_travelling))
        elif len(people) >= N_MATCHED:
            n = np.isfinite(people.to_numpy()).sum(axis=0).astype(np.float64)
            enough = np.where(n >= N_MATCHED, people.to_numpy(), np.nan)
            effects = SiteEffects((name,), *estimate_effects(enough, np.ones((len(people), 1))), n[None])
            model = replace(model, sites=model.sites.joined(effects))
            found.append(NewSite(name, "matched", len(people), n_travelling))
        else:
            found.append(NewSite(name, "", len(people), n_travelling))
    return model, found


def _add_longitudinal_site(
    model: CombatModel,
    name: Any,
    raw: Floats,
    least: int,
    *,
    site: pd.Series,
    covariates: pd.DataFrame,
    who: NDArray[np.intp],
) -> CombatModel:
    """Add a site to longitudinal ComBat; with V = σ²(I + λ11') of a participant's scans, V⁻¹ ∝ I - λ11'/(1 + nλ).

    Nuclei of fewer than `least` participants have no effect.
    """
    if model.std_between is None or model.offset is None:
        raise ValueError("not longitudinal ComBat")
    own, codes = (site == name).to_numpy(), model.sites.codes(site)
    offset = np.where(codes[:, None] >= 0, model.offset[codes], np.where(own[:, None], 0.0, np.nan))
    residuals = raw - model.expected(covariates) - offset
    known = np.isfinite(residuals)
    ratio = (model.std_between / model.std) ** 2

    def total(rows: Floats) -> Floats:
        return pd.DataFrame(rows).groupby(who).sum().to_numpy()

    at_site = known & own[:, None]
    weight = ratio / (1 + total(known.astype(np.float64)) * ratio)
    n, values = total(at_site.astype(np.float64)), np.where(known, residuals, 0.0)
    share = total(np.where(at_site, values, 0.0)) - weight * n * total(values)
    n_participants = (n > 0).sum(axis=0, dtype=np.float64)
    enough, nothing = n_participants >= least, np.full((1, len(n_participants)), np.nan)
    effect = np.where(enough, share.sum(axis=0), np.nan) / np.where(enough, (n - weight * n**2).sum(axis=0), 1)
    sites = SiteEffects((name,), nothing, nothing, nothing, nothing, n_participants[None])
    extended = replace(model, sites=model.sites.joined(sites), offset=np.vstack([model.offset, effect]))
    usable = np.where(enough, raw, np.nan)
    z, _ = extended.standardized(usable, site=site, covariates=covariates, participant=who)
    parts = estimate_effects(z[own], np.ones((int(own.sum()), 1)))
    return replace(extended, sites=model.sites.joined(SiteEffects((name,), *parts, sites.n_participants)))


def estimate_effects(z: Floats, indicator: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Estimate the shift and variance of each site from standardized values, and their posterior means.

    Parameters
    ----------
    z : ndarray of shape (scans, nuclei)
    indicator : ndarray of shape (scans, sites)
        1 for the site of a scan.

    Returns
    -------
    tuple of 4 ndarray of shape (sites, nuclei)
        ``shift``, ``variance``, ``shift_bayes`` and ``variance_bayes``; NaN without values.
    """
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
    return shift, variance, shift_bayes, variance_bayes


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
