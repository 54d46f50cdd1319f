"""Atomic writing, JSON, checksums and relative URLs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, describe_unfetched, is_pointer_file


@contextlib.contextmanager
def atomic_write(final: Path) -> Iterator[Path]:
    """Replace a file atomically: readers see the earlier content or the new one, never a part.

    Parameters
    ----------
    final : path
        File to write; its folders are created.

    Yields
    ------
    path
        Temporary name in the same folder, with the same suffix. It is synced to disk and renamed to `final` at the end
        of the block, or deleted if the block raises.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    # Random, because process ids repeat across the hosts and containers that share an output folder.
    temporary = final.with_name(f".{uuid.uuid4().hex}.{final.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(content: bytes, final: Path) -> Path:
    """Write a file atomically."""
    with atomic_write(final) as temporary:
        temporary.write_bytes(content)
    return final


def write_text(text: str, final: Path) -> Path:
    """Write UTF-8 text atomically, ending in a newline."""
    return write_bytes((text if text.endswith("\n") else text + "\n").encode(), final)


def write_json(data: Mapping[str, Any], final: Path) -> Path:
    """Write a JSON object atomically; numbers that are not finite become ``n/a``."""
    return write_text(json.dumps(to_json(data), indent=2, ensure_ascii=False, allow_nan=False), final)


def copy_file(source: Path, final: Path) -> Path:
    """Copy a file atomically, also from another file system."""
    with atomic_write(final) as temporary:
        shutil.copyfile(source, temporary)
    return final


def to_json(value: Any) -> Any:
    """Convert mappings, sequences, paths and numpy values to JSON types; NaN and infinity become ``n/a``."""
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "n/a"
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InputError
        If the file is missing, unfetched, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if is_pointer_file(path):
            raise InputError(describe_unfetched(path)) from error
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path.name}: invalid JSON ({where}); fix the file") from error
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror}); check the file") from error
    if not isinstance(data, dict):
        raise InputError(f"{path.name}: contains a {type(data).__name__}, expected a JSON object {{…}}; fix the file")
    return data


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or broken."""
    try:
        return read_json(path)
    except InputError:
        return {}


def sha256(path: Path) -> str:
    """Compute the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_or_error(path: Path) -> str:
    """Compute the checksum of a file; return the error's class name if it cannot be read (a later step reports it)."""
    try:
        return sha256(path)
    except OSError as error:
        return type(error).__name__


def sha256_of(values: Mapping[str, Any]) -> str:
    """Compute the checksum of named values, whatever their order; values unknown to JSON count by their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def path_to_url(path: str | Path) -> str:
    """Convert a path to a relative URL.

    >>> path_to_url("../my maps/sub-01")
    '../my%20maps/sub-01'
    """
    return quote(os.fsencode(Path(path).as_posix()))


def url_to_path(url: str, start: Path) -> Path:
    """Convert a relative URL to a path below the folder `start`.

    >>> url_to_path("../my%20maps", Path("out")).as_posix()
    'out/../my maps'
    """
    return start / unquote(url, errors="surrogateescape")
