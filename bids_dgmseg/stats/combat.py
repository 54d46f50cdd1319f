"""ComBat harmonization across sites, preserving covariates: fit, and removal of the fitted site effects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.regression import Covariate, Floats, covariate_columns, fit_covariates

N_SITE = 3
"""Minimum number of participants to estimate the shift and scale of a site."""


@dataclass(frozen=True)
class CombatModel:
    r"""ComBat fitted to one measure; in the notation of `fit_combat`, arrays of shape (sites, nuclei) or (nuclei,).

    They are NaN for a nucleus that cannot be harmonized, or whose values at a site are too few.
    """

    nuclei: tuple[str, ...]
    notes: tuple[str, ...]
    """Why a nucleus cannot be harmonized; empty if it can."""
    covariates: tuple[Covariate, ...]
    constant: Floats
    r""":math:`\hat\alpha`."""
    coefficients: Floats
    r""":math:`\hat\beta`, of shape (columns of the covariates, nuclei)."""
    std: Floats
    r""":math:`\hat\sigma`."""
    sites: tuple[str, ...]
    shift: Floats
    """Least-squares site effects, as the variance in units of the residual standard deviation."""
    variance: Floats
    shift_bayes: Floats
    """Posterior means, which are removed."""
    variance_bayes: Floats
    n_participants: Floats

    def __post_init__(self) -> None:
        """Check that the shapes agree, also those of a saved model."""
        n = len(self.nuclei)
        shapes = {name: (len(self.sites), n) for name in _SITE_EFFECTS} | {"constant": (n,), "std": (n,)}
        shapes["coefficients"] = (sum(covariate.n_columns for covariate in self.covariates), n)
        for name, shape in shapes.items():
            if (array := getattr(self, name)).shape != shape and np.prod(shape):
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")

    def apply(self, values: pd.DataFrame, *, site: pd.Series, covariates: pd.DataFrame) -> pd.DataFrame:
        """Remove the effects of the sites.

        Parameters
        ----------
        values : DataFrame of shape (scans, nuclei)
            The columns may be some of the nuclei in any order.
        site : Series of shape (scans,)
        covariates : DataFrame of shape (scans, covariates)
            Needs the columns of the fit.

        Returns
        -------
        DataFrame
            With the index and columns of `values`, NaN without a value, a covariate or the effects of its site.
        """
        raw = values.reindex(columns=list(self.nuclei)).to_numpy(np.float64)
        coefficients = self.coefficients.reshape(-1, len(self.nuclei))
        expected = self.constant + covariate_columns(self.covariates, covariates) @ coefficients
        codes = pd.Index(self.sites, dtype=object).get_indexer(
            pd.Index(site.astype(object).map(str, na_action="ignore"))
        )
        shift, variance = (
            np.where(codes[:, None] >= 0, effects[codes], np.nan) for effects in (self.shift_bayes, self.variance_bayes)
        )
        result = self.std * ((raw - expected) / self.std - shift) / np.sqrt(variance) + expected
        return pd.DataFrame(result, values.index, list(self.nuclei)).reindex(columns=values.columns)

    def describe_sites(self, harmonized: pd.DataFrame, site: pd.Series) -> pd.DataFrame:
        """Tabulate the effects of the sites that `harmonized` scans are from, shifts in the unit of the measure.

        One row per site and nucleus: ``site``, ``nucleus``, ``n`` (scans), ``n_participants`` (of the fit),
        ``n_unused`` (scans), ``shift``, ``scale``, ``shift_bayes``, ``scale_bayes``, ``note``.
        """
        records = []
        for name in sorted(site.dropna().unique(), key=str):
            scans = harmonized[(site == name).to_numpy()]
            row = self.sites.index(str(name)) if str(name) in self.sites else None
            for label in map(str, harmonized.columns):
                n = int(scans[label].notna().sum())
                record: dict[str, Any] = {"site": name, "nucleus": label, "n": n, "n_participants": 0}
                record |= {"n_unused": len(scans) - n, "note": ""}
                column = self.nuclei.index(label) if label in self.nuclei else None
                if row is None or column is None:
                    record["note"] = f"not harmonized: {'nucleus' if column is None else 'site'} not in the fit"
                elif np.isnan(self.shift_bayes[row, column]):
                    record["note"] = f"not harmonized: {self.notes[column] or f'a site needs {N_SITE} values'}"
                else:
                    at = row, column
                    unit, record["n_participants"] = self.std[column], int(self.n_participants[at])
                    record |= {"shift": self.shift[at] * unit, "scale": np.sqrt(self.variance[at])}
                    record |= {"shift_bayes": self.shift_bayes[at] * unit}
                    record |= {"scale_bayes": np.sqrt(self.variance_bayes[at])}
                records.append(record)
        columns = "site nucleus n n_participants n_unused shift scale shift_bayes scale_bayes note"
        return pd.DataFrame(records, columns=columns.split())


_SITE_EFFECTS = ("shift", "variance", "shift_bayes", "variance_bayes", "n_participants")


def fit_combat(
    values: pd.DataFrame,
    *,
    site: pd.Series,
    covariates: pd.DataFrame | None = None,
    participant: pd.Series | None = None,
) -> CombatModel:
    r"""Estimate the shift and scale of each site by ComBat with empirical Bayes.

    Parameters
    ----------
    values : DataFrame of shape (scans, nuclei)
        One measure, NaN where missing. All nuclei must have the same unit, since their site effects share a prior.
    site : Series of shape (scans,)
        Site or scanner of each scan, in the same order.
    covariates : DataFrame of shape (scans, covariates), optional
        Covariates to preserve, in the same order; text and booleans are categories.
    participant : Series of shape (scans,), optional
        Participant of each scan. Scans of one participant at one site are averaged; by default each scan is of another
        participant.

    Returns
    -------
    CombatModel
        `CombatModel.apply` removes the site effects.

    Raises
    ------
    InputError
        If sites and covariates are confounded, or fewer than two nuclei have values of 3 participants at two sites.
    ValueError
        If the lengths differ.

    Notes
    -----
    With nucleus :math:`g`, site :math:`i`, participant :math:`j` [1]_,

    .. math:: Y_{ijg} = \alpha_g + X_{ij}\beta_g + \gamma_{ig} + \delta_{ig}\varepsilon_{ijg}, \qquad
       Y^*_{ijg} = \frac{\hat\sigma_g}{\delta^*_{ig}} (Z_{ijg} - \gamma^*_{ig}) + \hat\alpha_g + X_{ij}\hat\beta_g,

    where :math:`Z` are the residuals of :math:`\hat\alpha + X\hat\beta` divided by :math:`\hat\sigma`, and the starred
    effects are posterior means under a normal prior of :math:`\gamma` and an inverse gamma prior of :math:`\delta^2`
    over the nuclei, iterated to convergence. It was introduced for scanners by [2]_. A nucleus with values of fewer
    than 3 participants at a site is missing there. Own code, since neuroHarmonize returns no value at all if one is
    missing, and counts repeated scans as people.

    References
    ----------
    .. [1] Johnson WE, Li C, Rabinovic A. Adjusting batch effects in microarray expression data using empirical Bayes
       methods. Biostatistics 8 (2007) 118-127. doi:10.1093/biostatistics/kxj037
    .. [2] Fortin JP, et al. Harmonization of cortical thickness measurements across scanners and sites. NeuroImage 167
       (2018) 104-120. doi:10.1016/j.neuroimage.2017.11.024
    """
    table = covariates if covariates is not None else pd.DataFrame(index=values.index)
    person = np.arange(len(values)) if participant is None else pd.factorize(participant)[0]
    if not len(values) == len(site) == len(table) == len(person):
        raise ValueError(
            f"{len(values)} scans, {len(site)} sites, {len(table)} rows of covariates and {len(person)} participants"
        )
    terms = fit_covariates(table)
    columns = covariate_columns(terms, table)
    usable = site.notna().to_numpy() & np.isfinite(columns).all(axis=1)
    codes, names = pd.factorize(site, sort=True)
    scans = pd.DataFrame(np.column_stack([values.to_numpy(np.float64), columns]))[usable]
    means = scans.groupby([person[usable], codes[usable]], sort=False).mean()
    y, x = np.split(means.to_numpy(), [values.shape[1]], axis=1)
    at_site = np.eye(len(names))[means.index.get_level_values(1)]
    _check_separable(at_site, x, np.repeat([term.name for term in terms], [term.n_columns for term in terms]))
    y, reasons = _select(y, at_site, x)
    constant, coefficients, std = _standardize(y, at_site, x)
    effects = _estimate_effects((y - constant - x @ coefficients) / std, at_site)
    return CombatModel(
        tuple(map(str, values.columns)),
        tuple(reasons),
        terms,
        constant,
        coefficients,
        std,
        tuple(map(str, names)),
        *effects,
        at_site.T @ np.isfinite(y),
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


def _check_separable(indicator: Floats, x: Floats, names: NDArray[Any]) -> None:
    """Raise an `InputError` if covariates and sites are confounded; `names` are the covariates of the columns of x."""
    if _identifiable(indicator, x):
        return
    covariates = list(dict.fromkeys(names.tolist()))
    # the covariates without which it would be possible; all if more than one of them has to go
    guilty = [name for name in covariates if _identifiable(indicator, x[:, names != name])] or covariates
    shown = " and ".join(map(str, guilty))
    remedy = "" if "group" in guilty else f", or run with `covariates` without {shown}"
    raise InputError(
        f"participants.tsv: {shown} and site are confounded (as if constant within each site), and harmonization would "
        f"remove the effect of {shown}, too; compare within sites{remedy}"
    )


def _identifiable(indicator: Floats, x: Floats) -> bool:
    """Return whether differences between sites are estimable in the presence of the covariates."""
    present = indicator[:, indicator.sum(axis=0) > 0]
    together = np.column_stack([np.ones(len(x)), x])
    rank = np.linalg.matrix_rank(np.column_stack([present, x]))
    return bool(rank == np.linalg.matrix_rank(together) + present.shape[1] - 1)


def _select(raw: Floats, indicator: Floats, x: Floats) -> tuple[Floats, list[str]]:
    """Values that can be harmonized, and why each nucleus cannot be (empty if it can)."""
    usable = np.isfinite(raw)
    enough = indicator.T @ usable >= N_SITE
    selected = np.where(usable & (indicator @ enough > 0), raw, np.nan)
    reasons = []
    for y in selected.T:
        finite = np.isfinite(y)
        reason = ""
        if (indicator[finite].sum(axis=0) > 0).sum() < 2:
            reason = "only one site has enough data"
        elif not _identifiable(indicator[finite], x[finite]):
            reason = "sites and covariates are confounded"
        else:
            rss = _least_squares(y, indicator, x)[2]
            if rss <= np.finfo(float).eps * (y[finite] ** 2).sum():
                reason = "values do not vary beyond sites and covariates"
        reasons.append(reason)
    if (n_used := reasons.count("")) < 2:
        shown = "; ".join(sorted({*reasons} - {""})) or "no more columns"
        raise InputError(
            f"group table: only {n_used} nuclei can be harmonized ({shown}), ComBat needs 2; add scans or omit "
            "covariates"
        )
    selected[:, [bool(reason) for reason in reasons]] = np.nan
    return selected, reasons


def _least_squares(y: Floats, indicator: Floats, x: Floats) -> tuple[Floats, Floats, float]:
    """Return site means (NaN without values) and coefficients of the covariates of one nucleus, and its RSS."""
    finite = np.isfinite(y)
    present = indicator[finite].sum(axis=0) > 0  # a site without values would make the design singular
    design = np.column_stack([indicator[finite][:, present], x[finite]])
    solution = np.linalg.lstsq(design, y[finite])[0]
    means: Floats = np.full(indicator.shape[1], np.nan)
    means[present] = solution[: present.sum()]
    rss = float(((y[finite] - design @ solution) ** 2).sum())
    return means, np.asarray(solution[present.sum() :]), rss


def _standardize(y: Floats, indicator: Floats, x: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the constants, the coefficients of the covariates and the residual standard deviations of the nuclei."""
    constant, coefficients, std = (np.full((*shape, y.shape[1]), np.nan) for shape in ((), (x.shape[1],), ()))
    for nucleus, column in enumerate(y.T):
        finite = np.isfinite(column)
        if finite.any():
            means, coefficients[:, nucleus], rss = _least_squares(column, indicator, x)
            constant[nucleus] = np.nansum(indicator[finite].sum(axis=0) / finite.sum() * means)
            std[nucleus] = np.sqrt(rss / finite.sum())
    return constant, coefficients, std


