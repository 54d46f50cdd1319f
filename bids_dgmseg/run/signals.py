"""Signals: SIGTERM and SIGHUP end a run as Ctrl-C does."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from bids_dgmseg.errors import HangUp, forget_interrupts, interrupt

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
