"""Tables over all scans: agreement between raters, differences between predictions, and age curves of both.

In all functions, `values` has one row per scan, quantity and nucleus: ``quantity``, ``abbreviation``, one column per
rater and, if some scans could not be compared, ``scan``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import DataDictionary, read_data_dictionaries
from bids_dgmseg.models.structures import names_of_pairs
from bids_dgmseg.stats.age_curves import EXPONENTIAL, fit_age_curves
from bids_dgmseg.stats.agreement import (
    POOLED,
    adjust_p_values,
    agree,
    anova,
    complete_pairs,
    complete_rows,
    estimate_columns,
    icc,
    mean_or_nan,
    paired_t,
    repeated_anova,
    tukey,
    wilcoxon,
)
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS
from bids_dgmseg.study.participants import AGE, GROUP, find_column, find_controls, read_participant_tables
from bids_dgmseg.study.study import add_constants

Pair = tuple[str, str]
"""Reference and prediction, or two raters."""

_EVALUATION = read_data_dictionaries("evaluation")

_KEYS = ["reference", "prediction", "labels", "scans"]

_FITTED = {
    "ageing": [
        *("abbreviation", "n", "n_scans", "n_missing", "age_min", "age_max"),
        *(f"{name}{end}" for name in ("alpha", "beta_per_year", "gamma", "plateau") for end in ("", "_low", "_high")),
        *("std", "r2", "note"),
    ],
    "ageing_curves": ["abbreviation", "age", "fit", "low", "high"],
}

_COLUMNS = {**_EVALUATION["agreement"], **read_data_dictionaries("group")["group"]}

AGEING_DICTIONARIES = {
    name: {**_EVALUATION["ageing"], **{column: _COLUMNS[column] for column in columns}}
    for name, columns in _FITTED.items()
}
"""Table of age curves → its data dictionary."""

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
    that was possible, by default all; otherwise the values of the pair are missing. p values are adjusted over the
    nuclei and pairs of each quantity, apart from those of both sides together. If there are several nuclei, the row
    `POOLED` of each quantity has the values of all of them, each side once, without p values: those of one scan are
    not independent.
    """
    rows, groups = [], []
    for quantity, of_quantity in values.groupby("quantity", sort=False):
        groups += [((quantity, name), group) for name, group in of_quantity.groupby("abbreviation", sort=False)]
        names = of_quantity["abbreviation"]
        pooled = of_quantity[~names.isin(names_of_pairs(names.unique()))]
        if pooled["abbreviation"].nunique() > 1:
            groups.append(((quantity, POOLED), pooled))
    for (quantity, abbreviation), group in groups:
        present = [rater for rater in raters if group[rater].notna().any()]
        among = tukey(group[present].to_numpy(float)) if len(present) > 2 else None
        for reference, prediction in pairs:
            first, second = (group[rater].to_numpy(float) for rater in (reference, prediction))
            if compared is not None:
                there = np.array([(scan, reference, prediction) in compared for scan in group["scan"]])
                first, second = (np.where(there, ratings, np.nan) for ratings in (first, second))
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
    p values are adjusted over the nuclei and pairs of each measure, apart from those of both sides together.
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
        "repeated_p_greenhouse_geisser": repeated.p_greenhouse_geisser,
    }


