"""Effects of age, one value per participant: linear and exponential curves; centiles by age and sex from controls."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import curve_fit
from scipy.stats import norm
from scipy.stats import t as student

from bids_dgmseg.stats.agreement import CONFIDENCE
from bids_dgmseg.stats.regression import (
    N_QUADRATIC,
    Floats,
    age_powers,
    average_repeated_scans,
    iter_groups,
    numeric_column,
    require_columns,
)

BETA_BOUNDS = (0.001, 1.0)
"""1/year: half of the increase takes 693 and 0.7 years."""

WIDEST = 10
"""Limits of α, γ or α + γ wider than this multiple of the range of the values are not given."""

LARGEST = 100.0
"""Parameters of an exponential curve that are larger than this many times the range of the values are not stated."""

IMPLAUSIBLE = 10
"""Difference to the lowest AICc from which a curve is implausible (Burnham and Anderson 2002, p. 70)."""

_MIN_FREE = 3
"""Degrees of freedom of the residuals that a fit needs."""

_PARAMETERS = ("alpha", "beta_per_year", "gamma", "plateau")

_SOLVER: dict[str, Any] = {"x_scale": "jac", "ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}

_COLUMNS = (
    *("curve", "n", "n_missing", "n_scans", "age_min", "age_max"),
    *(f"{name}{end}" for name in _PARAMETERS for end in ("", "_low", "_high")),
    *("std", "r2", "aicc", "delta_aicc", "best", "note"),
)

_CURVE_COLUMNS = ("curve", "age", "fit", "low", "high")

_VALUE_COLUMNS = ("participant_id", "age", "value", "value_adjusted")


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


@dataclass(frozen=True)
class Fit:
    """A curve fitted to one nucleus."""

    curve: Curve
    parameters: Floats
    covariance: Floats
    """Covariance of the parameters; infinite if the ages do not identify them."""
    n: int
    rss: float
    total: float
    """Sum of squared deviations of χ, without the effects of the sites, from its mean."""
    spread: float
    """Range of χ."""
    quantile: float
    """Quantile of Student's t distribution for the limits."""
    site_effects: Floats
    """Effect of the site on each value, 0 on average."""

    n_terms: int
    """Number of parameters, those of the sites included."""

    @property
    def aicc(self) -> float:
        """Akaike information criterion for small samples (AICc); the residual variance counts as a parameter."""
        k = self.n_terms + 1
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


