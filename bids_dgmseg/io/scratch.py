"""Folders and files in use by one process, and arrays in files that are mapped into memory only while they are read.

Locks are those of the operating system (`filelock`): they end with the process, in whatever way it ends. There is no
protection if a file system has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from bids_dgmseg.errors import InputError

LOCK = ".lock"
"""Locked file of a folder that is in use."""

_ABANDONED_AFTER_S = 30 * 24 * 3600.0
"""Age at which an unlocked folder of another machine, whose locks may be invisible here, is removed."""

T = TypeVar("T")


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock during the block; waits while another process holds it. The file stays."""
    from filelock import FileLock  # not needed for --help

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no locks, or the file belongs to another user
            stack.enter_context(FileLock(path, fallback_to_soft=False))
        yield


@contextlib.contextmanager
def sole_writer(folder: Path, *parts: str) -> Iterator[None]:
    """Create a folder and lock it, or only parts of it, during the block: no other process then does the same.

    Folders that were created and stay empty are removed.

    Raises
    ------
    InputError
        If another process has locked it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    with contextlib.ExitStack() as stack:
        try:
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            for path in reversed(missing):  # the innermost is removed first
                stack.callback(_try, path.rmdir)
            for path in [folder / f".{part}{LOCK}" for part in parts] or [folder / LOCK]:
                path.touch()
                try:
                    stack.enter_context(FileLock(path, timeout=0, fallback_to_soft=False))
                except Timeout:
                    raise
                except OSError:  # no locks
                    pass
                stack.callback(_try, path.unlink)
        except Timeout:
            raise InputError(
                f"{folder.name}: another process is writing into it; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        yield


def _try(action: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        action()


@contextlib.contextmanager
def private_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a folder that only this user can read, and remove those of processes that have ended.

    A lock beside it shows that it is in use during the block. Other folders with the prefix whose lock is free are
    removed. This one is not removed at the end.
    """
    from filelock import FileLock

    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    for lock in parent.glob(f".{prefix}*{LOCK}"):
        with contextlib.suppress(OSError), FileLock(lock, timeout=0, fallback_to_soft=False):
            is_old = time.time() - lock.stat().st_mtime > _ABANDONED_AFTER_S
            if is_old or lock.name.startswith(f".{prefix}{machine}-"):
                shutil.rmtree(_folder_of(lock), ignore_errors=True)
                lock.unlink()
    lock = parent / f".{prefix}{machine}-{uuid.uuid4().hex[:8]}{LOCK}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(FileLock(lock, fallback_to_soft=False))
        folder = _folder_of(lock)
        try:
            folder.mkdir(mode=0o700)
            yield folder
        finally:
            if not folder.exists():
                _try(lock.unlink)


def _folder_of(lock: Path) -> Path:
    return lock.with_name(lock.name[1:].removesuffix(LOCK))


class MappedArray:
    """Attribute of a dataclass's subclass whose value is read from an ``.npy`` file; see `store`.

    Each access maps the file anew and nothing keeps the map, so that the memory is released and a copy for another
    process has only the path. Changes of the array are not written to the file.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, record: object, path: Path) -> None:
        vars(record)[self.name] = path

    def __get__(self, record: object, owner: type | None = None) -> Any:
        """Map the file into memory."""
        import numpy as np  # the app imports this module before it knows whether arrays are needed

        return np.asarray(np.load(vars(record)[self.name], mmap_mode="c"))


def store(record: Any, kind: type[T], folder: Path) -> T:
    """Write arrays of a dataclass to new files in a folder.

    Parameters
    ----------
    record : dataclass
        Its arrays, or tensors on the CPU, are written as they are.
    kind : type
        Subclass of the class of `record` in which these attributes are a `MappedArray`.
    folder : path
        See `arrays_folder`.

    Returns
    -------
    kind
        With the same attributes.

    Raises
    ------
    InputError
        If a file cannot be written.
    """
    import numpy as np

    values = {field.name: getattr(record, field.name) for field in fields(record)}
    for name, attribute in vars(kind).items():
        if isinstance(attribute, MappedArray):
            path = folder / f"{uuid.uuid4().hex}.npy"
            try:
                np.save(path, np.asarray(values[name]))
            except OSError as error:  # numpy gives no reason if a disk is full
                reason = error.strerror or "the disk is full"
                raise InputError(
                    f"{folder.parent}: prepared maps cannot be written ({reason}); free space, or choose another folder"
                ) from error
            values[name] = path
    return kind(**values)


@contextlib.contextmanager
def arrays_folder(parent: Path) -> Iterator[Path]:
    """Create a private folder for the files of `store` during the block.

    If there is no folder `parent`, it is created, and removed if it is empty in the end.
    """
    is_new = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with private_folder(parent, "arrays-") as folder:
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        if is_new:
            _try(parent.rmdir)
