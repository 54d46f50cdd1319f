"""The measures of all scans as numbers: one row a scan and nucleus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.load import Cohort
from bids_dgmseg.study.participants import MISSING
from bids_dgmseg.study.results import ScanStats


def long_table(cohort: Cohort, measures: Sequence[str]) -> pd.DataFrame:
    """Parse measures of all scans, and put beside them what the statistics ask for.

    Parameters
    ----------
    cohort : Cohort
        All scans.
    measures : sequence of str
        Columns of ``_stats.tsv``; NaN where a scan lacks one.

    Returns
    -------
    DataFrame
        ``scan`` (place in the cohort), ``abbreviation``, the measures, the columns of ``cohort.facts`` and those of
        ``cohort.apart``.

    Raises
    ------
    InputError
        If no scan has a measure, or a value of it is no number.
    """
    there = {column for scan in cohort.scans for column in scan.columns}
    if missing := [measure for measure in measures if measure not in there]:
        shown = ", ".join(sorted(there))
        raise InputError(f"--measures {missing[0]}: no such column in _stats.tsv (columns: {shown}); correct it")
    scans: list[int] = []
    names: list[str] = []
    texts: dict[str, list[str]] = {measure: [] for measure in measures}
    for place, scan in enumerate(cohort.scans):
        rows = scan.rows()
        scans += [place] * len(rows)
        names += _cells(scan, rows, "abbreviation")
        for measure in measures:
            texts[measure] += _cells(scan, rows, measure)
    at = np.array(scans, dtype=np.intp)
    table = pd.DataFrame({"scan": at, "abbreviation": np.array(names, dtype=object)})
    for measure, values in texts.items():
        table[measure] = _numbers(values, measure, scans, cohort)
    for columns in (cohort.facts, cohort.keys[[*cohort.apart]]):
        for column in columns:
            table[column] = columns[column].to_numpy()[at]
    return table


def _cells(scan: ScanStats, rows: Sequence[Sequence[str]], column: str) -> list[str]:
    if column not in scan.columns:
        return [MISSING] * len(rows)
    place = scan.columns.index(column)
    return [row[place] for row in rows]


def _numbers(texts: Sequence[str], measure: str, scans: Sequence[int], cohort: Cohort) -> pd.Series:
    cells = pd.Series(texts, dtype=object)
    values = pd.to_numeric(cells.where(~cells.isin([MISSING, ""])), errors="coerce")
    odd = values.isna() & ~cells.isin([MISSING, "", "nan"])
    if odd.any():
        first = int(odd.to_numpy().argmax())
        who = cohort.keys["participant_id"].iloc[scans[first]]
        raise InputError(
            f"{who}: {measure} is {cells[first]!r}, expected numbers; run the participant level again, or "
            "choose other --measures"
        )
    return values.astype(np.float64)
