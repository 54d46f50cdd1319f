"""Environment of a run: threads, Nipype's options, log file, signals, directories.

Nipype writes to the log only, not to the terminal, HOME or the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, generators, is_own
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import HangUp, InputError, forget_interrupts, interrupt
from bids_dgmseg.io.files import describe_missing, describe_unfetched, is_broken_symlink, is_pointer_file, read_json
from bids_dgmseg.io.locks import LOCK, lock_new_file, machine_tag, remove_abandoned

LOG_NAME = "nipype.log"

_WORKER_MODULES = ("bids_dgmseg.workflow.preload", "bids_dgmseg.workflow.runner")

_STEP_MODULES = {
    "segment": (
        "bids_dgmseg.image.units",
        "bids_dgmseg.measurement.field_of_view",
        "bids_dgmseg.segmentation.regions",
        "bids_dgmseg.segmentation.segment",
    ),
    "measure": ("bids_dgmseg.measurement.scan", "bids_dgmseg.report.mosaic", "bids_dgmseg.report.viewer"),
}
"""What steps import when they run, see `interfaces`: with torch, or with matplotlib. The others import little, but
`save` needs torch, too, and `reconstruct` also imports ``qsm``."""

_VIEWER_MODULES = ("nilearn.plotting",)
"""Imported when a viewer is written, which takes half a second."""

_SERVERS = {step: forkserver.ForkServer() for step in _STEP_MODULES}

_RUN_PREFIX = "bids_dgmseg-"
_RUN_FOLDER = re.compile(rf"{_RUN_PREFIX}([0-9a-f]{{8}})-\w+")
"""With the tag of the machine, see `io.locks`."""


def limit_library_threads(n_threads: int) -> None:
    """Set environment variables for libraries and workers; call before importing NumPy or torch."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(n_threads)


@contextlib.contextmanager
def ignore_current_folder(*, leave: bool = True) -> Iterator[None]:
    """Read no settings and modules from the current folder, neither here nor in processes that are started.

    Libraries read their configuration from it (``nipype.cfg``, ``matplotlibrc``), and ``python -c``, by which
    multiprocessing starts processes, imports modules from it.

    Parameters
    ----------
    leave : bool
        Make the root folder the current one. If False, for programs with relative paths, ``nipype.cfg`` is still read.
    """
    safe_path = os.environ.get("PYTHONSAFEPATH")
    try:
        before: Path | None = Path.cwd()
    except OSError:  # it is gone
        before = None
    os.environ["PYTHONSAFEPATH"] = "1"
    os.chdir("/")
    try:
        if not leave and before:
            if (before / "matplotlibrc").exists():
                importlib.import_module("matplotlib")
            os.chdir(before)
        yield
    finally:
        _restore_variable("PYTHONSAFEPATH", safe_path)
        if before:
            with contextlib.suppress(OSError):
                os.chdir(before)


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
    for other in base.glob(f"{_RUN_PREFIX}*"):
        if match := _RUN_FOLDER.fullmatch(other.name):
            remove_abandoned(other, lock=other / LOCK, machine=match[1])
    settings = folder / ".settings"
    variables = {
        "NIPYPE_NO_ET": "1",  # no look-up of new versions
        "NIPYPE_CONFIG_DIR": str(settings / "nipype"),  # the user's own configuration must not change results
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or str(settings / "matplotlib"),
        "MPL_IGNORE_SYSTEM_FONTS": "1",  # figures use matplotlib's own, and looking at all others takes time
    }
    before = {name: os.environ.get(name) for name in variables}
    try:
        with lock_new_file(folder / LOCK):
            os.environ.update(variables)
            yield folder
    finally:
        for name, value in before.items():
            _restore_variable(name, value)
        shutil.rmtree(settings, ignore_errors=True)
        if not any(folder.glob("[!.]*")):  # failed scans leave their files for inspection until the next run
            shutil.rmtree(folder, ignore_errors=True)


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
    if status.st_uid not in {0, os.geteuid(), folder.stat().st_uid}:
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


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def worker_servers(*, viewer: bool) -> Iterator[None]:
    """Run the servers from which the processes of a parallel run are forked, which first load the libraries.

    Enter it as early as possible, since that takes seconds in which the run itself can be prepared, but inside
    `run_folder`, whose variables the libraries read, and where they write their caches: at the end the servers are
    killed, because one that is still loading would make the folder anew. There are two, which load different libraries
    at the same time: the first scan starts a second sooner than with one.
    """
    with ignore_interrupts():  # Ctrl-C reaches every process of a terminal; the run itself stops the others
        for step, server in _SERVERS.items():
            more = _VIEWER_MODULES if viewer and step == "measure" else ()
            server.set_forkserver_preload([*_WORKER_MODULES, *_STEP_MODULES[step], *more])
            server.ensure_running()
    try:
        yield
    finally:
        started: list[Any] = list(_SERVERS.values())
        for one in started:  # multiprocessing only asks a server to end, which it does once it has loaded everything
            os.kill(one._forkserver_pid, signal.SIGKILL)
            one._stop()


