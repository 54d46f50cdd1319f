"""Files and folders in use by a running process, and removal of those that killed processes have left.

The name of each has the tag of the machine that uses it. On one machine the kernel knows whether a lock (flock) is
held, also across containers and whatever way a process has ended. Locks of other machines on a shared file system may
be invisible, so that there only time counts.
"""

from __future__ import annotations

import contextlib
import fcntl
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

ABANDONED_AFTER_S = 7 * 24 * 3600.0
"""What another machine has not changed for so long belongs to no run: a run changes its folder with every step."""

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
    with unlocked.open("xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            unlocked.rename(path)
        except OSError:
            unlocked.unlink()
            raise
        yield


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock during the block; waits while another process holds it. The file stays.

    There is no protection if the file system has no locks, or the file belongs to another user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(path.open("ab")), fcntl.LOCK_EX)
        yield


def temporary_name(final: Path) -> Path:
    """Return a hidden name beside a file that no other process uses, with the same suffix."""
    # Random, because process ids repeat across the hosts and containers that share a folder.
    return final.with_name(f".{machine_tag()}{uuid.uuid4().hex[8:]}.{final.name}")


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
        if status.st_uid != os.geteuid() or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return False
        with contextlib.ExitStack() as stack:
            locks_work = False
            if lock.is_file():  # a folder has none for a moment after it was made
                file = stack.enter_context(lock.open("rb+"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    locks_work = True
                except BlockingIOError:
                    return False
                except OSError:  # a file system without locks
                    pass
            if not (locks_work and machine == machine_tag()):
                newest = max(one.lstat().st_mtime for one in (path, *path.rglob("*")))
                if time.time() - newest < ABANDONED_AFTER_S:
                    return False
            if stat.S_ISREG(status.st_mode):
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        if path.is_dir():  # on NFS a folder with an open file, here the lock, cannot be removed
            path.rmdir()
    except OSError:  # removed or finished meanwhile, or not ours to remove
        return False
    return True
