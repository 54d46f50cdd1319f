"""Read a table of measures, and tell one that is whole from one that is damaged."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bids_dgmseg.io.annex import is_broken_symlink, is_pointer_content
from bids_dgmseg.io.files import read_optional_json
from bids_dgmseg.measurement.columns import STATS_COLUMNS
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.study.sites import name_scanner

STATS = "_stats.tsv"

_ABBREVIATION = "abbreviation"

_TEXTS = ("name", _ABBREVIATION, "hemisphere", "rating", "reasons")
"""Columns of words; the program's others are numbers."""

_NO_NUMBER = ("n/a", "", "nan")

_SHOWN = 20

CUT_SHORT = "cut short"

AGAIN = "run the participant level again"

_ANEW = f"{AGAIN} with --force"


class DamagedTableError(Exception):
    """A table of measures cannot be used: what it is, in words that stand behind its name, and what to do."""

    def __init__(self, what: str, remedy: str = _ANEW) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def read_stats(path: Path, *, numbers: Collection[str], needed: Sequence[str], known: Collection[str] = ()) -> str:
    """Read a ``_stats.tsv`` that is whole.

    It is where every row is as long as the header, each nucleus of the label table beside it (``_dseg.tsv``) has one
    row, and no number is anything else or infinite. Without a label table no nucleus is missed.

    Parameters
    ----------
    path : Path
        The table.
    numbers : collection of str
        Columns of numbers; those that the table lacks are not looked at.
    needed : sequence of str
        Columns that it must have beside ``abbreviation``.
    known : collection of str
        Abbreviations that there are, for a table without a label table; empty: any.

    Returns
    -------
    str
        The text of the file.

    Raises
    ------
    DamagedTableError
        If it is not whole.
    """
    text = _read_text(path)
    header, *lines = text.splitlines() or [""]
    columns, rows = header.split("\t"), [line.split("\t") for line in lines]
    whole = rows and text.endswith("\n") and all(len(row) == len(columns) for row in rows)
    if not whole or not {_ABBREVIATION, *needed} <= set(columns):
        raise DamagedTableError(CUT_SHORT)
    nuclei = [row[columns.index(_ABBREVIATION)] for row in rows]
    _check_nuclei(nuclei, _read_labels(path), known)
    places = [place for place, column in enumerate(columns) if column in numbers and column not in _TEXTS]
    for nucleus, row in zip(nuclei, rows, strict=True):
        for place in places:
            if not _is_number(row[place]):
                raise DamagedTableError(f"damaged ({columns[place]} of {nucleus} is {_quote(row[place])})")
    return text


