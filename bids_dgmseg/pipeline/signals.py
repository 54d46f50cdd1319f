"""Ending in order when a user, a scheduler or a container asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Make SIGTERM (``docker stop``, ``scancel``) end the block as Ctrl-C does: workers stop, intermediate files go."""
    with _handled(signal.SIGTERM, _interrupt):
        yield


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Make Ctrl-C do nothing in the block, nor in processes that are started in it."""
    with _handled(signal.SIGINT, signal.SIG_IGN):
        yield


@contextmanager
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
