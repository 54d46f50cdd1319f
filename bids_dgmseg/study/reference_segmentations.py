"""Measures of reference segmentations of the same scans, from ``dgmseg evaluate``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.io.tables import MISSING, read_tsv
from bids_dgmseg.study.cohort import Cohort

COLUMNS: Mapping[str, str] = {"mean_ppm": "mean_reference_ppm", "volume_mm3": "volume_reference_mm3"}
"""Column of _stats.tsv → column of overlap.tsv."""

Entities = Mapping[str, str]

_KEYS = ("participant_id", "session_id", "scan", "reference", "abbreviation")


def read_reference_values(folder: Path, cohort: Cohort) -> tuple[pd.DataFrame, list[str]]:
    """Read the measures of the reference segmentations of the cohort's scans.

    A scan is matched by all entities of the labels, otherwise without ``desc``, otherwise by the entities that both
    have; if several match, the entities that the evaluation was told to choose decide.

    Parameters
    ----------
    folder : Path
        Output of ``dgmseg evaluate``, with ``overlap.tsv``.
    cohort : Cohort
        All scans.

    Returns
    -------
    table : DataFrame
        One row per scan and nucleus: ``scan`` (row of the cohort, see `first_rows`), ``reference`` (its name),
        ``abbreviation`` and the keys of `COLUMNS`.
    warnings : list of str
        Scans of the evaluation that the cohort lacks.

    Raises
    ------
    InputError
        If ``overlap.tsv`` does not exist, lacks these columns, or has no scan of the cohort.
    """
    overlap = _read_overlap(folder)
    chosen = read_optional_json(folder / "evaluation.json").get("choose", ())
    sessions: dict[tuple[str, str], dict[int, Entities]] = defaultdict(dict)
    keys, entities = cohort.keys[["participant_id", "session_id"]].to_numpy().tolist(), _entities(cohort)
    for row in np.unique(first_rows(cohort)).tolist():
        sessions[tuple(keys[row])][row] = entities[row]
    # with several predictions, the values of the reference are repeated
    overlap = overlap.drop_duplicates(["scan", "abbreviation"])
    rows: dict[str, int | None] = {}
    for scan, participant, session in overlap[["scan", "participant_id", "session_id"]].to_numpy().tolist():
        if scan not in rows:
            labels = {key: value for key, _, value in (part.partition("-") for part in scan.split("_"))}
            rows[scan] = _match(labels, sessions.get((participant, session), {}), chosen)
    unmatched = [scan for scan, row in rows.items() if row is None]
    if len(unmatched) == len(rows):
        raise InputError(
            f"--evaluation {folder.name}: none of its scans, such as {min(unmatched)}, matches exactly one scan of the "
            "study; evaluate the same output folder"
        )
    warnings = []
    if unmatched:
        warnings.append(
            f"--evaluation {folder.name}: {len(unmatched)} scans, such as {min(unmatched)}, do not match exactly one "
            "scan of the study; left out"
        )
    overlap = overlap.assign(scan=overlap["scan"].map(rows)).dropna(subset=["scan"]).astype({"scan": int})
    table = overlap[["scan", "reference", "abbreviation", *COLUMNS.values()]]
    return table.rename(columns={column: measure for measure, column in COLUMNS.items()}), warnings


def first_rows(cohort: Cohort) -> NDArray[np.intp]:
    """Return for each row of the cohort the first row of the same scan, which may be of another model."""
    first: dict[tuple[str, ...], int] = {}
    scans = zip(cohort.demographics["participant_id"], _entities(cohort), strict=True)
    names = [(person, *(f"{key}-{value}" for key, value in entities.items())) for person, entities in scans]
    return np.array([first.setdefault(name, row) for row, name in enumerate(names)], dtype=np.intp)


def _read_overlap(folder: Path) -> pd.DataFrame:
    path = folder / "overlap.tsv"
    if not path.is_file():
        raise InputError(f"--evaluation {folder.name}: overlap.tsv not found; pass an output folder of dgmseg evaluate")
    table = read_tsv(path, dtype=object)
    if table.empty or not {*_KEYS, *COLUMNS.values()} <= set(table.columns):
        raise InputError(f"--evaluation {folder.name}: overlap.tsv is not from dgmseg evaluate; run it again")
    return table.fillna({"session_id": MISSING}).astype(dict.fromkeys(COLUMNS.values(), float))


def _match(wanted: Entities, scans: Mapping[int, Entities], chosen: Collection[str]) -> int | None:
    """Return the row of the scan that labels belong to; None if there is not exactly one."""
    plain = {key: value for key, value in wanted.items() if key != "desc"}
    tests = (
        lambda entities: entities == wanted,
        lambda entities: {**entities, "desc": ""} == {**plain, "desc": ""},
        # each may have entities that the other lacks, such as space
        lambda entities: all(entities.get(key, value) == value for key, value in plain.items()),
    )
    found = next(filter(None, ([row for row in scans if test(scans[row])] for test in tests)), [])
    if len(found) > 1:
        found = [row for row in found if any(f"{key}-{value}" in chosen for key, value in scans[row].items())]
    return found[0] if len(found) == 1 else None


def _entities(cohort: Cohort) -> list[Entities]:
    """Return the entities by which the evaluation names each scan: without ``seg``, runs as integers."""
    scans = cohort.scans.drop(columns="seg").to_dict("records")
    named = [{str(key): value for key, value in scan.items() if isinstance(value, str)} for scan in scans]
    return [scan | ({"run": str(int(scan["run"]))} if scan.get("run", "").isdecimal() else {}) for scan in named]