def _estimate_effects(z: Floats, indicator: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return shift, variance and their posterior means, of shape (sites, nuclei), from standardized values."""
    shift, variance, shift_bayes, variance_bayes = np.full((4, indicator.shape[1], z.shape[1]), np.nan)
    for site in range(indicator.shape[1]):
        at_site = z[indicator[:, site] > 0]
        finite = np.isfinite(at_site).any(axis=0)
        if not finite.any():
            continue
        at_site = at_site[:, finite]
        shift[site, finite] = np.nanmean(at_site, axis=0)
        spread = np.nanvar(at_site, axis=0, ddof=1)
        variance[site, finite] = np.where(spread == 0, 1, spread)
        shift_bayes[site, finite], variance_bayes[site, finite] = _posterior(
            at_site, shift[site, finite], variance[site, finite]
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
    for _ in range(1000):
        old = new_shift, new_variance
        new_shift = (prior_spread * n * shift + new_variance * prior_shift) / (prior_spread * n + new_variance)
        squares = np.nansum((z - new_shift) ** 2, axis=0)
        new_variance = (squares / 2 + b) / (n / 2 + a - 1)
        if max(np.abs(new_shift - old[0]).max(), np.abs(new_variance - old[1]).max()) < 1e-10:
            break
    return new_shift, new_variance
