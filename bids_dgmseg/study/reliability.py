"""Plan the next study: reliability of repeated scans, and the participants that a comparison needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from bids_dgmseg.stats.agreement import estimate_columns, icc, mean_squares
from bids_dgmseg.stats.regression import average_repeated_scans, covariate_matrix, iter_groups, split_covariates
from bids_dgmseg.study.group_comparisons import first_site_only, without_contradictions
from bids_dgmseg.study.participants import DAYS_PER_YEAR
from bids_dgmseg.study.study import Analysis, ResultTable, Study

_MIN_PARTICIPANTS = 3

ALPHA, POWER = 0.05, 0.8

EFFECTS: dict[str, tuple[float, ...]] = {"ppm": (0.005, 0.01, 0.02), "mm3": (0.05, 0.1)}
"""Unit of a measure → differences between groups: in ppm, or as a fraction of the mean volume."""

YEARS, VISITS, ATTRITION = 2.0, 3, 0.2
"""Duration of a planned longitudinal study, its equally spaced visits, and the fraction lost before the last one."""


def estimate_reliability(study: Study) -> Analysis:
    """Compute how well measures of the same participants agree (``group_reliability``).

    The first two scans of each participant count, at most ``retest_days`` apart if their dates are known.
    """
    rows = [
        {**key, "measure": measure, **_reliability(pairs)}
        for measure in study.measures
        for key, pairs in _pairs(study, measure)
    ]
    table = pd.DataFrame([row for row in rows if "n" in row])
    why = "" if len(table) else f"fewer than {_MIN_PARTICIPANTS} participants with two scans"
    return Analysis((ResultTable("group_reliability", table, not_computed=why),))


def _pairs(study: Study, measure: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield the values (participants, 2) of each nucleus."""
    days = study.options.retest_days
    for key, rows in iter_groups(study.table.dropna(subset=[measure]), study.by):
        values = []
        for _, scans in rows.sort_values(["years", "scan"]).groupby("participant_id", observed=True):
            apart = (scans["years"] - scans["years"].iloc[0]) * DAYS_PER_YEAR
            near = scans[~(apart > days + 0.5)] if days is not None else scans
            if len(near) > 1:
                values.append(near[measure].iloc[:2].to_numpy())
        yield key, np.array(values).reshape(-1, 2)


def _reliability(pairs: np.ndarray) -> dict[str, float]:
    r"""Compute reliability from two scans of each participant.

    The two-way model participant × visit leaves the residual mean square :math:`E`; within participants it is
    :math:`W`, which contains what all change between the visits. Returned are ICC(2,1) and ICC(3,1) with limits, the
    within-person SD :math:`\sqrt{E}`, the repeatability coefficient :math:`1.96\sqrt{2E}`, and the smallest
    detectable change of one person :math:`1.96\sqrt{2W}` (Bland and Altman 1999, doi:10.1177/096228029900800204).
    """
    if len(pairs) < _MIN_PARTICIPANTS:
        return {}
    ms, coefficients = mean_squares(pairs), icc(pairs)
    return {
        "n": len(pairs),
        "mean": float(pairs.mean()),
        **{
            column: value
            for name in ("icc21", "icc31")
            for column, value in estimate_columns(name, coefficients[name]).items()
            if not column.endswith("_p")
        },
        "within_sd": float(np.sqrt(ms.error)),
        "repeatability": float(1.96 * np.sqrt(2 * ms.error)),
        "detectable_change": float(1.96 * np.sqrt(2 * ms.within)),
    }


def add_noise(study: Study, changes: Analysis, reliability: Analysis) -> Analysis:
    """Add the smallest change of one person that exceeds noise to the changes over time."""
    table, noise, keys = changes.tables[0], reliability.tables[0].rows, [*study.by, "measure"]
    if noise.empty or table.rows.empty:
        return changes
    rows = table.rows.merge(noise[[*keys, "detectable_change"]], on=keys, how="left")
    return replace(changes, tables=(replace(table, rows=rows), *changes.tables[1:]))


