"""Normative centiles by age from controls, and z-scores relative to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from bids_dgmseg.stats.long_table import N_SPLINE, Floats, iter_groups, numeric_column, require_columns

CENTILES = (5, 10, 25, 50, 75, 90, 95)

N_NORM = 10
"""Minimum number of controls for centiles."""


def fit_norms(
    table: pd.DataFrame,
    *,
    controls: np.ndarray,
    value: str = "mean_ppm",
    age: str = "age",
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Compute centiles of the controls by age, and the z-score of each scan.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus.
    controls : ndarray of shape (n,)
        Whether each row is of a control. The scans of a control are averaged.
    value, age, participant : str
    by : sequence of str

    Returns
    -------
    norms : DataFrame
        One row per nucleus and age in years within those of the controls: ``n_controls``, ``age``, ``p05`` … ``p95``.
    scores : DataFrame
        In the order and with the index of `table`: ``n_controls``, ``expected``, ``z``, ``centile`` and ``note``.

    Notes
    -----
    Controls are regressed on age: a line, from 30 controls on a quadratic. With the prediction
    :math:`\hat y`, the residual standard deviation :math:`s`, its :math:`m` degrees of freedom and the leverage
    :math:`h` of the age, :math:`(y - \hat y)/(s\sqrt{1 + h})` of a new person has a t distribution with m degrees of
    freedom: the centile is its probability, z the quantile of the normal distribution. Controls are compared with the
    other controls. Ages beyond those of the controls have no score.
    """
    require_columns(table, participant, *by)
    plain = pd.DataFrame({"y": numeric_column(table, value), "age": numeric_column(table, age)}, index=table.index)
    plain = plain.assign(who=table[participant].astype(str), control=np.asarray(controls, bool))
    keyed = pd.concat([plain, table[list(by)]], axis=1)
    scores = pd.DataFrame(index=table.index, columns=["n_controls", "expected", "z", "centile", "note"], dtype=object)
    curves = []
    for key, rows in iter_groups(keyed, by):
        usable = rows.dropna(subset=["y", "age"])
        people = usable[usable["control"]].groupby("who", sort=False)[["y", "age"]].mean()
        n = len(people)
        scores.loc[rows.index, "n_controls"] = n
        if n < N_NORM or not np.ptp(people["age"]) > 0:
            scores.loc[rows.index, "note"] = f"no norm: {n} controls with values and ages, {N_NORM} are needed"
            continue
        low, high = people["age"].min(), people["age"].max()
        ages = np.unique(np.concatenate([np.arange(np.ceil(low), np.floor(high) + 1), [low, high]]))
        centre, spread, unit, df = _predict(people, ages)
        quantiles = {f"p{percent:02d}": centre + student.ppf(percent / 100, df) * spread * unit for percent in CENTILES}
        curves.append(pd.DataFrame({**key, "n_controls": n, "age": ages, **quantiles}))
        inside = usable[usable["age"].between(low, high)]
        new = inside[~inside["who"].isin(people.index)]
        _score(scores, new, people)
        for who, own in inside[inside["who"].isin(people.index)].groupby("who", sort=False):
            _score(scores, own, people.drop(index=who))  # without the person's own values
        beyond = usable.index.difference(inside.index)
        scores.loc[beyond, "note"] = f"no score: age beyond those of the controls ({low:.0f} to {high:.0f})"
        scores.loc[rows.index.difference(usable.index), "note"] = "no value or age"
    columns = [*by, "n_controls", "age", *(f"p{percent:02d}" for percent in CENTILES)]
    norms = pd.concat(curves, ignore_index=True)[columns] if curves else pd.DataFrame(columns=columns)
    numbers = ["n_controls", "expected", "z", "centile"]
    return norms, scores.astype(dict.fromkeys(numbers, float)).assign(note=scores["note"].fillna(""))


def _predict(people: pd.DataFrame, ages: Floats) -> tuple[Floats, float, Floats, int]:
    """Return the prediction at ages, the residual SD, the error of a new value in units of it, degrees of freedom."""
    own, y = people["age"].to_numpy(float), people["y"].to_numpy(float)
    centre, scale = own.mean(), own.std() or 1.0
    powers = 3 if len(own) >= N_SPLINE else 2
    design, at = (np.vander((values - centre) / scale, powers, increasing=True) for values in (own, np.asarray(ages)))
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ y
    df = len(y) - powers
    spread = float(np.sqrt(((y - design @ coefficients) ** 2).sum() / df))
    return at @ coefficients, spread, np.sqrt(1 + np.einsum("ij,jk,ik->i", at, inverse, at)), df


def _score(scores: pd.DataFrame, rows: pd.DataFrame, people: pd.DataFrame) -> None:
    """Fill the scores of rows relative to people."""
    if rows.empty:
        return
    centre, spread, unit, df = _predict(people, rows["age"].to_numpy(float))
    if not spread > 0:
        scores.loc[rows.index, "note"] = "no score: the controls' values do not vary"
        return
    ratio = (rows["y"].to_numpy(float) - centre) / (spread * unit)
    scores.loc[rows.index, "expected"] = centre
    scores.loc[rows.index, "centile"] = 100 * student.cdf(ratio, df)
    # by the smaller tail, as probabilities near 1 lose digits
    scores.loc[rows.index, "z"] = -np.sign(ratio) * norm.ppf(student.sf(np.abs(ratio), df))
