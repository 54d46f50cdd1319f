"""Check values from the command line against type annotations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Limits:
    """Range of a number, as in ``Annotated[int, Limits(1)]``; the default is 0 or more."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is excluded."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low)

    def __str__(self) -> str:
        upper = "" if math.isinf(self.high) else f" and at most {self.high:g}"
        return f"{'above' if self.above else 'of at least'} {self.low:g}{upper}"


@dataclass(frozen=True)
class AnyLength:
    """Marks a list whose length may change, as in ``Annotated[tuple[int, ...], AnyLength()]``."""


Count = Annotated[int, Limits(1)]

Positive = Annotated[float, Limits(0, above=True)]

Axis = Annotated[int, Limits(0, 2)]

_NAMES: Mapping[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def convert(kind: Any, value: Any, limits: Limits = Limits()) -> Any:
    """Convert a value to its annotation: lists to tuples, integers to floats.

    Parameters
    ----------
    kind : annotation
        Composed of ``int``, ``float``, ``bool``, ``str``, ``Literal``, ``tuple``, ``Sequence``, ``Annotated`` with
        `Limits` or `AnyLength`, and ``None``, which cannot be given.
    value : object
        Value read from TOML.
    limits : Limits
        Range of numbers whose annotation has none.

    Raises
    ------
    ValueError
        If it has another type or lies outside the range.

    Examples
    --------
    >>> convert(tuple[float, ...], [1, 0.5])
    (1.0, 0.5)
    """
    outer, parts = get_origin(kind), get_args(kind)
    if outer is Annotated:
        return convert(parts[0], value, next((part for part in parts[1:] if isinstance(part, Limits)), limits))
    if NoneType in parts:
        return convert(next(part for part in parts if part is not NoneType), value, limits)
    if outer in (tuple, Sequence):
        if not isinstance(value, list | tuple) or (outer is Sequence and not value):
            raise ValueError(f"{value!r} is not a non-empty list")
        if outer is tuple and Ellipsis not in parts and len(value) != len(parts):
            raise ValueError(f"{list(value)} is not a list of {len(parts)} values")
        return tuple(convert(parts[0], one, limits) for one in value)
    if outer is Literal:
        valid = any(type(one) is type(value) and one == value for one in parts)  # True == 1
        expected = f"one of {', '.join(str(one) for one in parts if one != '')}"
    elif kind in (int, float):
        valid, expected = type(value) in (int, kind) and value in limits, f"{_NAMES[kind]} {limits}"
    else:
        valid, expected = type(value) is kind, _NAMES[kind]
    if not valid:
        raise ValueError(f"{value!r} is not {expected}")
    return float(value) if kind is float else value