def fit_curve(age: ArrayLike, chi: ArrayLike, *, curve: Curve, sites: Sequence[Any] | None = None) -> Fit:
    r"""Fit a curve by least squares.

    Parameters
    ----------
    age : array_like of shape (n,)
        Years, finite.
    chi : array_like of shape (n,)
        Susceptibility in ppm (or another measure in its unit), finite; one value per participant.
    curve : Curve
        ``EXPONENTIAL`` or ``LINEAR``.
    sites : sequence of n, optional
        Site of each value; each has a constant of its own, and γ is that of the mean value.

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
    shares = pd.get_dummies(pd.Series(sites, range(len(values)), dtype=object), dtype=float).to_numpy()[:, 1:]
    shares, k = shares - shares.mean(axis=0), len(curve.parameters)
    free = len(values) - k - shares.shape[1]
    if np.linalg.matrix_rank(np.column_stack([years - years.mean(), shares])) <= shares.shape[1] or free < _MIN_FREE:
        raise ValueError(f"{len(values)} participants at {1 + shares.shape[1]} sites do not determine an effect of age")

    def solve(rise: Floats) -> tuple[Floats, float]:
        design = np.column_stack([rise, np.ones(len(rise)), shares])
        solution = np.linalg.lstsq(design, values)[0]
        return solution, float(((values - design @ solution) ** 2).sum())

    (alpha, *others), _ = solve(years)
    start, bounds = [alpha, *others], (np.full(k + shares.shape[1], -np.inf), np.full(k + shares.shape[1], np.inf))
    if curve is EXPONENTIAL:  # linear at a given rate, of which the best of some is refined
        rates = np.geomspace(*BETA_BOUNDS, 12)
        beta = min(rates, key=lambda rate: solve(-np.expm1(-rate * years))[1])
        (alpha, *others), _ = solve(-np.expm1(-beta * years))
        start, (bounds[0][1], bounds[1][1]) = [alpha, beta, *others], BETA_BOUNDS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a covariance that cannot be estimated is infinite
        parameters, covariance = curve_fit(
            lambda age, *terms: curve.value(age, *terms[:k]) + shares @ np.array(terms[k:]),
            years,
            values,
            start,
            jac=lambda age, *terms: np.column_stack([curve.gradient(age, *terms[:k]), shares]),
            bounds=bounds,
            method="trf",
            **_SOLVER,
        )
    effects = shares @ parameters[k:]
    rss = float(((values - effects - curve.value(years, *parameters[:k])) ** 2).sum())
    total, spread = float(((values - effects - values.mean()) ** 2).sum()), float(np.ptp(values - effects))
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, free))
    numbers = (len(values), rss, total, spread, quantile)
    return Fit(curve, parameters[:k], covariance[:k, :k], *numbers, effects, k + shares.shape[1])


def fit_age_curves(
    table: pd.DataFrame, *, value: str = "mean_ppm", by: Sequence[str] = ("abbreviation",), site: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Fit curves to each nucleus and compare them by the Akaike information criterion.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``participant_id``, ``age`` at the scan in years and the measure, NaN where
        missing. The scans of a participant are averaged.
    value : str
        Column of the measure.
    by : sequence of str
        Columns that define separate fits.
    site : str, optional
        Column of the site, whose effect is estimated with the curve.

    Returns
    -------
    parameters : DataFrame
        One row per nucleus and curve: the columns `by` and those described in ``columns_group.tsv``. A curve that
        cannot be fitted (too few participants, no variance) has missing values and a ``note`` that states why. Limits
        are missing if the ages do not identify the parameters: β or its limits reach the bounds, or those of α, γ or
        the plateau α + γ are wider than 10 times the range of the values.
    curves : DataFrame
        One row per year of age of each fitted curve: the columns `by`, ``curve``, ``age``, ``fit`` and 95 %
        confidence limits ``low`` and ``high``, which contain those of both curves: the choice between them is
        uncertain. A curve with an AICc higher by 10 or more has none.
    values : DataFrame
        One row per participant of the fits: the columns `by`, ``participant_id``, ``age``, ``value`` and
        ``value_adjusted``, without the effect of the site on the best curve.

    Raises
    ------
    InputError
        If a column is missing.
    ValueError
        If a numeric column contains text.
    """
    people = average_repeated_scans(table, by=by, means=(value, "age"), same=(site,) if site else ())
    n_rows = {tuple(key.values()): len(rows) for key, rows in iter_groups(table, by)}
    records, drawn, points = [], [], []
    for key, rows in iter_groups(people, by):
        used = rows.dropna(subset=[value, *([site] if site else [])])
        n_scans = int(used["n_scans"].sum())
        counts = {"n": len(used), "n_scans": n_scans, "n_missing": n_rows[tuple(key.values())] - n_scans}
        counts |= {"age_min": used["age"].min(), "age_max": used["age"].max()}
        fitted, effects, bands = [], {}, {}
        for curve in (EXPONENTIAL, LINEAR):
            record = {**key, **counts, "curve": curve.name, "note": ""}
            try:
                fit = fit_curve(used["age"], used[value], curve=curve, sites=used[site].tolist() if site else None)
            except ValueError as error:  # raised for unsuitable data
                fitted.append(record | {"note": f"not fitted: {error}"})
                continue
            fitted.append(record | _describe(fit))
            effects[fit.aicc] = fit.site_effects
            low, high = used["age"].min(), used["age"].max()
            years = np.union1d([low, high], np.arange(math.ceil(low), high))
            bands[fit.aicc] = fit.band(years).assign(**key, curve=curve.name)
        lowest = min((record["aicc"] for record in fitted if "aicc" in record), default=np.nan)
        for record in fitted:
            aicc = record.get("aicc", np.nan)
            records.append(record | {"delta_aicc": aicc - lowest, "best": aicc == lowest})
        if effects:
            drawn += _common_limits(bands)
            about = used[["participant_id", "age"]].assign(value=used[value], **key)
            points.append(about.assign(value_adjusted=used[value] - effects[lowest]))
    tables = [pd.DataFrame(records, columns=[*by, *_COLUMNS])]
    for parts, names in ((drawn, _CURVE_COLUMNS), (points, _VALUE_COLUMNS)):
        columns = [*by, *names]
        tables.append(pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns))
    return tables[0], tables[1], tables[2]


