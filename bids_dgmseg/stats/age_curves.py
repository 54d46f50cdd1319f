"""Age curves of a cohort: linear and exponential, by least squares with one value per participant."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import curve_fit
from scipy.stats import t as student

from bids_dgmseg.stats.long_table import Floats, average_repeated_scans, iter_groups

BETA_BOUNDS = (0.001, 1.0)
"""1/year: half of the increase takes 693 and 0.7 years."""

WIDEST = 10
"""Limits of α, γ or α + γ wider than this multiple of the range of the values are not given."""

_PARAMETERS = ("alpha", "beta_per_year", "gamma", "plateau")

_SOLVER: dict[str, Any] = {"x_scale": "jac", "ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}

_COLUMNS = (
    *("curve", "n", "n_missing", "n_scans", "age_min", "age_max"),
    *(f"{name}{end}" for name in _PARAMETERS for end in ("", "_low", "_high")),
    *("std", "r2", "aicc", "delta_aicc", "best", "note"),
)

_CURVE_COLUMNS = ("curve", "age", "fit", "low", "high")


@dataclass(frozen=True)
class Curve:
    """A curve of age with its derivatives by its parameters, the columns of an array."""

    name: str
    value: Callable[..., Floats]
    gradient: Callable[..., Floats]
    parameters: tuple[str, ...]
    n_min: int
    """Minimum number of participants."""


EXPONENTIAL = Curve(
    "exponential",
    lambda age, alpha, beta, gamma: gamma - alpha * np.expm1(-beta * age),
    lambda age, alpha, beta, _: np.column_stack(
        [-np.expm1(-beta * age), alpha * age * np.exp(-beta * age), np.ones(len(age))]
    ),
    ("alpha", "beta_per_year", "gamma"),
    10,
)

LINEAR = Curve(
    "linear",
    lambda age, alpha, gamma: alpha * age + gamma,
    lambda age, *_: np.column_stack([age, np.ones(len(age))]),
    ("alpha", "gamma"),
    6,
)

CURVES = (EXPONENTIAL, LINEAR)


@dataclass(frozen=True)
class Fit:
    """A curve fitted to one nucleus."""

    curve: Curve
    parameters: Floats
    covariance: Floats
    """Of the parameters; infinite if the ages do not identify them."""
    n: int
    rss: float
    total: float
    """Sum of squared deviations of χ from its mean."""
    spread: float
    """Range of χ."""
    quantile: float
    """Quantile of Student's t distribution for the limits."""

    @property
    def aicc(self) -> float:
        """Akaike information criterion corrected for small samples; the residual variance counts as a parameter."""
        k = len(self.parameters) + 1
        mean_square = max(self.rss / self.n, np.finfo(float).tiny)
        return self.n * math.log(mean_square) + 2 * k + 2 * k * (k + 1) / (self.n - k - 1)

    def band(self, ages: Floats) -> pd.DataFrame:
        """Return the curve at some ages with its pointwise confidence limits: ``age``, ``fit``, ``low``, ``high``."""
        values = self.curve.value(ages, *self.parameters)
        gradient = self.curve.gradient(ages, *self.parameters)
        with np.errstate(invalid="ignore"):  # infinite covariances
            half = self.quantile * np.sqrt(np.einsum("ij,jk,ik->i", gradient, self.covariance, gradient))
        return pd.DataFrame({"age": ages, "fit": values, "low": values - half, "high": values + half})

    def estimates(self) -> dict[str, tuple[float, float]]:
        """Return each parameter and the plateau, α + γ, of the exponential curve, with half the width of its limits."""
        errors = np.sqrt(np.diag(self.covariance))
        estimates = dict(zip(self.curve.parameters, zip(self.parameters, errors, strict=True), strict=True))
        if self.curve is EXPONENTIAL:
            ends = np.array([1.0, 0.0, 1.0])
            with np.errstate(invalid="ignore"):
                estimates["plateau"] = ends @ self.parameters, np.sqrt(ends @ self.covariance @ ends)
        return {name: (float(value), self.quantile * float(error)) for name, (value, error) in estimates.items()}


