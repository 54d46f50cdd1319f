"""Participants' columns: names of age, sex, group and site, numbers and categories as spelled there, conditions.

Conditions such as ``group == "HC" and age > 50`` have the syntax of pandas queries, but are not evaluated by
`pandas.DataFrame.query`, which may call functions, and which replaces ``!=`` with text by ``not in`` (pandas 2 and 3),
so that a missing group would satisfy ``group != "PD"``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.stats.long_table import require_columns
from bids_dgmseg.study.spreadsheets import DECIMAL_COMMA, MISSING_TEXTS, fold

_OCCASIONS = ("", "at scan", "at mri", "at visit", "at session", "at acquisition", "at baseline")

AGE = tuple(f"age {at} {unit}" for at in _OCCASIONS for unit in ("", "years", "in years", "year", "yrs", "yr", "y"))
SEX, GROUP, SITE = ("sex", "gender"), ("group", "diagnosis"), ("site", "site id")
"""Names that a column may have; case, spaces and punctuation do not matter."""

_SEXES = {
    **dict.fromkeys(("f", "female", "woman", "w"), "F"),
    **dict.fromkeys(("m", "male", "man"), "M"),
    **dict.fromkeys(("o", "other"), "O"),
}

MISSING_CODES = ("-9", "-99", "-999", "-9999", "999", "9999")
"""Numbers that stand for a missing category or value."""

_NOT_STATED = ("none", *MISSING_CODES)

_MIN_LARGEST = 5
"""Participants in the largest category, from which on one with a single participant is reported."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_CAPPED = re.compile(r"(\d+\.?\d*)\s*\+|(?:>=?|≥)\s*(\d+\.?\d*)")

PER_YEAR = {"years": 1.0, "months": 12.0, "weeks": 365.25 / 7, "days": 365.25}

UNIT_NAMES = {
    **{unit: unit for unit in PER_YEAR},
    **dict.fromkeys(("year", "yr", "yrs", "y", "a"), "years"),
    **dict.fromkeys(("month", "mo", "mos", "mon"), "months"),
    **dict.fromkeys(("week", "wk", "wks"), "weeks"),
    **dict.fromkeys(("day", "d"), "days"),
}
"""Spelling of a unit, in lower case → key of `PER_YEAR`."""

_DICOM_UNITS = {unit[0]: unit for unit in PER_YEAR}

_DURATION = re.compile(r"(\d+(?:[.,]\d+)?)\s*([a-z]+)\.?(?:\s*-?\s*old)?", re.IGNORECASE)
"""Number and unit, as ``67 y``, ``67.5 years`` or, in DICOM, ``067Y``."""

_SEPARATORS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")
"""Within a name: PD- and PD are different."""

_MAX_WARNINGS = 5

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


def find_column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """Return the first column that has one of some names, in any case and with any punctuation.

    >>> find_column(["sex", "Age (years)"], AGE)
    'Age (years)'
    """
    by_name = {fold(str(column)): str(column) for column in reversed(list(columns))}
    return next((by_name[name] for name in map(fold, names) if name in by_name), None)


def read_categories(
    values: pd.Series, who: pd.Series, *, where: str, missing: Sequence[str] = _NOT_STATED
) -> tuple[pd.Series, list[str]]:
    """Mask codes of missing values and unite spellings; warnings name them, and a category of only one participant.

    Values that differ in case, or in what separates words (a space, a hyphen, an underscore), become the spelling that
    most participants have.

    `who` are the participants of the values, `where` is the table and column for the warnings.

    >>> sites, who = pd.Series(["A", "999"]), pd.Series(["sub-1", "sub-2"])
    >>> read_categories(sites, who, where="participants.tsv: site")[1]
    ["participants.tsv: site of sub-2 is '999', which counts as missing"]
    """
    is_code = values.map(str.casefold, na_action="ignore").isin(missing)
    lines = [_name_values(values[is_code], who, where=where, what="which counts as missing")] if is_code.any() else []
    kept = values.mask(is_code)
    spellings = unite_spellings(kept, who)
    for spelling in dict.fromkeys(spellings.values()):
        if others := sorted(text for text, united in spellings.items() if united == spelling != text):
            lines.append(
                f"{where} {' and '.join(map(repr, others))} {'is' if len(others) == 1 else 'are'} taken as {spelling!r}"
            )
    kept = kept.map(spellings, na_action="ignore").astype(object)
    counts = who.groupby(kept, sort=False).nunique()
    if len(counts) and counts.max() >= _MIN_LARGEST:
        lines += [
            f"{where} is {value!r} for {who[kept == value].iloc[0]} only; correct it if it is misspelled, write n/a if "
            "it means missing"
            for value in counts.index[counts == 1]
        ]
    return kept, lines


