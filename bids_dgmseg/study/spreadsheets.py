"""Read tables written by hand or by a spreadsheet: separators, quotes, labels and missing values."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import check_file_type, describe_unfetched, is_pointer_content

MISSING_TEXTS = ("", "n/a", "na", "nan", "#n/a")

_MISSING_MARKS = ("-", "--", "?", ".", "n.a.", "null", "unknown", "unk", "missing", "not available", "#value!")
"""Other texts of missing values, which are reported."""

Notes = Mapping[str, Sequence[str]]
"""Key of `_NOTES` → what is unusual in a table."""

_NOTES = {
    "ids": "{}; spell ids like the folders",
    "short": "fewer values than the header in {}; the last columns are n/a there",
    "marks": "{}; read as missing, which BIDS writes n/a",
}

DECIMAL_COMMA = re.compile(r"([-+]?\d+),(\d+)")

_INTEGER = re.compile(r"(\d+)(\.0+)?")


def read_labelled_table(
    path: Path, labels: Iterable[str], *, prefix: str, id_column: str, spellings: Sequence[str]
) -> tuple[pd.DataFrame, Notes]:
    """Read a table whose rows are identified by labels, tolerating common variants (see `read_participants`).

    Parameters
    ----------
    path : Path
    labels : iterable of str
        Labels of the scans, by which ids of another spelling are named.
    prefix : str
        Of the ids, such as ``sub-``.
    id_column : str
        Name of the id column in BIDS.
    spellings : sequence of str
        Accepted names of the id column, as `fold` changes them.

    Returns
    -------
    table : DataFrame
        Text by label, NaN where missing.
    notes : Notes
        What is unusual, for `describe_notes`.

    Raises
    ------
    InputError
        If the file cannot be read, there is no id column, a row is longer than the header, or an id appears twice.
    """
    columns, rows, notes = read_labelled_rows(path, labels, prefix=prefix, id_column=id_column, spellings=spellings)
    index = pd.Index(rows, dtype=object)
    return pd.DataFrame(rows.values(), index=index, columns=columns, dtype=object), notes


def read_labelled_rows(
    path: Path, labels: Iterable[str], *, prefix: str, id_column: str, spellings: Sequence[str]
) -> tuple[list[str], dict[str, list[str | float]], Notes]:
    """Return columns, rows by label, and notes of a table as `read_labelled_table` reads it."""
    header, lines = _read_rows(path, id_column=id_column)
    ids = [place for place, column in enumerate(header) if fold(column) in spellings]
    if not ids:
        raise InputError(
            f"{path.name}: no column {id_column} (columns: {', '.join(header) or 'none'}); rename the column of labels"
        )
    columns = [column for place, column in enumerate(header) if place != ids[0]]
    if repeated := [column for column, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{path.name}: column {repeated[0]!r} appears twice; rename one")
    match = _LabelMatcher(labels, prefix)
    rows: dict[str, list[str | float]] = {}
    line_of: dict[str, int] = {}
    notes: dict[str, list[str]] = {kind: [] for kind in _NOTES}
    for number, values in lines:
        if len(values) > len(header):
            raise InputError(f"{path.name}: line {number} has {len(values)} values, expected {len(header)}; fix it")
        if len(values) < len(header):
            notes["short"].append(f"line {number}")
        values = [*values, *[""] * (len(header) - len(values))]
        label = match(text := values.pop(ids[0]))
        if not label:
            raise InputError(f"{path.name}: line {number} has no {id_column}; fill it in or remove the line")
        if label in rows:
            raise InputError(
                f"{path.name}: {prefix}{label} appears twice (lines {line_of[label]} and {number}); "
                f"keep one line per {id_column.removesuffix('_id')}"
            )
        if label != (plain := text.removeprefix(prefix)) and not _INTEGER.fullmatch(plain):
            notes["ids"].append(f"{text} is {prefix}{label}")
        marks = {name: cell for name, cell in zip(columns, values, strict=True) if cell.casefold() in _MISSING_MARKS}
        notes["marks"] += [f"{name} of {prefix}{label} is {cell!r}" for name, cell in marks.items()]
        rows[label] = [
            float("nan") if name in marks else cell or float("nan") for name, cell in zip(columns, values, strict=True)
        ]
        line_of[label] = number
    return columns, rows, notes


def describe_notes(tables: Sequence[Notes], *, where: str) -> list[str]:
    """Return one line per kind of note."""
    found = {kind: [text for notes in tables for text in notes[kind]] for kind in _NOTES}
    return [f"{where}: {_NOTES[kind].format(list_some(texts))}" for kind, texts in found.items() if texts]


class _LabelMatcher:
    """Finds the scans' label for an id.

    A number, also with decimal zeros, matches the only label of that value, other text the only label with the same
    letters and digits.
    """

    def __init__(self, labels: Iterable[str], prefix: str) -> None:
        self.labels, self.prefix = set(labels), prefix

    @cached_property
    def by_number(self) -> dict[int, str]:
        numbers = Counter(int(label) for label in self.labels if label.isdecimal())
        return {int(label): label for label in self.labels if label.isdecimal() and numbers[int(label)] == 1}

    @cached_property
    def by_spelling(self) -> dict[str, str]:
        spellings = Counter(map(fold, self.labels))
        return {fold(label): label for label in self.labels if spellings[fold(label)] == 1}

    def __call__(self, text: str) -> str:
        label = text.removeprefix(self.prefix)
        whole = re.sub(r"\.0+$", "", text)
        if label in self.labels or "." in whole:  # 1.5 is not sub-15
            return label
        short = fold(whole).removeprefix(fold(self.prefix))
        spelled = self.by_spelling.get(fold(whole)) or self.by_spelling.get(short)
        return spelled or (self.by_number.get(int(short), label) if short.isdecimal() else label)


def fold(text: str) -> str:
    """Return letters and digits alone, in lower case, to compare names and ids that people spell differently.

    >>> fold("Age (years)")
    'ageyears'
    """
    return re.sub(r"[\W_]", "", text.casefold())


def _read_rows(path: Path, *, id_column: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Split a table into its header and its rows, each with its line number; missing values are empty."""
    text = _read_text(path)
    first = next((line for line in text.splitlines() if line.strip("\t;, ")), None)
    if first is None:
        raise InputError(f"{path.name}: the file is empty; write at least the header {id_column}")
    separator = "\t" if "\t" in first else max(";,", key=first.count)
    split = _split_rows(text, separator, name=path.name)
    rows = [(number, _clean(values, separator)) for number, values in split if any(map(str.strip, values))]
    header = rows[0][1]
    while header and not header[-1]:
        header.pop()
    if "" in header:
        raise InputError(f"{path.name}: column {header.index('') + 1} has no name; name it")
    for _, values in rows[1:]:
        while len(values) > len(header) and not values[-1]:
            values.pop()
    return header, rows[1:]


def _split_rows(text: str, separator: str, *, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of each row; spreadsheets quote cells with separators or line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    number = 1
    try:
        for values in reader:
            yield number, values
            number = reader.line_num + 1  # a quoted value may span several lines
    except csv.Error as error:
        raise InputError(f"{name}: line {number} has a quote that is not closed; remove or close it") from error


def _read_text(path: Path) -> str:
    """Read UTF-8, with or without a byte order mark, or UTF-16 (Excel's "Unicode text")."""
    check_file_type(path)
    try:
        data = path.read_bytes()
        if is_pointer_content(data):
            raise InputError(describe_unfetched(path))
        text = data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        return unicodedata.normalize("NFC", text)
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not UTF-8; save it as UTF-8") from error


def _clean(values: Sequence[str], separator: str) -> list[str]:
    """Strip values, empty where missing; between semicolons, a comma inside a number is its decimal point."""
    cleaned = [" ".join(value.split()) for value in values]
    if separator == ";":
        cleaned = [value.replace(",", ".") if DECIMAL_COMMA.fullmatch(value) else value for value in cleaned]
    return ["" if value.casefold() in MISSING_TEXTS else value for value in cleaned]