def _correct_p_values(table: pd.DataFrame) -> pd.DataFrame:
    """Insert adjusted p values after each p value of a paired test.

    A family is all rows with the same first value, of single sides or of both together: the latter repeat the
    former, so that neither may count as further tests of the other.
    """
    if table.empty:
        return table
    columns = {str(name): table[name] for name in table}
    is_pair = table["abbreviation"].isin(names_of_pairs(table["abbreviation"].unique()))
    families = table.groupby([table[str(table.columns[0])], is_pair], sort=False)
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
            scores = group[measure].dropna()
            rows.append(
                {
                    **dict(zip(keys, names, strict=True)),
                    "measure": measure,
                    "n": len(scores),
                    "n_missing": len(group) - len(scores),
                    "mean": scores.mean(),
                    "sd": scores.std(),
                    "median": scores.median(),
                    "minimum": scores.min(),
                    "maximum": scores.max(),
                }
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Ageing:
    """Age curves of each pair of reference and prediction; empty if they cannot be fitted."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """By the names of `AGEING_DICTIONARIES`."""
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Values that the curves are fitted to: the columns that identify a curve, ``age`` and ``value``."""
    notes: tuple[str, ...] = ()


def find_participants(chosen: Path | None, paths: Iterable[Path | None]) -> Path | None:
    """Return the dataset with participants.tsv: the `chosen` one, else of `paths` or the datasets they are derived in.

    Raises
    ------
    InputError
        If the dataset that is passed has no participants.tsv.
    """
    roots = [chosen] if chosen else [*filter(None, paths)]
    roots += [root.parent.parent for root in roots if root.parent.name == "derivatives"]
    dataset = next((root for root in roots if (root / "participants.tsv").is_file()), None)
    if chosen and not dataset:
        raise InputError(f"`participants` {chosen.name}: participants.tsv not found; pass the dataset that has it")
    return dataset


def compare_age_curves(
    values: pd.DataFrame, pairs: Sequence[Pair], root: Path | None, *, controls: Sequence[str] = ()
) -> Ageing:
    """Fit the exponential curve to the mean susceptibilities by reference and by prediction.

    Parameters
    ----------
    values : DataFrame
        ``quantity``, ``scan``, ``abbreviation`` and one column per rater.
    pairs : sequence of Pair
        Reference and prediction; both are fitted to the scans and nuclei that both have.
    root : path or None
        Dataset with participants.tsv.
    controls : sequence of str
        Groups of the participants whose curves are fitted; by default each group has its own.

    Raises
    ------
    InputError
        If the participants cannot be read, or nobody has the group of the controls.

    See Also
    --------
    bids_dgmseg.stats.age_curves.fit_curve : Equations and sources.
    """
    entities = {scan: split_entities(scan) for scan in values["scan"].unique()}
    scans = [scan for scan, named in entities.items() if "sub" in named]
    if root is None or not scans:
        if controls:
            raise InputError(
                "`controls`: no participants.tsv found, or no sub- in the names of the segmentations; pass its dataset "
                "as `participants`, and rename the files as sub-X_dseg.nii.gz"
            )
        return Ageing()
    subjects, notes = _read_subjects(root, {scan: (entities[scan]["sub"], entities[scan].get("ses")) for scan in scans})
    if subjects["age"].isna().all():
        return Ageing(notes=("no age curves: no ages in participants.tsv",) if controls else ())
    ppm = values[values["quantity"] == "mean_ppm"].merge(subjects, on="scan")
    rows = []
    for (reference, prediction), (name, chosen) in (
        (pair, selection) for pair in pairs for selection in _select(subjects, controls).items()
    ):
        both = ppm[ppm["scan"].isin(chosen)].dropna(subset=[reference, prediction])
        for rater in (reference, prediction):
            points = both.assign(value=both[rater])[["participant_id", "abbreviation", "age", "value"]]
            key = {"reference": reference, "prediction": prediction, "labels": rater, "scans": name}
            both_curves = fit_age_curves(points, value="value")[:2]
            fitted = (*(table[table["curve"] == EXPONENTIAL.name] for table in both_curves), points)
            rows.append([add_constants(table, **key) for table in fitted])
    fits, curves, points = (pd.concat(parts, ignore_index=True) for parts in zip(*rows, strict=True))
    fits["note"] = fits["note"].str.replace("group_ageing_curves", "ageing_curves")
    if curves.empty:
        return Ageing(notes=(f"no age curves: no group has {EXPONENTIAL.n_min} participants of different ages",))
    tables = {name: table[[*_KEYS, *_FITTED[name]]] for name, table in (("ageing", fits), ("ageing_curves", curves))}
    return Ageing(tables, points.dropna(subset=["age"]), tuple(notes))


def _read_subjects(root: Path, visits: Mapping[str, tuple[str, str | None]]) -> tuple[pd.DataFrame, list[str]]:
    """Return the columns of participants.tsv, ``scan``, ``age`` in years and ``_group`` of each scan, and notes."""
    rows = list(visits.values())
    tables, notes = read_participant_tables(root, rows, all_scans=False)
    subjects = tables.at_visits(rows).assign(participant_id=[f"sub-{participant}" for participant, _ in rows])
    ages, lines = tables.ages(rows, find_column(subjects.columns, AGE))
    group = find_column(subjects.columns, GROUP)
    groups = subjects[group] if group else pd.Series(np.nan, subjects.index, dtype=object)
    return subjects.assign(scan=list(visits), age=ages, _group=groups), [*notes, *lines]


def _select(subjects: pd.DataFrame, controls: Sequence[str]) -> dict[str, set[str]]:
    """Return the scans whose curves are fitted together, by their name in column ``scans``."""
    if controls:
        chosen = find_controls(subjects["_group"], controls)
        return {"controls": set(subjects.loc[chosen, "scan"])}
    names = sorted(subjects["_group"].dropna().unique(), key=str)
    if len(names) < 2:
        return {"all": set(subjects["scan"])}
    return {f"group {name}": set(subjects.loc[subjects["_group"] == name, "scan"]) for name in names}
