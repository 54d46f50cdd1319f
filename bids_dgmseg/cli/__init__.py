"""Command lines: ``bids_dgmseg`` (BIDS App) and ``dgmseg`` (tools), whose verbs and options are declared here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NoReturn

from bids_dgmseg.errors import INVALID


class Parser(argparse.ArgumentParser):
    """Parser that reports an error in two lines: what is wrong, and the option that may be meant."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        words = [word.partition("=")[0] for word in message.split()] if message.startswith("unrecognized") else []
        similar = [name for word in words for name in get_close_matches(word, self._option_string_actions, n=1)]
        hint = f"did you mean {similar[0]}?" if similar else f"see {self.prog} --help"
        self.exit(INVALID, f"{self.prog}: error: {message}\n{hint}\n")


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
    for item in options:
        if isinstance(item, Option):
            parser.add_argument(*item.names, **item.keywords)
        else:
            add_options(parser.add_mutually_exclusive_group(), item)


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
