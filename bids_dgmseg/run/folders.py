"""Folders of a run: its private folder for intermediate files, and checks of the output folder."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, generators, is_own
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import describe_missing, describe_unfetched, is_broken_symlink, is_pointer_file, read_json
from bids_dgmseg.io.locks import LOCK, lock_new_file, machine_tag, remove_abandoned
from bids_dgmseg.resources import environment_variables

_RUN_PREFIX = "bids_dgmseg-"
_RUN_FOLDER = re.compile(rf"{_RUN_PREFIX}([0-9a-f]{{8}})-\w+")
"""With the tag of the machine, see `io.locks`."""


@contextlib.contextmanager
def run_folder(work_dir: Path | None) -> Iterator[Path]:
    """Create a folder for the intermediate files and library settings of one run; remove it unless files are left.

    Only this user can read or change it, since Nipype unpickles the results of a step and libraries execute their
    caches: neither may come from an earlier run, let alone from another user. Also removes the folders of runs that
    were killed. Call before importing Nipype or matplotlib.

    Parameters
    ----------
    work_dir : path or None
        Folder in which it is created; None for the system's temporary folder.

    Yields
    ------
    path
        The folder, empty except for hidden files.

    Raises
    ------
    InputError
        If `work_dir` cannot be written, or others could replace what is in it.
    """
    base = work_dir or _temporary_folder()
    folder = _make_private_folder(base)
    parents = {base}
    with contextlib.suppress(InputError):
        parents.add(_temporary_folder())  # which has the `sockets_folder` of killed runs
    for parent in parents:
        for other in parent.glob(f"{_RUN_PREFIX}*"):
            if match := _RUN_FOLDER.fullmatch(other.name):
                remove_abandoned(other, lock=other / LOCK, machine=match[1])
    settings = folder / ".settings"
    variables = {
        "NIPYPE_NO_ET": "1",  # no look-up of new versions
        "NIPYPE_CONFIG_DIR": str(settings / "nipype"),  # the user's own configuration must not change results
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or str(settings / "matplotlib"),
        "MPL_IGNORE_SYSTEM_FONTS": "1",  # figures use matplotlib's own, and looking at all others takes time
    }
    try:
        with lock_new_file(folder / LOCK), environment_variables(variables):
            yield folder
    finally:
        shutil.rmtree(settings, ignore_errors=True)
        if not any(folder.glob("[!.]*")):  # failed scans leave their files for inspection until the next run
            shutil.rmtree(folder, ignore_errors=True)


@cache
def sockets_folder() -> Path | None:
    """Create a folder for the sockets of this process, by which it talks to its workers; None if that is impossible.

    It is removed when the process ends; after SIGKILL a later run removes it, as it does not with the folder that
    multiprocessing makes.
    """
    longest = 108 - len("/listener-12345678") - 1  # bytes in the address of a socket
    try:
        folder = Path(tempfile.mkdtemp(prefix=f"{_RUN_PREFIX}{machine_tag()}-"))
    except OSError:
        return None
    if len(os.fsencode(folder)) > longest:
        folder.rmdir()
        return None
    lock = contextlib.ExitStack()
    lock.enter_context(lock_new_file(folder / LOCK))

    def remove(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()

    atexit.register(remove)
    return folder


def _temporary_folder() -> Path:
    """Return the system's temporary folder; not the current folder, which `tempfile` falls back on."""
    with contextlib.suppress(FileNotFoundError):
        if (folder := Path(tempfile.gettempdir())) != Path("/"):
            return folder
    tried = os.environ.get("TMPDIR") or "/tmp"
    raise InputError(f"{tried}: temporary folder cannot be written or is full; choose another folder with -w")


def _make_private_folder(base: Path) -> Path:
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_RUN_PREFIX}{machine_tag()}-", dir=base))
    except OSError as error:
        raise InputError(f"{base}: cannot be written ({error.strerror}); choose another folder with -w") from error
    status = base.stat()
    risk = ""
    # Containers and network file systems may map user ids: a folder that is made here shows what this user's is.
    if hasattr(os, "geteuid") and status.st_uid not in {0, os.geteuid(), folder.stat().st_uid}:
        risk = (
            f"belongs to another user (id {status.st_uid}), who could replace intermediate files; choose a folder of "
            f"your own with -w, or start the container as this user (docker run -u {status.st_uid})"
        )
    elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        risk = (
            "every user can write to it and replace intermediate files; choose a folder of your own with -w, or "
            f"protect it (chmod +t {base})"
        )
    if risk:
        folder.rmdir()
        raise InputError(f"{base}: {risk}")
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        tempfile.tempdir = str(base)  # multiprocessing needs one for its sockets, and removes its own folder there
    return folder


def check_folders(config: RunConfig) -> None:
    """Reject an output or working directory that would damage the input or another program's dataset.

    That is one inside the raw data, or an output directory that is read-only or another program's dataset. Writes
    nothing, except that the output directory is created unless this is a dry run.
    """
    root, output_dir, work_dir = config.bids_dir.resolve(), config.output_dir, config.control.work_dir
    for folder, name in ((output_dir, "output directory"), *([(work_dir, "`work_dir`")] if work_dir else [])):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {name} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir and work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: `work_dir` inside the output directory, which would not be valid BIDS; choose a folder "
            "outside it"
        )
    if maker := _find_other_maker(output_dir, described=config.level != "participant"):
        raise InputError(f"{output_dir.name}: contains a dataset of {maker}; choose another output directory")
    if not config.control.dry_run:
        check_writable(output_dir)


def _find_other_maker(folder: Path, *, described: bool) -> str | None:
    """Return the program that made the dataset in a folder; None if it is this one or there is no dataset.

    Unless datasets must be described, participants without dataset_description.json are one too, as SEPIA writes them.
    """
    path = folder / DATASET_DESCRIPTION
    if is_broken_symlink(path):
        raise InputError(f"{folder.name}: {describe_missing(path)}")
    if is_pointer_file(path):
        raise InputError(f"{folder.name}: {describe_unfetched(path)}")
    if not path.is_file():
        found = next((one.name for one in sorted(folder.glob("sub-*")) if one.is_dir() and any(one.iterdir())), None)
        return f"another program ({found}, but no {DATASET_DESCRIPTION})" if found and not described else None
    try:
        read_json(path)
    except InputError as error:
        raise InputError(f"{folder.name}/{error}") from error
    if is_own(folder):
        return None
    return ", ".join(maker["Name"] for maker in generators(folder)) or "another program"