def _read_text(path: Path) -> str:
    if is_broken_symlink(path):
        raise DamagedTableError("not here (a link that leads nowhere)", "fetch it (datalad get or git annex get)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedTableError(f"unreadable ({error.strerror})", "check the file") from error
    if is_pointer_content(content):
        raise DamagedTableError("not here (a pointer only)", "fetch it (datalad get or git lfs pull)")
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _check_nuclei(nuclei: Sequence[str], labels: Collection[str], known: Collection[str]) -> None:
    """See that each nucleus is there once; `labels` are those that the model has, none where nobody knows."""
    if doubled := [name for name, count in Counter(nuclei).items() if count > 1]:
        raise DamagedTableError(f"damaged ({_quote(doubled[0])} is there twice)")
    expected = labels or known
    if unknown := [name for name in nuclei if expected and name not in expected]:
        raise DamagedTableError(f"damaged ({_quote(unknown[0])} is none of its nuclei)")
    if not set(labels) <= set(nuclei):
        raise DamagedTableError(CUT_SHORT)


def _read_labels(path: Path) -> list[str]:
    """Read the abbreviations of the label table beside; none where there is no such table."""
    try:
        text = path.with_name(f"{path.name.removesuffix(STATS)}_dseg.tsv").read_text("utf-8-sig", errors="replace")
    except OSError:
        return []
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    if _ABBREVIATION not in columns:
        return []
    rows = (line.split("\t") for line in lines)
    return [row[columns.index(_ABBREVIATION)] for row in rows if len(row) == len(columns)]


def _is_number(text: str) -> bool:
    """Tell numbers and what stands for none from all else, infinity among it."""
    if text in _NO_NUMBER:
        return True
    try:
        return math.isfinite(float(text)) and text.isascii() and "_" not in text
    except ValueError:
        return False


def _quote(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


_STATS = re.compile(rf"sub-[^_]+(_[^_-]+-[^_]+)*{re.escape(STATS)}")

_NEEDED = ("volume_mm3", "mean_ppm")

_NUCLEI = tuple(structure.abbreviation for structure in STRUCTURES)

_NOT_QUALITY = ("scan", "model", "settings", "versions", "seconds", "nuclei")

_RECONSTRUCTION = ("PhaseSign", "PhaseSignFrom", "BrainMask", "MagneticFieldStrength")
"""What may differ between the maps of one study; the steps, in long words, stand in ``_qc.json`` alone."""


@dataclass(frozen=True)
class ScanStats:
    """The table of one scan and model."""

    entities: Mapping[str, str]
    """As in the file name: ``sub``, ``ses``, ``acq``, …, ``seg`` is the model."""
    text: str
    """The table as it was read; rows are parsed when asked for, so that ten thousand tables stay small."""
    quality: Mapping[str, str]
    """Values of ``_qc.json`` by their names joined with underscores, such as ``input_units``."""
    scanner: str | None
    """What the map's sidecar said of the scanner."""
    page: str
    """The participant's page, from the output folder; empty if there is none."""

    @property
    def reference(self) -> str | None:
        """Reference region that ``_qc.json`` reports."""
        reference = self.quality.get("input_reference", "n/a")
        return None if reference == "n/a" else reference

    @property
    def columns(self) -> tuple[str, ...]:
        """The header."""
        return tuple(self.text.partition("\n")[0].split("\t"))

    def rows(self) -> list[list[str]]:
        """Parse the table: values in the order of `columns`, a list a nucleus."""
        return [line.split("\t") for line in self.text.splitlines()[1:]]

    def values(self, column: str) -> dict[str, str]:
        """One measure by abbreviation."""
        name, value = self.columns.index("abbreviation"), self.columns.index(column)
        return {row[name]: row[value] for row in self.rows()}


@dataclass(frozen=True)
class Tables:
    """What lies in an output folder, sorted by participant, session and the rest of the name."""

    scans: tuple[ScanStats, ...]
    broken: Mapping[str, DamagedTableError]
    """Names of the tables that cannot be used, and why."""
    unfinished: tuple[str, ...]
    """Names of the tables beside labels without the sidecar that is written last; they are not read."""


def read_scans(output_dir: Path) -> Tables:
    """Read all ``_stats.tsv`` below the participants' folders.

    Where the labels lie beside a table, their sidecar must too: it is the mark of a scan that is complete. Tables
    without images, as they are sent to other sites, need none.
    """
    scans, broken, unfinished = [], {}, []
    pages = {name for name in os.listdir(output_dir) if name.endswith(".html")}  # noqa: PTH208 names only
    for path, complete in sorted(_find(output_dir), key=lambda found: found[0].name):
        page = f"{path.name.partition('_')[0]}.html"
        if not complete:
            unfinished.append(path.name)
            continue
        try:
            scans.append(_read(path, page if page in pages else ""))
        except DamagedTableError as error:
            broken[path.name] = error
    return Tables(tuple(scans), broken, tuple(unfinished))


def read_entities(name: str) -> dict[str, str]:
    """Read the entities in the name of a table.

    >>> read_entities("sub-01_ses-1_seg-dgm16_stats.tsv")
    {'sub': '01', 'ses': '1', 'seg': 'dgm16'}
    """
    pairs = (part.split("-", 1) for part in name.removesuffix(STATS).split("_"))
    return {key: value for key, value in pairs}


def has_scans(output_dir: Path) -> bool:
    """Tell whether there is any ``_stats.tsv`` below the participants' folders."""
    return next(_find(output_dir), None) is not None


def _find(output_dir: Path) -> Iterator[tuple[Path, bool]]:
    """Find the tables, and whether each scan is complete."""
    for participant in _folders(output_dir, "sub-"):
        for parent in (participant, *_folders(participant, "ses-")):
            anat = parent / "anat"
            if anat.is_dir():
                names = set(os.listdir(anat))  # noqa: PTH208 3 x faster
                for name in filter(_STATS.fullmatch, names):
                    labels = f"{name.removesuffix(STATS)}_dseg"
                    yield anat / name, f"{labels}.nii.gz" not in names or f"{labels}.json" in names


def _folders(parent: Path, prefix: str) -> list[Path]:
    with os.scandir(parent) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


def _read(path: Path, page: str) -> ScanStats:
    entities = read_entities(path.name)
    if "seg" not in entities:
        raise DamagedTableError("without a model (seg-) in the name", "rename the file")
    text = read_stats(path, numbers=STATS_COLUMNS, needed=_NEEDED, known=_NUCLEI)
    record = read_optional_json(path.with_name(f"{path.name.removesuffix(STATS)}_qc.json"))
    scanner = record.pop("scanner", None)
    return ScanStats(
        entities,
        text,
        flatten(record),
        name_scanner(scanner) if isinstance(scanner, dict) else None,
        page,
    )


def flatten(record: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Write the values of a nested record as text, under their names joined with underscores.

    Lists of numbers and words are joined; ``warnings`` are counted too, and of echo times nothing but their number is
    kept. Settings, versions, tables and the steps of a reconstruction are left out.

    >>> flatten({"input": {"units": "ppm", "shape": [64, 64]}, "warnings": ["a", "b"], "scan": "sub-01"})
    {'input_units': 'ppm', 'input_shape': '64 x 64', 'n_warnings': '2', 'warnings': 'a; b'}
    """
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if name in _NOT_QUALITY:
            continue
        if name == "reconstruction" and isinstance(value, Mapping):
            flat |= _flatten_reconstruction(value)
        elif isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{name}_")
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


def _flatten_reconstruction(made: Mapping[str, Any]) -> dict[str, str]:
    times = made.get("EchoTime")
    flat = {"reconstruction_n_echoes": str(len(times))} if isinstance(times, list) else {}
    return flat | {f"reconstruction_{key}": _one_line(made[key]) for key in _RECONSTRUCTION if key in made}


def _one_line(value: Any) -> str:
    if value is None or value == "":
        return "n/a"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return " ".join(text.split()) or "n/a"