def name_server(step: str) -> str:
    """Return the name of the server whose processes run a step."""
    return step if step in _SERVERS else "segment"


@contextlib.contextmanager
def forked_by(server: str) -> Iterator[None]:
    """Fork the processes that multiprocessing starts from a server, which is started unless it runs."""
    default = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _SERVERS[server].connect_to_new_process  # multiprocessing knows one server only
    try:
        yield
    finally:
        forkserver.connect_to_new_process = default


def configure_nipype(*, stop_on_first_crash: bool, poll_s: float) -> None:
    """Set Nipype's options; call before building a Workflow."""
    from nipype import config

    config.update_config(
        {
            "execution": {
                "crashfile_format": "txt",
                "create_report": "false",
                "poll_sleep_duration": str(poll_s),  # 2 s by default
                "job_finished_timeout": "20",  # for results on a network file system
                "remove_unnecessary_outputs": "false",
                "stop_on_first_crash": str(stop_on_first_crash).lower(),
            },
        }
    )


@contextlib.contextmanager
def log_to(folder: Path, *, verbose: bool = False) -> Iterator[None]:
    """Write the logs of the run, Nipype and nibabel and the warnings of all libraries to `LOG_NAME`.

    If verbose, also to standard error. The file is created with the first message; processes may share it.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(folder / LOG_NAME, encoding="utf-8", delay=True)]
    if verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    for library in ("nibabel", "nipype"):
        importlib.import_module(library)  # which adds its own handlers
    loggers: list[Any] = [
        logging.getLogger(name) for name in ("bids_dgmseg", "nipype", "nibabel.global", "py.warnings")
    ]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = list(handlers), False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (own, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = own, propagate
        for handler in handlers:
            handler.close()


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM (``docker stop``, ``scancel``) and SIGHUP (closed terminal) as Ctrl-C: the run cleans up.

    Each of them is remembered, see `raise_if_interrupted`. SIGINT and SIGHUP stay ignored if they are (``nohup``).
    """
    forget_interrupts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_handled(signal.SIGTERM, _interrupt))
        for number, handler in ((signal.SIGINT, _interrupt), (signal.SIGHUP, _hang_up)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                stack.enter_context(_handled(number, handler))
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    interrupt()


def _hang_up(number: int, frame: FrameType | None) -> None:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # writing to a closed terminal would fail
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    interrupt(HangUp)


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C and a closed terminal, also in processes that are started in the block."""
    with _handled(signal.SIGINT, signal.SIG_IGN), _handled(signal.SIGHUP, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled(
    number: signal.Signals, handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def check_folders(config: RunConfig) -> None:
    """Reject an output or working directory that would damage the input or another program's dataset.

    That is one inside the raw data, or an output directory that is read-only or another program's dataset. Writes
    nothing, except that the output directory is created unless this is a dry run.
    """
    root, output_dir, work_dir = config.bids_dir.resolve(), config.output_dir, config.control.work_dir
    for folder, option in ((output_dir, "output directory"), *([(work_dir, "--work-dir")] if work_dir else [])):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {option} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir and work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: --work-dir inside the output directory, which would not be valid BIDS; choose a folder "
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
