"""Paths as links of JSON files and pages, whatever letters a file system has in its names."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote


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
