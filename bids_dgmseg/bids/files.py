"""Put files under their final names, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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
