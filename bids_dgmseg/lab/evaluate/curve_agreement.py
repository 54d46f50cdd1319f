"""Age curves of references and predictions on the same scans, as in DeepQSMSeg's Fig. 4 (Guan et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.bids.entities import split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_data_dictionaries
from bids_dgmseg.lab.evaluate.label_images import Pair
from bids_dgmseg.stats.age_curves import EXPONENTIAL, fit_age_curves
from bids_dgmseg.study.participants import AGE, GROUP, find_column, find_controls, read_participant_tables
from bids_dgmseg.study.tabular_files import add_constants

_KEYS = ["reference", "prediction", "labels", "scans"]

_FITTED = {
    "ageing": [
        *("abbreviation", "n", "n_scans", "n_missing", "age_min", "age_max"),
        *(f"{name}{end}" for name in ("alpha", "beta_per_year", "gamma", "plateau") for end in ("", "_low", "_high")),
        *("std", "r2", "note"),
    ],
    "ageing_curves": ["abbreviation", "age", "fit", "low", "high"],
}

_EVALUATION = read_data_dictionaries("evaluation")

_COLUMNS = {**_EVALUATION["agreement"], **read_data_dictionaries("group")["group"]}

AGEING_DICTIONARIES = {
    name: {**_EVALUATION["ageing"], **{column: _COLUMNS[column] for column in columns}}
    for name, columns in _FITTED.items()
}
"""Table of age curves → its data dictionary."""


@dataclass(frozen=True)
class Ageing:
    """Age curves of each pair of reference and prediction; empty if they cannot be fitted."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """By the names of `AGEING_DICTIONARIES`."""
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Values that the curves are fitted to: the columns that identify a curve, ``age`` and ``value``."""
    notes: tuple[str, ...] = ()


def find_participants(given: Path | None, paths: Iterable[Path | None]) -> Path | None:
    """Return the dataset with participants.tsv: the one `given`, else of `paths` or the datasets they are derived in.

    Raises
    ------
    InputError
        If the dataset that is passed has no participants.tsv.
    """
    roots = [given] if given else [*filter(None, paths)]
    roots += [root.parent.parent for root in roots if root.parent.name == "derivatives"]
    found = next((root for root in roots if (root / "participants.tsv").is_file()), None)
    if given and not found:
        raise InputError(f"`participants` {given.name}: participants.tsv not found; pass the dataset that has it")
    return found


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
            fitted = (*fit_age_curves(points, value="value", curves=(EXPONENTIAL,)), points)
            rows.append([add_constants(table, **key) for table in fitted])
    fits, curves, points = (pd.concat(parts, ignore_index=True) for parts in zip(*rows, strict=True))
    fits["note"] = fits["note"].str.replace("group_ageing_curves", "ageing_curves")
    if curves.empty:
        why = f"the exponential curve needs {EXPONENTIAL.n_min} participants of different ages"
        return Ageing(notes=(f"no age curves: {why} in a group",))
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