def unite_spellings(values: pd.Series, who: pd.Series) -> dict[str, str]:
    """Return for each value the spelling that most participants (`who`) have, the first in the alphabet if equal.

    >>> values = pd.Series(["Healthy control", "healthy_control", "healthy_control", "PD", "PD-"])
    >>> unite_spellings(values, pd.Series(range(5)))["Healthy control"]
    'healthy_control'
    """
    counts = who.groupby(values, sort=True).nunique()
    texts = pd.Series(counts.index, dtype=object).astype(str)
    folded = texts.map(lambda text: _SEPARATORS.sub(" ", text.strip()).casefold())
    table = pd.DataFrame({"text": texts, "folded": folded, "n": counts.to_numpy()})
    common = table.sort_values(["n", "text"], ascending=[False, True], kind="stable").drop_duplicates("folded")
    spelling = common.set_index("folded")["text"]
    return dict(zip(table["text"], table["folded"].map(spelling), strict=True))


def read_sexes(
    values: pd.Series, who: pd.Series, levels: Mapping[str, Any], *, where: str, stated: Iterable[str] = ()
) -> tuple[pd.Series, list[str]]:
    """Convert sexes to ``F``, ``M`` and ``O`` (other, as in BIDS), NaN for any other value, with warnings.

    `levels` are the ``Levels`` of the data dictionary. Without them, two codes such as 1 and 2 remain as they are;
    `stated` are the values of all participants, of whom some may have been selected.
    """
    values, lines = read_categories(values, who, where=where)
    lines = [line for line in lines if line.endswith("missing")]  # spellings are understood below
    known = dict(_SEXES)
    for code, level in levels.items():
        text = level.get("Description") if isinstance(level, Mapping) else level
        words = re.findall(r"\w+", f"{text}".casefold())
        known |= {str(code).casefold(): _SEXES[word] for word in words if word in _SEXES and len(word) > 1}
    sexes = values.map(lambda text: known.get(text.casefold()), na_action="ignore").astype(object)
    unclear = values.notna() & sexes.isna()
    own = {*values.dropna()}
    of_all = own.union(text for text in stated if text.casefold() not in _NOT_STATED)
    for texts in (own, of_all) if unclear.any() else ():
        if len(texts) != 2 or any(text.casefold() in known for text in texts):
            continue
        shown = " and ".join(map(repr, sorted(texts)))
        return values, [*lines, f"{where} is coded as {shown}, used as they are; write F and M to have them named"]
    if unclear.any():
        lines.append(_name_values(values[unclear], who, where=where, what="not F, M or O; it counts as missing"))
    if (sexes == "O").any():
        lines.append(_name_values(values[sexes == "O"], who, where=where, what="a separate category (other)"))
    return sexes.where(sexes.notna()), lines


def _name_values(values: pd.Series, who: pd.Series, *, where: str, what: str) -> str:
    shown = " or ".join(map(repr, sorted(set(values))))
    return f"{where} of {list_some(set(who[values.index]))} is {shown}, {what}"


