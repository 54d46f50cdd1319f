"""A terminal in place of standard output."""

import io

import pytest


class Terminal(io.StringIO):
    """Understands the one sequence that erases a line."""

    @classmethod
    def connected(cls, patch: pytest.MonkeyPatch, *, columns: int = 80) -> "Terminal":
        """Connect one; to be called in the test itself, since fixtures write elsewhere."""
        patch.setenv("COLUMNS", str(columns))
        patch.setattr("sys.stdout", terminal := cls())
        return terminal

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        """What stands on it in the end."""
        return [line.rpartition("\r\x1b[2K")[2] for line in self.getvalue().split("\n")]

    @property
    def shown(self) -> list[str]:
        """What stood on it in between, and at some time gave way."""
        return [text for line in self.getvalue().split("\n") for text in line.split("\r\x1b[2K")[:-1] if text]
