"""One table of all scans, from the outputs of the participant level."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bids_dgmseg.cohort.participants import MISSING, Participants, read_participants
from bids_dgmseg.cohort.scans import ScanStats, read_scans
from bids_dgmseg.errors import InputError
from bids_dgmseg.measure.columns import STATS_COLUMNS
from bids_dgmseg.structures import STRUCTURES

_ENTITIES = {
    "sub": "participant_id", "ses": "session_id", "acq": "acquisition", "run": "run", "seg": "model",
    "rec": "reconstruction", "ce": "ceagent", "dir": "direction", "res": "resolution", "desc": "description",
}  # fmt: skip
_ALWAYS = ("sub", "ses", "acq", "run", "seg")
_WIDE = ("volume_mm3", "mean_ppm")
_SHOWN = 5
_DESCRIPTIONS: Mapping[str, Mapping[str, str]] = {
    "participant_id": {"Description": "Participant"},
    "session_id": {"Description": "Session"},
    "acquisition": {"Description": "Value of the acq entity of the map"},
    "run": {"Description": "Value of the run entity of the map"},
    "model": {"Description": "Model that segmented, the seg entity of the files"},
    "reference": {"Description": "Region whose susceptibility is 0 in the map, as the map's sidecar states it"},
    **STATS_COLUMNS,
}


@dataclass(frozen=True)
class GroupTables:
    """What was written, and what a user should know about it."""

    paths: tuple[Path, ...]
    """Six files."""
    warnings: tuple[str, ...]
    """One line each."""


@dataclass(frozen=True)
class _Table:
    """A table to be written, without the participants' columns."""

    name: str
    columns: Sequence[str]
    rows: Iterable[tuple[str, Sequence[str]]]
    """Participant's label and values."""


def write_group_tables(output_dir: Path, participants_tsv: Path | None = None) -> GroupTables:
    """Gather the measures of all scans below an output folder.

    Writes ``group_stats.tsv`` (a row a nucleus), ``group_volumes.tsv`` and ``group_susceptibility.tsv`` (a row a scan
    and model), each with a data dictionary of the same name and each renamed into place when complete. Only
    ``_stats.tsv`` of the participant level and the ``_quality.json`` beside them are read.

    Parameters
    ----------
    output_dir : Path
        Where the participant level wrote.
    participants_tsv : Path, optional
        Table whose columns are put behind the measures.

    Raises
    ------
    InputError
        If there is no ``_stats.tsv``, or `participants_tsv` cannot be read or joined.
    """
    if not output_dir.is_dir():
        raise InputError(f"{output_dir}: no such folder; run the participant level first")
    scans, broken = read_scans(output_dir)
    if not scans:
        what = f"the tables are cut short ({broken[0]})" if broken else "no *_stats.tsv below"
        raise InputError(f"{output_dir.name}: {what}; run the participant level first")
    warnings = []
    if broken:
        warnings.append(f"{_some(broken)}: cut short and left out; run the participant level again for them")
    participants = Participants()
    if participants_tsv:
        participants = read_participants(participants_tsv, [scan.entities["sub"] for scan in scans])
        warnings += _unmatched(participants_tsv.name, participants, scans)
    warnings += _mixed_references(scans)
    paths = [path for table in _tables(scans) for path in _write_table(output_dir, table, participants)]
    return GroupTables(tuple(paths), tuple(warnings))


def _tables(scans: Sequence[ScanStats]) -> Iterator[_Table]:
    """Build the long and the two wide tables; rows are made while they are written."""
    entities = [*dict.fromkeys([*_ALWAYS, *(key for scan in scans for key in scan.entities)])]
    keys = [_ENTITIES.get(key, key) for key in entities]
    columns = [*dict.fromkeys(column for scan in scans for column in scan.columns)]
    yield _Table("group_stats", [*keys, *columns], _long_rows(scans, entities, columns))
    known = {abbreviation for scan in scans for abbreviation in scan.values("abbreviation")}
    nuclei = [structure.abbreviation for structure in STRUCTURES if structure.abbreviation in known]
    volumes, susceptibilities = ([f"{nucleus}_{measure}" for nucleus in nuclei] for measure in _WIDE)
    yield _Table("group_volumes", [*keys, *volumes], _wide_rows(scans, entities, nuclei, "volume_mm3"))
    rows = _wide_rows(scans, entities, nuclei, "mean_ppm", reference=True)
    yield _Table("group_susceptibility", [*keys, "reference", *susceptibilities], rows)


