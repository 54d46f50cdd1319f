"""Read participants.tsv as people write it."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_unfetched, is_pointer_content

MISSING = "n/a"

_MISSING_SPELLINGS = ("", "n/a", "na", "nan", "#n/a")

_ID_COLUMNS = ("participantid", "participant", "subjectid", "subject", "sub")

_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")

_NUMBER = re.compile(r"(\d{1,255})(\.0+)?")
"""As long as a file's name may be; Python reads no number of thousands of digits."""

_BLANK = "\t;, "

_MOST_LINES = 50
"""Of one row: a quote that is not closed by then is none."""


@dataclass(frozen=True)
class Participants:
    """The table of participants, without its column of ids."""

    columns: tuple[str, ...] = ()
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Participant's label without ``sub-`` → values in the order of `columns`, ``n/a`` where missing."""

    def values(self, participant: str) -> tuple[str, ...]:
        """Values of one participant by label, all ``n/a`` if not in the table."""
        return self.rows.get(participant, (MISSING,) * len(self.columns))


def read_participants(path: Path, labels: Iterable[str]) -> Participants:
    """Read the table and name its participants as the scans do.

    Tabs, semicolons, commas or blanks separate the columns; a byte order mark, blanks around values, ids without
    ``sub-`` and ids that lost their leading zeros to a spreadsheet are taken as they come.

    Parameters
    ----------
    path : Path
        The file.
    labels : iterable of str
        Labels of the participants that have scans, without ``sub-``.

    Returns
    -------
    Participants
        All rows of the file; those of participants with scans under the scans' label.

    Raises
    ------
    InputError
        If there is no column of ids, a row is longer than the header, or a participant has two rows.
    """
    columns, rows = read_keyed(path, labels, prefix="sub-", name="participant_id", spellings=_ID_COLUMNS)
    return Participants(columns, rows)


def read_keyed(
    path: Path, labels: Iterable[str], *, prefix: str, name: str, spellings: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Read a table whose rows are told apart by a column of labels.

    Parameters
    ----------
    path : Path
        The file.
    labels : iterable of str
        Labels that have scans, without their prefix.
    prefix : str
        ``sub-`` or ``ses-``.
    name : str
        What BIDS calls the column of labels.
    spellings : sequence of str
        Names of the column that are taken for it, in small letters without blanks, hyphens and underscores.

    Returns
    -------
    columns : tuple of str
        Without the column of labels.
    rows : dict
        Label → values in the order of the columns, ``n/a`` where missing.

    Raises
    ------
    InputError
        As `read_participants`.
    """
    header, lines = read_rows(path)
    ids = [index for index, column in enumerate(header) if re.sub(r"[\s_-]", "", column.casefold()) in spellings]
    if not ids:
        shown = ", ".join(header) or "none"
        raise InputError(f"{path.name}: no column {name} (columns: {shown}); name the column of the labels so")
    id_column = ids[0]
    columns = [column for index, column in enumerate(header) if index != id_column]
    if doubled := [column for column, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{path.name}: column {doubled[0]!r} appears twice; rename one")
    rows: dict[str, tuple[str, ...]] = {}
    first_line: dict[str, int] = {}
    find = _Finder(labels, prefix)
    for number, values in lines:
        if len(values) > len(header):
            raise InputError(f"{path.name}: line {number} has {len(values)} values, expected {len(header)}; correct it")
        values = [*values, *[MISSING] * (len(header) - len(values))]
        if values[id_column] == MISSING:
            raise InputError(f"{path.name}: line {number} has no {name}; fill it in or remove the line")
        label = find(values[id_column])
        if label in rows:
            raise InputError(
                f"{path.name}: {prefix}{label} appears twice (lines {first_line[label]} and {number}); "
                f"keep one line a {name.removesuffix('_id')}"
            )
        rows[label] = tuple(value for index, value in enumerate(values) if index != id_column)
        first_line[label] = number
    return tuple(columns), rows


class _Finder:
    """Finds the scans' label for an id; a number finds the one label of that value."""

    def __init__(self, labels: Iterable[str], prefix: str) -> None:
        self.labels, self.prefix = set(labels), prefix
        by_number: dict[int, list[str]] = {}
        for label in sorted(self.labels):
            if label.isdecimal():
                by_number.setdefault(int(label), []).append(label)
        self.by_number = {number: found[0] for number, found in by_number.items() if len(found) == 1}

    def __call__(self, text: str) -> str:
        label = text.removeprefix(self.prefix)
        if label in self.labels:
            return label
        if number := _NUMBER.fullmatch(label):
            return self.by_number.get(int(number[1]), label)
        return label


def read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Cut a table into its header and its rows, each with its line number, all values cleaned.

    Raises
    ------
    InputError
        If it cannot be read, is empty, or a column has no name.
    """
    lines = re.split("\r\n|\r|\n", _decode(path))
    first = next((line for line in lines if line.strip(_BLANK)), None)
    if first is None:
        raise InputError(f"{path.name}: is empty; write at least the header participant_id")
    separator = "\t" if "\t" in first else max(";,", key=first.count)
    if separator not in first:
        separator = " "
    fields = [(number, _clean(values, separator)) for number, values in _cut(lines, separator)]
    header = fields[0][1]
    while header and header[-1] == MISSING:
        header.pop()
    if MISSING in header:
        raise InputError(f"{path.name}: column {header.index(MISSING) + 1} has no name; name it")
    for _, values in fields[1:]:
        while len(values) > len(header) and values[-1] == MISSING:
            values.pop()
    return header, fields[1:]


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.name}: cannot be read ({error.strerror}); check the path") from error
    if is_pointer_content(data):
        raise InputError(describe_unfetched(path))
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))  # a spreadsheet's "Unicode text"
    for encoding in ("utf-16" if marked else "utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")


def _cut(lines: Sequence[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Cut lines into values, with the number of the first line of each row; a quoted value may have line breaks."""
    place, width = 0, 0
    while place < len(lines):
        number, line = place + 1, lines[place]
        place += 1
        if not line.strip(_BLANK):
            continue
        values = line.split() if separator == " " else line.split(separator)
        if separator != " " and '"' in line:
            values, n_lines = _cut_quoted(lines[place - 1 : place - 1 + _MOST_LINES], separator, width=width)
            place += n_lines - 1
        width = width or len(values)
        yield number, values


def _cut_quoted(lines: Sequence[str], separator: str, *, width: int) -> tuple[list[str], int]:
    """Cut the first row of lines, and count its lines; a quote that nothing closes is a letter like any other."""
    for n_lines in range(1, len(lines) + 1):
        row = io.StringIO("\n".join(lines[:n_lines]), newline="")
        try:
            found = list(csv.reader(row, delimiter=separator, strict=True))
        except csv.Error:  # the quote is still open, or closes inside a value
            continue
        # rows of more lines must be as wide as the table, or the quote opened none
        if n_lines == 1 or (len(found) == 1 and len(found[0]) == (width or len(found[0]))):
            return found[0], n_lines
    return lines[0].split(separator), 1


def _clean(values: Sequence[str], separator: str) -> list[str]:
    """Tidy the values of a row; where semicolons separate, a comma inside a number is its decimal point."""
    cleaned = [" ".join(value.split()) for value in values]
    if separator == ";":
        cleaned = [value.replace(",", ".") if _COMMA_NUMBER.fullmatch(value) else value for value in cleaned]
    return [MISSING if value.casefold() in _MISSING_SPELLINGS else value for value in cleaned]
