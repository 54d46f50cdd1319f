"""Checksums of files and of what results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Compute the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_if_there(path: Path) -> str:
    """Compute a file's checksum; of one that cannot be read, which the step that reads it tells, the kind of error."""
    try:
        return sha256(path)
    except OSError as error:
        return type(error).__name__


def sha256_of(parts: Mapping[str, Any]) -> str:
    """Compute the checksum of values by name, whatever their order; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
