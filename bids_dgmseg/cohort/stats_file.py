"""Read a table of measures, and tell one that is whole from one that is damaged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from bids_dgmseg.absent import leads_nowhere, points_elsewhere

STATS = "_stats.tsv"
_ABBREVIATION = "abbreviation"
_TEXTS = ("name", _ABBREVIATION, "hemisphere", "light", "reasons")
"""Columns of words; the program's others are numbers."""
_NO_NUMBER = ("n/a", "", "nan")
_SHOWN = 20
CUT_SHORT = "cut short"
AGAIN = "run the participant level again"
_ANEW = f"{AGAIN} with --force"


class DamagedTableError(Exception):
    """A table of measures cannot be used: what it is, in words that stand behind its name, and what to do."""

    def __init__(self, what: str, remedy: str = _ANEW) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def read_stats(path: Path, *, numbers: Collection[str], needed: Sequence[str], known: Collection[str] = ()) -> str:
    """Read a ``_stats.tsv`` that is whole.

    It is where every row is as long as the header, each nucleus of the label table beside it (``_dseg.tsv``) has one
    row, and no number is anything else or infinite. Without a label table no nucleus is missed.

    Parameters
    ----------
    path : Path
        The table.
    numbers : collection of str
        Columns of numbers; those that the table lacks are not looked at.
    needed : sequence of str
        Columns that it must have beside ``abbreviation``.
    known : collection of str
        Abbreviations that there are, for a table without a label table; empty: any.

    Returns
    -------
    str
        The text of the file.

    Raises
    ------
    DamagedTableError
        If it is not whole.
    """
    text = _read_text(path)
    header, *lines = text.splitlines() or [""]
    columns, rows = header.split("\t"), [line.split("\t") for line in lines]
    whole = rows and text.endswith("\n") and all(len(row) == len(columns) for row in rows)
    if not whole or not {_ABBREVIATION, *needed} <= set(columns):
        raise DamagedTableError(CUT_SHORT)
    nuclei = [row[columns.index(_ABBREVIATION)] for row in rows]
    _check_nuclei(nuclei, _read_labels(path), known)
    places = [place for place, column in enumerate(columns) if column in numbers and column not in _TEXTS]
    for nucleus, row in zip(nuclei, rows, strict=True):
        for place in places:
            if not _is_number(row[place]):
                raise DamagedTableError(f"damaged ({columns[place]} of {nucleus} is {_quote(row[place])})")
    return text


def _read_text(path: Path) -> str:
    if leads_nowhere(path):
        raise DamagedTableError("not here (a link that leads nowhere)", "fetch it (datalad get or git annex get)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedTableError(f"unreadable ({error.strerror})", "check the file") from error
    if points_elsewhere(content):
        raise DamagedTableError("not here (a pointer only)", "fetch it (datalad get or git lfs pull)")
    return content.decode("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def _check_nuclei(nuclei: Sequence[str], labels: Collection[str], known: Collection[str]) -> None:
    """See that each nucleus is there once; `labels` are those that the model has, none where nobody knows."""
    if doubled := [name for name, count in Counter(nuclei).items() if count > 1]:
        raise DamagedTableError(f"damaged ({_quote(doubled[0])} is there twice)")
    expected = labels or known
    if unknown := [name for name in nuclei if expected and name not in expected]:
        raise DamagedTableError(f"damaged ({_quote(unknown[0])} is none of its nuclei)")
    if not set(labels) <= set(nuclei):
        raise DamagedTableError(CUT_SHORT)


def _read_labels(path: Path) -> list[str]:
    """Read the abbreviations of the label table beside; none where there is no such table."""
    try:
        text = path.with_name(f"{path.name.removesuffix(STATS)}_dseg.tsv").read_text("utf-8-sig", errors="replace")
    except OSError:
        return []
    header, *lines = text.splitlines() or [""]
    columns = header.split("\t")
    if _ABBREVIATION not in columns:
        return []
    rows = (line.split("\t") for line in lines)
    return [row[columns.index(_ABBREVIATION)] for row in rows if len(row) == len(columns)]


def _is_number(text: str) -> bool:
    """Tell numbers and what stands for none from all else, infinity among it."""
    if text in _NO_NUMBER:
        return True
    try:
        return math.isfinite(float(text)) and text.isascii() and "_" not in text
    except ValueError:
        return False


def _quote(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
