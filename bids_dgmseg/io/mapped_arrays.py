"""Arrays in files that are mapped into memory only while they are read, for more images than fit into memory."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.locks import LOCK, lock_new_file, machine_tag, remove_abandoned

_PREFIX = ".arrays-"

T = TypeVar("T")


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
    values = {one.name: getattr(record, one.name) for one in fields(record)}
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
    """Create a hidden folder for the files of `store` during the block; also removes those of killed processes.

    If there is no folder `parent`, it is created, and removed if it is empty in the end.
    """
    is_new = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{_PREFIX}*"):
        remove_abandoned(other, lock=other / LOCK, machine=other.name.removeprefix(_PREFIX)[:8])
    name = f"{_PREFIX}{machine_tag()}-"
    try:
        with TemporaryDirectory(prefix=name, dir=parent, ignore_cleanup_errors=True) as folder:
            with lock_new_file(Path(folder, LOCK)):
                yield Path(folder)
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                parent.rmdir()
