"""The lines of a verb that takes long."""

from __future__ import annotations

import shutil
import sys
from typing import Self

_ERASE = "\r\x1b[2K"


class Line:
    """Prints lines; on a terminal a line that is shown gives way to the next. A context manager that leaves none."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._live = self._stream.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            print(_ERASE, end="", file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print(f"{_ERASE}{text}" if self._live else text, file=self._stream, flush=True)

    def show(self, text: str) -> None:
        """Show a line until the next; nothing where the output is no terminal."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be erased
            print(f"{_ERASE}{text[:width]}", end="", file=self._stream, flush=True)
