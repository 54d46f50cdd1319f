"""Declaration of options, and their types."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Option:
    """Arguments of argparse's ``add_argument``."""

    names: tuple[str, ...]
    keywords: dict[str, Any]


def option(usage: str, help: str, type: Callable[[str], Any] = str, **keywords: Any) -> Option:
    """Describe an option by its usage, as ``--help`` shows it.

    ``--force`` is a flag, ``--seed S`` takes one value, ``--choose ENTITY ...`` at least one and may be repeated.
    ``DIR`` or ``PREDICTION ...`` is a positional argument. Other keywords are those of argparse.
    """
    several = usage.endswith(" ...")
    words = usage.removesuffix(" ...").replace(",", "").split()
    names = tuple(word for word in words if word.startswith("-"))
    if not names:
        defaults: dict[str, Any] = {"metavar": usage.removesuffix(" ..."), "type": type}
        names = (words[0].lower(),)
    elif len(words) > len(names):
        defaults = {"metavar": words[-1], "type": type, **({"action": "extend", "default": []} if several else {})}
    else:
        defaults = {} if "choices" in keywords else {"action": "store_true"}
    if several:
        defaults["nargs"] = "+"
    return Option(names, {"help": help, **defaults, **keywords})


def add_options(parser: argparse._ActionsContainer, options: Iterable[Option | list[Option]]) -> None:
    """Add options to a parser; those of an inner list exclude one another."""
    for given in options:
        if isinstance(given, Option):
            parser.add_argument(*given.names, **given.keywords)
        else:
            add_options(parser.add_mutually_exclusive_group(), given)


@dataclass(frozen=True)
class Verb:
    """A command of `dgmseg`."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    """Returns the exit code."""
    options: Iterable[Option | list[Option]]
    after_interrupt: str = ""
    """Hint for interrupted runs."""


def absolute_path(text: str) -> Path:
    """Return an absolute path, with ``~`` expanded; each step runs in a different working directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(os.path.normpath(Path(text).expanduser().absolute()))


def number(text: str, convert: Callable[[str], Number], low: float, high: float, expected: str) -> Number:
    """Return a finite number from `low` to `high`."""
    with suppress(ValueError):
        if low <= (value := convert(text)) <= high and value < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


def positive_int(text: str) -> int:
    """Return an integer from 1."""
    return number(text, int, 1, math.inf, "a positive integer")


def non_negative_int(text: str) -> int:
    """Return an integer from 0."""
    return number(text, int, 0, math.inf, "a non-negative integer")


def seed(text: str) -> int:
    """Return an integer from 0 to 999999; the seeds derived for each sample would overflow with larger ones."""
    return number(text, int, 0, 999_999, "an integer from 0 to 999999")


def positive_float(text: str) -> float:
    """Return a finite number above 0."""
    return number(text, float, math.ulp(0), math.inf, "a positive number")


def non_negative_float(text: str) -> float:
    """Return a finite number from 0."""
    return number(text, float, 0, math.inf, "a non-negative number")


def entity(text: str) -> str:
    """Return a BIDS entity such as ``desc-manual``."""
    if not re.fullmatch(r"[a-z]+-[0-9a-zA-Z+]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a BIDS entity such as desc-manual or seg-dgm16")
    return text


def participant_label(text: str, prefix: str = "sub-") -> str:
    """Return a label without its prefix.

    >>> participant_label("sub-01"), participant_label("01")
    ('01', '01')
    """
    label = text.removeprefix(prefix)
    if re.fullmatch(r"[0-9a-zA-Z+]+", label):
        return label
    raise argparse.ArgumentTypeError(f"{text!r} is not a label (letters and digits, with or without {prefix})")


def session_label(text: str) -> str:
    """Return a session label without ``ses-``."""
    return participant_label(text, "ses-")


# Shared by the verbs that train
OUT = option("OUT", "model folder; an unfinished training in it is resumed", Path)
LABELS = [
    option(
        "--derivatives FOLDER ...",
        "derivative datasets with maps or labels (default: all in DATASET/derivatives)",
        absolute_path,
    ),
    option(
        "--choose ENTITY ...",
        "if a scan has several segmentations, use the one with this entity, such as desc-manual",
        entity,
    ),
]
CHECKPOINT = option(
    "--checkpoint-minutes M", "time between checkpoints (default: %(default)s)", non_negative_float, default=2.0
)
RUNTIME = [
    option("--seed S", "seed of initial weights and samples (default: %(default)s)", seed, default=1),
    option(
        "--device",
        "device for the network (default: %(default)s, a GPU if there is one)",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    ),
    option("--workers N", "sampling processes (default: %(default)s)", non_negative_int, default=1),
]
