"""Tables with a row a scan: asymmetry, outliers, values adjusted for size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.cohort.outliers import robust_z
from bids_dgmseg.cohort.size import N_CONTROLS, adjust_for_size
from bids_dgmseg.cohort.study import VOLUME, Study
from bids_dgmseg.cohort.writing import GroupTable
from bids_dgmseg.measure.asymmetry import asymmetry_index

_ADJUSTED = ["scan", "abbreviation", "control", "measure", "volume_mm3", "value", "adjusted"]


def asymmetry_table(study: Study) -> GroupTable:
    """Compare left with right in each scan."""
    parts = []
    side = study.table["abbreviation"].str[-2:]
    names = study.table["abbreviation"].str[:-2]
    nuclei = pd.Categorical(names, categories=list(names.unique()))  # merging sorts them so
    for measure in study.options.measures:
        rows = pd.DataFrame({"scan": study.table["scan"], "nucleus": nuclei, "value": study.table[measure]})
        left, right = (rows[side == f"_{name}"] for name in "LR")
        both = left.merge(right, on=["scan", "nucleus"], suffixes=("_left", "_right"), how="outer")
        parts.append(pd.DataFrame({
            "scan": both["scan"], "nucleus": both["nucleus"], "measure": measure, "left": both["value_left"],
            "right": both["value_right"], "asymmetry": asymmetry_index(both["value_left"], both["value_right"]),
        }))  # fmt: skip
    return GroupTable("group_asymmetry", _by_scan(parts))


def outlier_table(study: Study) -> GroupTable:
    """Robust z of each value within its site."""
    parts = []
    for measure in study.options.measures:
        found = robust_z(study.table, value=measure, by=(*study.by, "site"))
        rows = study.table[["scan", "abbreviation"]].assign(measure=measure, value=study.table[measure])
        parts.append(pd.concat([rows, found], axis=1))
    rows = _by_scan(parts)
    return GroupTable("group_outliers", rows, facts={"NumberOfOutliers": int(rows["outlier"].sum())})


def adjusted_table(study: Study) -> GroupTable:
    """Adjust for size by the controls' regression, and give the study the adjusted measures."""
    name = "group_adjusted"
    if study.controls is None:
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), not_computed="no --control-filter was given")
    control = study.controls[study.table["scan"].to_numpy()]
    n_controls = study.cohort.facts["participant_id"][study.controls].nunique()
    facts = {"Controls": {"Participants": n_controls, "Scans": int(study.controls.sum())}}
    if n_controls < N_CONTROLS:
        why = f"--control-filter matches {n_controls} participants, a slope needs {N_CONTROLS}"
        study.warnings.append(f"{name}.tsv: not computed: {why}")
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), facts=facts, not_computed=why)
    parts: list[pd.DataFrame] = []
    coefficients: list[dict[Hashable, Any]] = []
    for measure in [measure for measure in study.options.measures if measure.endswith("_ppm")]:
        done = adjust_for_size(study.table, controls=control, value=measure, volume=VOLUME, by=study.by,
                               participant="participant_id")  # fmt: skip
        found = done.coefficients.assign(measure=measure)[["measure", *done.coefficients.columns]]
        coefficients += found.to_dict("records")
        rows = study.table[["scan", "abbreviation"]].assign(
            control=control, measure=measure, volume_mm3=study.table[VOLUME], value=study.table[measure],
            adjusted=done.values,
        )  # fmt: skip
        parts.append(rows)
        if done.values.notna().any():
            study.table[f"{measure}_adjusted"] = done.values
            study.measures.append(f"{measure}_adjusted")
    if not parts:
        return GroupTable(name, pd.DataFrame(columns=_ADJUSTED), not_computed="no susceptibility among --measures")
    notes = tuple(
        f"{record['measure']} of {record['abbreviation']} by {record['model']}: {record['note']}"
        for record in coefficients if record["note"]
    )  # fmt: skip
    return GroupTable(name, _by_scan(parts), facts={**facts, "Coefficients": coefficients}, notes=notes)


def _by_scan(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """One table in the order of the scans."""
    together = pd.concat(parts, ignore_index=True)
    order = np.argsort(together["scan"].to_numpy(), kind="stable")
    return together.iloc[order].reset_index(drop=True)
