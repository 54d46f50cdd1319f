"""Reading the ``_stats.tsv`` of many scans at once, apart from damaged ones."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import MISSING, check_file_type, is_broken_symlink, is_pointer_content
from bids_dgmseg.models.structures import join_sides

STATS = "_stats.tsv"

RERUN = "run the participant level again"

_TEXT_COLUMNS = ("name", "abbreviation", "hemisphere", "rating", "reasons")

HEADER, LINE = "_header", "_line"
"""Columns with the text of a row of ``_stats.tsv`` and the header above it."""

_NOT_A_NUMBER = (MISSING, "", "nan")

_FILES_AT_ONCE = 1000
"""Files whose text is in memory at once."""


class DamagedTableError(Exception):
    """A table cannot be used: what is wrong with it, worded to follow its name, and what to do."""

    def __init__(self, problem: str, remedy: str = f"{RERUN} with --force") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def read_stats(
    paths: Sequence[Path], *, numbers: Collection[str], required: Sequence[str], known: Collection[str] = ()
) -> tuple[pd.DataFrame, dict[Path, DamagedTableError]]:
    """Read ``_stats.tsv`` files and separate the damaged ones.

    A table is whole if every row is as long as the header, each nucleus of the label table beside it (``_dseg.tsv``)
    has one row, and every number is finite or missing. Without a label table no nucleus can be missing. There may be
    rows of both sides of a nucleus together.

    Parameters
    ----------
    paths : sequence of Path
    numbers : collection of str
        Columns to check for numbers, if a table has them.
    required : sequence of str
        Columns that a table must have besides ``abbreviation``.
    known : collection of str
        Valid abbreviations for tables without a label table; empty: any.

    Returns
    -------
    stats : DataFrame
        ``file``, the place among the whole tables; the columns of all tables, as numbers (those of `numbers`) or text,
        NaN if a table lacks one; ``_header`` and ``_line``, the text itself, see `read_cells`.
    damaged : dict
        Path → reason.
    """
    damaged: dict[Path, DamagedTableError] = {}
    tables = []
    for start in range(0, len(paths), _FILES_AT_ONCE):
        rows: dict[str, list[tuple[int, list[str]]]] = defaultdict(list)
        for place, path in enumerate(paths[start : start + _FILES_AT_ONCE], start):
            try:
                header, lines = _read_lines(path, required, known)
            except DamagedTableError as error:
                damaged[path] = error
                continue
            rows[header].append((place, lines))
        for header, files in rows.items():  # one frame per header: much faster than one per file
            lines = [line for _, lines in files for line in lines]
            table = _parse(header, lines, [name for name in numbers if name not in _TEXT_COLUMNS])
            table.insert(0, "file", np.repeat([place for place, _ in files], [len(lines) for _, lines in files]))
            damaged |= {paths[place]: error for place, error in _convert_numbers(table, numbers).items()}
            tables.append(table)
    if not tables:
        return pd.DataFrame({"file": pd.Series(dtype=int)}), damaged
    whole = [place for place, path in enumerate(paths) if path not in damaged]
    stats = pd.concat(tables, ignore_index=True)
    if damaged:
        stats = stats[stats["file"].isin(whole)]
    if not stats["file"].is_monotonic_increasing:
        stats = stats.sort_values("file", kind="stable")
    return stats.reset_index(drop=True).assign(file=np.searchsorted(whole, stats["file"])), damaged


def _read_lines(path: Path, required: Sequence[str], known: Collection[str]) -> tuple[str, list[str]]:
    """Return the header and the lines of a table whose rows and nuclei are complete."""
    text = _read_text(path)
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    whole = lines and text.endswith("\n") and all(line.count("\t") == len(columns) - 1 for line in lines)
    if not whole or not {"abbreviation", *required} <= set(columns):
        raise DamagedTableError("cut short")
    place = columns.index("abbreviation")
    nuclei = [line.split("\t", place + 1)[place] for line in lines]
    labels = _read_label_names(path)
    if repeated := [name for name, count in Counter(nuclei).items() if count > 1]:
        raise DamagedTableError(f"damaged ({repeated[0]!r} appears twice)")
    expected = {*(labels or known), *join_sides(labels or known).values()}
    if unknown := [name for name in nuclei if expected and name not in expected]:
        raise DamagedTableError(f"damaged ({unknown[0]!r} is not one of its nuclei)")
    if not set(labels) <= set(nuclei):
        raise DamagedTableError("cut short")
    return header, lines


def _read_text(path: Path) -> str:
    try:
        check_file_type(path)
        content = path.read_bytes()
    except InputError as error:
        raise DamagedTableError("damaged (not a regular file)") from error
    except OSError as error:
        if is_broken_symlink(path):
            raise DamagedTableError("not fetched (a broken link)", "fetch it (datalad get or git annex get)") from error
        raise DamagedTableError(f"unreadable ({error.strerror})", "check the file") from error
    if is_pointer_content(content):
        raise DamagedTableError("not fetched (only a pointer)", "fetch it (datalad get or git lfs pull)")
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _read_label_names(path: Path) -> list[str]:
    """Return the abbreviations of the label table beside a table, if there is one."""
    try:
        text = path.with_name(f"{path.name.removesuffix(STATS)}_dseg.tsv").read_text("utf-8-sig", errors="replace")
    except OSError:
        return []
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    if "abbreviation" not in columns:
        return []
    rows = (line.split("\t") for line in lines)
    return [row[columns.index("abbreviation")] for row in rows if len(row) == len(columns)]


def _parse(header: str, lines: Sequence[str], numbers: Collection[str]) -> pd.DataFrame:
    """Parse lines with one header; a column of `numbers` is text if one of its values is not a number."""
    columns = header.split("\t")
    table: pd.DataFrame = pd.read_csv(
        io.BytesIO("\n".join([header, *lines]).encode()),
        sep="\t",
        dtype=dict.fromkeys(set(columns) - set(numbers), object),
        na_values={name: _NOT_A_NUMBER for name in columns if name in numbers},
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
        skip_blank_lines=False,
        low_memory=False,
    )
    table[HEADER], table[LINE] = header, pd.Series(lines, dtype=object)
    return table


def read_cells(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Split the lines of rows of `read_stats` into text, with the index of the rows; missing columns are ``n/a``."""
    places: dict[str, list[int]] = {}
    for header in rows[HEADER].unique():
        found = {column: place for place, column in enumerate(header.split("\t"))}
        places[header] = [found.get(column, -1) for column in columns]
    cells = []
    for header, line in zip(rows[HEADER].tolist(), rows[LINE].tolist(), strict=True):
        values = [*line.split("\t", max(places[header]) + 1), MISSING]
        cells.append([values[place] for place in places[header]])
    return pd.DataFrame(cells, index=rows.index, columns=list(columns), dtype=object)


