"""Atomic writing, JSON, BIDS tables (TSV), checksums, relative URLs, unfetched content; locks, arrays in files.

Locks are those of the operating system (`filelock`): they end with the process, in whatever way it ends. There is no
protection if a file system has none.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from bids_dgmseg.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

MISSING = "n/a"
"""A missing value in JSON files and tables."""

DataDictionary = Mapping[str, Mapping[str, str]]
"""Column → its entry in the BIDS data dictionary: ``Description`` and, if it has one, ``Units``."""

_POINTER_SIZE = 200
"""Bytes that are enough to recognize a pointer."""

NOT_FETCHED = "content not fetched"
"""Part of the error messages for a broken symlink and a pointer."""

_LONGEST_WRITE_S = 3600.0
"""Age from which a temporary file is that of a killed process."""

T = TypeVar("T")

_FETCH = "fetch it first (datalad get, git annex get or git lfs pull)"


@contextlib.contextmanager
def atomic_write(final: Path) -> Iterator[Path]:
    """Replace a file atomically: readers see the earlier content or the new one, never a part.

    Parameters
    ----------
    final : path
        File to write; its folders are created.

    Yields
    ------
    path
        Empty file in the same folder, with the same suffix. It is synced to disk and renamed to `final` at the end of
        the block, or deleted if the block raises. A killed process leaves it; see `remove_temporary_files`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(final)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(final)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # writing on a full disk names no file
            error.filename = str(final)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(final: Path) -> Path:
    """Return a hidden name beside a file that no other process uses, with the same suffix."""
    return final.with_name(f".{uuid.uuid4().hex}.{final.name}")


def is_temporary(path: Path) -> bool:
    """Return whether a file has a name of `temporary_name`."""
    return re.fullmatch(r"\.[0-9a-f]{32}\..+", path.name) is not None


def remove_temporary_files(folder: Path, min_age_s: float = _LONGEST_WRITE_S) -> None:
    """Remove the temporary files in a folder that killed processes have left: those not written to for some time."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            with contextlib.suppress(OSError):
                if is_temporary(Path(entry)) and time.time() - entry.stat().st_mtime >= min_age_s:
                    shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else Path(entry).unlink()


def write_bytes(content: bytes, final: Path) -> Path:
    """Write a file atomically."""
    with atomic_write(final) as temporary:
        temporary.write_bytes(content)
    return final


def write_text(text: str, final: Path) -> Path:
    """Write UTF-8 text atomically, ending in a newline."""
    return write_bytes((text if text.endswith("\n") else text + "\n").encode(), final)


def write_json(data: Mapping[str, Any], final: Path) -> Path:
    """Write a JSON object atomically; numbers that are not finite become ``n/a``."""
    return write_text(json.dumps(to_json(data), indent=2, ensure_ascii=False, allow_nan=False), final)


def copy_file(source: Path, final: Path) -> Path:
    """Copy a file atomically, also from another file system."""
    with atomic_write(final) as temporary:
        shutil.copyfile(source, temporary)
    return final


def to_json(value: Any) -> Any:
    """Convert mappings, sequences, paths and numpy values to JSON types; NaN and infinity become ``n/a``."""
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING
    return str(value) if isinstance(value, Path) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    InputError
        If the file is missing, unfetched, unreadable or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise InputError(f"{path.name}: too deeply nested; fix the file") from None
    except json.JSONDecodeError as error:
        if is_pointer_file(path):
            raise InputError(describe_unfetched(path)) from error
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path.name}: invalid JSON ({where}); fix the file") from error
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(_describe_encoding(path)) from error
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror}); check the file") from error
    if not isinstance(data, dict):
        raise InputError(f"{path.name}: contains a {type(data).__name__}, expected a JSON object {{…}}; fix the file")
    return data


def _describe_encoding(path: Path) -> str:
    """Return the error message for a text that is not UTF-8, with its first other character as Windows shows it."""
    content = path.read_bytes()
    text = content.decode(errors="replace").partition("\ufffd")[0]
    line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    character = content[len(text.encode()) :][:1].decode("cp1252", "replace")
    return f"{path.name}: not UTF-8 text (line {line}, character {column}: {character!r}); save it as UTF-8"


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing or broken."""
    try:
        return read_json(path) if path.is_file() else {}
    except (InputError, OSError):
        return {}


