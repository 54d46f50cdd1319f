"""Write a group table and its data dictionary, whole or not at all."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import atomic_write
from bids_dgmseg.study.columns import describe
from bids_dgmseg.study.participants import MISSING


@dataclass(frozen=True)
class GroupTable:
    """A table of the group level, before it is written."""

    name: str
    """File name without ``.tsv``."""
    rows: pd.DataFrame
    """Where its first column is ``scan``, a place in the cohort, the keys of that scan take its place."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the data dictionary beside the columns, such as coefficients."""
    notes: tuple[str, ...] = ()
    not_computed: str = ""
    """Why the table is empty."""


def write_frame(folder: Path, table: GroupTable, *, keys: pd.DataFrame, settings: Mapping[str, Any]) -> list[Path]:
    """Write a table of results.

    Parameters
    ----------
    folder : Path
        Where to.
    table : GroupTable
        Numbers are written to seven digits, missing values as ``n/a``.
    keys : DataFrame
        A row a scan of the cohort.
    settings : mapping
        What the run was asked for and found.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    rows = table.rows
    if "scan" in rows:
        front = keys.iloc[rows["scan"].to_numpy(int)].set_axis(rows.index)
        rows = pd.concat([front, rows.drop(columns="scan")], axis=1)
    about = {"Settings": settings, "Notes": list(table.notes), **table.facts}
    if table.not_computed:
        about["NotComputed"] = table.not_computed
    dictionary = {str(name): describe(str(name)) for name in rows}
    lines = zip(*(_as_texts(rows[name]) for name in rows), strict=True)
    return write_lines(folder, table.name, [*dictionary], lines, dictionary | about)


def _as_texts(values: pd.Series) -> list[str]:
    """Write a column, n/a where it is NaN, the one value unequal to itself; to_csv takes five times as long."""
    if values.dtype == bool:
        return ["true" if value else "false" for value in values.tolist()]
    if pd.api.types.is_numeric_dtype(values):
        return [MISSING if value != value else f"{value:.7g}" for value in values.tolist()]
    return [MISSING if value == "" or value != value else str(value) for value in values.tolist()]


def write_lines(
    folder: Path, name: str, columns: Sequence[str], lines: Iterable[Sequence[str]], dictionary: Mapping[str, Any]
) -> list[Path]:
    """Write a table of text, a line at a time."""

    def write(file: TextIO) -> None:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(lines)

    return write_table(folder, name, write, dictionary)


def write_table(
    folder: Path, name: str, write: Callable[[TextIO], object], dictionary: Mapping[str, Any]
) -> list[Path]:
    """Write the data dictionary, then the table."""
    text = json.dumps(_plain(dictionary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    tsv, sidecar = folder / f"{name}.tsv", folder / f"{name}.json"
    _write_whole(sidecar, lambda file: file.write(text))
    _write_whole(tsv, write)
    return [tsv, sidecar]


def _write_whole(final: Path, write: Callable[[TextIO], object]) -> None:
    """Write a text file atomically; undecodable bytes of file names are replaced."""
    try:
        with (
            atomic_write(final) as temporary,
            temporary.open("w", encoding="utf-8", errors="replace", newline="") as file,
        ):
            write(file)
    except OSError as error:
        raise InputError(f"{final.name}: cannot be written ({error.strerror}); check the output folder") from error


def _plain(value: Any) -> Any:
    """Turn a value into what JSON knows; a number that is not finite is missing."""
    if isinstance(value, pd.DataFrame):
        return [_plain(record) for record in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):  # numpy's numbers
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING
    return str(value) if isinstance(value, Path) else value
