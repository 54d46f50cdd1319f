"""Curves of susceptibility over age: fit, intervals, bands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f as f_distribution

Floats = NDArray[np.float64]

Interval = tuple[float, float]

BETA_BOUNDS = (0.001, 1.0)
"""1/year: the rise is half done after 693 and after 0.7 years."""

N_RESAMPLED = 5
"""Fewest participants that are resampled: with two, half of the samples are one person alone."""

_N_GRID = 200

_CHUNK = 100

_ROUNDING = 1e-10

_DESIGN = "age and chi have shapes {} and {}, expected one value each a scan"


@dataclass(frozen=True)
class Curve:
    """χ = α f(age) + γ, with a rate β in f or without."""

    name: str
    basis: Callable[[Floats, Floats], Floats]
    """Ages (n,) and rates (m,) → f of shape (n, m)."""
    has_rate: bool
    n_min: int
    """Fewest scans that are fitted."""

    @property
    def n_parameters(self) -> int:
        """α, γ and perhaps β."""
        return 3 if self.has_rate else 2


EXPONENTIAL = Curve("exponential", lambda age, beta: -np.expm1(-np.multiply.outer(age, beta)), True, 10)

LINEAR = Curve("linear", lambda age, beta: np.repeat(age[:, None], beta.size, axis=1), False, 6)

LOGARITHMIC = Curve("logarithmic", lambda age, beta: np.repeat(np.log(age)[:, None], beta.size, axis=1), False, 6)

CURVES = (EXPONENTIAL, LINEAR, LOGARITHMIC)


@dataclass(frozen=True)
class _Profile:
    """Least squares of α and γ at given rates β; all of shape (m,), or (replicates, m)."""

    beta: Floats
    n: Floats
    alpha: Floats
    mean_f: Floats
    mean_chi: Floats
    spread: Floats
    """Sum of squares of f around its mean."""
    rss: Floats

    def value(self, f: Floats) -> Floats:
        """Curve where its basis is f."""
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
    """Sum of squares of χ around its mean."""
    level: float
    beta_bounds: Interval
    intervals: dict[str, Interval]
    """``alpha``, ``beta``, ``gamma`` → confidence limits by profile."""
    region: _Profile
    """Rates within the confidence limits of β."""

    @property
    def std(self) -> float:
        """Residual standard deviation, in the unit of χ."""
        return math.sqrt(self.rss / (self.n - self.curve.n_parameters))

    @property
    def r2(self) -> float:
        """Share of the variance that the curve explains."""
        return 1 - self.rss / self.total

    @property
    def aicc(self) -> float:
        """Akaike's criterion for small samples; the residual variance counts as a parameter."""
        k = self.curve.n_parameters + 1
        mean_square = max(self.rss / self.n, np.finfo(float).tiny)
        return self.n * math.log(mean_square) + 2 * k + 2 * k * (k + 1) / (self.n - k - 1)

    @property
    def at_bound(self) -> bool:
        """Whether β itself or its interval lies on a bound, so that the ages do not tell α, β and γ apart."""
        return self.curve.has_rate and not set(self.beta_bounds).isdisjoint({self.beta, *self.intervals["beta"]})


