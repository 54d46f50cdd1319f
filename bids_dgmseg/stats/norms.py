"""Normative centiles by age and sex from controls, and z-scores relative to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from bids_dgmseg.stats.long_table import N_SPLINE, Floats, iter_groups, numeric_column, require_columns

CENTILES = (5, 10, 25, 50, 75, 90, 95)

N_NORM = 10
"""Minimum number of controls for centiles."""

N_SEX = 5
"""Minimum number of controls of each of two sexes for an effect of sex."""

_SCORES = ("n_controls", "expected", "z", "centile", "note")


@dataclass(frozen=True)
class AgeSexNorm:
    """Regression of one measure of one nucleus on age and sex in controls."""

    n_controls: int
    age_low: float
    age_high: float
    age_centre: float
    age_scale: float
    powers: int
    """Of age, with the constant: 2 for a line, 3 for a quadratic."""
    sexes: tuple[str, ...]
    """Of which the first has no column; empty without an effect of sex."""
    coefficients: Floats
    inverse: Floats
    """Of the cross products of the design."""
    std: float
    """Of the residuals."""

    @property
    def df(self) -> int:
        """Return the degrees of freedom of the residuals."""
        return self.n_controls - len(self.coefficients)

    def design(self, ages: Floats, sexes: Sequence[Any]) -> Floats:
        """Return the columns of age and sex, NaN for a sex that is not in `sexes`."""
        powers = np.vander((np.asarray(ages, float) - self.age_centre) / self.age_scale, self.powers, increasing=True)
        codes = pd.Index(list(self.sexes), dtype=object).get_indexer(pd.Index(list(sexes), dtype=object))
        columns = [np.where(codes < 0, np.nan, codes == level) for level in range(1, len(self.sexes))]
        return np.column_stack([powers, *columns])

    def predict(self, ages: Floats, sexes: Sequence[Any]) -> tuple[Floats, Floats]:
        """Return the expected values, and the standard errors of new values."""
        at = self.design(ages, sexes)
        return at @ self.coefficients, self.std * np.sqrt(1 + np.einsum("ij,jk,ik->i", at, self.inverse, at))

    def score(self, y: Floats, ages: Floats, sexes: Sequence[Any]) -> tuple[Floats, Floats, Floats]:
        """Return the expected values, z and centiles of new people."""
        centre, error = self.predict(ages, sexes)
        return centre, *_z_and_centile((y - centre) / error, self.df)

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


def fit_norm(y: Floats, ages: Floats, sexes: Sequence[Any]) -> AgeSexNorm:
    """Regress the values of controls, one each, on age: a line, from 30 controls on a quadratic; and on sex.

    Sex has an effect if each of two sexes has 5 controls; then `y` must be of these only, see `usable_sexes`.
    """
    # through two ages there are many quadratics
    levels, powers = usable_sexes(sexes), 3 if len(y) >= N_SPLINE and len(np.unique(ages)) > 2 else 2
    centre, scale = float(ages.mean()), float(ages.std()) or 1.0
    nothing = np.zeros(0)
    found = AgeSexNorm(
        len(y), float(ages.min()), float(ages.max()), centre, scale, powers, levels, nothing, np.zeros((0, 0)), 0.0
    )
    design = found.design(ages, sexes)
    inverse = np.asarray(np.linalg.pinv(design.T @ design), np.float64)
    coefficients = inverse @ design.T @ y
    residual = y - design @ coefficients
    exact = np.abs(residual).max() <= 1e-12 * np.abs(y).max()  # except for rounding
    found = replace(found, coefficients=coefficients, inverse=inverse)
    return replace(found, std=0.0 if exact else float(np.sqrt((residual**2).sum() / found.df)))


def usable_sexes(sexes: Sequence[Any]) -> tuple[str, ...]:
    """Return the two sexes with an effect, in alphabetical order, or none."""
    counts = pd.Series(list(sexes), dtype=object).dropna().astype(str).value_counts()
    levels = sorted(str(name) for name in counts.index[counts >= N_SEX])
    return tuple(levels) if len(levels) == 2 else ()


def fit_norms(
    table: pd.DataFrame,
    *,
    controls: np.ndarray,
    value: str = "mean_ppm",
    age: str = "age",
    sex: str | None = None,
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    r"""Compute centiles of the controls by age and sex, and the z-score of each scan.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus.
    controls : ndarray of shape (n,)
        Whether each row is of a control. The scans of a control are averaged.
    value, age, participant : str
    sex : str, optional
        Column of the sex; by default there is no effect of sex.
    by : sequence of str

    Returns
    -------
    norms : DataFrame
        One row per nucleus, sex (empty without its effect) and age in years within those of the controls:
        ``n_controls``, ``sex``, ``age``, ``p05`` … ``p95``.
    scores : DataFrame
        In the order and with the index of `table`: ``n_controls``, ``expected``, ``z``, ``centile`` and ``note``.

    Notes
    -----
    Controls are regressed on age (a line, from 30 controls on a quadratic) and, with 5 controls of each of two sexes,
    on sex. With the prediction :math:`\hat y`, the residual standard deviation :math:`s`, its :math:`m` degrees of
    freedom and the leverage :math:`h` of age and sex, :math:`(y - \hat y)/(s\sqrt{1 + h})` of a new person has a t
    distribution with m degrees of freedom: the centile is its probability, z the quantile of the normal distribution,
    at most ±37.5 (beyond, probabilities are no numbers).
    Controls are compared with the other controls. Ages beyond those of the controls have no score.
    """
    scores = _empty_scores(table)
    curves = []
    for key, rows, people in _controls_by_nucleus(table, controls, value, age, sex, participant, by):
        usable, n = rows.dropna(subset=["y", "age"]), len(people)
        scores.loc[rows.index, "n_controls"] = n
        if n < N_NORM or not np.ptp(people["age"]) > 0:
            scores.loc[rows.index, "note"] = f"no norm: {n} controls with values and ages, {N_NORM} are needed"
            continue
        found = _fit(people)
        curves.append(found.curves().assign(**key))
        inside = usable[usable["age"].between(found.age_low, found.age_high)]
        _score(scores, inside[~inside["who"].isin(people.index)], found)
        _score_controls(scores, inside[inside["who"].isin(people.index)], people, found)
        beyond = usable.index.difference(inside.index)
        limits = f"{found.age_low:.0f} to {found.age_high:.0f}"
        scores.loc[beyond, "note"] = f"no score: age beyond those of the controls ({limits})"
        scores.loc[rows.index.difference(usable.index), "note"] = "no value or age"
    return _curve_table(curves, by), _finish(scores)


def find_norms(
    table: pd.DataFrame,
    *,
    controls: np.ndarray,
    value: str,
    age: str = "age",
    sex: str | None = None,
    participant: str = "participant_id",
    by: Sequence[str] = ("abbreviation",),
) -> list[tuple[dict[str, Any], AgeSexNorm]]:
    """Return the norms of `fit_norms` by the values of `by`, to be applied to other scans."""
    found = []
    for key, _, people in _controls_by_nucleus(table, controls, value, age, sex, participant, by):
        if len(people) >= N_NORM and np.ptp(people["age"]) > 0 and (one := _fit(people)).std > 0:
            found.append((key, one))
    return found


def apply_norms(
    table: pd.DataFrame, norms: Mapping[str, AgeSexNorm], *, value: str, age: str = "age", sex: str = "sex"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score scans relative to norms of other people.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus (``abbreviation``).
    norms : mapping of str to AgeSexNorm
        By nucleus.
    value, age, sex : str

    Returns
    -------
    curves, scores : DataFrame
        As of `fit_norms`; ages beyond those of the controls have a score and a note.
    """
    plain = pd.DataFrame({"y": numeric_column(table, value), "age": numeric_column(table, age)}, index=table.index)
    plain = plain.assign(sex=table[sex], abbreviation=table["abbreviation"])
    scores = _empty_scores(table)
    for name, rows in plain.groupby("abbreviation", sort=False, observed=True):
        found = norms.get(str(name))
        if found is None:
            scores.loc[rows.index, "note"] = "no norm of this nucleus"
            continue
        scores.loc[rows.index, "n_controls"] = found.n_controls
        usable = rows.dropna(subset=["y", "age"])
        scores.loc[rows.index.difference(usable.index), "note"] = "no value or age"
        _score(scores, usable, found)
        is_beyond = ~usable["age"].between(found.age_low, found.age_high)
        beyond = usable.index[is_beyond & scores.loc[usable.index, "z"].notna()]
        limits = f"{found.age_low:.0f} to {found.age_high:.0f}"
        scores.loc[beyond, "note"] = f"extrapolated: age beyond those of the controls ({limits})"
    curves = [found.curves().assign(abbreviation=name) for name, found in norms.items()]
    return _curve_table(curves, ("abbreviation",)), _finish(scores)


