"""What a manual or other reference segmentation measures on the same scans, from ``dgmseg evaluate``."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.study.load import Cohort
from bids_dgmseg.study.participants import MISSING
from bids_dgmseg.study.results import ScanStats

COLUMNS: Mapping[str, str] = {"mean_ppm": "mean_reference_ppm", "volume_mm3": "volume_reference_mm3"}
"""Column of stats.tsv → column of overlap.tsv."""

Entities = Mapping[str, str]

_KEYS = ("participant_id", "session_id", "scan", "reference", "abbreviation")


def read_reference(folder: Path, cohort: Cohort) -> tuple[pd.DataFrame, list[str]]:
    """Read the reference's measures of the cohort's scans.

    A scan is found by all entities of the labels, else without ``desc``, else by those that both have; where several
    are found, what the evaluation was told to choose decides.

    Parameters
    ----------
    folder : Path
        Output of ``dgmseg evaluate``, with ``overlap.tsv``.
    cohort : Cohort
        All scans.

    Returns
    -------
    table : DataFrame
        ``scan`` (place in the cohort, see `first_places`), ``reference`` (its name), ``abbreviation`` and the keys of
        `COLUMNS`; one row a scan and nucleus.
    warnings : list of str
        Which scans of the evaluation the cohort lacks.

    Raises
    ------
    InputError
        If there is no ``overlap.tsv`` or it has not these columns, or has no scan of the cohort.
    """
    rows = _read_overlap(folder)
    chosen = read_optional_json(folder / "evaluation.json").get("choose", ())
    sessions = _by_session(cohort)
    # several predictions repeat the reference's values
    first = {(row["scan"], row["abbreviation"]): row for row in reversed(rows)}
    known, lost = [], set()
    for row in reversed(first.values()):
        there = sessions.get((row["participant_id"], row["session_id"] or MISSING), {})
        said = {key: value for key, _, value in (part.partition("-") for part in row["scan"].split("_"))}
        place = _find(said, there, chosen)
        if place is None:
            lost.add(row["scan"])
            continue
        values = {measure: _number(row[column]) for measure, column in COLUMNS.items()}
        known.append({"scan": place, "reference": row["reference"], "abbreviation": row["abbreviation"], **values})
    if not known:
        raise InputError(
            f"--evaluation {folder.name}: none of its scans is certainly among the measured ones, such as "
            f"{min(lost)}; evaluate the same output folder"
        )
    lines = (
        [
            f"--evaluation {folder.name}: {len(lost)} scans are not certainly among the measured ones, such as "
            f"{min(lost)}; left out"
        ]
        if lost
        else []
    )
    return pd.DataFrame(known), lines


def first_places(cohort: Cohort) -> NDArray[np.intp]:
    """Find for each row of the cohort the place of the first model's row of the same scan."""
    first: dict[tuple[str, ...], int] = {}
    scans = zip(cohort.facts["participant_id"], map(_entities, cohort.scans), strict=True)
    names = [(person, *(f"{key}-{value}" for key, value in entities.items())) for person, entities in scans]
    return np.array([first.setdefault(name, place) for place, name in enumerate(names)], dtype=np.intp)


def _read_overlap(folder: Path) -> list[dict[str, str]]:
    path = folder / "overlap.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except OSError as error:
        raise InputError(
            f"--evaluation {folder.name}: no overlap.tsv ({error.strerror}); give the folder that dgmseg evaluate wrote"
        ) from error
    if not rows or not {*_KEYS, *COLUMNS.values()} <= set(rows[0]):
        raise InputError(f"--evaluation {folder.name}: overlap.tsv is not of dgmseg evaluate; run it again")
    return rows


def _by_session(cohort: Cohort) -> dict[tuple[str, str], dict[int, Entities]]:
    """Participant and session → the first places of their scans, with their entities."""
    sessions: dict[tuple[str, str], dict[int, Entities]] = {}
    keys = cohort.keys[["participant_id", "session_id"]].to_numpy().tolist()
    for place in np.unique(first_places(cohort)).tolist():
        participant, session = keys[place]
        sessions.setdefault((participant, session), {})[place] = _entities(cohort.scans[place])
    return sessions


def _find(said: Entities, there: Mapping[int, Entities], chosen: Collection[str]) -> int | None:
    """Find the scan that labels are of; None where there are several, or persons of one name."""
    plain = _without_desc(said)
    tests = (
        lambda own: own == said,
        lambda own: _without_desc(own) == plain,
        # either may have entities that the other has not, such as space
        lambda own: all(own.get(key, value) == value for key, value in plain.items()),
    )
    found = next(filter(None, ([place for place in there if test(there[place])] for test in tests)), [])
    if len(found) > 1:
        found = [place for place in found if any(f"{key}-{value}" in chosen for key, value in there[place].items())]
    return found[0] if len(found) == 1 else None


def _entities(scan: ScanStats) -> Entities:
    """Entities as the evaluation names scans by: without ``seg``, runs as numbers."""
    kept = {key: value for key, value in scan.entities.items() if key != "seg"}
    if kept.get("run", "").isdecimal():
        kept["run"] = str(int(kept["run"]))
    return kept


def _without_desc(entities: Entities) -> Entities:
    return {key: value for key, value in entities.items() if key != "desc"}


def _number(text: str) -> float:
    return float(text) if text not in ("", "n/a") else float("nan")
