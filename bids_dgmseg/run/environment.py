"""Environment of a run: threads, current folder, worker processes, Nipype's options, log file.

Nipype writes to the log only, not to the terminal, HOME or the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bids_dgmseg.resources import environment_variables
from bids_dgmseg.run.signals import ignore_interrupts

LOG_NAME = "nipype.log"

WORKER_MODULES = [
    "bids_dgmseg.interfaces",
    "bids_dgmseg.image.units",
    "bids_dgmseg.measurement.scan",
    "bids_dgmseg.segmentation.segment",
]
"""Loaded once by the server from which the processes of a parallel run are forked. Without matplotlib, which reads
variables and writes caches of a run."""


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


def worker_context() -> Any:
    """Return the context of multiprocessing in which workers are started, and start its server.

    Call it as early as possible, because loading the libraries takes seconds in which the run can be prepared.
    """
    from multiprocessing import forkserver  # Windows has none

    from bids_dgmseg.run.folders import sockets_folder

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WORKER_MODULES)
    folder, options = sockets_folder(), multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = options.get("tempdir")
    try:
        if folder and folder.is_dir():
            options["tempdir"] = str(folder)  # where `multiprocessing.util.get_temp_dir` puts sockets
        with ignore_interrupts():  # Ctrl-C reaches every process of a terminal; the run itself stops the others
            forkserver.ensure_running()
    finally:
        options["tempdir"] = before
    return context


def configure_nipype(*, stop_on_first_crash: bool) -> None:
    """Set Nipype's options; call before building a Workflow."""
    from nipype import config

    config.update_config(
        {
            "execution": {
                "crashfile_format": "txt",
                "create_report": "false",
                "poll_sleep_duration": "0",  # 2 s by default; `WorkersPlugin` waits for its processes
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