def _common_limits(bands: Mapping[float, pd.DataFrame]) -> list[pd.DataFrame]:
    """Replace the limits of plausible curves, by AICc, by those that contain the limits of all; others have none."""
    plausible = [band for aicc, band in bands.items() if aicc - min(bands) < IMPLAUSIBLE]
    low, high = (pd.concat([band[end] for band in plausible], axis=1) for end in ("low", "high"))
    return [
        band.assign(low=low.min(axis=1), high=high.max(axis=1))
        if any(band is other for other in plausible)
        else band.assign(low=np.nan, high=np.nan)
        for band in bands.values()
    ]


def _describe(fit: Fit) -> dict[str, Any]:
    """Return the columns of a fit."""
    estimates, hidden = fit.estimates(), set[str]()
    record: dict[str, Any] = {"std": math.sqrt(fit.rss / (fit.n - fit.n_terms)), "r2": 1 - fit.rss / fit.total}
    if fit.curve is EXPONENTIAL:
        beta, half = estimates["beta_per_year"]
        low, high = BETA_BOUNDS
        if not (low < beta - half and beta + half < high):
            hidden = {"alpha", "beta_per_year", "gamma"}
        absurd = {name for name in ("alpha", "gamma") if not abs(estimates[name][0]) <= LARGEST * fit.spread}
        wide = any(not 2 * estimates[name][1] <= WIDEST * fit.spread for name in ("alpha", "gamma", "plateau"))
        hidden = set(estimates) if wide or absurd else hidden
        estimates |= {name: (np.nan, np.nan) for name in absurd}
    if hidden:
        names = ", ".join(name for name in estimates if name in hidden)
        record["note"] = f"{names} are not identified: limits too wide (use group_ageing_curves.tsv)"
    for name, (estimate, half) in estimates.items():
        limits = (np.nan, np.nan) if name in hidden else (estimate - half, estimate + half)
        record |= {name: estimate, f"{name}_low": limits[0], f"{name}_high": limits[1]}
    return record | {"aicc": fit.aicc}


CENTILES = (5, 10, 25, 50, 75, 90, 95)

N_NORM = 10
"""Minimum number of controls for centiles."""

N_SEX = 5
"""Minimum number of controls of each of two sexes for an effect of sex."""


