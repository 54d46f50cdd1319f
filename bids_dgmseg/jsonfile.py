"""Read JSON files that users wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bids_dgmseg.absent import describe_missing, describe_pointer, is_pointer
from bids_dgmseg.errors import InputError


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
