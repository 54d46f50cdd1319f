"""Files and folders in use by a running process, and removal of those that killed processes have left.

The name of each has the tag of the machine that uses it. On one machine the kernel knows whether a lock (flock) is
held, also across containers and whatever way a process has ended. Locks of other machines on a shared file system may
be invisible, so that there only time counts; so it does on Windows, where a locked file can be neither renamed nor
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from bids_dgmseg.errors import InputError

ABANDONED_AFTER_S = 7 * 24 * 3600.0
"""Files untouched by another machine for this long are considered abandoned; every step of a run changes its folder."""

_UNLOCKED_AFTER_S = 600.0
"""A folder of this machine without a lock is abandoned after this time: it got one when it was made."""

LOCK = ".lock"
"""Locked file in a folder that a run uses."""

_UNKNOWN_MACHINE = "0" * 8

_TEMPORARY_NAME = re.compile(r"\.([0-9a-f]{8})[0-9a-f]{24}\..+")


@cache
def machine_tag() -> str:
    """Return eight hexadecimal digits that stand for this machine since it was started, the same in all containers."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


@contextlib.contextmanager
def lock_new_file(path: Path) -> Iterator[None]:
    """Create an empty file that is locked as long as this process lives, at most until the end of the block.

    It gets its name only when it is locked, so that `remove_abandoned` never takes it for abandoned.
    """
    unlocked = path.with_name(f".{_UNKNOWN_MACHINE}{uuid.uuid4().hex[8:]}.lock")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(unlocked.open("xb"))
        if not _lock(file):
            file.close()  # Windows renames no open file
        try:
            unlocked.rename(path)
        except OSError:
            file.close()
            unlocked.unlink()
            raise
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock during the block; waits while another process holds it. The file stays.

    There is no protection if the file system has no locks, or the file belongs to another user.
    """
    from filelock import FileLock  # not needed for --help

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(FileLock(path, fallback_to_soft=False))
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, *parts: str) -> Iterator[None]:
    """Create a folder and lock it, or only parts of it, during the block: no other process then does the same.

    There is no protection if the file system has no locks. Folders that were created and stay empty are removed.

    Raises
    ------
    InputError
        If another process has locked it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for path in reversed(missing):  # the innermost is removed first
                stack.callback(_remove_empty, path)
            for path in [folder / f".{part}{LOCK}" for part in parts] or [folder / LOCK]:
                stack.enter_context(_locked(path))
        except BlockingIOError:
            raise InputError(
                f"{folder.name}: another process is writing into it; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create a file, lock it during the block, and remove it; `BlockingIOError` if another process has locked it."""
    with contextlib.ExitStack() as stack:
        is_current = False
        while not is_current:
            file = stack.enter_context(path.open("ab"))
            _lock(file)
            with contextlib.suppress(FileNotFoundError):  # another process has removed it before it was locked here
                is_current = os.path.samestat(path.stat(), os.fstat(file.fileno()))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _lock(file: BinaryIO) -> bool:
    """Lock an open file unless another process has (`BlockingIOError`); return whether the file system has locks."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        raise
    except OSError:
        pass
    return False


def temporary_name(final: Path) -> Path:
    """Return a hidden name beside a file that no other process uses, with the same suffix."""
    # Random, because process ids repeat across the hosts and containers that share a folder.
    return final.with_name(f".{machine_tag()}{uuid.uuid4().hex[8:]}.{final.name}")


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name of `temporary_name`."""
    return _TEMPORARY_NAME.fullmatch(path.name) is not None


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files in a folder that no running process writes."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if match := _TEMPORARY_NAME.fullmatch(entry.name):
                path = Path(entry.path)
                remove_abandoned(path, lock=path, machine=match[1])


def remove_abandoned(path: Path, *, lock: Path, machine: str) -> bool:
    """Remove a file or folder of this user unless a running process may use it; return whether it was removed.

    Parameters
    ----------
    path : path
        File or folder.
    lock : path
        File that is locked as long as it is in use.
    machine : str
        `machine_tag` of the process that made it.
    """
    try:
        status = path.lstat()
        own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if not own or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return False
        with contextlib.ExitStack() as stack:
            locks_work = False
            if lock.is_file():  # a folder has none for a moment after it was made
                locks_work = _lock(stack.enter_context(lock.open("rb+")))
            if not (locks_work and machine == machine_tag()):
                stack.close()  # Windows removes no open file
                newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
                lost_lock = machine == machine_tag() and path.is_dir() and not lock.exists()
                if time.time() - newest < (_UNLOCKED_AFTER_S if lost_lock else ABANDONED_AFTER_S):
                    return False
            if stat.S_ISREG(status.st_mode):
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():  # on NFS a folder with an open file, here the lock, cannot be removed
            path.rmdir()
    except OSError:  # in use, removed or finished meanwhile, or not ours to remove
        return False
    return True
