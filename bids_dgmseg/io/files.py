"""Put files under their final names, whole or not at all."""

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

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, describe_pointer, is_pointer


def place(temporary: Path, final: Path) -> None:
    """Copy a file to its final name, so that nobody ever sees half of it there.

    Parameters
    ----------
    temporary : Path
        Finished file, which may lie on another file system; it is kept.
    final : Path
        Its name; folders are made, an earlier file is replaced.
    """
    with _beside(final) as hidden:
        shutil.copyfile(temporary, hidden)


def write_text(text: str, final: Path) -> None:
    """Write UTF-8 text atomically, with a line end at the end."""
    with _beside(final) as hidden:
        hidden.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def write_json(data: Mapping[str, Any], final: Path) -> None:
    """Write a JSON object atomically; a number that is not finite becomes ``n/a``."""
    write_text(json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False), final)


@contextlib.contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """Offer a hidden name in the same folder, then give what was written there its final name."""
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden = final.with_name(f".{uuid.uuid4().hex}.{final.name}")
    try:
        yield hidden
        with hidden.open("rb+") as file:
            os.fsync(file.fileno())
        hidden.replace(final)
    finally:
        hidden.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "n/a"
    return str(value) if isinstance(value, Path) else value


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InputError
        If the file is missing or unreadable, is not JSON (where, by line and column), or holds no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if is_pointer(path):
            raise InputError(describe_pointer(path)) from error
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path.name}: not valid JSON ({where}); correct the file") from error
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path.name}: a number is too long or lists lie too deep; correct the file") from error
    if not isinstance(data, dict):
        raise InputError(f"{path.name}: holds a {type(data).__name__}, expected an object {{…}}; correct the file")
    return data


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that other things stand without; empty if it is missing or broken."""
    try:
        return read_json(path)
    except InputError:
        return {}


def write_atomically(content: bytes, final: Path) -> Path:
    """Write beside the target and rename, so that no half file is ever seen; its folder is made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)
    return final
