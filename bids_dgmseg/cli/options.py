"""Converters of options that several verbs have."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bids_dgmseg.errors import InputError


def absolute(text: str) -> Path:
    """Make a path absolute, ``~`` too."""
    return Path(text).expanduser().absolute()


def entity(text: str) -> str:
    """Take an entity of BIDS, such as ``desc-manual``, and nothing else."""
    if not re.fullmatch(r"[a-z]+-[0-9a-zA-Z+]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an entity such as desc-manual or seg-dgm16")
    return text


def count(text: str) -> int:
    """Take a whole number from 1."""
    return _whole(text, 1, math.inf)


def whole_number(text: str) -> int:
    """Take a whole number from 0."""
    return _whole(text, 0, math.inf)


def seed(text: str) -> int:
    """Take a whole number from 0 to 999999: larger ones overflow where each sample gets a seed of its own."""
    return _whole(text, 0, 999_999)


def _whole(text: str, low: int, high: float) -> int:
    with suppress(ValueError):
        if low <= (value := int(text)) <= high:
            return value
    most = f" to {high:.0f}" if high < math.inf else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low}{most}")


def positive(text: str) -> float:
    """Take a finite number above 0."""
    return _number(text, math.ulp(0), "above 0")


def not_negative(text: str) -> float:
    """Take a finite number from 0."""
    return _number(text, 0, "from 0")


def _number(text: str, low: float, words: str) -> float:
    with suppress(ValueError):
        if low <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number {words}")


PAPER_MODELS = ("dcnnet", "attunet25d", "deepqsmseg")
"""Those that `training.recipes` has; importing them loads torch."""

NNUNET = "nnunet2step"

SIMULATED, LABELLED, RECIPES = "default on simulated maps", "default on labelled maps", ", ".join(PAPER_MODELS)
"""The kinds of training beside `NNUNET`, as messages name them."""

_KINDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("watch", "validation_maps", "loss"), (SIMULATED,)),
    **dict.fromkeys(("part", "steps"), (SIMULATED, LABELLED)),
    **dict.fromkeys(("start", "learning_rate"), (SIMULATED, LABELLED, RECIPES)),
    "holdout": (LABELLED, RECIPES),
    **dict.fromkeys(("derivatives", "choose"), (LABELLED, RECIPES, NNUNET)),
    **dict.fromkeys(("fold", "folds", "scans", "variant", "arch", "recipe", "pretrain_on", "distill"), (RECIPES,)),
    **dict.fromkeys(("epochs", "checkpoint_minutes"), (RECIPES, NNUNET)),
    **dict.fromkeys(("step", "plan"), (NNUNET,)),
}
"""Options that not all kinds have, by their names in the parsed arguments."""


def refuse_foreign(args: argparse.Namespace, kind: str, parser: argparse.ArgumentParser) -> None:
    """Refuse options of other kinds of training.

    Parameters
    ----------
    args : Namespace
        As given.
    kind : str
        Of the training that is asked for.
    parser : ArgumentParser
        Knows what options are when they are not given.

    Raises
    ------
    InputError
        Naming the first one.
    """
    for name, kinds in _KINDS.items():
        if kind not in kinds and getattr(args, name) != parser.get_default(name):
            option = "from" if name == "start" else name.replace("_", "-")
            raise InputError(f"--{option}: is for {'; '.join(kinds)}; not for {kind}, so leave it out")
