"""What a run tells while it goes: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class _Running:
    step: str
    since: float = field(default_factory=time.monotonic)


class Progress:
    """Scans that are done, failed and running, with their current step; a context manager.

    Progress goes to standard output, warnings and failures to standard error.

    Parameters
    ----------
    total : int
        Number of scans to do.
    """

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._total, self._done, self._failed = total, 0, 0
        self._running: dict[str, _Running] = {}
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self._out, self._error = Console(**plain), Console(stderr=True, **plain)
        live = self._out.is_terminal and total > 0
        self._live = Live(get_renderable=self._draw, console=self._out, transient=True) if live else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def start(self, scan: str, step: str) -> None:
        """Show that a scan begins a step."""
        running = self._running.setdefault(scan, _Running(step))
        running.step = step
        if not self._live:
            self.say(f"{scan}: {step}")

    def finish(self, scan: str) -> None:
        """Count a scan that is done."""
        self._running.pop(scan, None)
        self._done += 1
        failed = f", {self._failed} failed" if self._failed else ""
        self.say(f"{scan}: done ({self._done} of {self._total}{failed})")

    def fail(self, scan: str, line: str) -> None:
        """Count a scan that failed, and say why."""
        self._running.pop(scan, None)
        self._failed += 1
        self.warn(line)

    def say(self, line: str) -> None:
        """Write a line for the reader of standard output."""
        self._out.print(_on_one_line(line))

    def warn(self, line: str) -> None:
        """Write a line that deserves attention; on a terminal above the live display."""
        (self._out if self._live else self._error).print(_on_one_line(line))

    def _draw(self) -> Table:
        from rich.table import Table

        counts = f"{self._done} of {self._total} scans done, {self._failed} failed, {len(self._running)} running"
        table = Table.grid(padding=(0, 2))
        table.add_row(counts)
        for scan, running in list(self._running.items()):
            table.add_row(f"  {scan}", running.step, f"{time.monotonic() - running.since:.0f} s")
        return table


def _on_one_line(text: str) -> str:
    """Show line breaks, and what cannot be encoded, by their codes: users' files hold anything."""
    shown = text.replace("\r", "\\r").replace("\n", "\\n")
    return shown.encode(errors="backslashreplace").decode()


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
