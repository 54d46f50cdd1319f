"""The tables of all scans, from the outputs of the participant level."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.cohort.columns import WIDE, describe
from bids_dgmseg.cohort.load import Cohort
from bids_dgmseg.cohort.participants import MISSING
from bids_dgmseg.cohort.scans import ScanStats
from bids_dgmseg.cohort.writing import write_lines
from bids_dgmseg.structures import STRUCTURES

Line = Sequence[str]


def write_scan_tables(folder: Path, cohort: Cohort, *, settings: Mapping[str, Any]) -> list[Path]:
    """Write the measures of all scans with the participants' columns behind.

    These are ``group_stats.tsv`` (a row a nucleus), ``group_volumes.tsv``, ``group_susceptibility.tsv`` and
    ``group_quality.tsv`` (a row a scan and model), each with a data dictionary of the same name and each renamed into
    place when complete. Columns of ``_stats.tsv`` and ``_quality.json`` that are new pass through.

    Parameters
    ----------
    folder : Path
        Where to.
    cohort : Cohort
        All scans.
    settings : mapping
        For the data dictionaries.

    Raises
    ------
    InputError
        If a table cannot be written.
    """
    scans = cohort.scans
    writer = _Writer(folder, cohort, settings)
    columns = [*dict.fromkeys(column for scan in scans for column in scan.columns)]
    paths = writer.write("group_stats", columns, (_long_rows(scan, columns) for scan in scans))
    known = {abbreviation for scan in scans for abbreviation in scan.values("abbreviation")}
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in known]
    volumes, susceptibilities = ([f"{nucleus}_{measure}" for nucleus in nuclei] for measure in WIDE)
    paths += writer.write("group_volumes", volumes, ([_wide_row(scan, nuclei, WIDE[0])] for scan in scans))
    paths += writer.write("group_susceptibility", ["reference", *susceptibilities], (
        [[scan.reference or MISSING, *_wide_row(scan, nuclei, WIDE[1])]] for scan in scans))  # fmt: skip
    names = [*dict.fromkeys(name for scan in scans for name in scan.quality)]
    paths += writer.write("group_quality", ["page", *names], (
        [[page, *(scan.quality.get(name, MISSING) for name in names)]]
        for scan, page in zip(scans, cohort.pages, strict=True)))  # fmt: skip
    return paths


class _Writer:
    """Puts a scan's keys in front of its lines and its participant's columns behind."""

    def __init__(self, folder: Path, cohort: Cohort, settings: Mapping[str, Any]) -> None:
        self._folder, self._settings, self._descriptions = folder, settings, cohort.descriptions
        front = cohort.keys.assign(age_years=[MISSING if pd.isna(age) else f"{age:.7g}" for age in cohort.facts["age"]])
        self._keys, self._people = list(front.columns), list(cohort.people.columns)
        self._front, self._behind = front.to_numpy(object).tolist(), cohort.people.to_numpy(object).tolist()

    def write(self, name: str, columns: Sequence[str], scans: Iterable[Iterable[Line]]) -> list[Path]:
        """Write the lines of all scans; a participant's column that would hide another is renamed."""
        own = [*self._keys, *columns]
        people = {column: f"participants_{column}" if column in own else column for column in self._people}
        dictionary: dict[str, Any] = {column: describe(column) for column in own}
        for column, shown in people.items():
            told = {"Description": f"Column {column} of participants.tsv or sessions.tsv"}
            dictionary[shown] = self._descriptions.get(column, told)
        lines = (
            [*front, *line, *behind]
            for front, behind, rows in zip(self._front, self._behind, scans, strict=True) for line in rows
        )  # fmt: skip
        header = [*own, *people.values()]
        return write_lines(self._folder, name, header, lines, dictionary | {"Settings": self._settings})


def _long_rows(scan: ScanStats, columns: Sequence[str]) -> Iterator[Line]:
    """Rows of a scan's table, in the order of all scans' columns."""
    if scan.columns == tuple(columns):
        yield from scan.rows()
        return
    places = [scan.columns.index(column) if column in scan.columns else None for column in columns]
    for row in scan.rows():
        yield [MISSING if place is None else row[place] for place in places]


def _wide_row(scan: ScanStats, nuclei: Sequence[str], measure: str) -> list[str]:
    values = scan.values(measure)
    return [values.get(name, MISSING) for name in nuclei]
