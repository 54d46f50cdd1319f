"""Tables over all scans: agreement between raters, differences between predictions, and the model benchmark.

In all functions, `values` has one row per scan, quantity and nucleus: ``quantity``, ``abbreviation``, one column per
rater and, if some scans could not be compared, ``scan``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.io.files import DataDictionary, read_data_dictionaries
from bids_dgmseg.lab.evaluate.curve_agreement import AGEING_DICTIONARIES
from bids_dgmseg.lab.evaluate.label_images import Pair
from bids_dgmseg.models.structures import bilateral_names
from bids_dgmseg.stats.agreement import (
    POOLED,
    agree,
    complete_pairs,
    complete_rows,
    estimate_columns,
    icc,
    mean_or_nan,
)
from bids_dgmseg.stats.hypothesis_tests import adjust_p_values, anova, paired_t, repeated_anova, tukey, wilcoxon
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

_EVALUATION, _BENCHMARK = read_data_dictionaries("evaluation"), read_data_dictionaries("benchmark")

OVERLAP_TABLE_COLUMNS: DataDictionary = {
    **_EVALUATION["scan"],
    **{name: entry for name, entry in OVERLAP_COLUMNS.items() if name != "index"},
    **_EVALUATION["susceptibility"],
}

EVALUATION_DICTIONARIES: Mapping[str, DataDictionary] = {
    "overlap": OVERLAP_TABLE_COLUMNS,
    **{name: _EVALUATION[name] for name in ("overlap_summary", "agreement", "raters", "methods")},
    **AGEING_DICTIONARIES,
}
"""Table of ``dgmseg evaluate`` → its data dictionary."""

BENCHMARK_DICTIONARIES: Mapping[str, DataDictionary] = {
    "models": _BENCHMARK["models"],
    "summary": _BENCHMARK["summary"],
    "comparison": {
        **{name: entry for name, entry in OVERLAP_TABLE_COLUMNS.items() if name not in ("reference", "prediction")},
        **_BENCHMARK["comparison"],
    },
}
"""Table of the model benchmark → its data dictionary."""

_BENCHMARK_MEASURES = [name.removesuffix("_sd") for name in _BENCHMARK["summary"] if name.endswith("_sd")]

_BENCHMARK_ESTIMATES = (
    *("mean_reference", "mean_prediction", "sd_reference", "sd_prediction"),
    *("pearson_r", "icc21", "bias", "loa_lower", "loa_upper"),
)

_NUCLEUS = ["quantity", "abbreviation"]


def agreement_table(
    values: pd.DataFrame,
    *,
    raters: Sequence[str],
    pairs: Sequence[Pair],
    compared: Collection[tuple[str, ...]] | None = None,
) -> pd.DataFrame:
    """Compute agreement and differences of pairs of raters (``agreement.tsv``).

    Tukey's test is over all `raters` if they are three or more. `compared` are the scan and pair of each comparison
    that was possible, by default all; otherwise the values of the pair are missing. p values are corrected over the
    nuclei and pairs of each quantity, apart from those of bilateral rows. If there are several nuclei, the row
    `POOLED` of each quantity has the values of all of them, each side once, without p values: those of one scan are
    not independent.
    """
    rows, groups = [], []
    for quantity, of_quantity in values.groupby("quantity", sort=False):
        groups += [((quantity, name), group) for name, group in of_quantity.groupby("abbreviation", sort=False)]
        names = of_quantity["abbreviation"]
        pooled = of_quantity[~names.isin(bilateral_names(names.unique()))]
        if pooled["abbreviation"].nunique() > 1:
            groups.append(((quantity, POOLED), pooled))
    for (quantity, abbreviation), group in groups:
        present = [rater for rater in raters if group[rater].notna().any()]
        among = tukey(group[present].to_numpy(float)) if len(present) > 2 else None
        for reference, prediction in pairs:
            first, second = (group[rater].to_numpy(float) for rater in (reference, prediction))
            if compared is not None:
                there = np.array([(scan, reference, prediction) in compared for scan in group["scan"]])
                first, second = (np.where(there, one, np.nan) for one in (first, second))
            row = {
                "quantity": quantity,
                "abbreviation": abbreviation,
                "reference": reference,
                "prediction": prediction,
                **agree(first, second),
                **_paired_tests(first, second, among, present, (reference, prediction)),
            }
            if abbreviation == POOLED:
                row |= {name: np.nan for name in row if name in ("t", "wilcoxon_w") or name.endswith("_p")}
            rows.append(row)
    return _correct_p_values(pd.DataFrame(rows, columns=None if rows else list(_EVALUATION["agreement"])))


def raters_table(values: pd.DataFrame, *, raters: Sequence[str]) -> pd.DataFrame:
    """Compute agreement of three or more raters, and test whether their means differ (``raters.tsv``).

    A nucleus is compared between the raters that have it in any scan.
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
        rows.append({**row, **_analysis_of_variance(ratings)})
    return pd.DataFrame(rows)