def value_of(record: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a value of a JSON object, which another program may have written; an empty one if it has another type.

    >>> value_of({"reasons": 5}, "reasons", list)
    []
    """
    value = record.get(key)
    return value if isinstance(value, kind) else kind()


def read_tsv(path: Path, **options: Any) -> pd.DataFrame:
    """Read a tab-separated table; ``n/a`` and empty cells are NaN, and no other text is.

    Parameters
    ----------
    path : path
        UTF-8 text, with or without byte order mark.
    **options
        Passed to `pandas.read_csv`, for example ``dtype=str``, ``usecols`` or, for commas, ``sep=","``.

    Raises
    ------
    InputError
        If the file is missing, unfetched or not a table.
    """
    import pandas as pd  # slow; every run of the app imports this module

    defaults = {"sep": "\t", "na_values": [MISSING, ""], "keep_default_na": False, "encoding": "utf-8-sig"}
    settings: dict[str, Any] = defaults | options
    if is_pointer_file(path):  # pandas would read it as a header without rows
        raise InputError(describe_unfetched(path))
    try:
        return pd.read_csv(path, **settings)
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(_describe_encoding(path)) from error
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        reason = " ".join(str(error).split())
        kind = {"\t": "tab", ",": "comma"}[settings["sep"]]
        raise InputError(f"{path.name}: not a {kind}-separated table ({reason}); fix the file") from error


def write_tsv(table: pd.DataFrame, final: Path, float_format: str | None = None) -> Path:
    """Write a table atomically without its index; `float_format` is such as ``%.7g``, by default exact.

    As BIDS asks, NaN and empty text become ``n/a``, Boolean values ``true`` and ``false``.
    """
    import pandas as pd  # slow; every run of the app imports this module

    shown = table.copy(deep=False)
    for place, dtype in enumerate(table.dtypes):  # by place, since names may repeat
        values = table.iloc[:, place]
        if dtype.kind == "b":
            shown.isetitem(place, values.map({True: "true", False: "false"}).array)
        elif dtype.kind == "f" and float_format:  # twice as fast as pandas' own formatting
            numbers = values.to_numpy(float, na_value=math.nan).tolist()
            texts = [MISSING if math.isnan(number) else float_format % number for number in numbers]
            shown.isetitem(place, pd.array(texts, dtype=object))
        elif dtype.kind not in "iuf":
            shown.isetitem(place, values.astype(object).where(values.notna() & (values != ""), MISSING).array)
    with atomic_write(final) as temporary:
        shown.to_csv(temporary, sep="\t", index=False, na_rep=MISSING, lineterminator="\n", mode="w")
    return final


def read_data_dictionaries(name: str) -> dict[str, DataDictionary]:
    """Read the data dictionaries of the program's own tables from ``data/columns_NAME.tsv``, in the order of columns.

    >>> read_data_dictionaries("stats")["nucleus"]["volume_mm3"]
    {'Description': 'n_voxels times the voxel volume', 'Units': 'mm^3'}
    """
    text = files("bids_dgmseg").joinpath("data", f"columns_{name}.tsv").read_text(encoding="utf-8")
    dictionaries: dict[str, dict[str, dict[str, str]]] = {}
    for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        entry = {"Description": row["description"], "Units": row["units"]}
        entries = dictionaries.setdefault(row["table"], {})
        entries[row["name"]] = {key: value for key, value in entry.items() if value != MISSING}
    return dict(dictionaries)


def sha256(path: Path) -> str:
    """Compute the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_or_error(path: Path) -> str:
    """Compute the checksum of a file; return the error's class name if it cannot be read (a later step reports it)."""
    try:
        return sha256(path)
    except OSError as error:
        return type(error).__name__


def sha256_of(values: Mapping[str, Any]) -> str:
    """Compute the checksum of named values, whatever their order; values unknown to JSON count by their text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Hash the content of files, or the error of those that cannot be read."""
    return sha256_of({"files": [sha256_or_error(path) for path in paths]})


def sidecar_path(image: Path) -> Path:
    """Return the path of the JSON file next to an image."""
    return image.with_name(re.sub(r"\.nii(\.gz)?$", "", image.name) + ".json")


def read_sidecar(image: Path, units: str | None = None) -> dict[str, Any]:
    """Read the JSON file next to an image, empty if there is none; stated units take precedence."""
    path = sidecar_path(image)
    sidecar = read_json(path) if path.is_file() else {}
    return {**sidecar, "Units": units} if units else sidecar


def path_to_url(path: str | Path) -> str:
    """Convert a path to a relative URL.

    >>> path_to_url("../my maps/sub-01")
    '../my%20maps/sub-01'
    """
    return quote(os.fsencode(Path(path).as_posix()))


def url_to_path(url: str, start: Path) -> Path:
    """Convert a relative URL to a path below the folder `start`.

    >>> url_to_path("../my%20maps", Path("out")).as_posix()
    'out/../my maps'
    """
    return start / unquote(url, errors="surrogateescape")


def list_folders(parent: Path, prefix: str) -> list[Path]:
    """Return the folders in a folder whose names start with a prefix; none if it does not exist or is a file.

    Faster than `Path.glob`, which matters for thousands of participants.
    """
    try:
        with os.scandir(parent) as entries:
            return [parent / entry.name for entry in entries if entry.name.startswith(prefix) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_broken_symlink(path: Path) -> bool:
    """Return whether a path is a symlink to a missing file, as git-annex leaves unfetched files."""
    return path.is_symlink() and not path.exists()


def is_unfetched(path: Path) -> bool:
    """Return whether the content of a file is not there: a broken symlink or a pointer."""
    return is_broken_symlink(path) or is_pointer_file(path)


def is_file_or_unfetched(path: Path) -> bool:
    """Return whether a file of that name exists, fetched or not."""
    return path.is_file() or is_broken_symlink(path)


def is_pointer_file(path: Path) -> bool:
    """Return whether a file holds only the pointer that git-annex or Git LFS leave for unfetched content."""
    try:
        with path.open("rb") as file:
            return is_pointer_content(file.read(_POINTER_SIZE))
    except OSError:
        return False


def is_pointer_content(content: bytes) -> bool:
    """Return whether the first bytes of a file are such a pointer."""
    start = content[:_POINTER_SIZE]
    return start.startswith(b"version https://git-lfs") or b"/annex/objects/" in start


def describe_missing(path: Path) -> str:
    """Return the error message for a file that does not exist, or is a broken symlink."""
    if path.is_symlink():
        return f"{path.name}: {NOT_FETCHED} (broken symlink); {_FETCH}"
    return f"{path}: no such file; check the path"


def describe_unfetched(path: Path) -> str:
    """Return the error message for a file that holds only an annex or LFS pointer."""
    return f"{path.name}: {NOT_FETCHED} (the file is only a pointer); {_FETCH}"


LOCK = ".lock"
"""Locked file of a folder that is in use."""

_ABANDONED_AFTER_S = 30 * 24 * 3600.0
"""Age at which an unlocked folder of another machine, whose locks may be invisible here, is removed."""


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