def _controls_by_nucleus(
    table: pd.DataFrame,
    controls: np.ndarray,
    value: str,
    age: str,
    sex: str | None,
    participant: str,
    by: Sequence[str],
) -> Iterator[tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]]:
    """Iterate over the nuclei: key, all rows, and one row per control: ``y``, ``age`` and ``sex``."""
    require_columns(table, participant, *by)
    plain = pd.DataFrame({"y": numeric_column(table, value), "age": numeric_column(table, age)}, index=table.index)
    known = table[sex].astype(object) if sex else pd.Series(None, table.index, dtype=object)
    plain = plain.assign(sex=known, who=table[participant].astype(str), control=np.asarray(controls, bool))
    for key, rows in iter_groups(pd.concat([plain, table[list(by)]], axis=1), by):
        usable = rows[rows["control"]].dropna(subset=["y", "age"])
        people = usable.groupby("who", sort=False).agg({"y": "mean", "age": "mean", "sex": "first"})
        if levels := usable_sexes(people["sex"].tolist()):
            people = people[people["sex"].isin(levels)]
        yield key, rows, people


def _fit(people: pd.DataFrame) -> AgeSexNorm:
    return fit_norm(people["y"].to_numpy(float), people["age"].to_numpy(float), people["sex"].tolist())


