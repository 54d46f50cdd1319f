"""Tables of agreement between raters, differences between predictions, and the model benchmark.

In all functions, `values` has one row per scan, quantity and nucleus: ``quantity``, ``abbreviation``, one column per
rater and, if some scans could not be compared, ``scan``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.evaluate.columns import (
    BENCHMARK_ESTIMATES,
    BENCHMARK_MEASURES,
    MODELS_COLUMNS,
    NUCLEI_COLUMNS,
    QUANTITIES,
)
from bids_dgmseg.stats.agreement import agree, complete_pairs, complete_rows, estimate_columns, icc, mean_or_nan
from bids_dgmseg.stats.hypothesis_tests import adjust_p_values, anova, paired_t, repeated_anova, tukey, wilcoxon

Pair = tuple[str, str]

_NUCLEUS = ["quantity", "abbreviation"]


def agreement_table(
    values: pd.DataFrame,
    *,
    raters: Sequence[str],
    pairs: Sequence[Pair],
    compared: Collection[tuple[str, ...]] | None = None,
) -> pd.DataFrame:
    """Compute agreement and differences of pairs of raters.

    Parameters
    ----------
    values : DataFrame
        See the module.
    raters : sequence of str
        All columns of raters, which Tukey's test is over if there are three or more.
    pairs : sequence of (str, str)
        Reference and prediction, or two raters.
    compared : collection of (str, str, str), optional
        Scan and pair, if they could be compared; by default all. Otherwise the values of the pair are missing.

    Returns
    -------
    DataFrame
        The columns of `AGREEMENT_COLUMNS`. p values are corrected over the nuclei and pairs of each quantity.
    """
    rows = []
    for (quantity, abbreviation), group in values.groupby(_NUCLEUS, sort=False):
        present = [rater for rater in raters if group[rater].notna().any()]
        among = tukey(group[present].to_numpy(float)) if len(present) > 2 else None
        for reference, prediction in pairs:
            first, second = (group[rater].to_numpy(float) for rater in (reference, prediction))
            if compared is not None:
                there = np.array([(scan, reference, prediction) in compared for scan in group["scan"]])
                first, second = (np.where(there, one, np.nan) for one in (first, second))
            rows.append(
                {
                    "quantity": quantity,
                    "abbreviation": abbreviation,
                    "reference": reference,
                    "prediction": prediction,
                    **agree(first, second),
                    **_tests(first, second),
                    "tukey_p": _of_pair(among, present, reference, prediction),
                }
            )
    return _corrected(pd.DataFrame(rows))


def raters_table(values: pd.DataFrame, *, raters: Sequence[str]) -> pd.DataFrame:
    """Compute agreement of three or more raters, and test whether their means differ.

    Parameters
    ----------
    values : DataFrame
        See the module.
    raters : sequence of str
        The columns to compare.

    Returns
    -------
    DataFrame
        The columns of `RATERS_COLUMNS`, one row per quantity and nucleus, for raters that have it in any scan.
    """
    rows = []
    for (quantity, abbreviation), group in values.groupby(_NUCLEUS, sort=False):
        present = [rater for rater in raters if group[rater].notna().any()]
        if len(present) < 2:
            continue
        ratings = group[present].to_numpy(float)
        complete = len(complete_rows(ratings))
        row = {
            "quantity": quantity,
            "abbreviation": abbreviation,
            "raters": ", ".join(present),
            "k": len(present),
            "n": complete,
            "n_missing": len(ratings) - complete,
        }
        for name, estimate in icc(ratings).items():
            row |= estimate_columns(name, estimate)
        rows.append({**row, **_variance(ratings)})
    return pd.DataFrame(rows)


def methods_table(values: pd.DataFrame, *, raters: Sequence[str]) -> pd.DataFrame:
    """Test which of several predictions is closer to the reference, by each measure of overlap.

    Parameters
    ----------
    values : DataFrame
        See the module; the quantities are measures such as ``dice``.
    raters : sequence of str
        Columns of the predictions, two or more.

    Returns
    -------
    DataFrame
        The columns of `METHODS_COLUMNS`, one row per measure, nucleus and pair of predictions. p values are corrected
        over the nuclei and pairs of each measure.
    """
    rows = []
    for (quantity, abbreviation), group in values.groupby(_NUCLEUS, sort=False):
        present = [rater for rater in raters if group[rater].notna().any()]
        if len(present) < 2:
            continue
        ratings = group[present].to_numpy(float)
        among, variance = tukey(ratings), _variance(ratings)
        for first, second in combinations(present, 2):
            x, y = complete_pairs(group[first].to_numpy(float), group[second].to_numpy(float))
            rows.append(
                {
                    "measure": quantity,
                    "abbreviation": abbreviation,
                    "first": first,
                    "second": second,
                    "n": len(x),
                    "n_missing": len(group) - len(x),
                    "mean_first": mean_or_nan(x),
                    "mean_second": mean_or_nan(y),
                    "mean_difference": mean_or_nan(y - x),
                    **_tests(x, y),
                    "tukey_p": _of_pair(among, present, first, second),
                    **variance,
                }
            )
    return _corrected(pd.DataFrame(rows))


def summarize(overlap: pd.DataFrame, *, measures: Sequence[str]) -> pd.DataFrame:
    """Summarize measures of overlap over the scans, one row per pair of raters, nucleus and measure.

    Parameters
    ----------
    overlap : DataFrame
        ``reference``, ``prediction``, ``abbreviation`` and the measures; one row per scan and nucleus.
    measures : sequence of str
        The columns to summarize.

    Returns
    -------
    DataFrame
        The columns of `SUMMARY_COLUMNS`.
    """
    rows = []
    for (reference, prediction, abbreviation), group in overlap.groupby(
        ["reference", "prediction", "abbreviation"], sort=False
    ):
        for measure in measures:
            known = group[measure].dropna()
            rows.append(
                {
                    "reference": reference,
                    "prediction": prediction,
                    "abbreviation": abbreviation,
                    "measure": measure,
                    "n": len(known),
                    "n_missing": len(group) - len(known),
                    "mean": known.mean(),
                    "sd": known.std(),
                    "median": known.median(),
                    "minimum": known.min(),
                    "maximum": known.max(),
                }
            )
    return pd.DataFrame(rows)


def nuclei_table(
    summary: pd.DataFrame, agreement: pd.DataFrame, *, models: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Summarize overlap and agreement of each model per nucleus.

    Parameters
    ----------
    summary : DataFrame
        ``prediction``, ``abbreviation``, ``measure``, ``n``, ``mean``, ``sd``: see `summarize`.
    agreement : DataFrame
        ``quantity``, ``prediction``, ``abbreviation`` and the estimates: see `agreement_table`.
    models : mapping of str to sequence of str
        Model → its nuclei.

    Returns
    -------
    DataFrame
        The columns of `NUCLEI_COLUMNS`; NaN and ``n`` 0 for a nucleus that no reference segmentation has.
    """
    measured, agreed = (
        {(row["prediction"], row["abbreviation"], row[key]): row for row in table.to_dict("records")}
        for table, key in ((summary, "measure"), (agreement, "quantity"))
    )
    rows = []
    for model, nuclei in models.items():
        for nucleus in nuclei:
            row = {"model": model, "abbreviation": nucleus, "n": measured.get((model, nucleus, "dice"), {}).get("n", 0)}
            for measure in BENCHMARK_MEASURES:
                found = measured.get((model, nucleus, measure), {})
                row |= {measure: found.get("mean", np.nan), f"{measure}_sd": found.get("sd", np.nan)}
            for quantity in QUANTITIES:
                found = agreed.get((model, nucleus, quantity), {})
                row |= {f"{quantity}_{name}": found.get(name, np.nan) for name in BENCHMARK_ESTIMATES}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(NUCLEI_COLUMNS))


