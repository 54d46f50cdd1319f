"""Tables of a comparison of models on labelled scans: a row a model, and a row a model and nucleus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.evaluate.columns import AGREEMENT_COLUMNS
from bids_dgmseg.stats.overlap import OVERLAP_COLUMNS

MEASURES = (
    "dice",
    "jaccard",
    "hausdorff_mm",
    "hd95_mm",
    "mean_surface_distance_mm",
    "centre_distance_mm",
    "volume_similarity",
    "volume_difference_percent",
)

QUANTITIES = {"volume_mm3": "mm^3", "mean_ppm": "ppm"}

_ESTIMATES = ("mean_reference", "mean_prediction", "pearson_r", "icc21", "bias", "loa_lower", "loa_upper")


def nuclei_table(
    summary: pd.DataFrame, agreement: pd.DataFrame, *, models: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Say how each model did on each of its nuclei.

    Parameters
    ----------
    summary : DataFrame
        ``prediction``, ``abbreviation``, ``measure``, ``n``, ``mean``, ``sd``: see `summarize`.
    agreement : DataFrame
        ``quantity``, ``prediction``, ``abbreviation`` and the estimates: see `agreement_table`.
    models : mapping of str to sequence of str
        Model → abbreviations of its nuclei.

    Returns
    -------
    DataFrame
        The columns of `NUCLEI_COLUMNS`. A nucleus that no scan's labels have is a row of NaN with ``n`` 0.
    """
    measured, agreed = _by_nucleus(summary, "measure"), _by_nucleus(agreement, "quantity")
    rows = []
    for model, nuclei in models.items():
        for nucleus in nuclei:
            row = {"model": model, "abbreviation": nucleus, "n": measured.get((model, nucleus, "dice"), {}).get("n", 0)}
            for measure in MEASURES:
                found = measured.get((model, nucleus, measure), {})
                row |= {measure: found.get("mean", np.nan), f"{measure}_sd": found.get("sd", np.nan)}
            for quantity in QUANTITIES:
                found = agreed.get((model, nucleus, quantity), {})
                row |= {f"{quantity}_{name}": found.get(name, np.nan) for name in _ESTIMATES}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(NUCLEI_COLUMNS))


def models_table(overlap: pd.DataFrame, costs: pd.DataFrame, *, models: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Sum each model up over its nuclei and all scans.

    Parameters
    ----------
    overlap : DataFrame
        ``prediction``, ``abbreviation``, ``dice``, ``hd95_mm``, ``n_reference``, ``n_prediction``; a row a scan and
        nucleus.
    costs : DataFrame
        ``model``, ``seconds``, ``cpu_seconds``, ``peak_mb``; NaN where a scan could not be segmented.
    models : mapping of str to sequence of str
        Model → abbreviations of its nuclei.

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


def _by_nucleus(table: pd.DataFrame, what: str) -> dict[tuple[str, str, str], Mapping[Any, Any]]:
    """Find rows by model, nucleus and what they are about."""
    return {(row["prediction"], row["abbreviation"], row[what]): row for row in table.to_dict("records")}


def _described(name: str) -> Mapping[str, str]:
    """Describe a column of `nuclei_table` by the dictionary of what it summarizes."""
    quantity = next((key for key in QUANTITIES if name.startswith(f"{key}_")), None)
    if quantity:
        text, unit = AGREEMENT_COLUMNS[name.removeprefix(f"{quantity}_")]["Description"], QUANTITIES[quantity]
        what = "volume" if quantity == "volume_mm3" else "mean susceptibility under the label"
        plain = name.endswith(("pearson_r", "icc21"))
        return {"Description": f"Of the {what}: {text}", **({} if plain else {"Units": unit})}
    entry = OVERLAP_COLUMNS[name.removesuffix("_sd")]
    of = "Standard deviation (n - 1)" if name.endswith("_sd") else "Mean"
    return {**entry, "Description": f"{of} over the scans of: {entry['Description']}"}


_MODEL = {"model": {"Description": "Model, as its folder below predictions is named"}}

NUCLEI_COLUMNS: Mapping[str, Mapping[str, str]] = {
    **_MODEL,
    "abbreviation": {"Description": "Nucleus and side, such as DN_L; left is the patient's left"},
    "n": {"Description": "Scans whose labels or prediction have the nucleus"},
    **{name: _described(name) for measure in MEASURES for name in (measure, f"{measure}_sd")},
    **{f"{quantity}_{name}": _described(f"{quantity}_{name}") for quantity in QUANTITIES for name in _ESTIMATES},
}
"""Column → BIDS data dictionary entry, in the order of the table of `nuclei_table`."""

COST_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "seconds": {"Description": "Time from the map in memory to its labels, weights read on the way", "Units": "s"},
    "cpu_seconds": {
        "Description": "Time that all threads were busy: as seconds on a machine without other work",
        "Units": "s",
    },
    "peak_mb": {"Description": "Largest resident memory of the process", "Units": "MB"},
}
"""Columns of what a scan costs."""

MODELS_COLUMNS: Mapping[str, Mapping[str, str]] = {
    **_MODEL,
    "n_nuclei": {"Description": "Nuclei of the model, left and right apart"},
    "n_compared": {"Description": "Those that the labels of any scan have; means are over these"},
    "n_scans": {"Description": "Scans that it segmented"},
    "n_failed": {"Description": "Scans that it could not segment"},
    "dice": {"Description": "Mean Dice over scans and nuclei that the labels have"},
    "dice_least": {"Description": "Least of these"},
    "hd95_mm": {"Description": "Mean of HD95 over the same, where both have the nucleus", "Units": "mm"},
    "n_missed": {"Description": "Nuclei in scans that the labels have and the model has not"},
    **{
        name: {**entry, "Description": f"{what} of: {entry['Description']}"}
        for (name, entry), what in zip(COST_COLUMNS.items(), ("Median", "Median", "Largest"), strict=True)
    },
}
"""The same of `models_table`."""
