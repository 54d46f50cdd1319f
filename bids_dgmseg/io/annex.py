"""Detect git-annex and Git LFS files whose content has not been fetched."""

from __future__ import annotations

from pathlib import Path

_START = 200
"""Bytes that are enough to recognize a pointer."""

_FETCH = "fetch it first (datalad get, git annex get or git lfs pull)"


def is_broken_symlink(path: Path) -> bool:
    """Return whether a path is a symlink to a missing file, as git-annex leaves unfetched files."""
    return path.is_symlink() and not path.exists()


def is_file_or_unfetched(path: Path) -> bool:
    """Return whether a file of that name exists, fetched or not."""
    return path.is_file() or is_broken_symlink(path)


def is_pointer_file(path: Path) -> bool:
    """Return whether a file holds only the pointer that git-annex or Git LFS leave for unfetched content."""
    try:
        with path.open("rb") as file:
            return is_pointer_content(file.read(_START))
    except OSError:
        return False


def is_pointer_content(content: bytes) -> bool:
    """Return the same as `is_pointer_file`, for content already in memory."""
    start = content[:_START]
    return start.startswith(b"version https://git-lfs") or b"/annex/objects/" in start


def describe_missing(path: Path) -> str:
    """Return the error message for a file that does not exist, or is a broken symlink."""
    if path.is_symlink():
        return f"{path.name}: content not fetched (broken symlink); {_FETCH}"
    return f"{path}: no such file; check the path"


def describe_unfetched(path: Path) -> str:
    """Return the error message for a file that holds only an annex or LFS pointer."""
    return f"{path.name}: content not fetched (the file is only a pointer); {_FETCH}"
