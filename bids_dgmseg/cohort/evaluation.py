"""What a manual or other reference segmentation measures on the same scans, from ``dgmseg evaluate``."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from bids_dgmseg.cohort.load import Cohort
from bids_dgmseg.errors import InputError

COLUMNS: Mapping[str, str] = {"mean_ppm": "mean_reference_ppm", "volume_mm3": "volume_reference_mm3"}
"""Column of stats.tsv → column of overlap.tsv."""
_KEYS = ("participant_id", "session_id", "scan", "reference", "abbreviation")


def read_reference(folder: Path, cohort: Cohort) -> tuple[pd.DataFrame, list[str]]:
    """Read the reference's measures of the cohort's scans.

    Parameters
    ----------
    folder : Path
        Output of ``dgmseg evaluate``, with ``overlap.tsv``.
    cohort : Cohort
        All scans.

    Returns
    -------
    table : DataFrame
        ``scan`` (place in the cohort of the first model's), ``reference`` (its name), ``abbreviation`` and the keys of
        `COLUMNS`; one row a scan and nucleus.
    warnings : list of str
        Which scans of the evaluation the cohort lacks.

    Raises
    ------
    InputError
        If there is no ``overlap.tsv`` or it has not these columns, or has no scan of the cohort.
    """
    path = folder / "overlap.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except OSError as error:
        raise InputError(f"--evaluation {folder.name}: no overlap.tsv ({error.strerror}); give the folder that dgmseg "
                         "evaluate wrote") from error  # fmt: skip
    if not rows or not {*_KEYS, *COLUMNS.values()} <= set(rows[0]):
        raise InputError(f"--evaluation {folder.name}: overlap.tsv is not of dgmseg evaluate; run it again")
    places = _places(cohort)
    # several predictions repeat the reference's values
    first = {(row["scan"], row["abbreviation"]): row for row in reversed(rows)}
    known, lost = [], set()
    for row in reversed(first.values()):
        # labels may say desc-manual where the map says nothing
        scan = "_".join(part for part in row["scan"].split("_") if not part.startswith("desc-"))
        place = places.get(scan, places.get(_short(row["participant_id"], row["session_id"])))
        if place is None:
            lost.add(row["scan"])
            continue
        values = {measure: _number(row[column]) for measure, column in COLUMNS.items()}
        known.append({"scan": place, "reference": row["reference"], "abbreviation": row["abbreviation"], **values})
    if not known:
        raise InputError(f"--evaluation {folder.name}: none of its scans is among the measured ones; evaluate the "
                         "same output folder")  # fmt: skip
    lines = [f"--evaluation {folder.name}: {len(lost)} scans are not among the measured ones, such as "
             f"{min(lost)}; left out"] if lost else []  # fmt: skip
    return pd.DataFrame(known), lines


def _places(cohort: Cohort) -> dict[str, int]:
    """Find scans by their entities without ``seg`` and ``desc``, or by participant and session where these do."""
    places: dict[str, int] = {}
    people: dict[str, set[str]] = {}
    sessions: dict[str, set[str]] = {}
    for place, (scan, person) in enumerate(zip(cohort.scans, cohort.facts["participant_id"], strict=True)):
        kept = {key: value for key, value in scan.entities.items() if key not in ("seg", "desc")}
        if kept.get("run", "").isdecimal():
            kept["run"] = str(int(kept["run"]))
        name = "_".join(f"{key}-{value}" for key, value in kept.items())
        places.setdefault(name, place)
        people.setdefault(name, set()).add(person)
        session = f"ses-{kept['ses']}" if "ses" in kept else ""
        sessions.setdefault(_short(f"sub-{kept['sub']}", session), set()).add(name)
    certain = {name: place for name, place in places.items() if len(people[name]) == 1}
    alone = {key: certain[next(iter(names))] for key, names in sessions.items() if len(names) == 1 and names <= (
        certain.keys())}  # fmt: skip
    return alone | certain


def _short(participant: str, session: str) -> str:
    return participant if session in ("", "n/a") else f"{participant}_{session}"


def _number(text: str) -> float:
    return float(text) if text not in ("", "n/a") else float("nan")
