"""Terminal output: the progress of a run, the status line of a training, warnings.

Parameters in backquotes are printed as options of the command line.

A terminal gets a live display (rich), anything else plain lines.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from bids_dgmseg.errors import for_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class RunProgress:
    """Progress of a run: scans that are done, failed or running, with their current step; a context manager.

    Progress goes to standard output, warnings and failures to standard error. On a terminal all of it goes to standard
    output, above the live display.

    Parameters
    ----------
    total : int
        Number of scans to process; 0 for messages alone.
    """

    def __init__(self, total: int) -> None:
        from rich.live import Live

        self._total, self._n_done, self._n_failed = total, 0, 0
        self._running: dict[str, tuple[str, float]] = {}  # scan → step, and start of the scan
        self._out, self._error = _console(), _console(stderr=True)
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
        """Show that a scan has reached a step."""
        _, started = self._running.get(scan, (step, time.monotonic()))
        self._running[scan] = (step, started)
        if not self._live:
            self.info(f"{scan}: {step}")

    def finish(self, scan: str) -> None:
        """Count a scan as done."""
        self._running.pop(scan, None)
        self._n_done += 1
        failed = f", {self._n_failed} failed" if self._n_failed else ""
        self.info(f"{scan}: done ({self._n_done} of {self._total}{failed})")

    def fail(self, scan: str, reason: str) -> None:
        """Count a scan as failed and print the reason."""
        self._running.pop(scan, None)
        self._n_failed += 1
        self.warn(reason)

    def info(self, text: str) -> None:
        """Print a line to standard output."""
        self._out.print(for_terminal(text))

    def warn(self, text: str) -> None:
        """Print a warning or an error."""
        (self._out if self._live else self._error).print(for_terminal(text))

    def _draw(self) -> Table:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        done = f"{self._n_done} of {self._total} scan(s) done"
        table.add_row(f"{done}, {self._n_failed} failed, {len(self._running)} running")
        for scan, (step, started) in list(self._running.items()):
            table.add_row(f"  {scan}", step, f"{time.monotonic() - started:.0f} s")
        return table


class StatusLine:
    """Log of a training: lines that stay, and on a terminal one status line below them; a context manager."""

    def __init__(self) -> None:
        self._console = _console()
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._erase()

    def log(self, text: str) -> None:
        """Print a line that stays."""
        self._erase()
        self._console.print(for_terminal(text))

    def update(self, text: str) -> None:
        """Replace the status line; does nothing if the output is not a terminal."""
        if self._live:
            self._erase()
            width = self._console.width - 1  # a line that wraps could not be erased
            self._console.print(for_terminal(text)[:width], end="")

    def _erase(self) -> None:
        if self._live:
            from rich.control import Control
            from rich.segment import ControlType

            self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))


def _console(*, stderr: bool = False) -> Console:
    """Return a console that writes text as it is, to the stream that is current now."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    terminal = stream.isatty()  # not FORCE_COLOR, which Jupyter sets: a notebook would keep every state of the display
    console = Console(file=stream, force_terminal=terminal, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if console.width < 1:  # COLUMNS=0, with which rich prints nothing
        console.width = 80
    return console