def fit_curve(
    age: ArrayLike, chi: ArrayLike, *, curve: Curve, level: float = 0.95, beta_bounds: Interval = BETA_BOUNDS
) -> Fit:
    r"""Fit a curve by least squares, with confidence limits by profile.

    Parameters
    ----------
    age : array_like of shape (n,)
        Years, finite; above 0 for the logarithmic curve, not below 0 for the others.
    chi : array_like of shape (n,)
        Susceptibility in ppm (or any measure in its own unit), finite.
    curve : Curve
        ``EXPONENTIAL``, ``LINEAR`` or ``LOGARITHMIC``.
    level : float
        Of the confidence limits.
    beta_bounds : tuple of 2 float
        Range of β in 1/year.

    Returns
    -------
    Fit
        α and γ in the unit of `chi`, β in 1/year.

    Raises
    ------
    ValueError
        If there are fewer scans than ``curve.n_min``, a value is not finite or outside the range, or one of `age` and
        `chi` does not vary.

    Notes
    -----
    The exponential curve is eq. 6 of [1]_, which takes it from [2]_,

    .. math:: \chi = \alpha (1 - e^{-\beta\,\text{age}}) + \gamma,

    the others are :math:`\alpha\,\text{age} + \gamma` and :math:`\alpha \ln\text{age} + \gamma`. At a given β all three
    are linear, so that α and γ follow in closed form and only β is searched [3]_: over 200 values between its bounds,
    then from each local minimum of these. The confidence region is that of
    :math:`\text{RSS} \le \text{RSS}_{min} (1 + F_{1,n-p}/(n-p))` [4]_; the limits of each parameter are its extremes in
    that region, infinite where the ages do not tell it. For a curve without β they are Student's. Scans count as
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
    one = np.ones((1, values.size))

    def profile(beta: Floats) -> _Profile:
        return _profile(curve, years, values, one, beta)

    total = float(((values - values.mean()) ** 2).sum())
    beta = _best_rate(profile, beta_bounds) if curve.has_rate else math.nan
    best = profile(np.array([beta]))
    rss = float(best.rss[0, 0])
    free = values.size - curve.n_parameters
    limit = rss * (1 + float(f_distribution.ppf(level, 1, free)) / free)
    beta_limits = _rate_limits(profile, beta, limit, beta_bounds) if curve.has_rate else (math.nan, math.nan)
    rates = np.array([beta])
    if curve.has_rate:
        rates = np.union1d(np.geomspace(*beta_limits, 2 * _N_GRID), rates)
    region = profile(rates)
    zero = np.zeros(rates.size)
    half = _half_width(limit - region.rss[0], 1.0, region.spread[0])
    intervals = {
        "alpha": (float((region.alpha[0] - half).min()), float((region.alpha[0] + half).max())),
        "beta": beta_limits,
        "gamma": _value_limits(region, zero, limit),
    }
    gamma = float(best.value(np.zeros(1))[0, 0])
    return Fit(
        curve, float(best.alpha[0, 0]), beta, gamma, values.size, rss, total, level, beta_bounds, intervals, region
    )


def bands(fit: Fit, ages: ArrayLike) -> pd.DataFrame:
    """Compute a fitted curve with its bands.

    Parameters
    ----------
    fit : Fit
        As `fit_curve` returned it.
    ages : array_like of shape (m,)
        Years; above 0 for the logarithmic curve.

    Returns
    -------
    DataFrame
        One row an age: ``age``, ``fit``; ``low`` and ``high``, where the curve lies; ``prediction_low`` and
        ``prediction_high``, where a further scan's value lies; each point by point at the level of `fit`.

    Notes
    -----
    The curve's limits are its extremes over the confidence region of `fit_curve`; a further scan adds the residual
    variance to them in squares.
    """
    years = np.asarray(ages, dtype=np.float64)
    region = fit.region
    free = fit.n - fit.curve.n_parameters
    quantile = float(f_distribution.ppf(fit.level, 1, free))
    limit = fit.rss * (1 + quantile / free)
    values = fit.gamma + fit.alpha * fit.curve.basis(years, np.array([fit.beta]))[:, 0]
    limits = [_value_limits(region, f, limit) for f in fit.curve.basis(years, region.beta)]
    low, high = np.array(limits).reshape(-1, 2).T
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
    """Confidence limits by refitting to resampled participants.

    Use it where participants have several scans: they are drawn with all of them.

    Parameters
    ----------
    fit : Fit
        As `fit_curve` returned it for the same `age` and `chi`.
    age, chi : array_like of shape (n,)
        Years and the measure.
    rng : Generator
        Draws the participants.
    participants : array_like of shape (n,), optional
        Who was scanned; without it every scan is a participant.
    n_replicates : int
        Number of refits.

    Returns
    -------
    dict
        ``alpha``, ``beta``, ``gamma`` → percentiles of the refits that hold ``fit.level`` of them. β is searched over
        200 values between its bounds and interpolated. NaN with fewer than 5 participants, whose samples repeat.
    """
    years, values = _check(age, chi, fit.curve)
    who = np.arange(values.size)
    if participants is not None:
        who = np.unique(np.asarray(participants), return_inverse=True)[1]
    if who.max() + 1 < N_RESAMPLED:
        return dict.fromkeys(("alpha", "beta", "gamma"), (math.nan, math.nan))
    grid = np.geomspace(*fit.beta_bounds, _N_GRID) if fit.curve.has_rate else np.array([math.nan])
    found = [
        _refit(_profile(fit.curve, years, values, weights, grid))
        for weights in _draw(who, n_replicates=n_replicates, rng=rng)
    ]
    replicates = np.concatenate(found, axis=1)
    tail = (1 - fit.level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail], axis=1)
    return {name: (float(a), float(b)) for name, a, b in zip(("alpha", "beta", "gamma"), low, high, strict=True)}


def _check(age: ArrayLike, chi: ArrayLike, curve: Curve) -> tuple[Floats, Floats]:
    years, values = np.asarray(age, dtype=np.float64), np.asarray(chi, dtype=np.float64)
    if years.ndim != 1 or years.shape != values.shape:
        raise ValueError(_DESIGN.format(years.shape, values.shape))
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


def _profile(curve: Curve, age: Floats, chi: Floats, weights: Floats, beta: Floats) -> _Profile:
    """Solve for α and γ at every rate and for every set of weights (replicates, n)."""
    f = curve.basis(age, beta)
    # around the means first: a saturated f varies by less than its rounding otherwise
    centre_f, centre_chi = f.mean(axis=0), chi.mean()
    f, y = f - centre_f, chi - centre_chi
    n = weights.sum(axis=1, keepdims=True)
    mean_f, mean_y = weights @ f / n, (weights @ y)[:, None] / n
    squares = weights @ f**2
    spread = squares - n * mean_f**2
    # in this sample f does not vary, or by less than its rounding: α is not told, and taken for 0
    spread[spread <= _ROUNDING * squares] = 0
    product = weights @ (f * y[:, None]) - n * mean_f * mean_y
    alpha = np.divide(product, spread, out=np.zeros_like(spread), where=spread > 0)
    if weights.shape[0] == 1:  # residuals themselves: a perfect fit is lost in the difference of sums
        rss = (weights[0][:, None] * (y[:, None] - mean_y[0] - alpha[0] * (f - mean_f[0])) ** 2).sum(axis=0)[None]
    else:
        rss = (weights @ y**2)[:, None] - n * mean_y**2 - alpha**2 * spread
    return _Profile(beta, n, alpha, mean_f + centre_f, mean_y + centre_chi, spread, rss)


def _best_rate(profile: Callable[[Floats], _Profile], bounds: Interval) -> float:
    """Search β from every local minimum between the bounds."""
    grid = np.geomspace(*bounds, _N_GRID)
    rss = profile(grid).rss[0]
    around = np.pad(rss, 1, constant_values=np.inf)
    candidates = [(float(rss[0]), bounds[0]), (float(rss[-1]), bounds[1])]
    for place in map(int, np.flatnonzero((rss <= around[:-2]) & (rss <= around[2:]))):
        bracket = np.log([grid[max(place - 1, 0)], grid[min(place + 1, grid.size - 1)]])
        found = minimize_scalar(
            lambda log_beta: profile(np.exp([log_beta])).rss[0, 0],
            bounds=tuple(bracket),
            method="bounded",
            options={"xatol": 1e-9},
        )
        candidates.append((float(found.fun), float(np.exp(found.x))))
    return min(candidates)[1]


def _rate_limits(profile: Callable[[Floats], _Profile], beta: float, limit: float, bounds: Interval) -> Interval:
    """Smallest and largest β in the confidence region; a bound where the region reaches it."""
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


def _value_limits(region: _Profile, f: Floats, limit: float) -> Interval:
    """Extremes of the curve in the confidence region where its basis is f, a value a rate; f = 0 is γ."""
    excess = limit - region.rss[0]
    at_mean = _half_width(excess, 1.0, region.n[0])
    away = _half_width(excess, (f - region.mean_f[0]) ** 2, region.spread[0])
    value, half = region.value(f)[0], np.hypot(at_mean, away)
    return float((value - half).min()), float((value + half).max())


def _half_width(excess: Floats, over: ArrayLike, under: Floats) -> Floats:
    """Square root of excess · over / under: 0 without excess or distance, infinite where f does not vary."""
    top = np.maximum(excess, 0) * np.asarray(over)
    width = np.full(top.shape, np.inf)
    np.divide(top, under, out=width, where=under > 0)
    width[top == 0] = 0
    return np.sqrt(width)


def _draw(who: NDArray[np.int_], *, n_replicates: int, rng: np.random.Generator) -> Iterator[Floats]:
    """How often each scan counts, replicates × scans, in chunks."""
    n = int(who.max()) + 1
    for start in range(0, n_replicates, _CHUNK):
        size = min(_CHUNK, n_replicates - start)
        yield rng.multinomial(n, np.full(n, 1 / n), size=size)[:, who].astype(np.float64)


def _refit(profile: _Profile) -> Floats:
    """α, β, γ of every replicate: the best rate and its neighbours' parabola in log β."""
    rows = np.arange(profile.rss.shape[0])
    place = profile.rss.argmin(axis=1)
    beta, alpha, gamma = profile.beta[place], profile.alpha, profile.value(np.zeros(profile.beta.size))
    if profile.beta.size == 1:
        return np.stack([alpha[:, 0], beta, gamma[:, 0]])
    middle = np.clip(place, 1, profile.beta.size - 2)
    left, centre, right = (profile.rss[rows, middle + step] for step in (-1, 0, 1))
    curvature = left - 2 * centre + right
    shift = np.divide(left - right, 2 * curvature, out=np.zeros_like(curvature), where=curvature > 0)
    shift = np.where(place == middle, np.clip(shift, -1, 1), place - middle)  # at a bound: no parabola
    ratio = profile.beta[1] / profile.beta[0]

    def between(values: Floats) -> Floats:
        """Quadratic interpolation of what changes smoothly with log β."""
        a, b, c = (values[rows, middle + step] for step in (-1, 0, 1))
        interpolated: Floats = b + shift * (c - a) / 2 + shift**2 * (a - 2 * b + c) / 2
        return interpolated

    return np.stack([between(alpha), profile.beta[middle] * ratio**shift, between(gamma)])
