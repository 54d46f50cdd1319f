"""Conditions on participants' columns, such as ``group == "HC" and age > 50``, read as pandas' ``query`` spells them.

They are evaluated here and not by pandas, whose expressions may call any function.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError
from bids_dgmseg.stats.frames import PLAIN_NUMBER, to_numbers

_QUOTED = re.compile(r"`([^`]+)`")

_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_USE = 'write it like group == "HC" and age > 50, or site in ["A", "B"]'


def match_filter(table: pd.DataFrame, condition: str, *, option: str) -> NDArray[np.bool_]:
    """Tell which rows meet a condition.

    Parameters
    ----------
    table : DataFrame
        Columns of text, ``n/a`` or NaN where missing, with ``participant_id``.
    condition : str
        Comparisons (``==``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``in``, ``not in``) of columns with text, numbers or
        lists of them, joined by ``and``, ``or``, ``not`` or ``&``, ``|``, ``~``; names with blanks in backticks. Quoted
        numbers are numbers where the column has numbers.
    option : str
        Where the condition came from, for the messages.

    Returns
    -------
    ndarray of bool, shape (rows,)
        A comparison with a missing value is neither true nor false; what is not true is not matched.

    Raises
    ------
    InputError
        If the condition cannot be read, names a column that does not exist, orders numbers by a word, or is met by
        nobody.

    Examples
    --------
    >>> table = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "group": ["HC", "PD", "n/a"]})
    >>> match_filter(table, 'group != "PD"', option="--control-filter").tolist()
    [True, False, False]
    """
    names: dict[str, str] = {}

    def unquote(match: re.Match[str]) -> str:
        names[f"quoted_{len(names)}"] = match[1]
        return f"quoted_{len(names) - 1}"

    try:
        tree = ast.parse(_QUOTED.sub(unquote, condition).strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{option} {condition}: cannot be read; {_USE}") from error
    reader = _Reader(table, names, f"{option} {condition}")
    met: NDArray[np.bool_] = reader.truth(tree.body).fillna(False).to_numpy(bool)
    if not met.any():
        shown = "; ".join(f"{name} is {_values(table[name])}" for name in dict.fromkeys(reader.used))
        raise InputError(f"{option} {condition}: nobody with measures meets it ({shown}); correct it")
    return met


class _Reader:
    """Evaluates one condition on one table, with three values: true, false, missing."""

    def __init__(self, table: pd.DataFrame, names: Mapping[str, str], where: str) -> None:
        self._table, self._names, self._where = table, names, where
        self.used: list[str] = []

    def truth(self, node: ast.expr) -> pd.Series:
        """Evaluate what is true or false."""
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self.truth(value) for value in values]
                joined = parts[0]
                for part in parts[1:]:
                    joined = joined & part if isinstance(op, ast.And) else joined | part
                return joined
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                return self.truth(left) & self.truth(right)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.truth(left) | self.truth(right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return ~self.truth(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                results = [self._compare(a, op, b) for a, op, b in zip(operands, ops, operands[1:], strict=False)]
                together = results[0]
                for result in results[1:]:
                    together = together & result
                return together
        raise self._refuse(node)

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pd.Series:
        if isinstance(left, ast.Constant | ast.UnaryOp) and isinstance(right, ast.Name):  # 50 < age
            turned: dict[type[ast.cmpop], type[ast.cmpop]] = {
                ast.Lt: ast.Gt,
                ast.LtE: ast.GtE,
                ast.Gt: ast.Lt,
                ast.GtE: ast.LtE,
            }
            return self._compare(right, turned.get(type(op), type(op))(), left)
        if not isinstance(left, ast.Name):
            raise self._refuse(left)
        try:
            wanted = ast.literal_eval(right)
        except (ValueError, TypeError, SyntaxError):
            raise self._refuse(right) from None
        several = isinstance(wanted, list | tuple | set)
        choices = list(wanted) if several else [wanted]
        if not choices or not all(isinstance(choice, str | int | float) for choice in choices):
            raise self._refuse(right)
        name = self._find(left.id)
        if isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE):
            choices = self._order(name, choices)
        else:
            choices = self._alike(name, choices)
        values, there = self._column(name, numeric=not isinstance(choices[0], str))
        if several or isinstance(op, ast.In | ast.NotIn):
            if not several or not isinstance(op, ast.In | ast.NotIn | ast.Eq | ast.NotEq):
                raise self._refuse(right)
            found = values.isin(choices)
            result = found if isinstance(op, ast.In | ast.Eq) else ~found
        else:
            result = _COMPARE[type(op)](values, choices[0])
        return result.astype("boolean").where(there)

    def _order(self, column: str, choices: list[Any]) -> list[Any]:
        """Read quoted numbers that a column with numbers is held against: as text, 9 comes after 50."""
        if all(isinstance(choice, str) for choice in choices) and self._numbers(column).any():
            read = [_number(choice) for choice in choices]
            if None not in read:
                return read
            if self._numbers(column).all():
                raise InputError(
                    f"{self._where}: {column} has numbers, {choices[read.index(None)]!r} is none; "
                    "compare it with a number"
                )
        return choices

    def _alike(self, column: str, choices: list[Any]) -> list[Any]:
        """Read all choices as numbers where the whole column has numbers, else all as text if one is."""
        if not any(isinstance(choice, str) for choice in choices):
            return choices
        read = [_number(choice) for choice in choices]
        if None not in read and self._numbers(column).all():
            return read
        return [choice if isinstance(choice, str) else f"{choice:g}" for choice in choices]

    def _numbers(self, column: str) -> pd.Series:
        """Tell which of the values that are there are numbers."""
        _, there = self._column(column, numeric=False)
        return self._column(column, numeric=True)[1][there]

    def _find(self, name: str) -> str:
        """Find the column that a name in the condition means."""
        column = self._names.get(name, name)
        if column not in self._table.columns:
            there = ", ".join(map(str, self._table.columns))
            raise InputError(f"{self._where}: no column {column} (columns: {there}); correct the name")
        self.used.append(column)
        return column

    def _column(self, column: str, *, numeric: bool) -> tuple[pd.Series, pd.Series]:
        """Values of a column, and where there are any."""
        if numeric:
            values, _ = to_numbers(self._table, column)
            return values, values.notna()
        texts = self._table[column].astype(object)
        return texts.astype(str), texts.notna() & (texts != "n/a")

    def _refuse(self, node: ast.AST) -> InputError:
        return InputError(f"{self._where}: {ast.unparse(node)!r} cannot be used in it; {_USE}")


def _number(choice: str | int | float) -> float | None:
    """Read what is compared with as a number; None if it is none."""
    return float(choice) if not isinstance(choice, str) or PLAIN_NUMBER.fullmatch(choice.strip()) else None


def _values(column: pd.Series) -> str:
    texts = sorted({str(value) for value in column.dropna().unique()} - {"n/a"})
    shown = ", ".join(texts[:8]) or "nowhere given"
    return f"{shown}, …" if len(texts) > 8 else shown
