"""Results of the participant level: the tables of all scans, whole or damaged."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.io.annex import is_broken_symlink, is_pointer_content
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.io.tables import MISSING
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.study.participants import Visit

STATS = "_stats.tsv"

CUT_SHORT = "cut short"

RERUN = "run the participant level again"

SCANNER_FIELDS = (
    "InstitutionName",
    "Manufacturer",
    "ManufacturersModelName",
    "DeviceSerialNumber",
    "MagneticFieldStrength",
)
"""Sidecar fields that identify a scanner; the participant level keeps them in ``_qc.json``."""

_STATS_NAME = re.compile(rf"sub-[^_]+(_[^_-]+-[^_]+)*{re.escape(STATS)}")

_TEXT_COLUMNS = ("name", "abbreviation", "hemisphere", "rating", "reasons")

_NOT_A_NUMBER = (MISSING, "", "nan")

_NOT_IN_QC_TABLE = ("scan", "model", "settings", "versions", "seconds", "nuclei")

_RECONSTRUCTION = ("PhaseSign", "PhaseSignFrom", "BrainMask", "MagneticFieldStrength")
"""What may differ between the maps of a study; the steps of a reconstruction are in ``_qc.json`` only."""


class DamagedTableError(Exception):
    """A table cannot be used: what is wrong with it, worded to follow its name, and what to do."""

    def __init__(self, problem: str, remedy: str = f"{RERUN} with --force") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class Results:
    """Tables of a results folder, sorted by file name."""

    scans: pd.DataFrame
    """One row per scan and model, text: BIDS entities by their keys (``sub``, ``ses``, …, ``seg`` is the model), NaN if
    the name lacks one; ``page``, link to the participant's page; ``scanner``, its name if known."""
    stats: pd.DataFrame
    """One row per scan and nucleus: ``scan``, a row of `scans`, and the columns of ``_stats.tsv`` as text."""
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