def _long_rows(
    scans: Sequence[ScanStats], entities: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, Sequence[str]]]:
    for scan in scans:
        keys = _keys(scan, entities)
        places = [scan.columns.index(column) if column in scan.columns else None for column in columns]
        for row in scan.rows():
            yield scan.entities["sub"], [*keys, *(MISSING if place is None else row[place] for place in places)]


def _wide_rows(
    scans: Sequence[ScanStats], entities: Sequence[str], nuclei: Sequence[str], measure: str, *, reference: bool = False
) -> Iterator[tuple[str, Sequence[str]]]:
    for scan in scans:
        values = scan.values(measure)
        extra = [scan.reference or MISSING] if reference else []
        yield scan.entities["sub"], [*_keys(scan, entities), *extra, *(values.get(name, MISSING) for name in nuclei)]


def _keys(scan: ScanStats, entities: Sequence[str]) -> list[str]:
    """Values of the leading columns; participant and session keep their prefix, as in every BIDS table."""
    prefixes = {"sub": "sub-", "ses": "ses-"}
    return [prefixes.get(key, "") + scan.entities[key] if key in scan.entities else MISSING for key in entities]


def _write_table(output_dir: Path, table: _Table, participants: Participants) -> list[Path]:
    """Write a table with the participants' columns behind, and its data dictionary."""
    behind = [f"participants_{column}" if column in table.columns else column for column in participants.columns]

    def write_rows(file: TextIO) -> None:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow([*table.columns, *behind])
        writer.writerows([*row, *participants.values(label)] for label, row in table.rows)

    dictionary = {column: _describe(column) for column in table.columns}
    for column, original in zip(behind, participants.columns, strict=True):
        dictionary[column] = participants.descriptions.get(
            original, {"Description": f"Column {original} of participants.tsv"}
        )
    text = json.dumps(dictionary, indent=2, ensure_ascii=False) + "\n"
    tsv, sidecar = output_dir / f"{table.name}.tsv", output_dir / f"{table.name}.json"
    _write_whole(sidecar, lambda file: file.write(text))
    _write_whole(tsv, write_rows)
    return [tsv, sidecar]


def _write_whole(final: Path, write: Callable[[TextIO], object]) -> None:
    """Write under a hidden temporary name beside the target and rename, so that nobody reads half a file."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            write(file)
        temporary.replace(final)
    except OSError as error:
        raise InputError(f"{final.name}: cannot be written ({error.strerror}); check the output folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def _describe(column: str) -> Mapping[str, str]:
    """Describe a column, one of a wide table by its nucleus."""
    if column in _DESCRIPTIONS:
        return _DESCRIPTIONS[column]
    for measure in _WIDE:
        if column.endswith(f"_{measure}"):
            name = STRUCTURES.named(column.removesuffix(f"_{measure}")).name
            entry = STATS_COLUMNS[measure]
            return {**entry, "Description": f"{name}: {entry['Description']}"}
    return {"Description": f"Value of the {column} entity of the map, or a column of its _stats.tsv"}


def _unmatched(name: str, participants: Participants, scans: Sequence[ScanStats]) -> list[str]:
    """One warning for participants without a row, one for rows without a scan."""
    scanned = {scan.entities["sub"] for scan in scans}
    warnings = []
    if alone := sorted(scanned - set(participants.rows)):
        warnings.append(f"{name}: no row for {_some(alone, 'sub-')}; their columns are n/a")
    if absent := sorted(set(participants.rows) - scanned):
        warnings.append(f"{name}: no measures of {_some(absent, 'sub-')}; they are not in the tables")
    return warnings


def _mixed_references(scans: Sequence[ScanStats]) -> list[str]:
    """Warn where maps are relative to different regions: their susceptibilities have different zeros."""
    counts = Counter(scan.reference for scan in scans if scan.reference)
    if len(counts) < 2:
        return []
    shown = ", ".join(f"{reference} ({count})" for reference, count in counts.most_common())
    return [f"group_susceptibility.tsv: reference regions differ: {shown}; refer the maps to one before comparing"]


def _some(names: Sequence[str], prefix: str = "") -> str:
    """Name a few of many."""
    shown = ", ".join(prefix + name for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
