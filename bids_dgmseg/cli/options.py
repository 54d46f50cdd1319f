"""Option types shared by `bids_dgmseg` and the verbs of `dgmseg`."""

from __future__ import annotations

import argparse
import math
import os
import re
from contextlib import suppress
from pathlib import Path


def absolute_path(text: str) -> Path:
    """Return an absolute path, with ``~`` expanded; each step runs in a different working directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.normpath(Path(text).expanduser().absolute()))


def positive_int(text: str) -> int:
    """Return an integer from 1."""
    return _integer(text, 1, math.inf, "a positive integer")


def non_negative_int(text: str) -> int:
    """Return an integer from 0."""
    return _integer(text, 0, math.inf, "a non-negative integer")


def seed(text: str) -> int:
    """Return an integer from 0 to 999999; the seeds derived for each sample would overflow with larger ones."""
    return _integer(text, 0, 999_999, "an integer from 0 to 999999")


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    return _number(text, math.ulp(0), "a positive number")


def non_negative_float(text: str) -> float:
    """Return a finite number from 0."""
    return _number(text, 0, "a non-negative number")


def entity(text: str) -> str:
    """Return a BIDS entity such as ``desc-manual``."""
    if not re.fullmatch(r"[a-z]+-[0-9a-zA-Z+]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a BIDS entity such as desc-manual or seg-dgm16")
    return text


def participant_label(text: str) -> str:
    """Return a participant label without ``sub-``.

    >>> participant_label("sub-01"), participant_label("01")
    ('01', '01')
    """
    return _label(text, "sub-")


def session_label(text: str) -> str:
    """Return a session label without ``ses-``."""
    return _label(text, "ses-")


def _label(text: str, prefix: str) -> str:
    label = text.removeprefix(prefix)
    if re.fullmatch(r"[0-9a-zA-Z+]+", label):
        return label
    raise argparse.ArgumentTypeError(f"{text!r} is not a label (letters and digits, with or without {prefix})")


def _integer(text: str, low: int, high: float, expected: str) -> int:
    with suppress(ValueError):
        if low <= (value := int(text)) <= high:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


def _number(text: str, low: float, expected: str) -> float:
    with suppress(ValueError):
        if low <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
