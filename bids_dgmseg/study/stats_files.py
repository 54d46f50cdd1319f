"""Reading the ``_stats.tsv`` of many scans at once, apart from damaged ones."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import MISSING, check_file_type, is_broken_symlink, is_pointer_content
from bids_dgmseg.measurement.columns import describe_sampled
from bids_dgmseg.models.structures import ALL_STRUCTURES, join_sides

STATS = "_stats.tsv"

RERUN = "run the participant level again"

_TEXT_COLUMNS = ("name", "abbreviation", "hemisphere", "rating", "reasons")

_NOT_A_NUMBER = (MISSING, "", "nan")

_FILES_AT_ONCE = 1000
"""Files whose text is in memory at once."""


class DamagedTableError(Exception):
    """A table cannot be used: what is wrong with it, worded to follow its name, and what to do."""

    def __init__(self, problem: str, remedy: str = f"{RERUN} with `force`") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def read_stats(
    paths: Sequence[Path], *, numbers: Collection[str], required: Sequence[str], known: Collection[str] = ()
) -> tuple[pd.DataFrame, dict[Path, DamagedTableError]]:
    """Read ``_stats.tsv`` files and separate the damaged ones.

    A table is whole if every row is as long as the header, each nucleus of the label table beside it (``_dseg.tsv``)
    has one row, and every number is finite or missing. Without a label table no nucleus can be missing. There may be
    bilateral rows.

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
        ``file``, the place among the whole tables, and the columns of all tables as text; NaN if a table lacks one.
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
                rows[header].append((place, lines))
            except DamagedTableError as error:
                damaged[path] = error
        for header, files in rows.items():  # one frame per header: much faster than one per file
            table = _parse(header, [line for _, lines in files for line in lines])
            table.insert(0, "file", np.repeat([place for place, _ in files], [len(lines) for _, lines in files]))
            damaged |= {paths[place]: error for place, error in _check_numbers(table, numbers).items()}
            tables.append(table)
    if not tables:
        return pd.DataFrame({"file": pd.Series(dtype=int)}), damaged
    whole = [place for place, path in enumerate(paths) if path not in damaged]
    stats = pd.concat(tables)
    stats = stats[stats["file"].isin(whole)].sort_values("file", kind="stable", ignore_index=True)
    return stats.assign(file=np.searchsorted(whole, stats["file"])), damaged


def _read_lines(path: Path, required: Sequence[str], known: Collection[str]) -> tuple[str, list[str]]:
    """Return the header and the lines of a table whose rows and nuclei are complete."""
    text = _read_text(path)
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    whole = lines and text.endswith("\n") and all(line.count("\t") == len(columns) - 1 for line in lines)
    if not whole or not {"abbreviation", *required} <= set(columns):
        raise DamagedTableError("cut short")
    nuclei = [line.split("\t")[columns.index("abbreviation")] for line in lines]
    labels = _read_label_names(path)
    if repeated := [name for name, count in Counter(nuclei).items() if count > 1]:
        raise DamagedTableError(f"damaged ({repeated[0]!r} appears twice)")
    names = set(labels or known)
    names |= {one.part_of for one in ALL_STRUCTURES if one.part_of and one.abbreviation in names}
    expected = {*names, *join_sides(names).values()}
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


def _parse(header: str, lines: Sequence[str]) -> pd.DataFrame:
    """Parse lines with one header as text."""
    content = io.BytesIO("\n".join([header, *lines]).encode())
    table: pd.DataFrame = pd.read_csv(
        content, sep="\t", dtype=object, keep_default_na=False, quoting=csv.QUOTE_NONE, skip_blank_lines=False
    )
    return table


def _check_numbers(table: pd.DataFrame, numbers: Collection[str]) -> dict[int, DamagedTableError]:
    """Return the first value of each file that is neither finite nor missing."""
    invalid: dict[int, tuple[int, str]] = {}
    checked = [
        name for name in map(str, table) if name not in _TEXT_COLUMNS and (name in numbers or describe_sampled(name))
    ]
    for column in checked:
        is_number = np.isfinite(pd.to_numeric(table[column], errors="coerce"))
        rows = np.flatnonzero(~is_number & ~table[column].isin(_NOT_A_NUMBER))
        for row, file in zip(rows.tolist(), table["file"].iloc[rows].tolist(), strict=True):
            if file not in invalid or row < invalid[file][0]:
                invalid[file] = (row, column)
    return {
        file: DamagedTableError(f"damaged ({column} of {table['abbreviation'][row]} is {table[column][row]!r})")
        for file, (row, column) in invalid.items()
    }
