"""z-scores of a scan's measures relative to literature norms (``norms.tsv``)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from bids_dgmseg.measurement.columns import Z_SCORE_OF


@dataclass(frozen=True)
class Norm:
    """Mean and standard deviation of a measure of one nucleus and hemisphere in adults."""

    mean: float
    sd: float
    reference: str | None
    """Region whose susceptibility is 0; None for volumes and if it is not known."""
    source: str
    doi: str | None


def read_norms(text: str) -> dict[tuple[str, str], Norm]:
    """Read ``norms.tsv``.

    Parameters
    ----------
    text : str
        Tab-separated, one row per nucleus and measure; ``n/a`` if no published value was found.

    Returns
    -------
    dict
        (nucleus, measure) → norm, without the rows that have no value.
    """
    rows = [
        {key: None if value == "n/a" else value for key, value in row.items()}
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
    ]
    return {
        (row["nucleus"], row["measure"]): Norm(
            float(row["mean"]), float(row["sd"]), row["reference"], row["source"] or "", row["doi"]
        )
        for row in rows
        if row["nucleus"] and row["measure"] and row["mean"] and row["sd"]
    }


NORMS = read_norms(files("bids_dgmseg").joinpath("data", "norms.tsv").read_text(encoding="utf-8"))

_EXCLUDED = re.compile(
    r"\b(without|excluding|excludes|except|minus|outside|no)\b.*"
    r"|\bnon\W?csf\b"
    r"|\b(csf|cerebrospinal fluid|ventric\w*)\W+((is|was|are|were)\s+)?(excluded|removed|masked out)\b"
)
"""What the description of a region excludes."""


def parse_reference_region(description: str) -> str | None:
    """Parse the reference region that a sidecar describes into the terms of ``norms.tsv``; None if it states none.

    >>> [parse_reference_region(text) for text in ("CSF (lateral ventricles)", "whole brain without CSF", "not stated")]
    ['csf', 'whole-brain', None]
    """
    text = description.casefold()
    included = _EXCLUDED.sub(" ", text).strip(" ,;()")
    if any(word in included for word in ("csf", "cerebrospinal", "ventric")):
        return "csf"
    if "whole" in included or included in ("brain", "brain mask"):
        return "whole-brain"
    return None if text in ("", "n/a", "none", "unknown", "not stated") else text


def compare_with_norms(
    stats: pd.DataFrame, *, reference: str | None = None, norms: Mapping[tuple[str, str], Norm] = NORMS
) -> pd.DataFrame:
    r"""Compute z-scores relative to the norms.

    Parameters
    ----------
    stats : DataFrame
        Table of `bids_dgmseg.measurement.nuclei.measure_nuclei`.
    reference : str, optional
        Region whose susceptibility is 0 in the map, such as ``csf`` or ``whole-brain``; None if it is not known.
    norms : mapping
        (nucleus, measure) → norm.

    Returns
    -------
    DataFrame
        One row per nucleus and hemisphere: ``index``, ``abbreviation`` and the columns of `Z_SCORE_OF`. NaN if the
        measure is missing, there is no norm, or norm and map are known to have different references.

    Notes
    -----
    :math:`z = (x - \mu) / \sigma`. Segmentation protocols, field strengths, reconstructions and ages differ more
    between studies than subjects do within one: a z-score of 3 is not a finding, one of 30 means a wrong unit.
    """
    nuclei = [abbreviation.split("_")[0] for abbreviation in stats["abbreviation"]]
    table = stats[["index", "abbreviation"]].reset_index(drop=True)
    for measure, name in Z_SCORE_OF.items():
        values = stats[measure].to_numpy(np.float64, na_value=np.nan)
        scores = np.full(len(values), np.nan)
        for row, nucleus in enumerate(nuclei):
            norm = norms.get((nucleus, measure))
            if norm is None or not norm.sd > 0 or (norm.reference and reference and norm.reference != reference):
                continue
            scores[row] = (values[row] - norm.mean) / norm.sd
        table[name] = scores
    return table
