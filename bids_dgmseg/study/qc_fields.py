"""Fields of ``_qc.json`` as columns of a table, and the name of the scanner in them."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from bids_dgmseg.bids.derivatives import SCANNER_FIELDS
from bids_dgmseg.io.files import MISSING

_NOT_IN_QC_TABLE = ("scan", "model", "normalization", "settings", "versions")

_RECONSTRUCTION = (
    "PhaseSign",
    "PhaseSignFrom",
    "BrainMask",
    "BrainVolume",
    "MagneticFieldStrength",
    "FieldNoise",
    "LocalFieldFraction",
    "FieldMisfit",
    "MisfitOverNoise",
)
"""What may differ between the maps of a study; the steps of a reconstruction are in ``_qc.json`` only."""


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
