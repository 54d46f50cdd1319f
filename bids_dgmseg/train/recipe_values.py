"""Values that users give, held against the annotations of what they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin


@dataclass(frozen=True)
class Limits:
    """Which numbers can be meant, as ``Annotated[int, Limits(1)]``; without it those from 0."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    """Whether `low` itself is too low."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and math.isfinite(value) and not (self.above and value == self.low)

    def __str__(self) -> str:
        most = "" if math.isinf(self.high) else f", up to {self.high:g}"
        return f"{'above' if self.above else 'from'} {self.low:g}{most}"


@dataclass(frozen=True)
class AnyLength:
    """Of a list, as ``Annotated[tuple[int, ...], AnyLength()]``, that may get more or fewer values than it has."""


_NAMES: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def fit(kind: Any, value: Any, limits: Limits = Limits()) -> Any:
    """Give a value as an annotation has it: lists as tuples, whole numbers as floats where these are wanted.

    Parameters
    ----------
    kind : annotation
        Of ``int``, ``float``, ``bool``, ``str``, ``Literal``, ``tuple``, ``Sequence``, ``Annotated`` with `Limits` or
        `AnyLength`, or one of them or ``None``, which then is not given.
    value : object
        As read from TOML.
    limits : Limits
        Of numbers whose annotation has none.

    Raises
    ------
    ValueError
        If it is of another kind, or cannot be meant.

    Examples
    --------
    >>> fit(tuple[float, ...], [1, 0.5])
    (1.0, 0.5)
    """
    outer, parts = get_origin(kind), get_args(kind)
    if outer is Annotated:
        return fit(parts[0], value, next((part for part in parts[1:] if isinstance(part, Limits)), limits))
    if NoneType in parts:
        return fit(next(part for part in parts if part is not NoneType), value, limits)
    if outer in (tuple, Sequence):
        if not isinstance(value, list | tuple) or (outer is Sequence and not value):
            raise ValueError(f"{value!r} is not a list with values")
        if outer is tuple and Ellipsis not in parts and len(value) != len(parts):
            raise ValueError(f"{list(value)} is not a list of {len(parts)}")
        return tuple(fit(parts[0], one, limits) for one in value)
    if outer is Literal:
        fits = any(type(one) is type(value) and one == value for one in parts)  # True is 1 otherwise
        wanted = f"one of {', '.join(str(one) for one in parts if one != '')}"
    elif kind in (int, float):
        fits, wanted = type(value) in (int, kind) and value in limits, f"{_NAMES[kind]} {limits}"
    else:
        fits, wanted = type(value) is kind, _NAMES[kind]
    if not fits:
        raise ValueError(f"{value!r} is not {wanted}")
    return float(value) if kind is float else value
