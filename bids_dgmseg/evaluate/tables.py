"""Tables of agreement and difference, a row a quantity, nucleus and pair of raters.

`values` is everywhere the same frame: ``quantity``, ``abbreviation``, and one column a rater; a row a scan, which
the column ``scan`` names where some could not be compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.stats.agreement import agree, complete_pairs, complete_rows, estimate_columns, icc, mean_or_nan
from bids_dgmseg.stats.hypothesis_tests import adjust_p_values, anova, paired_t, repeated_anova, tukey, wilcoxon

Pair = tuple[str, str]


def agreement_table(
    values: pd.DataFrame,
    *,
    raters: Sequence[str],
    pairs: Sequence[Pair],
    compared: Collection[tuple[str, ...]] | None = None,
) -> pd.DataFrame:
    """Say how well pairs of raters agree and whether they differ.

    Parameters
    ----------
    values : DataFrame
        As the module says.
    raters : sequence of str
        All of its columns that are raters; Tukey's test is made over them, where they are three or more.
    pairs : sequence of (str, str)
        Reference and prediction, or two raters.
    compared : collection of (str, str, str), optional
        Scan and pair of those that could be compared, by default all; in others a pair's values count as missing.

    Returns
    -------
    DataFrame
        The columns of `AGREEMENT_COLUMNS`. p values are corrected over the nuclei and pairs of each quantity.
    """
    rows = []
    for quantity, abbreviation, group in _nuclei(values):
        present = _present(group, raters)
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
    """Say how well three raters or more agree, and whether their means differ.

    Parameters
    ----------
    values : DataFrame
        As the module says.
    raters : sequence of str
        The columns to compare.

    Returns
    -------
    DataFrame
        The columns of `RATERS_COLUMNS`, a row a quantity and nucleus, of the raters that have the nucleus in any scan.
    """
    rows = []
    for quantity, abbreviation, group in _nuclei(values):
        present = _present(group, raters)
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
    """Say which of several predictions comes closer to the reference, by each measure of overlap.

    Parameters
    ----------
    values : DataFrame
        As the module says; the quantities are measures such as ``dice``.
    raters : sequence of str
        Columns of the predictions, two or more.

    Returns
    -------
    DataFrame
        The columns of `METHODS_COLUMNS`, a row a measure, nucleus and pair of predictions. p values are corrected
        over the nuclei and pairs of each measure.
    """
    rows = []
    for quantity, abbreviation, group in _nuclei(values):
        present = _present(group, raters)
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
    """Summarize measures of overlap over the scans, a row a pair of raters, nucleus and measure.

    Parameters
    ----------
    overlap : DataFrame
        ``reference``, ``prediction``, ``abbreviation`` and the measures; a row a scan and nucleus.
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


def _nuclei(values: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    for (quantity, abbreviation), group in values.groupby(["quantity", "abbreviation"], sort=False):
        yield str(quantity), str(abbreviation), group


def _present(group: pd.DataFrame, raters: Sequence[str]) -> list[str]:
    """Name those with a value: the others do not know the nucleus, and must not empty a test among all."""
    return [rater for rater in raters if group[rater].notna().any()]


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
    if table is None or not {first, second} <= set(names):
        return np.nan
    return float(table[names.index(first), names.index(second)])


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Put corrected p values behind each p value of a paired test."""
    if table.empty:
        return table
    families = table.groupby(str(table.columns[0]), sort=False).indices.values()
    for test in ("t_p", "wilcoxon_p"):
        place = list(table.columns).index(test)
        methods: tuple[Literal["bonferroni", "holm"], ...] = ("bonferroni", "holm")
        for step, method in enumerate(methods, start=1):
            p, adjusted = table[test].to_numpy(float), np.full(len(table), np.nan)
            for family in families:
                adjusted[family] = adjust_p_values(p[family], method=method)
            table.insert(place + step, f"{test}_{method}", adjusted)
    return table