def fit_curve(age: ArrayLike, chi: ArrayLike, *, curve: Curve, level: float = 0.95) -> Fit:
    r"""Fit a curve by least squares.

    Parameters
    ----------
    age : array_like of shape (n,)
        Years, finite.
    chi : array_like of shape (n,)
        Susceptibility in ppm (or another measure in its unit), finite; one value per participant.
    curve : Curve
        ``EXPONENTIAL`` or ``LINEAR``.
    level : float
        Confidence level of the limits.

    Returns
    -------
    Fit
        α and γ in the unit of `chi`, β in 1/year, from 0.001 to 1.

    Raises
    ------
    ValueError
        If there are fewer values than ``curve.n_min``, or `age` or `chi` does not vary.

    Notes
    -----
    The exponential curve is eq. 6 of [1]_ after [2]_, :math:`\chi = \alpha (1 - e^{-\beta\,\text{age}}) + \gamma`, the
    other :math:`\alpha\,\text{age} + \gamma`. The limits are those of the linearized model.

    References
    ----------
    .. [1] Guan Y, et al. DeepQSMSeg: a deep learning-based sub-cortical nucleus segmentation tool for quantitative
       susceptibility mapping. Annu Int Conf IEEE Eng Med Biol Soc (2021). PMID 34892034
    .. [2] Zhang Y, et al. Longitudinal atlas for normative human brain development and aging over the lifespan using
       quantitative susceptibility mapping. NeuroImage 171 (2018) 176-189.
    """
    years, values = np.asarray(age, np.float64), np.asarray(chi, np.float64)
    if len(values) < curve.n_min:
        raise ValueError(f"{len(values)} participants, the {curve.name} curve needs {curve.n_min}")
    for name, array in (("ages", years), ("values", values)):
        if np.ptp(array) == 0:
            raise ValueError(f"all {name} are {array[0]:g}")
    bounds: Any = (-np.inf, np.inf)
    start = tuple(np.polyfit(years, values, 1))
    if curve is EXPONENTIAL:  # linear at a given rate, of which the best of some is refined
        trials = []
        for beta in np.geomspace(*BETA_BOUNDS, 12):
            (alpha, gamma), rss, *_ = np.polyfit(-np.expm1(-beta * years), values, 1, full=True)
            trials.append((float(rss[0]) if len(rss) else math.inf, (alpha, beta, gamma)))
        start = min(trials)[1]
        bounds = tuple([limit, beta, limit] for limit, beta in zip(bounds, BETA_BOUNDS, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a covariance that cannot be estimated is infinite
        parameters, covariance = curve_fit(
            curve.value, years, values, start, jac=curve.gradient, bounds=bounds, method="trf", **_SOLVER
        )
    rss = float(((values - curve.value(years, *parameters)) ** 2).sum())
    total, free = float(((values - values.mean()) ** 2).sum()), len(values) - len(parameters)
    quantile = float(student.ppf((1 + level) / 2, free))
    return Fit(curve, parameters, covariance, len(values), rss, total, float(np.ptp(values)), quantile)


def fit_age_curves(
    table: pd.DataFrame,
    *,
    value: str = "mean_ppm",
    age: str = "age",
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
    curves: Sequence[Curve] = CURVES,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit curves to each nucleus and compare them by the Akaike information criterion.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus; ages and measures are numeric, NaN where missing. The scans of a participant are
        averaged.
    value, age, participant : str
        Columns of the measure, of the ages at the scan in years, and of the participants.
    by : sequence of str
        Columns that define separate fits.
    curves : sequence of Curve

    Returns
    -------
    parameters : DataFrame
        One row per nucleus and curve: the columns `by` and those described in ``columns_group.tsv``. A curve that
        cannot be fitted (too few participants, no variance) has missing values and a ``note`` that states why. Limits
        are missing if the ages do not identify the parameters: β or its limits reach the bounds, or those of α, γ or
        the plateau α + γ are wider than 10 times the range of the values.
    curves : DataFrame
        One row per year of age of each fitted curve: the columns `by`, ``curve``, ``age``, ``fit`` and its 95 %
        confidence limits ``low`` and ``high``.

    Raises
    ------
    InputError
        If a column is missing.
    ValueError
        If a numeric column contains text.
    """
    people = average_repeated_scans(table, participant=participant, by=by, means=(value, age), same=())
    n_rows = {tuple(key.values()): len(rows) for key, rows in iter_groups(table, by)}
    records, drawn = [], []
    for key, rows in iter_groups(people, by):
        used = rows.dropna(subset=[value])
        n_scans = int(used["n_scans"].sum())
        counts = {"n": len(used), "n_scans": n_scans, "n_missing": n_rows[tuple(key.values())] - n_scans}
        counts |= {"age_min": used[age].min(), "age_max": used[age].max()}
        fitted = []
        for curve in curves:
            record = {**key, **counts, "curve": curve.name, "note": ""}
            try:
                fit = fit_curve(used[age], used[value], curve=curve)
            except ValueError as error:  # raised for unsuitable data
                fitted.append(record | {"note": f"not fitted: {error}"})
                continue
            fitted.append(record | _describe(fit))
            low, high = used[age].min(), used[age].max()
            years = np.union1d([low, high], np.arange(math.ceil(low), high))
            drawn.append(fit.band(years).assign(**key, curve=curve.name))
        lowest = min((record["aicc"] for record in fitted if "aicc" in record), default=np.nan)
        for record in fitted:
            aicc = record.get("aicc", np.nan)
            records.append(record | {"delta_aicc": aicc - lowest, "best": aicc == lowest})
    columns = [*by, *_CURVE_COLUMNS]
    lines = pd.concat(drawn, ignore_index=True)[columns] if drawn else pd.DataFrame(columns=columns)
    return pd.DataFrame(records, columns=[*by, *_COLUMNS]), lines


def _describe(fit: Fit) -> dict[str, Any]:
    """Return the columns of a fit."""
    estimates, hidden = fit.estimates(), set[str]()
    record: dict[str, Any] = {"std": math.sqrt(fit.rss / (fit.n - len(fit.parameters))), "r2": 1 - fit.rss / fit.total}
    if fit.curve is EXPONENTIAL:
        beta, half = estimates["beta_per_year"]
        low, high = BETA_BOUNDS
        if not (low < beta - half and beta + half < high):
            hidden = {"alpha", "beta_per_year", "gamma"}
        if any(not 2 * estimates[name][1] <= WIDEST * fit.spread for name in ("alpha", "gamma", "plateau")):
            hidden = set(estimates)
    if hidden:
        names = ", ".join(name for name in estimates if name in hidden)
        record["note"] = f"{names} are not identified: limits too wide; use the values of group_ageing_curves.tsv"
    for name, (estimate, half) in estimates.items():
        limits = (np.nan, np.nan) if name in hidden else (estimate - half, estimate + half)
        record |= {name: estimate, f"{name}_low": limits[0], f"{name}_high": limits[1]}
    return record | {"aicc": fit.aicc}