def parse_numbers(
    table: pd.DataFrame, column: str, files: pd.Series | None = None
) -> tuple[pd.Series, tuple[str, ...]]:
    """Parse a column of participants.tsv as numbers, with one warning per participant with an unusual spelling.

    ``67 y`` is 67; ``89+`` and ``>89`` are 89, ``034Y`` and ``018M`` (DICOM) 34 and 1.5 years, ``30,5`` is 30.5;
    anything else that is not a number is missing. `table` has ``participant_id``, and `files` the names of the tables
    that the values are from (by default participants.tsv), for the warnings; from the sixth on they are joined.

    >>> ages = pd.DataFrame({"participant_id": ["sub-1", "sub-2", "sub-3"], "age": ["30", "89+", "n/a"]})
    >>> values, warnings = parse_numbers(ages, "age")
    >>> values.tolist()
    [30.0, 89.0, nan]
    >>> warnings
    ("participants.tsv: age of sub-2 is '89+', taken as 89",)
    """
    require_columns(table, column, "participant_id")
    if pd.api.types.is_numeric_dtype(table[column]):
        return table[column].astype(np.float64), ()
    texts = table[column].astype(object).where(table[column].notna(), "").astype(str).str.strip()
    parsed = {text: _parse_number(text) for text in texts.unique()}
    values = texts.map(lambda text: parsed[text][0]).astype(np.float64)
    where = pd.Series("participants.tsv", table.index) if files is None else files
    cells = pd.DataFrame({"file": where, "who": table["participant_id"], "text": texts})
    unusual = cells[[parsed[text][1] for text in texts]]
    unusual = unusual.drop_duplicates()
    warnings = []
    for file, who, text in unusual.head(_MAX_WARNINGS).itertuples(index=False):
        value = parsed[text][0]
        taken = "not a number; it counts as missing" if np.isnan(value) else f"taken as {value:g}"
        warnings.append(f"{file}: {column} of {who} is {text!r}, {taken}")
    if len(unusual) > _MAX_WARNINGS:
        others = unusual["text"].iloc[_MAX_WARNINGS:]
        file = unusual["file"].iloc[_MAX_WARNINGS]
        n_missing = sum(bool(np.isnan(parsed[text][0])) for text in others)
        warnings.append(
            f"{file}: {column} of {len(others)} more is not plainly a number, such as "
            f"{others.iloc[0]!r}; {n_missing} of them {'counts' if n_missing == 1 else 'count'} as missing"
        )
    return values, tuple(warnings)


def without_codes(values: pd.Series, who: pd.Series, *, where: str) -> tuple[pd.Series, list[str]]:
    """Replace codes of missing values among numbers by NaN; returns the numbers and a line about these codes.

    A number of `MISSING_CODES` is one if it is negative and no other number is, or more than twice the largest of the
    others.

    >>> who = pd.Series(["sub-1", "sub-2", "sub-3", "sub-4"])
    >>> without_codes(pd.Series([12.0, 30.0, -9.0, 999.0]), who, where="participants.tsv: score")[0].tolist()
    [12.0, 30.0, nan, nan]
    """
    listed = values.isin([float(code) for code in MISSING_CODES])
    others = values[~listed].dropna()
    if others.empty:
        return values, []
    low, high = float(others.min()), float(others.max())
    is_code = listed & (((values < 0) & (low >= 0)) | (values > max(2 * high, 0)))
    codes = values[is_code]
    if codes.empty:
        return values, []
    shown = ", ".join(f"{code:g}" for code in sorted(set(codes)))
    line = (
        f"{where} of {list_some(set(who[codes.index]))} is {shown}, the others are from {low:g} to {high:g}; it counts "
        "as missing"
    )
    return values.mask(is_code), [line]


def _parse_number(text: str) -> tuple[float, bool]:
    """Value of a cell, and whether its spelling is unusual."""
    if text.casefold() in MISSING_TEXTS:
        return np.nan, False
    if plain := _NUMBER.fullmatch(text):
        return float(plain[0]), False
    if comma := DECIMAL_COMMA.fullmatch(text):
        return float(f"{comma[1]}.{comma[2]}"), True
    if capped := _CAPPED.fullmatch(text):
        return float(capped[1] or capped[2]), True
    if duration := _DURATION.fullmatch(text):
        if unit := unit_of_value(text):
            plain_years = unit == "years" and not duration[1].startswith("0") and "," not in duration[1]
            return float(duration[1].replace(",", ".")) / PER_YEAR[unit], not plain_years
    return np.nan, True


def unit_of_value(text: str) -> str | None:
    """Return the unit of time that is written behind a number; None if there is none.

    >>> [unit_of_value(text) for text in ("67 years", "018M", "18 m", "67", "12 apples")]
    ['years', 'months', None, None, None]
    """
    if not (duration := _DURATION.fullmatch(text.strip())):
        return None
    word = duration[2].lower()
    if word in _DICOM_UNITS and re.fullmatch(r"\d{3}[a-zA-Z]", text.strip()):
        return _DICOM_UNITS[word]
    return UNIT_NAMES.get(word)


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
