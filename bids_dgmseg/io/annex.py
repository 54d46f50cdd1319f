"""Files that are in a dataset by name alone, because nobody fetched their content."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote

_START = 200
"""Bytes that a pointer is known by."""

_FETCH = "fetch it first (datalad get, git annex get or git lfs pull)"


def leads_nowhere(path: Path) -> bool:
    """Tell whether a path is a link to what is not here, as git-annex leaves it."""
    return path.is_symlink() and not path.exists()


def is_there(path: Path) -> bool:
    """Tell whether there is a file of that name, fetched or not."""
    return path.is_file() or leads_nowhere(path)


def is_pointer(path: Path) -> bool:
    """Tell whether a file holds what git-annex or Git LFS leave in the place of a file that was not fetched."""
    try:
        with path.open("rb") as file:
            return points_elsewhere(file.read(_START))
    except OSError:
        return False


def points_elsewhere(content: bytes) -> bool:
    """Tell the same of a file that was read."""
    start = content[:_START]
    return start.startswith(b"version https://git-lfs") or b"/annex/objects/" in start


def describe_missing(path: Path) -> str:
    """Say of a file that cannot be opened, because it is not there, what to do."""
    if path.is_symlink():
        return f"{path.name}: its content is not here (a link that leads nowhere); {_FETCH}"
    return f"{path}: no such file; check the path"


def describe_pointer(path: Path) -> str:
    """Say of a file that holds a pointer what to do."""
    return f"{path.name}: its content is not here, only a pointer to it; {_FETCH}"


def make_link(path: str | Path) -> str:
    """Write a path as a link.

    >>> make_link("../my maps/sub-01")
    '../my%20maps/sub-01'
    """
    return quote(os.fsencode(Path(path).as_posix()))


def follow_link(link: str, start: Path) -> Path:
    """Find where a link leads from a folder, as it is written.

    >>> follow_link("../my%20maps", Path("out")).as_posix()
    'out/../my maps'
    """
    return start / unquote(link, errors="surrogateescape")
