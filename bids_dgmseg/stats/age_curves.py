"""Age curves of one measure of one nucleus: least-squares fit, profile intervals, bands, bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f as f_distribution

Floats = NDArray[np.float64]

Interval = tuple[float, float]

BETA_BOUNDS = (0.001, 1.0)
"""1/year: half of the increase takes 693 and 0.7 years."""

N_RESAMPLED = 5
"""Minimum number of participants to resample: with two, half of the samples contain only one of them."""

PARAMETERS = ("alpha", "beta", "gamma", "plateau")

_N_GRID = 200
"""Rates between the bounds."""

_CHUNK = 100
"""Bootstrap replicates computed at once."""

_ROUNDING = 1e-10
"""Relative rounding error of a sum of squares of deviations."""


@dataclass(frozen=True)
class Curve:
    """A curve χ = α f(age) + γ, where f may have a rate β."""

    name: str
    basis: Callable[[Floats, Floats], Floats]
    """Ages (n,) and rates (m,) → f of shape (n, m)."""
    has_rate: bool
    n_min: int
    """Minimum number of scans."""

    @property
    def n_parameters(self) -> int:
        """Number of parameters: α, γ and, with a rate, β."""
        return 3 if self.has_rate else 2


EXPONENTIAL = Curve("exponential", lambda age, beta: -np.expm1(-np.multiply.outer(age, beta)), True, 10)

LINEAR = Curve("linear", lambda age, beta: np.repeat(age[:, None], beta.size, axis=1), False, 6)

LOGARITHMIC = Curve("logarithmic", lambda age, beta: np.repeat(np.log(age)[:, None], beta.size, axis=1), False, 6)

CURVES = (EXPONENTIAL, LINEAR, LOGARITHMIC)


@dataclass(frozen=True)
class _Profile:
    """Least-squares α and γ at given rates β; arrays of shape (m,) or (replicates, m)."""

    beta: Floats
    n: Floats
    alpha: Floats
    mean_f: Floats
    mean_chi: Floats
    spread: Floats
    """Sum of squared deviations of f from its mean."""
    rss: Floats

    def value(self, f: Floats) -> Floats:
        """Value of the curve at basis f."""
        return self.mean_chi + self.alpha * (f - self.mean_f)


@dataclass(frozen=True)
class Fit:
    """One curve fitted to one nucleus."""

    curve: Curve
    alpha: float
    beta: float
    """1/year; NaN for a curve without a rate."""
    gamma: float
    n: int
    rss: float
    total: float
    """Sum of squared deviations of χ from its mean."""
    level: float
    beta_bounds: Interval
    intervals: dict[str, Interval]
    """``alpha``, ``beta``, ``gamma``, ``plateau`` → profile confidence limits."""
    spread: float
    """Range of χ."""
    region: _Profile
    """Profile at rates within the confidence limits of β."""

    @property
    def std(self) -> float:
        """Residual standard deviation in the unit of χ."""
        return math.sqrt(self.rss / (self.n - self.curve.n_parameters))

    @property
    def r2(self) -> float:
        """Fraction of the variance that the curve explains."""
        return 1 - self.rss / self.total

    @property
    def aicc(self) -> float:
        """Akaike information criterion corrected for small samples; the residual variance counts as a parameter."""
        k = self.curve.n_parameters + 1
        mean_square = max(self.rss / self.n, np.finfo(float).tiny)
        return self.n * math.log(mean_square) + 2 * k + 2 * k * (k + 1) / (self.n - k - 1)

    @property
    def plateau(self) -> float:
        """Value that a curve with a rate approaches, α + γ; NaN for the others."""
        return self.alpha + self.gamma if self.curve.has_rate else math.nan

    @property
    def at_bound(self) -> bool:
        """Whether β or its interval reaches a bound, so that α, β and γ are not identifiable."""
        return self.curve.has_rate and not set(self.beta_bounds).isdisjoint({self.beta, *self.intervals["beta"]})


def fit_curve(
    age: ArrayLike, chi: ArrayLike, *, curve: Curve, level: float = 0.95, beta_bounds: Interval = BETA_BOUNDS
) -> Fit:
    r"""Fit a curve by least squares, with profile confidence limits.

    Parameters
    ----------
    age : array_like of shape (n,)
        Years, finite, at least 0; above 0 for the logarithmic curve.
    chi : array_like of shape (n,)
        Susceptibility in ppm (or another measure in its unit), finite.
    curve : Curve
        ``EXPONENTIAL``, ``LINEAR`` or ``LOGARITHMIC``.
    level : float
        Confidence level of the limits.
    beta_bounds : tuple of 2 float
        Range of β in 1/year.

    Returns
    -------
    Fit
        α and γ in the unit of `chi`, β in 1/year.

    Raises
    ------
    ValueError
        If there are fewer scans than ``curve.n_min``, a value is not finite or outside its range, or `age` or `chi`
        does not vary.

    Notes
    -----
    The exponential curve is eq. 6 of [1]_ after [2]_,

    .. math:: \chi = \alpha (1 - e^{-\beta\,\text{age}}) + \gamma,

    the others are :math:`\alpha\,\text{age} + \gamma` and :math:`\alpha \ln\text{age} + \gamma`. At a given β all three
    are linear, so that α and γ follow in closed form and only β is searched (variable projection [3]_): over 200 values
    between its bounds, then from each local minimum of these. The confidence region is
    :math:`\text{RSS} \le \text{RSS}_{min} (1 + F_{1,n-p}/(n-p))` [4]_; the limits of each parameter are its extremes in
    that region, infinite if the ages do not identify it. For a curve without β they are Student's. Scans count as
    independent.

    References
    ----------
    .. [1] Guan Y, et al. DeepQSMSeg: a deep learning-based sub-cortical nucleus segmentation tool for quantitative
       susceptibility mapping. Annu Int Conf IEEE Eng Med Biol Soc (2021). PMID 34892034
    .. [2] Zhang Y, et al. Longitudinal atlas for normative human brain development and aging over the lifespan using
       quantitative susceptibility mapping. NeuroImage 171 (2018) 176-189.
    .. [3] Golub GH, Pereyra V. The differentiation of pseudo-inverses and nonlinear least squares problems whose
       variables separate. SIAM J Numer Anal 10 (1973) 413-432. doi:10.1137/0710036
    .. [4] Bates DM, Watts DG. Nonlinear regression analysis and its applications. Wiley (1988), chapter 6.
       doi:10.1002/9780470316757
    """
    years, values = _check(age, chi, curve)
    # scans of one age count together, by their mean: large studies have many scans and few different ages
    ages, which = np.unique(years, return_inverse=True)
    counts = np.bincount(which)
    means = np.bincount(which, values) / counts
    within = float(((values - means[which]) ** 2).sum())
    profile = partial(_profile, curve, ages, means, counts[None].astype(np.float64), within=within)
    total = float(((values - values.mean()) ** 2).sum())
    beta = _best_rate(profile, beta_bounds) if curve.has_rate else math.nan
    best = profile(np.array([beta]))
    rss = float(best.rss[0, 0])
    free = values.size - curve.n_parameters
    limit = rss * (1 + float(f_distribution.ppf(level, 1, free)) / free)
    beta_limits = _rate_limits(profile, beta, limit, beta_bounds) if curve.has_rate else (math.nan, math.nan)
    rates = np.union1d(np.geomspace(*beta_limits, 2 * _N_GRID), [beta]) if curve.has_rate else np.array([beta])
    region = profile(rates)
    half = _half_width(limit - region.rss[0], 1.0, region.spread[0])
    ends = np.outer([0.0, 1.0], np.ones(rates.size))
    (gamma_low, plateau_low), (gamma_high, plateau_high) = _value_limits(region, ends, limit).tolist()
    intervals = {
        "alpha": (float((region.alpha[0] - half).min()), float((region.alpha[0] + half).max())),
        "beta": beta_limits,
        "gamma": (gamma_low, gamma_high),
        "plateau": (plateau_low, plateau_high) if curve.has_rate else (math.nan, math.nan),
    }
    spread = float(np.ptp(values))
    alpha, gamma = float(best.alpha[0, 0]), float(best.value(np.zeros(1))[0, 0])
    return Fit(curve, alpha, beta, gamma, values.size, rss, total, level, beta_bounds, intervals, spread, region)


def bands(fit: Fit, ages: ArrayLike) -> pd.DataFrame:
    """Compute a fitted curve with its confidence and prediction bands, one row per age in years.

    Columns: ``age``, ``fit``; the confidence band ``low`` to ``high``, extremes over the confidence region of
    `fit_curve`; the prediction band of a further scan ``prediction_low`` to ``prediction_high``, which adds the
    residual variance in quadrature. Both are pointwise at the level of `fit`.
    """
    years = np.asarray(ages, dtype=np.float64)
    region = fit.region
    free = fit.n - fit.curve.n_parameters
    quantile = float(f_distribution.ppf(fit.level, 1, free))
    limit = fit.rss * (1 + quantile / free)
    values = fit.gamma + fit.alpha * fit.curve.basis(years, np.array([fit.beta]))[:, 0]
    low, high = _value_limits(region, fit.curve.basis(years, region.beta), limit)
    noise = quantile * fit.std**2
    return pd.DataFrame(
        {
            "age": years,
            "fit": values,
            "low": low,
            "high": high,
            "prediction_low": values - np.sqrt((values - low) ** 2 + noise),
            "prediction_high": values + np.sqrt((high - values) ** 2 + noise),
        }
    )


def bootstrap(
    fit: Fit,
    age: ArrayLike,
    chi: ArrayLike,
    *,
    rng: np.random.Generator,
    participants: ArrayLike | None = None,
    n_replicates: int = 1000,
) -> dict[str, Interval]:
    """Compute bootstrap confidence limits by resampling participants with all their scans.

    Parameters
    ----------
    fit : Fit
        As `fit_curve` returned it for the same `age` and `chi`.
    age, chi : array_like of shape (n,)
        Years and the measure.
    rng : Generator
        Random generator for the samples.
    participants : array_like of shape (n,), optional
        Participant of each scan; by default each scan is one.
    n_replicates : int
        Number of refits.

    Returns
    -------
    dict
        ``alpha``, ``beta``, ``gamma``, ``plateau`` → percentile interval at ``fit.level``. β is searched over 200
        values between its bounds and interpolated. NaN for fewer than 5 participants, whose samples repeat.
    """
    years, values = _check(age, chi, fit.curve)
    who = np.arange(values.size)
    if participants is not None:
        who = np.unique(np.asarray(participants), return_inverse=True)[1]
    if who.max() + 1 < N_RESAMPLED:
        return dict.fromkeys(PARAMETERS, (math.nan, math.nan))
    grid = np.geomspace(*fit.beta_bounds, _N_GRID) if fit.curve.has_rate else np.array([math.nan])
    chunks = []
    for start in range(0, n_replicates, _CHUNK):
        n, size = int(who.max()) + 1, min(_CHUNK, n_replicates - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)  # how often each participant counts
        chunks.append(_refit(_profile(fit.curve, years, values, drawn[:, who].astype(np.float64), grid)))
    replicates = np.concatenate(chunks, axis=1)
    plateau = replicates[0] + replicates[2] if fit.curve.has_rate else np.full(n_replicates, np.nan)
    replicates = np.vstack([replicates, plateau])
    tail = (1 - fit.level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=1)
    return {name: (float(a), float(b)) for name, a, b in zip(PARAMETERS, low, high, strict=True)}


def _check(age: ArrayLike, chi: ArrayLike, curve: Curve) -> tuple[Floats, Floats]:
    years, values = np.asarray(age, dtype=np.float64), np.asarray(chi, dtype=np.float64)
    if years.ndim != 1 or years.shape != values.shape:
        raise ValueError(f"age and chi have shapes {years.shape} and {values.shape}, expected one value each per scan")
    if values.size < curve.n_min:
        raise ValueError(f"{values.size} scans, the {curve.name} curve needs {curve.n_min}")
    if not (np.isfinite(years).all() and np.isfinite(values).all()):
        raise ValueError("age or chi holds a value that is not finite")
    if years.min() < 0:
        raise ValueError(f"age {years.min():g} is below 0")
    if curve is LOGARITHMIC and years.min() == 0:
        raise ValueError("age 0 has no logarithm")
    for name, array in (("ages", years), ("values", values)):
        if np.ptp(array) == 0:
            raise ValueError(f"all {name} are {array[0]:g}")
    return years, values


def _profile(curve: Curve, age: Floats, chi: Floats, weights: Floats, beta: Floats, *, within: float = 0.0) -> _Profile:
    """Solve for α and γ at each rate and for each set of weights (replicates, n).

    `within` is the sum of squares of the scans around the means `chi`, if these are weighted by their numbers.
    """
    f = curve.basis(age, beta)
    # Subtract the means first: otherwise a saturated f varies by less than its rounding error.
    centre_f, centre_chi = f.mean(axis=0), chi.mean()
    f, y = f - centre_f, chi - centre_chi
    n = weights.sum(axis=1, keepdims=True)
    mean_f, mean_y = weights @ f / n, (weights @ y)[:, None] / n
    squares = weights @ f**2
    spread = squares - n * mean_f**2
    # If f does not vary in this sample by more than rounding, α is not identifiable and set to 0.
    spread[spread <= _ROUNDING * squares] = 0
    product = weights @ (f * y[:, None]) - n * mean_f * mean_y
    alpha = np.divide(product, spread, out=np.zeros_like(spread), where=spread > 0)
    if weights.shape[0] == 1:  # from the residuals: the difference of sums cancels for a perfect fit
        rss = (weights[0][:, None] * (y[:, None] - mean_y[0] - alpha[0] * (f - mean_f[0])) ** 2).sum(axis=0)[None]
    else:
        rss = (weights @ y**2)[:, None] - n * mean_y**2 - alpha**2 * spread
    return _Profile(beta, n, alpha, mean_f + centre_f, mean_y + centre_chi, spread, rss + within)


def _best_rate(profile: Callable[[Floats], _Profile], bounds: Interval) -> float:
    """Search β from each local minimum between the bounds."""
    grid = np.geomspace(*bounds, _N_GRID)
    rss = profile(grid).rss[0]
    around = np.pad(rss, 1, constant_values=np.inf)
    candidates = [(float(rss[0]), bounds[0]), (float(rss[-1]), bounds[1])]
    for index in map(int, np.flatnonzero((rss <= around[:-2]) & (rss <= around[2:]))):
        bracket = np.log([grid[max(index - 1, 0)], grid[min(index + 1, grid.size - 1)]])
        found = minimize_scalar(
            lambda log_beta: profile(np.exp([log_beta])).rss[0, 0],
            bounds=tuple(bracket),
            method="bounded",
            options={"xatol": 1e-9},
        )
        candidates.append((float(found.fun), float(np.exp(found.x))))
    return min(candidates)[1]


def _rate_limits(profile: Callable[[Floats], _Profile], beta: float, limit: float, bounds: Interval) -> Interval:
    """Smallest and largest β in the confidence region; a bound if the region reaches it."""
    grid = np.union1d(np.geomspace(*bounds, _N_GRID), [beta])
    grid[0], grid[-1] = bounds
    inside = np.flatnonzero((profile(grid).rss[0] <= limit) | (grid == beta))

    def crossing(within: int, beyond: int) -> float:
        if not 0 <= beyond < grid.size:
            return float(grid[within])
        log_limits = np.sort(np.log(grid[[within, beyond]]))
        if profile(grid[[within]]).rss[0, 0] >= limit:  # a perfect fit has no width
            return float(grid[within])
        return math.exp(brentq(lambda log_beta: profile(np.exp([log_beta])).rss[0, 0] - limit, *log_limits))

    return crossing(inside[0], inside[0] - 1), crossing(inside[-1], inside[-1] + 1)


def _value_limits(region: _Profile, f: Floats, limit: float) -> Floats:
    """Extremes (2, m) of the curve over the confidence region at basis f (m, rates), 0 for γ and 1 for the plateau."""
    excess = limit - region.rss[0]
    at_mean = _half_width(excess, 1.0, region.n[0])
    away = _half_width(excess, (f - region.mean_f[0]) ** 2, region.spread[0])
    value, half = region.value(f), np.hypot(at_mean, away)
    return np.stack([(value - half).min(axis=1), (value + half).max(axis=1)])


def _half_width(excess: Floats, over: ArrayLike, under: Floats) -> Floats:
    """Square root of excess · over / under: 0 if the numerator is 0, infinite if f does not vary."""
    top = np.maximum(excess, 0) * np.asarray(over)
    width = np.full(top.shape, np.inf)
    np.divide(top, under, out=width, where=under > 0)
    width[top == 0] = 0
    return np.sqrt(width)


def _refit(profile: _Profile) -> Floats:
    """α, β, γ of each replicate: minimum of the parabola in log β through the best rate and its neighbours."""
    rows = np.arange(profile.rss.shape[0])
    best = profile.rss.argmin(axis=1)
    beta, alpha, gamma = profile.beta[best], profile.alpha, profile.value(np.zeros(profile.beta.size))
    if profile.beta.size == 1:
        return np.stack([alpha[:, 0], beta, gamma[:, 0]])
    middle = np.clip(best, 1, profile.beta.size - 2)
    left, centre, right = (profile.rss[rows, middle + step] for step in (-1, 0, 1))
    curvature = left - 2 * centre + right
    shift = np.divide(left - right, 2 * curvature, out=np.zeros_like(curvature), where=curvature > 0)
    shift = np.where(best == middle, np.clip(shift, -1, 1), best - middle)  # no parabola at a bound
    ratio = profile.beta[1] / profile.beta[0]

    def between(values: Floats) -> Floats:
        """Quadratic interpolation in log β."""
        a, b, c = (values[rows, middle + step] for step in (-1, 0, 1))
        interpolated: Floats = b + shift * (c - a) / 2 + shift**2 * (a - 2 * b + c) / 2
        return interpolated

    return np.stack([between(alpha), profile.beta[middle] * ratio**shift, between(gamma)])
