"""Declaration of the options of verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bids_dgmseg.arguments import (
    absolute_path,
    entity,
    non_negative_float,
    non_negative_int,
    participant_label,
    positive_float,
    positive_int,
    seed,
)


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
START = option(
    "--from FOLDER",
    "initialize with these weights; `default` for the shipped ones (default: random initialization)",
    dest="start",
)
RECIPE: list[Option | list[Option]] = [
    option("--epochs N", "maximum epochs (default: the paper's)", positive_int),
    option("--minutes M", "time limit per fold (default: none)", positive_float),
    option("--learning-rate RATE", "learning rate (default: the paper's)", positive_float),
    START,
    option("--scans N", "use only N training participants per fold (default: all)", positive_int),
    option("--holdout LABEL ...", "participants to leave out entirely", participant_label),
    *LABELS,
    option(
        "--variant NAME",
        "alternative recipe; attunet25d: source (two classes on axial slices, for --from), resnet50; deepqsmseg: small "
        "(6 to 96 instead of 16 to 256 filters) (default: %(default)s)",
        default="paper",
    ),
    option(
        "--arch KEY=VALUE ...", "arguments of the network, such as attention=false (default: those of the registry)"
    ),
    option(
        "--recipe KEY=VALUE ...",
        "values of the recipe, such as sampling.step=[9,9,9] or loss.terms.overlap=0 (default: the paper's)",
    ),
    [
        option(
            "--pretrain-on FOLDER ...",
            "output of bids_dgmseg for maps without manual labels: train on them before the manual labels; "
            "several folders are fused by majority vote",
            absolute_path,
        ),
        option(
            "--distill FOLDER ...",
            "output of bids_dgmseg for maps without manual labels: train on them together with the manual "
            "labels; one folder per model",
            absolute_path,
        ),
    ],
]
"""Options of the training of a paper's network."""

PLAN = option(
    "--plan",
    "paper: 0.86 mm voxels and nnU-Net's own filters and patches, for a GPU; small: weights below 10 MB in "
    "total, for a CPU; with --from that of the weights (default: %(default)s)",
    choices=("paper", "small"),
    default="paper",
)
CHECKPOINT = option(
    "--checkpoint-minutes M", "time between checkpoints (default: %(default)g)", non_negative_float, default=2.0
)
RUNTIME = [
    option("--seed S", "seed of initial weights and samples (default: %(default)s)", seed, default=1),
    option(
        "--device",
        "device for the network; mps: GPU of a Mac (default: %(default)s, a CUDA GPU if there is one)",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
    ),
    option(
        "--workers N",
        "processes that draw samples, and in train prepare maps, too (default: %(default)s)",
        non_negative_int,
        default=1,
    ),
]
