"""Output folders of the participant level: their names, the scans to use with their results, and the participants."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.bids.derivatives import SCANNER_FIELDS
from bids_dgmseg.bids.fingerprints import explain_outdated
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING, list_folders, read_optional_json
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.study.demographics import find_column
from bids_dgmseg.study.participants import ParticipantTables, Visit, read_participant_tables
from bids_dgmseg.study.stats_files import RERUN, STATS, DamagedTableError, read_stats

_STATS_NAME = re.compile(rf"sub-[^_]+(_[^_-]+-[^_]+)*{re.escape(STATS)}")

_NOT_IN_QC_TABLE = ("scan", "model", "settings", "versions", "seconds", "nuclei")

_RECONSTRUCTION = (
    "PhaseSign",
    "PhaseSignFrom",
    "BrainMask",
    "BrainVolume",
    "MagneticFieldStrength",
    "FieldNoise",
    "LocalFieldFraction",
    "FieldMisfit",
)
"""What may differ between the maps of a study; the steps of a reconstruction are in ``_qc.json`` only."""


_GENERIC_NAMES = ("bids_dgmseg", "derivatives")


@dataclass(frozen=True)
class ResultsFolder:
    """An output folder of the participant level."""

    path: Path
    name: str
    dataset: Path | None
    """Dataset with its participants.tsv and sessions.tsv."""
    link: str = "."
    """Relative path of the folder from the one of the group tables."""
    outdated: Mapping[str, str] = field(default_factory=dict)
    """File name of a ``_stats.tsv`` → why its results are out of date, as far as the input dataset shows."""


@dataclass(frozen=True)
class ResultsSelection:
    """Labels of the scans to use; empty means all."""

    participants: tuple[str, ...] = ()
    """Without ``sub-``."""
    sessions: tuple[str, ...] = ()
    """Without ``ses-``."""
    models: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.participants or self.sessions or self.models)

    def includes(self, entities: Mapping[Any, Any]) -> bool:
        """Return whether a scan with these entities is selected."""
        return all(not wanted or entities.get(key) in wanted for key, _, _, wanted in self._criteria())

    def check(self, scans: Sequence[Mapping[Any, Any]], *, where: str) -> None:
        """Raise an `InputError` if a label does not exist, with the existing ones, or no scan is selected."""
        for key, prefix, option, wanted in self._criteria():
            known = {str(entities[key]) for entities in scans if not pd.isna(entities.get(key))}
            if unknown := [label for label in wanted if label not in known]:
                some = list_some(f"{prefix}{label}" for label in known) or "none"
                raise InputError(f"{where}: no results of {prefix}{unknown[0]}; check {option} (found {some})")
        if not any(map(self.includes, scans)):
            options = ", ".join(option for _, _, option, wanted in self._criteria() if wanted)
            raise InputError(f"{where}: no scan matches all of {options}; check them")

    def describe(self) -> dict[str, list[str]]:
        """Return the labels by option, for the data dictionaries."""
        return {option.removeprefix("--"): list(wanted) for _, _, option, wanted in self._criteria() if wanted}

    def _criteria(self) -> Sequence[tuple[str, str, str, tuple[str, ...]]]:
        """List entity, prefix of its labels, option and labels."""
        return (
            ("sub", "sub-", "--participant-label", self.participants),
            ("ses", "ses-", "--session-label", self.sessions),
            ("seg", "", "--model", self.models),
        )


@dataclass(frozen=True)
class Results:
    """Tables of a results folder, sorted by file name."""

    scans: pd.DataFrame
    """One row per scan and model, text: BIDS entities by their keys (``sub``, ``ses``, …, ``seg`` is the model), NaN if
    the name lacks one; ``page``, link to the participant's page; ``scanner``, its name if known; ``outdated``, why the
    results are out of date, otherwise None."""
    stats: pd.DataFrame
    """One row per scan and nucleus: ``scan``, a row of `scans`, and the other columns of `read_stats`."""
    qc: pd.DataFrame
    """Values of ``_qc.json`` as text, one row per scan; names are joined with underscores (``input_units``)."""
    damaged: Mapping[str, DamagedTableError]
    """File name of each table that cannot be used."""
    unfinished: tuple[str, ...]
    """File names of tables that lie beside labels without a sidecar, which is written last."""

    @property
    def visits(self) -> list[Visit]:
        """Labels of participant and session of each scan."""
        scans = self.scans.reindex(columns=["sub", "ses"]).to_numpy(object).tolist()
        return [(participant, None if pd.isna(session) else session) for participant, session in scans]

    @property
    def left_out(self) -> dict[tuple[str, str], list[str]]:
        """Names of the tables that are not used, by problem and remedy."""
        names: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, error in self.damaged.items():
            names[error.problem, error.remedy].append(name)
        if self.unfinished:
            names["unfinished (_dseg.json is missing)", RERUN] += self.unfinished
        return names

    def select(self, chosen: Sequence[bool]) -> Results:
        """Return the results of some scans, which are numbered anew."""
        mask = np.array(chosen, dtype=bool)
        row = np.cumsum(mask) - 1
        stats = self.stats[mask[self.stats["scan"]]]
        return replace(
            self,
            scans=self.scans[mask].reset_index(drop=True),
            qc=self.qc[mask].reset_index(drop=True),
            stats=stats.assign(scan=row[stats["scan"]]),
        )


@dataclass(frozen=True)
class FolderScans:
    """Selected scans of one folder."""

    folder: ResultsFolder
    results: Results
    tables: ParticipantTables
    warnings: Sequence[str]
    n_damaged: int


def read_folders(
    folders: Sequence[ResultsFolder], selection: ResultsSelection, *, roles: Iterable[Sequence[str]]
) -> list[FolderScans]:
    """Read the selected scans of all folders.

    `roles` are the names of the columns of age, sex and so on: each folder's columns are named as in the first folder
    with one.

    Raises
    ------
    InputError
        If there are no results, none is selected, a table of participants cannot be read, or no results belong to any
        of the participants listed.
    """
    found = [read_results(folder.path, link=folder.link, outdated=folder.outdated) for folder in folders]
    if not any(len(results.scans) for results in found):
        for folder, results in zip(folders, found, strict=True):
            for (problem, remedy), names in results.left_out.items():
                raise InputError(f"{folder.path.name}: all tables are {problem} ({names[0]}); {remedy}")
        where = ", ".join(folder.path.name for folder in folders)
        raise InputError(f"{where}: no *_stats.tsv found; run the participant level first")
    if selection:
        records = [record for results in found for record in results.scans.to_dict("records")]
        selection.check(records, where=list_some([folder.name for folder in folders]))
    scans = [_select_scans(folder, results, selection) for folder, results in zip(folders, found, strict=True)]
    listed = [set(part.tables.participants.index) for part in scans]
    measured = [{participant for participant, _ in results.visits} for results in found]
    if any(listed) and all(map(set.isdisjoint, listed, measured)):
        ids, labels = (list_some(f"sub-{label}" for label in set().union(*part)) for part in (listed, measured))
        raise InputError(f"participants.tsv: none of its ids ({ids}) has results (found {labels}); correct the ids")
    return _align_columns(scans, roles)


def _select_scans(folder: ResultsFolder, results: Results, selection: ResultsSelection) -> FolderScans:
    warnings = []
    for (problem, remedy), names in results.left_out.items():
        if selected := [name for name in names if selection.includes(read_entities(name))]:
            them = " for them" if remedy.startswith(RERUN) else ""
            warnings.append(f"{list_some(selected)}: {problem} and left out; {remedy}{them}")
    n_damaged = sum(selection.includes(read_entities(name)) for name in results.damaged)
    chosen = results.select([selection.includes(record) for record in results.scans.to_dict("records")])
    # labels are matched among all scans with results: an id such as 3 may stand for sub-03 or for sub-3
    tables, more = read_participant_tables(
        folder.dataset, results.visits, selected=chosen.visits if selection else None
    )
    return FolderScans(folder, chosen, tables, [*warnings, *more], n_damaged)


def _align_columns(parts: Sequence[FolderScans], roles: Iterable[Sequence[str]]) -> list[FolderScans]:
    """Rename the age, sex, group and site columns of each folder as in the first folder that has them."""
    aligned = list(parts)
    for names in roles:
        aligned = [_align_sessions(part, names) for part in aligned]
        columns = [find_column(part.tables.columns, names) for part in aligned]
        first = next(filter(None, columns), None)
        for place, column in enumerate(columns):
            part = aligned[place]
            if column and first and column != first and first not in part.tables.columns:
                warning = f"participants.tsv: using its column {column} as {first}"
                tables = part.tables.rename({column: first})
                aligned[place] = replace(part, tables=tables, warnings=[*part.warnings, warning])
    return aligned


def _align_sessions(part: FolderScans, names: Sequence[str]) -> FolderScans:
    """Rename a column of sessions.tsv as in participants.tsv, if they name it differently."""
    tables = part.tables
    general, own = (find_column(table.columns, names) for table in (tables.participants, tables.sessions))
    if not general or not own or general in tables.sessions or own in tables.participants:
        return part
    warning = f"sessions.tsv: using its column {own} as {general}"
    return replace(part, tables=tables.rename({own: general}), warnings=[*part.warnings, warning])


def read_results(folder: Path, *, link: str = ".", outdated: Mapping[str, str] | None = None) -> Results:
    """Read the ``_stats.tsv`` and ``_qc.json`` of all scans below the participants' folders.

    `link` is the path of the folder that links to the participants' pages start with, `outdated` that of a
    `ResultsFolder`.

    If labels lie beside a table, their sidecar must exist too: it marks a complete scan. Tables without images, as
    sites share them, need none.
    """
    pages = {name for name in os.listdir(folder) if name.endswith(".html")}  # noqa: PTH208 names only
    found = sorted(_find_tables(folder), key=lambda item: item[0].name)
    unfinished = tuple(path.name for path, complete in found if not complete)
    complete = [path for path, is_complete in found if is_complete]
    no_model = DamagedTableError("without a model (seg-) in the name", "rename the file")
    without_model = dict.fromkeys((path for path in complete if "seg" not in read_entities(path.name)), no_model)
    paths = [path for path in complete if path not in without_model]
    stats, damaged = read_stats(
        paths, numbers=STATS_COLUMNS, required=("volume_mm3", "mean_ppm"), known=[s.abbreviation for s in STRUCTURES]
    )
    whole = [path for path in paths if path not in damaged]
    scans, qc = [], []
    for path in whole:
        stem = path.name.removesuffix(STATS)
        record = read_optional_json(path.with_name(f"{stem}_qc.json"))
        scanner = record.pop("scanner", None)
        page = f"{path.name.partition('_')[0]}.html"
        scans.append(
            {
                **read_entities(path.name),
                "page": (PurePosixPath(link) / page).as_posix() if page in pages else None,
                "scanner": name_scanner(scanner) if isinstance(scanner, dict) else None,
                "outdated": (outdated or {}).get(path.name) or explain_outdated(path.with_name(f"{stem}_dseg.json")),
            }
        )
        qc.append(flatten_qc(record))
    return Results(
        pd.DataFrame(scans, dtype=object),
        stats.rename(columns={"file": "scan"}),
        pd.DataFrame(qc, index=range(len(qc)), dtype=object),
        {path.name: error for path, error in sorted((without_model | damaged).items(), key=lambda item: item[0].name)},
        unfinished,
    )


def has_results(folder: Path) -> bool:
    """Return whether there is any ``_stats.tsv`` below the participants' folders."""
    return next(_find_tables(folder), None) is not None