@dataclass(frozen=True)
class AgeSexNorm:
    """Regression of one measure of one nucleus on age and sex in controls, one value each."""

    n_controls: int
    age_low: float
    age_high: float
    age_mean: float
    age_std: float
    sexes: tuple[str, ...]
    """Two sexes, of which the first has no column; empty without an effect of sex."""
    is_quadratic: bool
    coefficients: Floats
    inverse: Floats
    """Inverse of the cross products of the design."""
    std: float
    """Standard deviation of the residuals."""
    controls: tuple[str, ...] = ()
    """Checksums of the values and ages, by which a control is scored without itself."""

    def __post_init__(self) -> None:
        """Check the numbers, also those of a saved norm."""
        n = 2 + self.is_quadratic + max(len(self.sexes) - 1, 0)
        if self.coefficients.shape != (n,) or self.inverse.shape != (n, n):
            raise ValueError(f"{self.coefficients.shape} coefficients, expected {n}")
        if not (self.std > 0 and self.age_std > 0 and self.df > 1):
            raise ValueError(f"{self.n_controls} controls, std {self.std} and age_std {self.age_std} are not usable")

    @property
    def df(self) -> int:
        """Return the degrees of freedom of the residuals."""
        return self.n_controls - len(self.coefficients)

    def design(self, ages: Floats, sexes: Sequence[Any]) -> Floats:
        """Return the columns of age and sex, NaN for a sex that is not in `sexes`."""
        return _design(ages, sexes, self.age_mean, self.age_std, self.sexes, is_quadratic=self.is_quadratic)

    def predict(self, ages: Floats, sexes: Sequence[Any]) -> tuple[Floats, Floats]:
        """Return the expected values, and the standard errors of new values."""
        at = self.design(ages, sexes)
        return at @ self.coefficients, self.std * np.sqrt(1 + np.einsum("ij,jk,ik->i", at, self.inverse, at))

    def curves(self) -> pd.DataFrame:
        """Return the centiles at whole years of age within those of the controls, and at their limits."""
        low, high = self.age_low, self.age_high
        ages = np.unique(np.concatenate([np.arange(np.ceil(low), np.floor(high) + 1), [low, high]]))
        parts = []
        for sex in self.sexes or ("",):
            centre, error = self.predict(ages, [sex] * len(ages))
            limits = {f"p{percent:02d}": centre + student.ppf(percent / 100, self.df) * error for percent in CENTILES}
            parts.append(pd.DataFrame({"n_controls": self.n_controls, "sex": sex, "age": ages, **limits}))
        return pd.concat(parts, ignore_index=True)


def fit_norms(
    table: pd.DataFrame, *, controls: np.ndarray, value: str = "mean_ppm", by: Sequence[str] = ("abbreviation",)
) -> dict[tuple[Any, ...], AgeSexNorm]:
    r"""Regress the controls on age and sex, per nucleus.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus: ``participant_id``, ``age``, ``sex`` and the measure.
    controls : ndarray of bool, shape (n,)
        Rows of controls, whose scans are averaged.
    value : str
        Column of the measure.
    by : sequence of str

    Returns
    -------
    dict
        Values of `by` → norm; without nuclei of fewer than 10 controls with values and ages, or without variation.

    Notes
    -----
    Controls are regressed on age (a line, from 30 controls on a quadratic) and, with 5 controls of each of two sexes,
    on sex. With the prediction :math:`\hat y`, the residual standard deviation :math:`s`, its :math:`m` degrees of
    freedom and the leverage :math:`h` of age and sex, :math:`(y - \hat y)/(s\sqrt{1 + h})` of a new person has a t
    distribution with m degrees of freedom: the centile is its probability, z the quantile of the normal distribution,
    at most ±37.5 (beyond, probabilities are no numbers).
    """
    norms = {}
    for key, rows in iter_groups(_plain(table, value, by, controls), by):
        people = _average_controls(rows)
        if len(people) >= N_NORM and np.ptp(people["age"]) > 0:
            fitted = _fit(people)
            if fitted is not None:
                norms[tuple(key.values())] = fitted
    return norms


def centile_curves(norms: Mapping[tuple[Any, ...], AgeSexNorm], *, by: Sequence[str]) -> pd.DataFrame:
    """Return `by`, ``n_controls``, ``sex`` (empty without its effect), ``age`` and ``p05`` … ``p95`` of all norms."""
    columns = [*by, "n_controls", "sex", "age", *(f"p{percent:02d}" for percent in CENTILES)]
    curves = [fitted.curves().assign(**dict(zip(by, key, strict=True))) for key, fitted in norms.items()]
    return pd.concat(curves, ignore_index=True)[columns] if curves else pd.DataFrame(columns=columns)


