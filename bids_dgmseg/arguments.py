"""Options of the command line, declared as fields of records, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

Level = Literal["participant", "group"]


@dataclass(frozen=True, kw_only=True)
class OptionDetails:
    """Option of ``bids_dgmseg``, as a field of the configuration declares it."""

    help: str
    """Text of ``--help``; the default is added to it unless it says "default:"."""
    name: str = ""
    """Name on the command line, if it is not that of the field with hyphens."""
    short: str = ""
    both_levels: bool = False
    """Accepted at both levels, although the other options of the record are not."""
    changes_results: bool = False
    """The results of a scan depend on the option: it is recorded, and scans are processed again if it changes."""
    values: str | None = None
    """Placeholder of the values in ``--help``."""
    parse: Callable[[str], Any] | None = None
    """Converts and checks a value; None for that of the field's type."""


def option(help: str, default: Any = MISSING, *, factory: Any = MISSING, **details: Any) -> Any:
    """Declare an option as a field of a frozen dataclass; `details` are those of `OptionDetails`.

    The type of the field says how it is used: ``bool`` is a flag (``--no-NAME`` if it is on by default), ``Literal`` a
    choice, whose value is optional if the first is empty, ``tuple`` takes several values, ``Path`` is made absolute.
    """
    return field(default=default, default_factory=factory, metadata={"option": OptionDetails(help=help, **details)})


def key_of(item: Field[Any]) -> str:
    """Return the key of an option in a namespace."""
    return (item.metadata["option"].name or item.name).replace("-", "_")


def flag_of(item: Field[Any]) -> str:
    """Return the long name of an option on the command line."""
    name = key_of(item).replace("_", "-")
    return f"--no-{name}" if item.default is True else f"--{name}"


def level_of(part: Field[Any], item: Field[Any]) -> Level | None:
    """Return the only level at which an option is accepted, from the field of its record and its own; None for both."""
    return None if item.metadata["option"].both_levels else part.metadata["level"]


def add_record(parser: argparse._ActionsContainer, part: Field[Any], *, shown: Collection[Level | None]) -> None:
    """Add the options of a part of the configuration to a parser.

    Only those of the levels in `shown` are in its help; None are the options of both.
    """
    for item, names, keywords in list_arguments(part.metadata["record"]):
        if level_of(part, item) not in shown:
            keywords["help"] = argparse.SUPPRESS
        parser.add_argument(*names, **keywords)


def list_arguments(record: type) -> Iterator[tuple[Field[Any], list[str], dict[str, Any]]]:
    """Yield the fields of a record with names and keywords for argparse.

    Options that are not on the command line are absent from the namespace, so that the record's defaults apply.
    """
    hints = get_type_hints(record)
    for item in fields(record):
        declared: OptionDetails = item.metadata["option"]
        keywords: dict[str, Any] = {"dest": key_of(item), "default": argparse.SUPPRESS, "help": _describe(item)}
        names = [*([declared.short] if declared.short else []), flag_of(item)]
        yield item, names, {**keywords, **_conversion(hints[item.name], item)}


def _describe(item: Field[Any]) -> str:
    declared: OptionDetails = item.metadata["option"]
    plain = isinstance(item.default, str | int | float) and not isinstance(item.default, bool) and item.default != ""
    return declared.help + (f" (default: {item.default})" if plain and "default:" not in declared.help else "")


def _conversion(hint: Any, item: Field[Any]) -> dict[str, Any]:
    """Return the keywords of argparse that follow from the type of a field."""
    declared: OptionDetails = item.metadata["option"]
    if hint is bool:
        return {"action": "store_false" if item.default is True else "store_true"}
    if get_origin(hint) is Literal:
        choices = tuple(filter(None, get_args(hint)))
        return {"choices": choices, **({"nargs": "?", "const": choices[0]} if "" in get_args(hint) else {})}
    is_path = hint is Path or Path in get_args(hint)
    default_type = absolute_path if is_path else str
    keywords = {
        "type": declared.parse or default_type,
        "metavar": declared.values or ("FOLDER" if is_path else "NAME"),
    }
    return keywords | ({"nargs": "+", "action": "extend"} if get_origin(hint) is tuple else {})


def build_record(record: type, values: Mapping[str, Any]) -> Any:
    """Fill a record with the values of a namespace; several values of an option lose their duplicates."""
    present = {item.name: values[key_of(item)] for item in fields(record) if key_of(item) in values}
    return record(
        **{name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value for name, value in present.items()}
    )


def settings_of(record: Any) -> dict[str, Any]:
    """Return the options that change results, by their names, without those that are empty."""
    values = {key_of(item): getattr(record, item.name) for item in fields(record) if _changes_results(item)}
    return {name: value for name, value in values.items() if value not in (None, (), "")}


def _changes_results(item: Field[Any]) -> bool:
    return "option" in item.metadata and item.metadata["option"].changes_results


def absolute_path(text: str) -> Path:
    """Return an absolute path, with ``~`` expanded; each step runs in a different working directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    try:
        return Path(os.path.normpath(Path(text).expanduser().absolute()))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: no home folder of that user; use an absolute path") from None
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: the current folder no longer exists; use an absolute path") from None


def number(
    text: str, *, convert: Callable[[str], int | float] = int, low: float, high: float = math.inf, expected: str
) -> int | float:
    """Return a finite number from `low` to `high`; what is `expected` completes the message "'x' is not …"."""
    with suppress(ValueError):
        if low <= (value := convert(text)) <= high and value < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


positive_int = partial(number, low=1, expected="a positive integer")
non_negative_int = partial(number, low=0, expected="a non-negative integer")
positive_float = partial(number, convert=float, low=math.ulp(0), expected="a positive number")
non_negative_float = partial(number, convert=float, low=0, expected="a non-negative number")
seed = partial(number, low=0, high=999_999, expected="an integer from 0 to 999999")
"""The seeds derived for each sample would overflow with larger ones."""


def entity(text: str) -> str:
    """Return a BIDS entity such as ``desc-manual``."""
    if not re.fullmatch(r"[a-z]+-[0-9a-zA-Z+]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a BIDS entity such as desc-manual or seg-dgm16")
    return text


def label(text: str, *, prefix: str) -> str:
    """Return a label without its prefix.

    >>> label("sub-01", prefix="sub-"), label("01", prefix="sub-")
    ('01', '01')
    """
    bare = text.removeprefix(prefix)
    if re.fullmatch(r"[0-9a-zA-Z+]+", bare):
        return bare
    raise argparse.ArgumentTypeError(f"{text!r} is not a label (letters and digits, with or without {prefix})")


participant_label, session_label = partial(label, prefix="sub-"), partial(label, prefix="ses-")