def plan_study(study: Study, reliability: ResultTable) -> Analysis:
    """Compute the participants per group that a next study needs (``group_power``).

    The spread between participants is that of their means around those of their groups at equal covariates; within
    participants it is that of ``group_reliability``.
    """
    rows = []
    table, _ = without_contradictions(study, ("group", *study.covariates), where="group_power")
    table, _ = first_site_only(table, where="group_power")
    grouped = table["group"].notna()
    table = table[grouped] if grouped.any() else table.assign(group="all")
    numbers, categories = split_covariates(table, list(dict.fromkeys(["group", *study.covariates])))
    within = {} if reliability.rows.empty else reliability.rows.set_index([*study.by, "measure"])["within_sd"].to_dict()
    for measure in study.measures:
        effects = EFFECTS.get(measure.rpartition("_")[2], ())
        people = average_repeated_scans(table, by=study.by, means=[measure, *numbers], same=categories)
        for key, part in iter_groups(people.dropna(subset=[measure, *numbers, *categories]), study.by):
            sizes, values = part["group"].value_counts(), part[measure].to_numpy(np.float64)
            design = np.column_stack([np.ones(len(part)), covariate_matrix(part[[*categories, *numbers]])])
            df = len(part) - int(np.linalg.matrix_rank(design))
            if df < _MIN_PARTICIPANTS:
                continue
            residuals = values - design @ (np.linalg.pinv(design) @ values)
            sd, mean = float(np.sqrt(residuals @ residuals / df)), float(values.mean())
            smallest = int(sizes.iloc[:2].min()) if len(sizes) > 1 else int(sizes.iloc[0] // 2)
            within_sd = within.get((*key.values(), measure), np.nan)
            detectable = detectable_difference(smallest, sd) if smallest > 1 else np.nan
            for effect in effects:
                difference = effect if measure.endswith("ppm") else effect * mean
                slope_sd = np.sqrt(slope_variance(within_sd)) if within_sd > 0 else np.nan
                rows.append(
                    {
                        **key,
                        "measure": measure,
                        "between_sd": sd,
                        "within_sd": within_sd,
                        "planned_difference": difference,
                        "n_per_group": participants_needed(difference, sd),
                        "n_per_group_slopes": participants_needed(difference / YEARS, slope_sd) / (1 - ATTRITION),
                        "n_now": smallest,
                        "detectable_now": detectable,
                    }
                )
    facts = {"Alpha": ALPHA, "Power": POWER, "Years": YEARS, "Visits": VISITS, "Attrition": ATTRITION}
    table = pd.DataFrame(rows)
    if len(table):
        table[["n_per_group", "n_per_group_slopes"]] = np.ceil(table[["n_per_group", "n_per_group_slopes"]])
    why = "" if len(table) else "too few participants"
    return Analysis((ResultTable("group_power", table, facts=facts, not_computed=why),))


_Z_ALPHA, _Z = float(norm.isf(ALPHA / 2)), float(norm.isf(ALPHA / 2) + norm.ppf(POWER))


def participants_needed(difference: float, sd: float) -> float:
    r"""Return participants per group for a difference of two means (two-sided t test, ``ALPHA``, ``POWER``).

    .. math:: n = 2 (z_{1 - \alpha/2} + z_{1 - \beta})^2 \sigma^2 / \delta^2 + z_{1 - \alpha/2}^2 / 4

    is within one participant of the exact number (Guenther 1981, doi:10.1080/00031305.1981.10479363).
    """
    return 2 * (_Z * sd / difference) ** 2 + _Z_ALPHA**2 / 4 if sd > 0 else np.nan


def detectable_difference(n_per_group: Any, sd: float) -> Any:
    """Return the difference of two means that so many participants per group find (a number or an array)."""
    return _Z * sd * np.sqrt(2 / (n_per_group - _Z_ALPHA**2 / 4))


def slope_variance(within_sd: float) -> float:
    r"""Return the variance of a participant's slope in the planned study: :math:`\sigma^2 / \sum (t - \bar t)^2`."""
    times = np.linspace(0, YEARS, VISITS)
    return within_sd**2 / float(((times - times.mean()) ** 2).sum())