def score_scans(
    table: pd.DataFrame,
    norms: Mapping[tuple[Any, ...], AgeSexNorm],
    *,
    value: str = "mean_ppm",
    by: Sequence[str] = ("abbreviation",),
) -> pd.DataFrame:
    """Score scans relative to norms, those of the controls of the norms relative to the other controls.

    Parameters
    ----------
    table, value, by
        As in `fit_norms`.
    norms : mapping
        Values of `by` → norm.

    Returns
    -------
    DataFrame
        In the order and with the index of `table`: ``n_controls``, ``expected``, ``z``, ``centile`` and ``note``, why
        there is no score. Ages beyond those of the controls have none.
    """
    plain = _plain(table, value, by, None)
    plain = plain.assign(n_controls=np.nan, expected=np.nan, z=np.nan, centile=np.nan, note="no value or age")
    for key, rows in iter_groups(plain, by):
        fitted, usable = norms.get(tuple(key.values())), rows.dropna(subset=["y", "age"])
        if fitted is None:
            plain.loc[rows.index, "note"] = f"no norm: {N_NORM} controls with values and ages are needed"
            continue
        centre, error = fitted.predict(usable["age"].to_numpy(float), usable["sex"].tolist())
        df = np.full(len(usable), fitted.df)
        people = _average_people(rows)
        people = people[[text in fitted.controls for text in _checksums(people)]]
        if len(people):
            left_out = _leave_out(usable, people, fitted)
            is_control = np.isfinite(left_out[0])
            centre, error = (np.where(is_control, *both) for both in zip(left_out, (centre, error), strict=True))
            df = df - is_control
        # by the smaller tail, as probabilities near 1 lose digits; one of 0 would be an infinite z
        ratio = (usable["y"].to_numpy(float) - centre) / error
        tail = np.maximum(student.sf(np.abs(ratio), df), np.finfo(float).tiny)
        z, centile = -np.sign(ratio) * norm.ppf(tail), 100 * student.cdf(ratio, df)
        is_beyond = ~usable["age"].between(fitted.age_low, fitted.age_high).to_numpy()
        limits = f"{fitted.age_low:.0f} to {fitted.age_high:.0f}"
        note = np.where(np.isnan(z), f"no score: the norms are of {' and '.join(fitted.sexes)}", "")
        note = np.where(is_beyond, f"no score: age beyond those of the controls ({limits})", note)
        scores = np.column_stack([centre, z, centile])
        scores[is_beyond] = np.nan
        plain.loc[rows.index, "n_controls"] = fitted.n_controls
        plain.loc[usable.index, ["expected", "z", "centile"]] = scores
        plain.loc[usable.index, "note"] = note
    return plain[["n_controls", "expected", "z", "centile", "note"]].set_axis(table.index)


def _plain(table: pd.DataFrame, value: str, by: Sequence[str], controls: np.ndarray | None) -> pd.DataFrame:
    """Return ``y``, ``age``, ``sex``, ``who``, ``control`` and `by` of each row."""
    require_columns(table, "participant_id", "sex", *by)
    plain = table[list(by)].reset_index(drop=True)
    numbers = {"y": numeric_column(table, value), "age": numeric_column(table, "age")}
    texts = {"sex": table["sex"].to_numpy(object), "who": table["participant_id"].astype(str).to_numpy()}
    return plain.assign(**numbers, **texts, control=False if controls is None else np.asarray(controls, bool))


