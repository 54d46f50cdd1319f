"""Environment of a run: signals, threads, private folder, worker processes, Nipype's options, log file.

Nipype writes to the log only, not to the terminal, HOME or the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from bids_dgmseg.errors import HangUp, InputError, forget_interrupts, interrupt
from bids_dgmseg.io.files import private_folder
from bids_dgmseg.resources import environment_variables

LOG_NAME = "nipype.log"

WORKER_MODULES = [
    "bids_dgmseg.interfaces",
    "bids_dgmseg.image.units",
    "bids_dgmseg.measurement.scan_measures",
    "bids_dgmseg.segmentation.segment",
]
"""Loaded once by the server from which the processes of a parallel run are forked. Without matplotlib, which reads
variables and writes caches of a run."""


_HANG_UP: signal.Signals = getattr(signal, "SIGHUP", None) or signal.SIGBREAK  # type: ignore[attr-defined]  # Windows


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM (``docker stop``, ``scancel``) and SIGHUP (closed terminal) as Ctrl-C: the run cleans up.

    Each of them is remembered, see `raise_if_interrupted`. SIGINT and SIGHUP stay ignored if they are (``nohup``).
    """
    forget_interrupts()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_handled(signal.SIGTERM, _interrupt))
        for number, handler in ((signal.SIGINT, _interrupt), (_HANG_UP, _hang_up)):
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
    with _handled(signal.SIGINT, signal.SIG_IGN), _handled(_HANG_UP, signal.SIG_IGN):
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
    try:
        before: Path | None = Path.cwd()
    except OSError:  # it is gone
        before = None
    with environment_variables({"PYTHONSAFEPATH": "1"}):
        os.chdir("/")
        try:
            if not leave and before:
                if (before / "matplotlibrc").exists():
                    importlib.import_module("matplotlib")
                os.chdir(before)
            yield
        finally:
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
    if base is None:
        tried = os.environ.get("TMPDIR") or "/tmp"
        raise InputError(f"{tried}: temporary folder cannot be written; choose another folder with -w")
    with contextlib.ExitStack() as stack:
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = stack.enter_context(private_folder(base, "bids_dgmseg-"))
        except OSError as error:
            raise InputError(f"{base}: cannot be written ({error.strerror}); choose another folder with -w") from error
        stack.callback(_remove_unless_scans_failed, folder)
        _check_owner(base, folder)
        settings = folder / ".settings"
        variables = {
            "NIPYPE_NO_ET": "1",  # no look-up of new versions
            "NIPYPE_CONFIG_DIR": str(settings / "nipype"),  # the user's own configuration must not change results
            "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR") or str(settings / "matplotlib"),
            "MPL_IGNORE_SYSTEM_FONTS": "1",  # figures use matplotlib's own, and looking at all others takes time
        }
        if _temporary_folder() is None:
            variables["TMPDIR"] = str(base)  # also of the workers
        stack.enter_context(environment_variables(variables))
        yield folder


def _temporary_folder() -> Path | None:
    """Return the folder of temporary files, None if none can be written, as on a read-only file system."""
    with contextlib.suppress(FileNotFoundError):
        return Path(tempfile.gettempdir())
    return None


def _remove_unless_scans_failed(folder: Path) -> None:
    """Remove the folder of a run; failed scans leave their files for inspection until the next run."""
    shutil.rmtree(folder / ".settings", ignore_errors=True)
    if not any(folder.glob("[!.]*")):
        shutil.rmtree(folder, ignore_errors=True)


def _check_owner(base: Path, folder: Path) -> None:
    """Reject a folder for runs in which others could replace the folder of this run."""
    status = base.stat()
    # Containers and network file systems may map user ids: a folder that is made here shows what this user's is.
    owners = {0, folder.stat().st_uid, *([os.geteuid()] if hasattr(os, "geteuid") else [])}
    if status.st_uid not in owners or (status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX):
        raise InputError(
            f"{base}: other users could replace intermediate files in it; choose a folder of your own with -w"
        )


def worker_context() -> Any:
    """Return the context of multiprocessing in which workers are started, and start its server.

    Call it as early as possible, because loading the libraries takes seconds in which the run can be prepared.
    """
    from multiprocessing import forkserver  # Windows has none

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WORKER_MODULES)
    if _temporary_folder():  # for its sockets; without one, it starts with the first worker, in `run_folder`
        with ignore_interrupts():  # Ctrl-C reaches every process of a terminal; the run itself stops the others
            forkserver.ensure_running()
    return context


def configure_nipype() -> None:
    """Set Nipype's options; call before building a Workflow."""
    from nipype import config

    config.update_config(
        {
            "execution": {
                "crashfile_format": "txt",
                "create_report": "false",
                "poll_sleep_duration": "0",  # 2 s by default; `WorkersPlugin` waits for its processes
                "remove_unnecessary_outputs": "false",
            }
        }
    )


@contextlib.contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Write the logs of the run, Nipype and nibabel and the warnings of all libraries to `LOG_NAME`.

    The file is created with the first message; processes may share it.
    """
    handler = logging.FileHandler(folder / LOG_NAME, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    for library in ("nibabel", "nipype"):
        importlib.import_module(library)  # which adds its own handlers
    loggers: list[Any] = [
        logging.getLogger(name) for name in ("bids_dgmseg", "nipype", "nibabel.global", "py.warnings")
    ]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, (former, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = former, propagate
        handler.close()
