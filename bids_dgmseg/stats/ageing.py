"""Age curves of all nuclei of a cohort, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.age_curves import (
    BETA_BOUNDS,
    CURVES,
    N_RESAMPLED,
    Curve,
    Fit,
    Interval,
    bands,
    bootstrap,
    fit_curve,
)
from bids_dgmseg.stats.long_table import iter_groups, numeric_column, require_columns

_PARAMETERS = {"alpha": "alpha", "beta": "beta_per_year", "gamma": "gamma"}

_COLUMNS = (
    "curve",
    "n",
    "n_missing",
    "n_participants",
    "age_min",
    "age_max",
    *(f"{column}{end}" for column in _PARAMETERS.values() for end in ("", "_low", "_high")),
    "std",
    "r2",
    "aicc",
    "delta_aicc",
    "best",
    "note",
)


@dataclass(frozen=True)
class AgeingOptions:
    """Columns and settings of the age curves."""

    value: str = "mean_ppm"
    """Column of the measure."""
    age: str = "age"
    """Column of the ages at the scan, in years."""
    participant: str = "participant_id"
    by: tuple[str, ...] = ("abbreviation",)
    """Columns that define separate fits."""
    curves: tuple[Curve, ...] = CURVES
    level: float = 0.95
    beta_bounds: Interval = BETA_BOUNDS
    n_replicates: int = 0
    """Bootstrap replicates over participants; 0 for profile limits."""


def fit_ageing(
    table: pd.DataFrame, *, options: AgeingOptions | None = None, rng: np.random.Generator | None = None
) -> pd.DataFrame:
    """Fit all curves to each nucleus and select one by the Akaike information criterion.

    Parameters
    ----------
    table : DataFrame
        One row per scan and nucleus, as in ``group_stats.tsv``; ages and measures are numeric, NaN where missing.
    options : AgeingOptions, optional
        Columns and settings.
    rng : Generator, optional
        Random generator for the bootstrap; only required for it.

    Returns
    -------
    DataFrame
        One row per nucleus and curve: the columns of ``options.by``; ``curve``; ``n`` scans used, ``n_missing`` without
        age or measure, ``n_participants`` used; ``age_min``, ``age_max`` (years); ``alpha``, ``gamma`` (unit of the
        measure) and ``beta_per_year``, each with ``_low`` and ``_high``; ``std`` of the residuals; ``r2``; ``aicc``;
        ``delta_aicc`` relative to the best curve of the nucleus, whose ``best`` is True; ``note``. A curve that cannot
        be fitted (too few scans, no variance) has missing values and a note that states why.

    Raises
    ------
    InputError
        If a column is missing or an age is below 0.
    ValueError
        If a bootstrap is requested without `rng`, or a numeric column contains text.

    See Also
    --------
    bids_dgmseg.stats.age_curves.fit_curve : Equations and sources of the curves.
    """
    return fit_with_bands(table, options=options, rng=rng, with_bands=False)[0]


def ageing_bands(
    table: pd.DataFrame, *, ages: ArrayLike | None = None, options: AgeingOptions | None = None
) -> pd.DataFrame:
    """Compute all fitted curves with their bands.

    Parameters
    ----------
    table : DataFrame
        As in `fit_ageing`.
    ages : array_like of shape (m,), optional
        Years; by default 101 from the youngest to the oldest of each nucleus.
    options : AgeingOptions, optional
        Columns and settings; profile limits.

    Returns
    -------
    DataFrame
        One row per age: the columns of ``options.by``, ``curve`` and those of `bands`; no rows for curves that were not
        fitted.

    Raises
    ------
    InputError
        If a column is missing or an age is below 0.
    """
    return fit_with_bands(table, ages=ages, options=options)[1]


def fit_with_bands(
    table: pd.DataFrame,
    *,
    ages: ArrayLike | None = None,
    options: AgeingOptions | None = None,
    rng: np.random.Generator | None = None,
    with_bands: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute the tables of `fit_ageing` and `ageing_bands` with a single fit; parameters and errors are theirs.

    Returns
    -------
    parameters, curves : DataFrame
        `curves` is empty without `with_bands`.
    """
    options = options or AgeingOptions()
    if options.n_replicates and rng is None:
        raise ValueError("a bootstrap needs rng")
    _check(table, options)
    records, tables = [], []
    for key, rows in iter_groups(table, options.by):
        used = _complete(rows, options)
        counts = {
            "n": len(used),
            "n_missing": len(rows) - len(used),
            "n_participants": used[options.participant].nunique(),
            "age_min": used[options.age].min(),
            "age_max": used[options.age].max(),
        }
        fitted = []
        for curve in options.curves:
            fit, note = _try_fit(used, curve, options)
            fitted.append(counts | _fit_record(used, curve, fit, note, options=options, rng=rng))
            if fit is not None and with_bands:
                where = np.linspace(used[options.age].min(), used[options.age].max(), 101) if ages is None else ages
                tables.append(bands(fit, where).assign(**key, curve=curve.name))
        records += [key | record for record in _rank(fitted)]
    columns = [*options.by, "curve", "age", "fit", "low", "high", "prediction_low", "prediction_high"]
    curves = pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    return pd.DataFrame(records, columns=[*options.by, *_COLUMNS]), curves


