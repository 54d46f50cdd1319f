"""Converters of options that several verbs have."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def absolute(text: str) -> Path:
    """Make a path absolute, ``~`` too."""
    return Path(text).expanduser().absolute()


def entity(text: str) -> str:
    """Take an entity of BIDS, such as ``desc-manual``, and nothing else."""
    if not re.fullmatch(r"[a-z]+-[0-9a-zA-Z+]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an entity such as desc-manual or seg-dgm16")
    return text
