"""Fake terminal for tests of standard output."""

import io

import pytest


class Terminal(io.StringIO):
    """Understands the control sequence that erases a line."""

    @classmethod
    def connected(cls, patch: pytest.MonkeyPatch, *, columns: int = 80) -> "Terminal":
        """Replace standard output; call this in the test itself, because pytest replaces it for fixtures too."""
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("TERM", "xterm")
        patch.setattr("sys.stdout", terminal := cls())
        return terminal

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """Lines on the screen at the end."""
        return [line.rpartition("\r\x1b[2K")[2] for line in self.getvalue().split("\n")]

    @property
    def shown(self) -> list[str]:
        """Lines that were shown and erased again."""
        return [text for line in self.getvalue().split("\n") for text in line.split("\r\x1b[2K")[:-1] if text]
