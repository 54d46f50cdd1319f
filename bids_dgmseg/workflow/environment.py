"""Environment of a run: threads, Nipype's options, log file, signals, directories.

Nipype writes to the log only, not to the terminal, HOME or the network.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, generators, is_own
from bids_dgmseg.bids.output_dataset import check_writable
from bids_dgmseg.config import RunConfig
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import describe_missing, describe_unfetched, is_broken_symlink, is_pointer_file, read_json

LOG_NAME = "nipype.log"


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
    """Write the logs of Nipype and nibabel and the warnings of all libraries to `LOG_NAME`, or also to standard error.

    The file is created with the first message; processes may share it.
    """
    handlers: list[logging.Handler] = [logging.FileHandler(folder / LOG_NAME, encoding="utf-8", delay=True)]
    if verbose:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
    for library in ("nibabel", "nipype"):
        importlib.import_module(library)  # which adds its own handlers
    loggers: list[Any] = [logging.getLogger(name) for name in ("nipype", "nibabel.global", "py.warnings")]
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


def terminate_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Treat SIGTERM (``docker stop``, ``scancel``) as Ctrl-C: workers stop, intermediate files are removed."""
    return _handled(signal.SIGTERM, signal.default_int_handler)


def ignore_interrupts() -> contextlib.AbstractContextManager[None]:
    """Ignore Ctrl-C, also in processes that are started in the block."""
    return _handled(signal.SIGINT, signal.SIG_IGN)


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
    for folder, option in ((output_dir, "output directory"), (work_dir, "--work-dir")):
        inside = folder.resolve()
        if inside.is_relative_to(root) and inside.relative_to(root).parts[:1] != ("derivatives",):
            raise InputError(
                f"{folder.name}: {option} inside the input's raw data ({root.name}); "
                f"choose a folder outside it or below {root.name}/derivatives"
            )
    if work_dir.resolve().is_relative_to(output_dir.resolve()):
        raise InputError(
            f"{work_dir.name}: --work-dir inside the output directory, which would not be valid BIDS; choose a folder "
            "outside it"
        )
    if maker := _find_other_maker(output_dir, described=config.level != "participant"):
        raise InputError(f"{output_dir.name}: contains a dataset of {maker}; choose another output directory")
    if not config.control.dry_run:
        check_writable(output_dir)


def make_run_folder(work_dir: Path) -> Path:
    """Create a folder in the working directory that no other run uses; `InputError` if that fails."""
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="run-", dir=work_dir))
    except OSError as error:
        raise InputError(f"{work_dir}: cannot be written ({error.strerror}); choose another --work-dir") from error


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
