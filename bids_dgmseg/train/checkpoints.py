"""Checkpoints in files small enough to be carried anywhere, written atomically."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_bytes

LARGEST_BYTES = 16 * 1024 * 1024
"""What file hosts and version control take without complaint."""


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a training.

    Parameters
    ----------
    state : mapping
        Tensors and plain values.
    path : path
        Gets the state; one larger than `LARGEST_BYTES` goes into files beside it, and this one names them. A reader
        sees the earlier checkpoint or the new one, never a part.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content, parts = buffer.getvalue(), []
    if len(content) > LARGEST_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        starts = range(0, len(content), LARGEST_BYTES)
        for number, start in enumerate(starts, 1):
            parts.append(f"{path.name}.{digest[:8]}.{number}of{len(starts)}")
            write_bytes(content[start : start + LARGEST_BYTES], path.with_name(parts[-1]))
        content = json.dumps({"sha256": digest, "parts": parts}).encode()
    write_bytes(content, path)
    for earlier in path.parent.glob(f"{path.name}.*of*"):
        if earlier.name not in parts:
            earlier.unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Raises
    ------
    InputError
        If a part is missing or damaged.
    """
    content = path.read_bytes()
    if content.startswith(b"{"):  # a torch file begins with PK
        named = json.loads(content)
        files = [path.with_name(name) for name in named["parts"]]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{path.name}: its part {missing[0]} is missing; copy the whole folder")
        content = b"".join(file.read_bytes() for file in files)
        if hashlib.sha256(content).hexdigest() != named["sha256"]:
            raise InputError(f"{path.name}: its parts are damaged; copy the whole folder again")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state