def read_results(folder: Path, *, link: str = ".") -> Results:
    """Read the ``_stats.tsv`` and ``_qc.json`` of all scans below the participants' folders.

    `link` is the path of the folder that links to the participants' pages start with.

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
        record = read_optional_json(path.with_name(f"{path.name.removesuffix(STATS)}_qc.json"))
        scanner = record.pop("scanner", None)
        page = f"{path.name.partition('_')[0]}.html"
        scans.append(
            {
                **read_entities(path.name),
                "page": (PurePosixPath(link) / page).as_posix() if page in pages else None,
                "scanner": name_scanner(scanner) if isinstance(scanner, dict) else None,
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


def read_stats(
    paths: Sequence[Path], *, numbers: Collection[str], required: Sequence[str], known: Collection[str] = ()
) -> tuple[pd.DataFrame, dict[Path, DamagedTableError]]:
    """Read ``_stats.tsv`` files and separate the damaged ones.

    A table is whole if every row is as long as the header, each nucleus of the label table beside it (``_dseg.tsv``)
    has one row, and every number is finite or missing. Without a label table no nucleus can be missing.

    Parameters
    ----------
    paths : sequence of Path
        The tables.
    numbers : collection of str
        Columns to check for numbers, if a table has them.
    required : sequence of str
        Columns that a table must have besides ``abbreviation``.
    known : collection of str
        Valid abbreviations for tables without a label table; empty: any.

    Returns
    -------
    stats : DataFrame
        ``file``, the place among the whole tables, and the columns of all tables as text, NaN if a table lacks one.
    damaged : dict
        Path → reason.
    """
    damaged: dict[Path, DamagedTableError] = {}
    rows: dict[str, list[tuple[Path, list[str]]]] = defaultdict(list)
    for path in paths:
        try:
            header, lines = _read_lines(path, required, known)
        except DamagedTableError as error:
            damaged[path] = error
            continue
        rows[header].append((path, lines))
    place_of = {path: place for place, path in enumerate(paths)}
    tables = []
    for header, files in rows.items():  # one frame per header: much faster than one per file
        text = io.BytesIO("\n".join([header, *(line for _, lines in files for line in lines)]).encode())
        table = pd.read_csv(
            text, sep="\t", dtype=object, na_filter=False, quoting=csv.QUOTE_NONE, skip_blank_lines=False
        )
        file = np.repeat([place_of[path] for path, _ in files], [len(lines) for _, lines in files])
        table.insert(0, "file", file)
        damaged |= {paths[place]: error for place, error in _find_bad_numbers(table, numbers).items()}
        tables.append(table)
    if not tables:
        return pd.DataFrame({"file": pd.Series(dtype=int)}), damaged
    whole = [place for path, place in place_of.items() if path not in damaged]
    stats = pd.concat(tables).sort_values("file", kind="stable", ignore_index=True)
    stats = stats[stats["file"].isin(whole)].reset_index(drop=True)
    return stats.assign(file=np.searchsorted(whole, stats["file"])), damaged


def _read_lines(path: Path, required: Sequence[str], known: Collection[str]) -> tuple[str, list[str]]:
    """Return the header and the lines of a table whose rows and nuclei are complete."""
    text = _read_text(path)
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    whole = lines and text.endswith("\n") and all(line.count("\t") == len(columns) - 1 for line in lines)
    if not whole or not {"abbreviation", *required} <= set(columns):
        raise DamagedTableError(CUT_SHORT)
    place = columns.index("abbreviation")
    nuclei = [line.split("\t", place + 1)[place] for line in lines]
    labels = _read_label_names(path)
    if repeated := [name for name, count in Counter(nuclei).items() if count > 1]:
        raise DamagedTableError(f"damaged ({repeated[0]!r} appears twice)")
    expected = labels or known
    if unknown := [name for name in nuclei if expected and name not in expected]:
        raise DamagedTableError(f"damaged ({unknown[0]!r} is not one of its nuclei)")
    if not set(labels) <= set(nuclei):
        raise DamagedTableError(CUT_SHORT)
    return header, lines


def _read_text(path: Path) -> str:
    if is_broken_symlink(path):
        raise DamagedTableError("not fetched (a broken link)", "fetch it (datalad get or git annex get)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedTableError(f"unreadable ({error.strerror})", "check the file") from error
    if is_pointer_content(content):
        raise DamagedTableError("not fetched (only a pointer)", "fetch it (datalad get or git lfs pull)")
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _read_label_names(path: Path) -> list[str]:
    """Return the abbreviations of the label table beside a table, if there is one."""
    try:
        text = path.with_name(f"{path.name.removesuffix(STATS)}_dseg.tsv").read_text("utf-8-sig", errors="replace")
    except OSError:
        return []
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    if "abbreviation" not in columns:
        return []
    rows = (line.split("\t") for line in lines)
    return [row[columns.index("abbreviation")] for row in rows if len(row) == len(columns)]


def _find_bad_numbers(table: pd.DataFrame, numbers: Collection[str]) -> dict[int, DamagedTableError]:
    """Return the first value of each file that is neither a finite number nor missing: file → error."""
    found: dict[int, tuple[int, str, Any]] = {}
    for column in table.columns:
        if column not in numbers or column in _TEXT_COLUMNS:
            continue
        cells = table[column]
        bad = ~np.isfinite(pd.to_numeric(cells, errors="coerce")) & ~cells.isin(_NOT_A_NUMBER)
        for row, file in table["file"][bad].drop_duplicates().items():
            if int(file) not in found or row < found[int(file)][0]:
                found[int(file)] = (int(str(row)), str(column), cells[row])
    return {
        file: DamagedTableError(f"damaged ({column} of {table['abbreviation'][row]} is {cell!r})")
        for file, (row, column, cell) in found.items()
    }


def _find_tables(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Find the tables, and whether each scan is complete."""
    for participant in _folders(folder, "sub-"):
        for parent in (participant, *_folders(participant, "ses-")):
            anat = parent / "anat"
            if anat.is_dir():
                names = set(os.listdir(anat))  # noqa: PTH208 3 x faster
                for name in filter(_STATS_NAME.fullmatch, names):
                    labels = f"{name.removesuffix(STATS)}_dseg"
                    yield anat / name, f"{labels}.nii.gz" not in names or f"{labels}.json" in names


def _folders(parent: Path, prefix: str) -> list[Path]:
    with os.scandir(parent) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


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
    return " ".join(words)


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
