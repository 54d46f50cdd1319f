"""Conditions on participants' columns, such as ``group == "HC" and age > 50``."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_MAX_VALUES = 8

_BACKTICKS = re.compile(r"`([^`]+)`")

_USAGE = 'write it like group == "HC" and age > 50, or site in ["A", "B"]'

_MIRRORED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], pd.Series]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def match_condition(table: pd.DataFrame, condition: str, *, parameter: str) -> NDArray[np.bool_]:
    """Return which rows satisfy a condition, which is the value of a parameter.

    It has comparisons (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``) of columns of text with text,
    numbers or lists of them, joined by ``and``, ``or``, ``not`` or ``&``, ``|``, ``~``; column names with spaces are in
    backticks. Quoted numbers are numbers if the column has numbers. A comparison with a missing value is neither true
    nor false, and such rows do not match.

    >>> table = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "group": ["HC", "PD", None]})
    >>> match_condition(table, 'group != "PD"', parameter="control_filter").tolist()
    [True, False, False]

    Raises
    ------
    InputError
        If the condition is not valid, names an unknown column, orders numbers relative to a word, or matches no row.
    """
    where = f"`{parameter}` {condition}"
    quoted: list[str] = []

    def unquote(match: re.Match[str]) -> str:
        quoted.append(match[1])
        return f"quoted_{len(quoted) - 1}"

    try:
        tree = ast.parse(_BACKTICKS.sub(unquote, condition).strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{where}: cannot be parsed; {_USAGE}") from error
    evaluator = _Evaluator(table, {f"quoted_{place}": name for place, name in enumerate(quoted)}, where)
    matched: NDArray[np.bool_] = evaluator.evaluate(tree.body).fillna(False).to_numpy(bool)
    if not matched.any():
        shown = []
        for name in dict.fromkeys(evaluator.used):
            values = sorted({str(value) for value in table[name].dropna().unique()})
            more = ", …" if len(values) > _MAX_VALUES else ""
            shown.append(f"{name} is {', '.join(values[:_MAX_VALUES]) or 'always missing'}{more}")
        raise InputError(f"{where}: matches no participant with results ({'; '.join(shown)}); fix the condition")
    return matched


class _Evaluator:
    """Evaluates a condition on a table; only comparisons of columns with constants are allowed."""

    def __init__(self, table: pd.DataFrame, names: dict[str, str], where: str) -> None:
        self._table, self._names, self._where = table, names, where
        self.used: list[str] = []

    def evaluate(self, node: ast.expr) -> pd.Series:
        """Evaluate an expression; the result is nullable, as in Kleene's three-valued logic."""
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return reduce(operator.and_, map(self.evaluate, values))
            case ast.BoolOp(op=ast.Or(), values=values):
                return reduce(operator.or_, map(self.evaluate, values))
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.evaluate(left) & self.evaluate(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.evaluate(left) | self.evaluate(right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return ~self.evaluate(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                return reduce(operator.and_, map(self._compare, operands, ops, comparators))
        raise self._invalid(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pd.Series:
        if isinstance(left, ast.Constant | ast.UnaryOp) and isinstance(right, ast.Name):  # 50 < age
            return self._compare(right, _MIRRORED.get(type(op), type(op))(), left)
        if not isinstance(left, ast.Name):
            raise self._invalid(left)
        try:
            constant = ast.literal_eval(right)
        except (ValueError, TypeError, SyntaxError):
            raise self._invalid(right) from None
        is_list, is_order = isinstance(constant, list | tuple | set), isinstance(op, tuple(_COMPARE))
        values = list(constant) if is_list else [constant]
        valid = values and all(isinstance(value, str | int | float) for value in values)
        if isinstance(op, ast.Is | ast.IsNot) or (is_order if is_list else isinstance(op, ast.In | ast.NotIn)):
            valid = False
        if not valid:
            raise self._invalid(right)
        name = self._names.get(left.id, left.id)
        if name not in self._table.columns:
            known = ", ".join(map(str, self._table.columns))
            raise InputError(f"{self._where}: no column {name} (columns: {known}); fix the name")
        self.used.append(name)
        values = self._convert(name, values, is_order=is_order)
        # nullable dtypes, in which a comparison with a missing value is missing
        if isinstance(values[0], str):
            column: pd.Series = self._table[name].map(str, na_action="ignore").astype("string")
        else:
            column = pd.to_numeric(self._table[name].str.removesuffix("+"), errors="coerce").astype("Float64")
        if is_order:
            return _COMPARE[type(op)](column, values[0])
        equal = reduce(operator.or_, (column == value for value in values))
        return equal if isinstance(op, ast.Eq | ast.In) else ~equal

    def _convert(self, name: str, values: list[str | float], *, is_order: bool) -> list[str | float]:
        """Convert the constants to numbers, otherwise all to text, to suit the column.

        Quoted constants are numbers if all of the column are, or, to order it by them, any: as text, 9 follows 50.
        """
        words = [value for value in values if isinstance(value, str)]
        is_number = pd.to_numeric(self._table[name].str.removesuffix("+"), errors="coerce").notna()[
            self._table[name].notna()
        ]
        if not words:
            return values
        no_numbers = [word for word in words if not _NUMBER.fullmatch(word.strip())]
        if not no_numbers and (is_number.any() if is_order else is_number.all()):
            return [float(value) for value in values]
        if is_order and no_numbers and len(is_number) and is_number.all():
            raise InputError(
                f"{self._where}: {name} has numbers, {no_numbers[0]!r} is not one; compare it with a number"
            )
        return [value if isinstance(value, str) else f"{value:g}" for value in values]

    def _invalid(self, node: ast.AST) -> InputError:
        return InputError(f"{self._where}: {ast.unparse(node)!r} is not allowed; {_USAGE}")
