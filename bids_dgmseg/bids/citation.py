"""Sentences for a paper's methods section that several places write."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

_FOLDER = files("bids_dgmseg").joinpath("data", "boilerplate")


def read_boilerplate(name: str) -> str:
    """Read a text of ``data/boilerplate``."""
    return _FOLDER.joinpath(name).read_text(encoding="utf-8")


def say_reconstruction(n_echoes: Sequence[int]) -> str:
    """Say how maps were made.

    Parameters
    ----------
    n_echoes : sequence of int
        Of how many echoes each was made; 0 for a map that was given.

    Returns
    -------
    str
        Lines that end with a line break; empty where all were given.
    """
    if not any(n_echoes):
        return ""
    some = "" if all(n_echoes) else "Some maps were given, others made of echoes. "
    return some + read_boilerplate("reconstruction.md" if max(n_echoes) > 1 else "reconstruction_one_echo.md")