def models_table(overlap: pd.DataFrame, costs: pd.DataFrame, *, models: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Summarize each model over its nuclei and all scans.

    Parameters
    ----------
    overlap : DataFrame
        ``prediction``, ``abbreviation``, ``dice``, ``hd95_mm``, ``n_reference``, ``n_prediction``; one row per scan
        and nucleus.
    costs : DataFrame
        ``model``, ``seconds``, ``cpu_seconds``, ``peak_mb``; NaN if a scan could not be segmented.
    models : mapping of str to sequence of str
        Model → its nuclei.

    Returns
    -------
    DataFrame
        The columns of `MODELS_COLUMNS`.
    """
    rows = []
    for model, nuclei in models.items():
        cost, scores = costs[costs["model"] == model], overlap[overlap["prediction"] == model]
        there = scores[scores["n_reference"] > 0]
        rows.append(
            {
                "model": model,
                "n_nuclei": len(nuclei),
                "n_compared": there["abbreviation"].nunique(),
                "n_scans": int(cost["seconds"].notna().sum()),
                "n_failed": int(cost["seconds"].isna().sum()),
                "dice": there["dice"].mean(),
                "dice_least": there["dice"].min(),
                "hd95_mm": there["hd95_mm"].mean(),
                "n_missed": int((there["n_prediction"] == 0).sum()),
                "seconds": cost["seconds"].median(),
                "cpu_seconds": cost["cpu_seconds"].median(),
                "peak_mb": cost["peak_mb"].max(),
            }
        )
    return pd.DataFrame(rows, columns=list(MODELS_COLUMNS))


def _tests(first: NDArray[np.floating], second: NDArray[np.floating]) -> dict[str, float]:
    t, ranks = paired_t(first, second), wilcoxon(first, second)
    return {"t": t.statistic, "t_p": t.p, "wilcoxon_w": ranks.statistic, "wilcoxon_p": ranks.p}


def _variance(ratings: NDArray[np.floating]) -> dict[str, float]:
    one_way, repeated = anova(ratings), repeated_anova(ratings)
    return {
        "anova_f": one_way.statistic,
        "anova_p": one_way.p,
        "repeated_f": repeated.f,
        "repeated_p": repeated.p,
        "repeated_epsilon": repeated.epsilon,
        "repeated_p_corrected": repeated.p_corrected,
    }


def _of_pair(table: NDArray[np.float64] | None, raters: Sequence[str], first: str, second: str) -> float:
    names = list(raters)
    if table is None or not {first, second} <= set(names):  # others do not segment the nucleus
        return np.nan
    return float(table[names.index(first), names.index(second)])


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Insert corrected p values after each p value of a paired test; a family is all rows with the same first value."""
    if table.empty:
        return table
    columns = {str(name): table[name] for name in table}
    families = table.groupby(str(table.columns[0]), sort=False)
    for test in ("t_p", "wilcoxon_p"):
        for method in ("bonferroni", "holm"):
            columns[f"{test}_{method}"] = families[test].transform(adjust_p_values, method=method)
    order = [column for name in table for column in (name, f"{name}_bonferroni", f"{name}_holm") if column in columns]
    return pd.DataFrame(columns)[order]
