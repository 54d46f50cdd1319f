"""Normative centiles by age and sex from controls, and z-scores relative to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from bids_dgmseg.stats.long_table import N_QUADRATIC, Floats, age_powers, iter_groups, numeric_column, require_columns

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
    table: pd.DataFrame,
    *,
    controls: np.ndarray,
    value: str = "mean_ppm",
    age: str = "age",
    sex: str = "sex",
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
) -> dict[tuple[Any, ...], AgeSexNorm]:
    r"""Regress the controls on age and sex, per nucleus.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus.
    controls : ndarray of bool, shape (n,)
        Rows of controls, whose scans are averaged.
    value, age, sex, participant : str
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
    for key, rows in iter_groups(_plain(table, value, age, sex, participant, by, controls), by):
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
    controls: np.ndarray | None = None,
    value: str = "mean_ppm",
    age: str = "age",
    sex: str = "sex",
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
) -> pd.DataFrame:
    """Score scans relative to norms.

    Parameters
    ----------
    table, value, age, sex, participant, by
        As in `fit_norms`.
    norms : mapping
        Values of `by` → norm.
    controls : ndarray of bool, shape (n,), optional
        Rows of the controls whose norms these are: each is compared with the other controls.

    Returns
    -------
    DataFrame
        In the order and with the index of `table`: ``n_controls``, ``expected``, ``z``, ``centile`` and ``note``, why
        there is no score. Ages beyond those of the controls have none.
    """
    plain = _plain(table, value, age, sex, participant, by, controls)
    plain = plain.assign(n_controls=np.nan, expected=np.nan, z=np.nan, centile=np.nan, note="no value or age")
    for key, rows in iter_groups(plain, by):
        fitted, usable = norms.get(tuple(key.values())), rows.dropna(subset=["y", "age"])
        if fitted is None:
            plain.loc[rows.index, "note"] = f"no norm: {N_NORM} controls with values and ages are needed"
            continue
        centre, error = fitted.predict(usable["age"].to_numpy(float), usable["sex"].tolist())
        df = np.full(len(usable), fitted.df)
        if usable["control"].any():
            left_out = _leave_out(usable, _average_controls(rows), fitted)
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


def _plain(
    table: pd.DataFrame,
    value: str,
    age: str,
    sex: str,
    participant: str,
    by: Sequence[str],
    controls: np.ndarray | None,
) -> pd.DataFrame:
    """Return ``y``, ``age``, ``sex``, ``who``, ``control`` and `by` of each row."""
    require_columns(table, participant, sex, *by)
    plain = table[list(by)].reset_index(drop=True)
    numbers = {"y": numeric_column(table, value), "age": numeric_column(table, age)}
    texts = {"sex": table[sex].to_numpy(object), "who": table[participant].astype(str).to_numpy()}
    return plain.assign(**numbers, **texts, control=False if controls is None else np.asarray(controls, bool))


def _average_controls(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per control of a nucleus: ``y``, ``age`` and ``sex``, one of two if it has an effect."""
    usable = rows[rows["control"]].dropna(subset=["y", "age"])
    people = usable.groupby("who", sort=False).agg({"y": "mean", "age": "mean", "sex": "first"})
    sexes = _usable_sexes(people["sex"])
    return people[people["sex"].isin(sexes)] if sexes else people


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
    return AgeSexNorm(len(y), low, high, mean, std, sexes, is_quadratic, coefficients, inverse, spread)


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