def _average_controls(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per control of a nucleus: ``y``, ``age`` and ``sex``, one of two if it has an effect."""
    people = _average_people(rows[rows["control"]])
    sexes = _usable_sexes(people["sex"])
    return people[people["sex"].isin(sexes)] if sexes else people


def _average_people(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per participant of a nucleus, whose scans are averaged."""
    usable = rows.dropna(subset=["y", "age"])
    return usable.groupby("who", sort=False).agg({"y": "mean", "age": "mean", "sex": "first"})


def _usable_sexes(sexes: pd.Series) -> tuple[str, ...]:
    """Return the two sexes with an effect, in alphabetical order, or none."""
    counts = sexes.dropna().astype(str).value_counts()
    levels = sorted(map(str, counts.index[counts >= N_SEX]))
    return tuple(levels) if len(levels) == 2 else ()


def _design(
    ages: Floats, sexes: Sequence[Any], mean: float, std: float, levels: Sequence[str], *, is_quadratic: bool
) -> Floats:
    """Return the constant, the powers of the standardized age and the second sex as columns."""
    powers = age_powers((np.asarray(ages, float) - mean) / std, n=N_QUADRATIC if is_quadratic else 0)
    codes = pd.Index(list(levels), dtype=object).get_indexer(pd.Index(list(sexes), dtype=object))
    columns = [np.where(codes < 0, np.nan, codes == level) for level in range(1, len(levels))]
    return np.column_stack([np.ones(len(powers)), powers, *columns])


def _fit(people: pd.DataFrame) -> AgeSexNorm | None:
    """Fit one nucleus; None if the values do not vary."""
    y, ages, sexes = people["y"].to_numpy(float), people["age"].to_numpy(float), _usable_sexes(people["sex"])
    # through two ages there are many quadratics
    is_quadratic = len(y) >= N_QUADRATIC and len(np.unique(ages)) > 2
    mean, std = float(ages.mean()), float(ages.std())
    design = _design(ages, people["sex"].tolist(), mean, std, sexes, is_quadratic=is_quadratic)
    inverse = np.asarray(np.linalg.pinv(design.T @ design), np.float64)
    coefficients = inverse @ design.T @ y
    residuals = y - design @ coefficients
    if np.abs(residuals).max() <= 1e-12 * np.abs(y).max():  # rounding
        return None
    spread = float(np.sqrt((residuals**2).sum() / (len(y) - design.shape[1])))
    low, high = float(ages.min()), float(ages.max())
    checksums = tuple(_checksums(people))
    return AgeSexNorm(len(y), low, high, mean, std, sexes, is_quadratic, coefficients, inverse, spread, checksums)


def _checksums(people: pd.DataFrame) -> list[str]:
    """Return a text for each person that depends on value and age, but does not tell them."""
    pairs = zip(people["y"], people["age"], strict=True)
    return [hashlib.sha256(f"{y:.6g} {age:.4f}".encode()).hexdigest()[:8] for y, age in pairs]


def _leave_out(rows: pd.DataFrame, people: pd.DataFrame, fitted: AgeSexNorm) -> tuple[Floats, Floats]:
    """Return expected values and standard errors by the other controls; NaN in rows that are not of the controls.

    Without one person of leverage h and residual e, the inverse G of the cross products is
    G + (G x)(G x)'/(1 - h), the coefficients are less by G x e/(1 - h), the residual sum of squares by e²/(1 - h).
    """
    design = fitted.design(people["age"].to_numpy(float), people["sex"].tolist())
    residual = people["y"].to_numpy(float) - design @ fitted.coefficients
    weighted = design @ fitted.inverse  # G x of each person
    kept = 1 - np.einsum("ij,ij->i", weighted, design)
    left = fitted.std**2 * fitted.df - residual**2 / kept
    person = people.index.get_indexer(pd.Index(rows["who"]))
    at = fitted.design(rows["age"].to_numpy(float), rows["sex"].tolist())
    shared = np.einsum("ij,ij->i", at, weighted[person])
    centre = at @ fitted.coefficients - shared * residual[person] / kept[person]
    spread = 1 + np.einsum("ij,jk,ik->i", at, fitted.inverse, at) + shared**2 / kept[person]
    with np.errstate(invalid="ignore"):  # a control without whom there is no norm
        error = np.sqrt(left[person] / (fitted.df - 1) * spread)
    return np.where(person >= 0, centre, np.nan), np.where(person >= 0, error, np.nan)