def _score_controls(scores: pd.DataFrame, rows: pd.DataFrame, people: pd.DataFrame, found: AgeSexNorm) -> None:
    """Fill the scores of the controls' own rows by the norm of the other controls.

    Without one person of leverage h and residual e, the inverse G of the cross products is
    G + (G x)(G x)'/(1 - h), the coefficients are less by G x e/(1 - h), the residual sum of squares by e²/(1 - h).
    """
    design = found.design(people["age"].to_numpy(float), people["sex"].tolist())
    residual = people["y"].to_numpy(float) - design @ found.coefficients
    weighted = design @ found.inverse  # G x of each person
    kept = 1 - np.einsum("ij,ij->i", weighted, design)
    rss, smallest = found.std**2 * found.df, 1e-6
    left = rss - residual**2 / np.maximum(kept, smallest)
    few = people["sex"].isin([name for name in found.sexes if (people["sex"] == name).sum() == N_SEX]).to_numpy(bool)
    refit = few | (kept <= smallest) | (left <= smallest * rss) | (len(people) == N_SPLINE)
    person = people.index.get_indexer(pd.Index(rows["who"]))
    for who, own in rows[refit[person]].groupby("who", sort=False):
        _score(scores, own, _fit(people.drop(index=who)))
    rows, person = rows[~refit[person]], person[~refit[person]]
    at = found.design(rows["age"].to_numpy(float), rows["sex"].tolist())
    shared = np.einsum("ij,ij->i", at, weighted[person])
    centre = at @ found.coefficients - shared * residual[person] / kept[person]
    spread = 1 + np.einsum("ij,jk,ik->i", at, found.inverse, at) + shared**2 / kept[person]
    error = np.sqrt(left[person] / (found.df - 1) * spread)
    z, centile = _z_and_centile((rows["y"].to_numpy(float) - centre) / error, found.df - 1)
    scores.loc[rows.index, ["expected", "z", "centile"]] = np.column_stack([centre, z, centile])


def _z_and_centile(ratio: Floats, df: int) -> tuple[Floats, Floats]:
    # by the smaller tail, as probabilities near 1 lose digits; one of 0 would be an infinite z
    tail = np.maximum(student.sf(np.abs(ratio), df), np.finfo(float).tiny)
    return -np.sign(ratio) * norm.ppf(tail), 100 * student.cdf(ratio, df)


def _empty_scores(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(index=table.index, columns=list(_SCORES), dtype=object)


def _finish(scores: pd.DataFrame) -> pd.DataFrame:
    numbers = ["n_controls", "expected", "z", "centile"]
    return scores.astype(dict.fromkeys(numbers, float)).assign(note=scores["note"].fillna(""))


def _curve_table(curves: Sequence[pd.DataFrame], by: Sequence[str]) -> pd.DataFrame:
    columns = [*by, "n_controls", "sex", "age", *(f"p{percent:02d}" for percent in CENTILES)]
    return pd.concat(curves, ignore_index=True)[columns] if curves else pd.DataFrame(columns=columns)


def _score(scores: pd.DataFrame, rows: pd.DataFrame, found: AgeSexNorm) -> None:
    """Fill the scores of rows."""
    if rows.empty:
        return
    if not found.std > 0:
        scores.loc[rows.index, "note"] = "no score: the controls' values do not vary"
        return
    values = found.score(rows["y"].to_numpy(float), rows["age"].to_numpy(float), rows["sex"].tolist())
    for name, column in zip(("expected", "z", "centile"), values, strict=True):
        scores.loc[rows.index, name] = column
    if found.sexes:
        other = ~rows["sex"].isin(found.sexes)
        scores.loc[rows.index[other], "note"] = f"no score: the norms are of {' and '.join(found.sexes)}"
