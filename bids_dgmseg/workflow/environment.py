"""Process environment of a run: threads, Nipype's options, log file, signals.

Nipype writes to the log only, not to the terminal, HOME or the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

LOG_NAME = "nipype.log"

_LOGGERS = ("nipype", "nibabel.global", "py.warnings")

_FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


def prepare_environment(work_dir: Path, *, n_threads: int) -> None:
    """Set environment variables for libraries and workers; call before importing Nipype, NumPy or torch."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(n_threads)
    os.environ["NIPYPE_NO_ET"] = "1"  # no look-up of new versions
    os.environ["NIPYPE_CONFIG_DIR"] = str(work_dir / "nipype")  # the user's own configuration must not change results
    os.environ.setdefault("MPLCONFIGDIR", str(work_dir / "matplotlib"))


def configure_nipype(*, stop_on_first_crash: bool) -> None:
    """Set Nipype's options; call before building a Workflow."""
    from nipype import config

    config.update_config(
        {
            "execution": {
                "crashfile_format": "txt",
                "create_report": "false",
                "poll_sleep_duration": "0.05",  # 2 s by default
                "remove_unnecessary_outputs": "false",
                "stop_on_first_crash": str(stop_on_first_crash).lower(),
            },
        }
    )


@contextlib.contextmanager
def log_to(folder: Path, *, verbose: bool = False) -> Iterator[None]:
    """Write the logs of Nipype and nibabel and the warnings of all libraries to a file.

    Parameters
    ----------
    folder : path
        Folder of `LOG_NAME`, which is created with the first message; processes may share it.
    verbose : bool
        Also print the log to standard error.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(folder / LOG_NAME, encoding="utf-8", delay=True)]
    if verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
    for library in ("nibabel", "nipype"):
        importlib.import_module(library)  # which adds its own handlers
    loggers: list[Any] = [logging.getLogger(name) for name in _LOGGERS]
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
    """Treat SIGTERM (``docker stop``, ``scancel``) as Ctrl-C: workers stop, intermediate files are removed."""
    with _handled(signal.SIGTERM, signal.default_int_handler):
        yield


@contextlib.contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C, also in processes that are started in the block."""
    with _handled(signal.SIGINT, signal.SIG_IGN):
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
