"""Read back what the participant level wrote of each scan."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_STATS = re.compile(r"sub-[^_]+(_[^_-]+-[^_]+)*_stats\.tsv")
_NEEDED = ("abbreviation", "volume_mm3", "mean_ppm")


@dataclass(frozen=True)
class ScanStats:
    """The table of one scan and model."""

    entities: Mapping[str, str]
    """As in the file name: ``sub``, ``ses``, ``acq``, …, ``seg`` is the model."""
    text: str
    """The table as it was read; rows are parsed when asked for, so that ten thousand tables stay small."""
    reference: str | None
    """Reference region that ``_quality.json`` reports."""

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


def read_scans(output_dir: Path) -> tuple[list[ScanStats], list[str]]:
    """Read all ``_stats.tsv`` below the participants' folders.

    Returns
    -------
    scans : list of ScanStats
        Sorted by participant, session and the rest of the name.
    broken : list of str
        Names of the tables that are cut short.
    """
    scans, broken = [], []
    for path in sorted(_find(output_dir), key=lambda path: path.name):
        if scan := _read(path):
            scans.append(scan)
        else:
            broken.append(path.name)
    return scans, broken


def _find(output_dir: Path) -> Iterator[Path]:
    for participant in _folders(output_dir, "sub-"):
        for parent in (participant, *_folders(participant, "ses-")):
            anat = parent / "anat"
            if anat.is_dir():
                yield from (anat / name for name in os.listdir(anat) if _STATS.fullmatch(name))  # noqa: PTH208 3 x faster


def _folders(parent: Path, prefix: str) -> list[Path]:
    with os.scandir(parent) as entries:
        return [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]


def _read(path: Path) -> ScanStats | None:
    text = path.read_text(encoding="utf-8")
    header, *rows = text.splitlines() or [""]
    columns = header.split("\t")
    whole = rows and text.endswith("\n") and all(row.count("\t") + 1 == len(columns) for row in rows)
    if not whole or not set(_NEEDED) <= set(columns):
        return None
    pairs = (part.split("-", 1) for part in path.name.removesuffix("_stats.tsv").split("_"))
    return ScanStats({key: value for key, value in pairs}, text, _read_reference(path))


def _read_reference(stats: Path) -> str | None:
    quality = stats.with_name(stats.name.removesuffix("_stats.tsv") + "_quality.json")
    try:
        reference = json.loads(quality.read_text(encoding="utf-8"))["input"]["reference"]
    except (OSError, ValueError, KeyError, TypeError):  # an older version's or none: the measures stand without it
        return None
    return str(reference)
