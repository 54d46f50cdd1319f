"""Look-up tables of the labels of other programs, as in BIDS: ``index`` and ``name`` per label."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError

_LARGEST = 2**31 - 1


def read_lookup_table(lut: str | os.PathLike[str] | pd.DataFrame) -> Mapping[int, tuple[str, str]]:
    """Read a look-up table: number of the label → name and abbreviation, by default the name.

    Parameters
    ----------
    lut : path or DataFrame
        With the columns ``index`` and ``name``, and ``abbreviation`` if present; a file is a TSV.

    Raises
    ------
    InputError
        If the table cannot be read, lacks a column, or its index is not an integer, repeats or is 0 for more than the
        background.
    """
    table = lut if isinstance(lut, pd.DataFrame) else _read_tsv(lut)
    if missing := {"index", "name"} - set(table):
        raise InputError(f"`lut`: no column {' or '.join(sorted(missing))}; expected index and name")
    numbers = pd.to_numeric(table["index"], errors="coerce")
    if (wrong := ~(numbers.abs() <= _LARGEST) | (numbers % 1 != 0)).any():
        raise InputError(f"`lut`: index {table['index'][wrong].iloc[0]!s}, expected integers; correct the table")
    if (repeated := numbers.duplicated()).any():
        raise InputError(f"`lut`: index {int(numbers[repeated].iloc[0])} occurs twice; keep one row per label")
    if (unnamed := table["name"].isna()).any():
        raise InputError(f"`lut`: index {int(numbers[unnamed].iloc[0])} has no name; add it")
    names = table["name"].astype(str)
    short = table["abbreviation"].fillna(names).astype(str) if "abbreviation" in table else names
    return dict(zip(numbers.astype(int), zip(names, short, strict=True), strict=True))


def _read_tsv(lut: object) -> pd.DataFrame:
    if not isinstance(lut, str | os.PathLike):
        raise InputError(f"`lut`: is a {type(lut).__name__}, expected the path of a TSV file or a DataFrame")
    path = Path(lut)
    try:
        options: dict[str, Any] = {"na_values": ["", "n/a"], "keep_default_na": False}  # NA is a nucleus
        table: pd.DataFrame = pd.read_csv(path.expanduser(), sep="\t", encoding="utf-8-sig", **options)
        return table
    except FileNotFoundError:
        raise InputError(f"{path}: not found; check `lut`") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check `lut`") from error
    except (ValueError, RuntimeError) as error:  # not UTF-8, empty, or rows of different lengths
        reason = " ".join(str(error).split())
        raise InputError(f"{path.name}: not a table ({reason}); pass a TSV with index and name as `lut`") from error