def read_entities(name: str) -> dict[str, str]:
    """Split the name of a table into BIDS entities.

    >>> read_entities("sub-01_ses-1_seg-dgm16_stats.tsv")
    {'sub': '01', 'ses': '1', 'seg': 'dgm16'}
    """
    pairs = (part.split("-", 1) for part in name.removesuffix(STATS).split("_"))
    return {key: value for key, value in pairs}


def _find_tables(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Find the tables, and whether each scan is complete."""
    for participant in list_folders(folder, "sub-"):
        for parent in (participant, *list_folders(participant, "ses-")):
            anat = parent / "anat"
            if anat.is_dir():
                names = set(os.listdir(anat))  # noqa: PTH208 3 x faster
                for name in filter(_STATS_NAME.fullmatch, names):
                    labels = f"{name.removesuffix(STATS)}_dseg"
                    yield anat / name, f"{labels}.nii.gz" not in names or f"{labels}.json" in names


def name_scanner(fields: Mapping[str, Any]) -> str | None:
    """Return the name of a scanner from sidecar fields; None if they do not identify one.

    Values that are neither text nor integer are ignored. The field strength alone is not enough: scanners of many sites
    share it.

    >>> name_scanner({"Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "MagneticFieldStrength": 2.89})
    'Siemens Prisma 3T'
    """
    *texts, strength = (fields.get(name) for name in SCANNER_FIELDS)
    # serial numbers may be written as numbers
    usable = (text for text in texts if isinstance(text, str | int) and not isinstance(text, bool))
    words = [word for text in usable if (word := " ".join(str(text).split()))]
    if not words:
        return None
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        words.append(f"{round(2 * float(strength)) / 2:g}T")  # type: ignore[arg-type]  # 2.89 and 3 are the same strength
    return unicodedata.normalize("NFC", " ".join(words))


def flatten_qc(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Convert a nested record to text by names joined with underscores.

    Lists of numbers or words are joined, ``warnings`` are also counted, and only the number of echo times is kept.
    Settings, versions, tables and the steps of a reconstruction are left out.

    >>> flatten_qc({"input": {"units": "ppm", "shape": [64, 64]}, "warnings": ["a", "b"], "scan": "sub-01"})
    {'input_units': 'ppm', 'input_shape': '64 x 64', 'n_warnings': '2', 'warnings': 'a; b'}
    """
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if name in _NOT_IN_QC_TABLE:
            continue
        if name == "reconstruction" and isinstance(value, Mapping):
            if isinstance(times := value.get("EchoTime"), list):
                flat["reconstruction_n_echoes"] = str(len(times))
            flat |= {f"reconstruction_{key}": _one_line(value[key]) for key in _RECONSTRUCTION if key in value}
        elif isinstance(value, Mapping):
            flat |= flatten_qc(value, prefix=f"{name}_")
        elif isinstance(value, list):
            if any(isinstance(item, Mapping | list) for item in value):
                continue
            if name == "warnings":
                flat["n_warnings"] = str(len(value))
            numbers = all(isinstance(item, int | float) for item in value)
            flat[name] = _one_line((" x " if numbers else "; ").join(map(str, value)))
        else:
            flat[name] = _one_line(value)
    return flat


def _one_line(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(text.split()) or MISSING


def name_folders(paths: Sequence[Path]) -> list[str]:
    """Return names of folders that distinguish them, without parts that say nothing, such as ``derivatives``.

    >>> name_folders([Path("/data/bern/derivatives/bids_dgmseg"), Path("/data/graz/derivatives/bids_dgmseg")])
    ['bern', 'graz']
    >>> name_folders([Path("/a/study"), Path("/b/study")])
    ['a/study', 'b/study']
    """
    parts = [[part for part in path.parts[1:] if part not in _GENERIC_NAMES] or [path.name] for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        # a name that is not valid UTF-8 could not be written to a table
        names = ["/".join(part[-depth:]).encode(errors="replace").decode() for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