def methods_table(values: pd.DataFrame, *, raters: Sequence[str]) -> pd.DataFrame:
    """Test which of several predictions is closer to the reference, by each measure of overlap (``methods.tsv``).

    The quantities of `values` are measures such as ``dice``; `raters` are the columns of two or more predictions.
    p values are corrected over the nuclei and pairs of each measure, apart from those of bilateral rows.
    """
    rows = []
    for (quantity, abbreviation), group in values.groupby(_NUCLEUS, sort=False):
        present = [rater for rater in raters if group[rater].notna().any()]
        if len(present) < 2:
            continue
        ratings = group[present].to_numpy(float)
        among, variance = tukey(ratings), _analysis_of_variance(ratings)
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
                    **_paired_tests(x, y, among, present, (first, second)),
                    **variance,
                }
            )
    return _correct_p_values(pd.DataFrame(rows))


def _paired_tests(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    among: NDArray[np.float64] | None,
    raters: Sequence[str],
    pair: Pair,
) -> dict[str, float]:
    """Test the difference of a pair; `among` are the p values of Tukey's test for all `raters` with the nucleus."""
    t, ranks = paired_t(first, second), wilcoxon(first, second)
    tukey_p = np.nan
    if among is not None and set(pair) <= set(raters):  # others do not segment the nucleus
        tukey_p = float(among[raters.index(pair[0]), raters.index(pair[1])])
    return {
        "t": t.statistic,
        "t_p": t.p,
        "wilcoxon_w": ranks.statistic,
        "wilcoxon_p": ranks.p,
        "tukey_p": tukey_p,
    }


def _analysis_of_variance(ratings: NDArray[np.floating]) -> dict[str, float]:
    one_way, repeated = anova(ratings), repeated_anova(ratings)
    return {
        "anova_f": one_way.statistic,
        "anova_p": one_way.p,
        "repeated_f": repeated.f,
        "repeated_p": repeated.p,
        "repeated_epsilon": repeated.epsilon,
        "repeated_p_corrected": repeated.p_corrected,
    }


def _correct_p_values(table: pd.DataFrame) -> pd.DataFrame:
    """Insert corrected p values after each p value of a paired test.

    A family is all rows with the same first value, of single sides or bilateral: the latter repeat the
    former, so that neither may count as further tests of the other.
    """
    if table.empty:
        return table
    columns = {str(name): table[name] for name in table}
    bilateral = table["abbreviation"].isin(bilateral_names(table["abbreviation"].unique()))
    families = table.groupby([table[str(table.columns[0])], bilateral], sort=False)
    for test in ("t_p", "wilcoxon_p"):
        for method in ("bonferroni", "holm"):
            columns[f"{test}_{method}"] = families[test].transform(adjust_p_values, method=method)
    order = [column for name in table for column in (name, f"{name}_bonferroni", f"{name}_holm") if column in columns]
    return pd.DataFrame(columns)[order]


def summarize(overlap: pd.DataFrame, *, measures: Sequence[str]) -> pd.DataFrame:
    """Summarize measures of overlap over the scans, per pair of raters, nucleus and measure (``overlap_summary.tsv``).

    `overlap` has ``reference``, ``prediction``, ``abbreviation`` and the measures; one row per scan and nucleus.
    """
    keys = ["reference", "prediction", "abbreviation"]
    rows = []
    for names, group in overlap.groupby(keys, sort=False):
        for measure in measures:
            known = group[measure].dropna()
            rows.append(
                {
                    **dict(zip(keys, names, strict=True)),
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
    """Summarize overlap and agreement of each model per nucleus (``summary.tsv`` of the benchmark).

    `summary` is a table of `summarize`, `agreement` one of `agreement_table`; `models` are the nuclei by model. A
    nucleus that no reference segmentation has is NaN, with ``n`` 0.
    """
    measured, agreed = (
        {(row["prediction"], row["abbreviation"], row[key]): row for row in table.to_dict("records")}
        for table, key in ((summary, "measure"), (agreement, "quantity"))
    )
    rows = []
    for model, nuclei in models.items():
        for nucleus in nuclei:
            row = {"model": model, "abbreviation": nucleus, "n": measured.get((model, nucleus, "dice"), {}).get("n", 0)}
            for measure in _BENCHMARK_MEASURES:
                found = measured.get((model, nucleus, measure), {})
                row |= {measure: found.get("mean", np.nan), f"{measure}_sd": found.get("sd", np.nan)}
            for quantity in ("volume_mm3", "mean_ppm"):
                found = agreed.get((model, nucleus, quantity), {})
                row |= {f"{quantity}_{name}": found.get(name, np.nan) for name in _BENCHMARK_ESTIMATES}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(BENCHMARK_DICTIONARIES["summary"]))


def models_table(overlap: pd.DataFrame, costs: pd.DataFrame, *, models: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Summarize each model over its nuclei and all scans (``models.tsv`` of the benchmark).

    Parameters
    ----------
    overlap : DataFrame
        ``prediction``, ``abbreviation``, ``dice``, ``hd95_mm``, ``n_reference``, ``n_prediction``; one row per scan
        and nucleus.
    costs : DataFrame
        ``model``, ``seconds``, ``cpu_seconds``, ``peak_mb``; NaN if a scan could not be segmented.
    models : mapping of str to sequence of str
        Model → its nuclei.
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
    return pd.DataFrame(rows, columns=list(BENCHMARK_DICTIONARIES["models"]))
