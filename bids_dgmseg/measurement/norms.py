"""Where a scan's numbers lie among those in the literature."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from bids_dgmseg.measurement.columns import Z_COLUMNS


@dataclass(frozen=True)
class Norm:
    """What adults have: mean and standard deviation of a measure of one nucleus, a side."""

    mean: float
    sd: float
    reference: str | None
    """Region whose susceptibility is 0; None for volumes and where it is not known."""
    source: str
    doi: str | None


def read_norms(text: str) -> dict[tuple[str, str], Norm]:
    """Read ``norms.tsv``.

    Parameters
    ----------
    text : str
        Tab-separated, one row a nucleus and measure; ``n/a`` where nothing could be found.

    Returns
    -------
    dict
        (nucleus, measure) → norm, without the rows that have none.
    """
    return {
        (row["nucleus"], row["measure"]): Norm(
            mean=float(row["mean"]),
            sd=float(row["sd"]),
            reference=_known(row["reference"]),
            source=row["source"],
            doi=_known(row["doi"]),
        )
        for row in csv.DictReader(text.splitlines(), delimiter="\t")
        if row["mean"] != "n/a" and row["sd"] != "n/a"
    }


def _known(word: str) -> str | None:
    return None if word == "n/a" else word


NORMS = read_norms(files("bids_dgmseg").joinpath("data", "norms.tsv").read_text(encoding="utf-8"))

_EXCLUDED = re.compile(
    r"\b(without|excluding|excludes|except|minus|outside|no)\b.*"
    r"|\bnon\W?csf\b"
    r"|\b(csf|cerebrospinal fluid|ventric\w*)\W+((is|was|are|were)\s+)?(excluded|removed|masked out)\b"
)
"""What a region is said not to hold."""


def name_region(words: str) -> str | None:
    """Name the reference region that a sidecar describes, as ``norms.tsv`` does; None where it states none.

    >>> name_region("CSF (lateral ventricles)"), name_region("whole brain without CSF"), name_region("not stated")
    ('csf', 'whole-brain', None)
    """
    said = words.casefold()
    taken = _EXCLUDED.sub(" ", said).strip(" ,;()")
    if any(word in taken for word in ("csf", "cerebrospinal", "ventric")):
        return "csf"
    if "whole" in taken or taken in ("brain", "brain mask"):
        return "whole-brain"
    return None if said in ("", "n/a", "none", "unknown", "not stated") else said


def compare_with_norms(
    stats: pd.DataFrame, *, reference: str | None = None, norms: Mapping[tuple[str, str], Norm] = NORMS
) -> pd.DataFrame:
    r"""Compute z-scores against the literature.

    Parameters
    ----------
    stats : DataFrame
        Rows and columns of `bids_dgmseg.measurement.nuclei.measure_regions`.
    reference : str, optional
        Region whose susceptibility is 0 in the map, such as ``csf`` or ``whole-brain``; None if it is not known.
    norms : mapping
        (nucleus, measure) → norm.

    Returns
    -------
    DataFrame
        One row a nucleus and side: ``index``, ``abbreviation``, and the columns of `Z_COLUMNS`. NaN where the measure
        is missing, there is no norm, or norm and map are known to have different references.

    Notes
    -----
    :math:`z = (x - \mu) / \sigma`. Outlining protocols, field strengths, reconstructions and ages differ between
    studies by more than people do within one: a z-score of 3 is no finding, one of 30 is a wrong unit.
    """
    nuclei = [abbreviation.split("_")[0] for abbreviation in stats["abbreviation"]]
    table = stats[["index", "abbreviation"]].reset_index(drop=True)
    for measure, name in Z_COLUMNS.items():
        values = stats[measure].to_numpy(np.float64, na_value=np.nan)
        table[name] = [
            _score(value, norms.get((nucleus, measure)), reference)
            for nucleus, value in zip(nuclei, values, strict=True)
        ]
    return table


def _score(value: float, norm: Norm | None, reference: str | None) -> float:
    if norm is None or not norm.sd > 0:
        return math.nan
    if norm.reference is not None and reference is not None and norm.reference != reference:
        return math.nan
    return (float(value) - norm.mean) / norm.sd
