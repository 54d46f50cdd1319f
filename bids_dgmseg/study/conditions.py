"""Conditions on the participants' columns, such as ``group == "HC" and age > 50``, in the syntax of pandas queries.

They are not evaluated by `pandas.DataFrame.query`, which may call functions, and which replaces ``!=`` with text by
``not in`` (pandas 2 and 3), so that a missing group would satisfy ``group != "PD"``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.study.demographics import PLAIN_NUMBER, parse_numbers

_BACKTICKS = re.compile(r"`([^`]+)`")

_USAGE = 'write it like group == "HC" and age > 50, or site in ["A", "B"]'

_MIRRORED: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}

_ORDER = tuple(_MIRRORED)

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], pd.Series]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_N_SHOWN = 8


def match_condition(table: pd.DataFrame, condition: str, *, option: str) -> NDArray[np.bool_]:
    """Return which rows satisfy a condition.

    Parameters
    ----------
    table : DataFrame
        Columns of text, NaN where missing, with ``participant_id``.
    condition : str
        Comparisons (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``) of columns with text, numbers or
        lists of them, joined by ``and``, ``or``, ``not`` or ``&``, ``|``, ``~``; column names with spaces in backticks.
        Quoted numbers are numbers if the column has numbers.
    option : str
        Option that the condition was given to, for the messages.

    Returns
    -------
    ndarray of bool, shape (rows,)
        A comparison with a missing value is neither true nor false, and such rows do not match.

    Raises
    ------
    InputError
        If the condition is not valid, names an unknown column, orders numbers relative to a word, or matches no row.

    Examples
    --------
    >>> table = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "group": ["HC", "PD", None]})
    >>> match_condition(table, 'group != "PD"', option="--control-filter").tolist()
    [True, False, False]
    """
    where = f"{option} {condition}"
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
        shown = "; ".join(f"{name} is {_list_values(table[name])}" for name in dict.fromkeys(evaluator.used))
        raise InputError(f"{where}: matches no participant with results ({shown}); fix the condition")
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
        is_list, is_order = isinstance(constant, list | tuple | set), isinstance(op, _ORDER)
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
            column = parse_numbers(self._table, name)[0].astype("Float64")
        if is_order:
            return _COMPARE[type(op)](column, values[0])
        equal = reduce(operator.or_, (column == value for value in values))
        return equal if isinstance(op, ast.Eq | ast.In) else ~equal

    def _convert(self, name: str, values: list[str | float], *, is_order: bool) -> list[str | float]:
        """Convert the constants to numbers, otherwise all to text, to suit the column.

        Quoted constants are numbers if all of the column are, or, to order it by them, any: as text, 9 follows 50.
        """
        words = [value for value in values if isinstance(value, str)]
        is_number = parse_numbers(self._table, name)[0].notna()[self._table[name].notna()]
        if not words:
            return values
        no_numbers = [word for word in words if not PLAIN_NUMBER.fullmatch(word.strip())]
        if not no_numbers and (is_number.any() if is_order else is_number.all()):
            return [float(value) for value in values]
        if is_order and no_numbers and len(is_number) and is_number.all():
            raise InputError(
                f"{self._where}: {name} has numbers, {no_numbers[0]!r} is not one; compare it with a number"
            )
        return [value if isinstance(value, str) else f"{value:g}" for value in values]

    def _invalid(self, node: ast.AST) -> InputError:
        return InputError(f"{self._where}: {ast.unparse(node)!r} is not allowed; {_USAGE}")


def _list_values(column: pd.Series) -> str:
    values: Sequence[str] = sorted({str(value) for value in column.dropna().unique()})
    shown = ", ".join(values[:_N_SHOWN]) or "always missing"
    return f"{shown}, …" if len(values) > _N_SHOWN else shown
