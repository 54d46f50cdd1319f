"""Checkpoints in files small enough for any host, and the record that tells whether a folder's training may resume."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bids_dgmseg import __version__
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json, to_json, write_bytes, write_json

LARGEST_BYTES = 16 * 1024 * 1024
"""Size that file hosts and version control accept."""


def write_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write the state of a training.

    Parameters
    ----------
    state : mapping
        Tensors and plain values.
    path : path
        If the state is larger than `LARGEST_BYTES`, it is split into files beside this one, which then lists them.
        A reader sees the earlier checkpoint or the new one, never a mixture.
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
        index = json.loads(content)
        files = [path.with_name(name) for name in index["parts"]]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{path.name}: its part {missing[0]} is missing; copy the whole folder")
        content = b"".join(file.read_bytes() for file in files)
        if hashlib.sha256(content).hexdigest() != index["sha256"]:
            raise InputError(f"{path.name}: its parts are damaged; copy the whole folder again")
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def write_record(out: Path, record: Mapping[str, Any], *, begun: bool, length: Mapping[str, Any] | None = None) -> None:
    """Write ``training.json``; if the folder already contains a training, check that it is the same.

    Parameters
    ----------
    out : path
        Model folder.
    record : mapping
        What is trained on what: model, labels (checksums), seed, ….
    begun : bool
        Whether the folder contains results of a training.
    length : mapping, optional
        What may differ when a training is continued.

    Raises
    ------
    InputError
        If the folder contains a different training.
    """
    path = out / "training.json"
    if begun and path.is_file():
        earlier = read_json(path)
        if differing := [name for name, value in to_json(record).items() if earlier.get(name) != value]:
            raise InputError(
                f"{out.name}: contains a different training (differs in {', '.join(differing)}); choose a new OUT"
            )
    write_json({**record, **({"length": length} if length else {}), "version": __version__}, path)
