"""Which site a scan comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_GENERIC = ("bids_dgmseg", "derivatives")

_FIELD = "MagneticFieldStrength"

SCANNER_FIELDS = ("InstitutionName", "Manufacturer", "ManufacturersModelName", "DeviceSerialNumber", _FIELD)
"""Metadata of a map that tell its scanner; the participant level keeps them in qc.json."""


def name_trees(paths: Sequence[Path]) -> list[str]:
    """Name output folders after the part of their paths that tells them apart.

    Folders' names that say nothing, such as ``derivatives``, are passed over where others are left.

    >>> name_trees([Path("/data/bern/derivatives/bids_dgmseg"), Path("/data/graz/derivatives/bids_dgmseg")])
    ['bern', 'graz']
    >>> name_trees([Path("/a/study"), Path("/b/study")])
    ['a/study', 'b/study']
    """
    parts = [[part for part in path.parts[1:] if part not in _GENERIC] or [path.name] for path in paths]
    deepest = max(map(len, parts), default=1)
    for depth in range(1, deepest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def name_scanner(fields: Mapping[str, Any]) -> str | None:
    """Name a scanner by the fields of a sidecar; None where they do not say what it is.

    Text is written in one line; what is neither text nor a whole number, such as a list, says nothing. A field strength
    is none by itself: scanners of many sites share it.

    >>> name_scanner({"Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "MagneticFieldStrength": 2.89})
    'Siemens Prisma 3T'
    """
    words = [word for name in SCANNER_FIELDS[:-1] if (word := _one_line(fields.get(name)))]
    if not words:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        tesla = round(2 * float(fields[_FIELD])) / 2  # 2.89 and 3 are one strength
        words.append(f"{tesla:g}T")
    return " ".join(words)


def _one_line(value: Any) -> str:
    # serial numbers are written as numbers too
    said = isinstance(value, str | int) and not isinstance(value, bool)
    return " ".join(str(value).split()) if said else ""
