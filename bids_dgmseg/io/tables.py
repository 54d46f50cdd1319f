"""Tab-separated tables as BIDS stores them: a header line, and ``n/a`` for missing values."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.annex import describe_missing, describe_unfetched, is_pointer_file
from bids_dgmseg.io.files import write_text

MISSING = "n/a"

DataDictionary = Mapping[str, Mapping[str, str]]
"""Column → its entry in the BIDS data dictionary: ``Description`` and, if it has one, ``Units``."""


def read_data_dictionaries(name: str) -> dict[str, DataDictionary]:
    """Read the data dictionaries of the program's own tables from ``data/columns_NAME.tsv``, in the order of columns.

    >>> read_data_dictionaries("stats")["nucleus"]["volume_mm3"]
    {'Description': 'n_voxels times the voxel volume', 'Units': 'mm^3'}
    """
    text = files("bids_dgmseg").joinpath("data", f"columns_{name}.tsv").read_text(encoding="utf-8")
    dictionaries: dict[str, dict[str, dict[str, str]]] = {}
    for row in csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE):
        entry = {"Description": row["description"], "Units": row["units"]}
        entries = dictionaries.setdefault(row["table"], {})
        entries[row["name"]] = {key: value for key, value in entry.items() if value != MISSING}
    return dict(dictionaries)


def read_tsv(path: Path, **options: Any) -> pd.DataFrame:
    """Read a tab-separated table; ``n/a`` and empty cells are NaN, and no other text is.

    Parameters
    ----------
    path : path
        UTF-8 text, with or without byte order mark.
    **options
        Passed to `pandas.read_csv`, for example ``dtype=str`` or ``usecols``.

    Raises
    ------
    InputError
        If the file is missing, unfetched or not a table.
    """
    defaults = {"na_values": [MISSING, ""], "keep_default_na": False, "encoding": "utf-8-sig"}
    settings: dict[str, Any] = defaults | options
    if is_pointer_file(path):  # pandas would read it as a header without rows
        raise InputError(describe_unfetched(path))
    try:
        table: pd.DataFrame = pd.read_csv(path, sep="\t", **settings)
        return table
    except FileNotFoundError:
        raise InputError(describe_missing(path)) from None
    except (OSError, ValueError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        reason = " ".join(str(error).split())
        raise InputError(f"{path.name}: not a tab-separated table ({reason}); fix the file") from error


def format_tsv(table: pd.DataFrame, float_format: str | None = None) -> str:
    """Format a table as tab-separated text without its index; NaN becomes ``n/a``."""
    text: str = table.to_csv(sep="\t", index=False, na_rep=MISSING, float_format=float_format, lineterminator="\n")
    return text


def write_tsv(table: pd.DataFrame, path: Path, float_format: str | None = None) -> Path:
    """Write a table atomically, as `format_tsv` formats it."""
    return write_text(format_tsv(table, float_format), path)