def join_cells(rows: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Return the text of rows of `read_stats` with these columns; empty cells and missing columns are ``n/a``."""
    lines = rows[LINE].copy()
    others = rows[HEADER] != "\t".join(columns)
    lines[others] = ["\t".join(cells) for cells in read_cells(rows[others], columns).to_numpy().tolist()]
    return lines.map(_fill_empty)


def _fill_empty(line: str) -> str:
    line = f"\t{line}\t"
    while "\t\t" in line:
        line = line.replace("\t\t", f"\t{MISSING}\t")
    return line[1:-1]


def _convert_numbers(table: pd.DataFrame, numbers: Collection[str]) -> dict[int, DamagedTableError]:
    """Make all columns of numbers numeric; return the first value of each file that is neither finite nor missing."""
    found: dict[int, tuple[int, str, Any]] = {}
    for column in table.columns:
        if column not in numbers or column in _TEXT_COLUMNS:
            continue
        if table[column].dtype.kind in "iuf" and not np.isinf(table[column]).any():
            continue
        cells = read_cells(table, [column])[column]
        values = pd.to_numeric(cells, errors="coerce")
        table[column] = values.astype(np.float64)
        others = cells[~np.isfinite(values)]
        bad = others.index[~others.isin(_NOT_A_NUMBER)]
        for row, file in table["file"][bad].drop_duplicates().items():
            if int(file) not in found or row < found[int(file)][0]:
                found[int(file)] = (int(str(row)), str(column), cells[row])
    return {
        file: DamagedTableError(f"damaged ({column} of {table['abbreviation'][row]} is {cell!r})")
        for file, (row, column, cell) in found.items()
    }