def _check(table: pd.DataFrame, options: AgeingOptions) -> None:
    require_columns(table, options.participant, options.value)
    ages = numeric_column(table, options.age)
    if (ages < 0).any():
        row = int(np.flatnonzero(ages < 0)[0])
        name = table[options.participant].iloc[row]
        raise InputError(f"{name}: {options.age} is {ages[row]:g}, expected years from 0; correct it")


def _complete(rows: pd.DataFrame, options: AgeingOptions) -> pd.DataFrame:
    """Rows with age and measure, both as float64."""
    plain = rows.assign(**{column: numeric_column(rows, column) for column in (options.age, options.value)})
    plain = plain.replace([np.inf, -np.inf], np.nan)
    return plain.dropna(subset=[options.age, options.value])


def _try_fit(used: pd.DataFrame, curve: Curve, options: AgeingOptions) -> tuple[Fit | None, str]:
    """Fit a curve; also return why it failed or what to note."""
    try:
        fit = fit_curve(
            used[options.age], used[options.value], curve=curve, level=options.level, beta_bounds=options.beta_bounds
        )
    except ValueError as error:  # raised for unsuitable data
        return None, f"not fitted: {error}"
    if fit.at_bound:
        low, high = options.beta_bounds
        return fit, f"beta or its interval reaches {low:g} or {high:g} per year: alpha, beta, gamma are not identified"
    return fit, ""


def _fit_record(
    used: pd.DataFrame,
    curve: Curve,
    fit: Fit | None,
    note: str,
    *,
    options: AgeingOptions,
    rng: np.random.Generator | None,
) -> dict[str, Any]:
    record: dict[str, Any] = {"curve": curve.name, "note": note}
    if fit is None:
        return record
    intervals, doubt = _limits(used, fit, options, rng)
    record["note"] = "; ".join(filter(None, (note, doubt)))
    for name, column in _PARAMETERS.items():
        low, high = intervals[name]
        record |= {column: getattr(fit, name), f"{column}_low": low, f"{column}_high": high}
    return record | {"std": fit.std, "r2": fit.r2, "aicc": fit.aicc}


def _limits(
    used: pd.DataFrame, fit: Fit, options: AgeingOptions, rng: np.random.Generator | None
) -> tuple[dict[str, Interval], str]:
    """Confidence limits, and a note on their validity."""
    who = used[options.participant]
    n_people = who.nunique()
    if not options.n_replicates or rng is None:
        repeated = "scans of one participant count as independent in the intervals (--bootstrap resamples participants)"
        return fit.intervals, repeated if n_people < len(used) else ""
    intervals = bootstrap(
        fit,
        used[options.age],
        used[options.value],
        rng=rng,
        participants=who.astype(str),
        n_replicates=options.n_replicates,
    )
    few = f"no limits: {n_people} participants, a bootstrap needs {N_RESAMPLED}"
    return intervals, few if n_people < N_RESAMPLED else ""


def _rank(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark the curve with the lowest criterion as best."""
    lowest = min((record["aicc"] for record in records if "aicc" in record), default=np.nan)
    return [
        record | {"delta_aicc": record.get("aicc", np.nan) - lowest, "best": record.get("aicc") == lowest}
        for record in records
    ]
