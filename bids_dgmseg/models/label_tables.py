"""Tables of label numbers, names and colors: read from BIDS and other programs, written for viewers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.models.structures import ALL_STRUCTURES, GRAY, Structure

if TYPE_CHECKING:
    import pandas as pd

TABLES = ("dgmseg", "freesurfer", "suit")
"""Names of label tables in the package: this program's, FreeSurfer's and those of SUIT's cerebellar atlas."""

_LINES = (
    re.compile(r'\s*(?P<index>\d+)\s+(?P<rgb>\d+\s+\d+\s+\d+)\s+[\d.]+\s+\d\s+\d\s+"(?P<name>.*)"\s*'),  # ITK-SNAP
    re.compile(r"\s*(?P<index>\d+)\s+(?P<name>\S+)\s+(?P<rgb>\d+\s+\d+\s+\d+)\b.*"),  # FreeSurfer, 3D Slicer
)

PROGRAM_NAMES = {
    "caudate": "caudate nucleus",
    "pallidum": "globus pallidus",
    "substancia nigra": "substantia nigra",
    "cerebellum dentate": "dentate nucleus",
    "accumbens area": "nucleus accumbens",
    "thalamus proper": "thalamus",
    "dentate": "dentate nucleus",
    "interposed": "interposed nucleus",
    "caud": "caudate nucleus",
    "rednc": "red nucleus",
    "snigra": "substantia nigra",
    "nucaccumbens": "nucleus accumbens",
    "thal": "thalamus",
}
"""Names in FreeSurferColorLUT.txt, also of older versions, in SUIT and MRICloud → ours; without the side."""


@dataclass(frozen=True)
class Label:
    """Row of a label table."""

    index: int
    name: str
    abbreviation: str
    """The name, if the table has no abbreviation."""
    color: str = GRAY
    """``#rrggbb``."""


def read_label_table(source: str | os.PathLike[str] | pd.DataFrame) -> list[Label]:
    """Read the labels of a segmentation from a table, without background.

    Parameters
    ----------
    source : path, str or DataFrame
        Text file of FreeSurfer, ITK-SNAP or 3D Slicer; BIDS label table (TSV or DataFrame) with ``index``, and ``name``
        or ``abbreviation``; or one of `TABLES`.

    Raises
    ------
    InputError
        If it cannot be read, has no label, lists a number twice, or has an index that is not an integer.
    """
    if not isinstance(source, str | os.PathLike):
        where, labels = "`lut`", _read_columns(source, "`lut`")
    elif source == "dgmseg":
        return [Label(row.index, row.name, row.abbreviation, row.color) for row in ALL_STRUCTURES]
    else:
        packaged = {"freesurfer": "freesurfer_aseg.tsv", "suit": "suit.tsv"}.get(str(source))
        folder = Path(str(files("bids_dgmseg").joinpath("data")))
        path = folder / packaged if packaged else Path(source).expanduser()
        where, labels = path.name, _read_lines(path) or _read_columns(read_tsv(path), path.name)
    labels = [label for label in labels if label.index != 0]
    if not labels:
        raise InputError(f"{where}: no labels found; add a row per label")
    numbers = [label.index for label in labels]
    if repeated := next((number for number in numbers if numbers.count(number) > 1), None):
        raise InputError(f"{where}: {repeated} is listed twice; keep one row per label")
    return labels


def _read_lines(path: Path) -> list[Label]:
    """Read a text table of FreeSurfer, ITK-SNAP or 3D Slicer; empty if the file is none."""
    labels: list[Label] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "index" in text.partition("\n")[0]:  # a BIDS table may have columns of numbers, too
        return labels
    for line in text.splitlines():
        if match := next((match for pattern in _LINES if (match := pattern.fullmatch(line))), None):
            color = "#" + "".join(f"{min(int(value), 255):02x}" for value in match["rgb"].split())
            labels.append(Label(int(match["index"]), match["name"], match["name"], color))
    return labels


def _read_columns(table: pd.DataFrame, where: str) -> list[Label]:
    """Read the columns of a BIDS label table; rows without a name are named by their number."""
    import pandas as pd  # slow; every run of the app imports this module

    if "index" not in table or not {"name", "abbreviation"} & set(table):
        missing = "name" if "index" in table else "index"
        raise InputError(
            f"{where}: no column {missing}; expected index and name, or a table of FreeSurfer, ITK-SNAP or 3D Slicer"
        )
    numbers = pd.to_numeric(table["index"], errors="coerce")
    if (wrong := ~(numbers % 1 == 0)).any():
        raise InputError(f"{where}: index {table['index'][wrong].iloc[0]!s}, expected integers; correct the table")
    labels = []
    for number, row in zip(numbers, table.to_dict("records"), strict=True):
        cells = {column: str(value).strip() for column, value in row.items() if pd.notna(value)}
        name = cells.get("name") or cells.get("abbreviation") or f"{int(number)}"
        color = f"#{cells.get('color', '').removeprefix('#').lower()}"
        is_color = re.fullmatch("#[0-9a-f]{6}", color)
        labels.append(Label(int(number), name, cells.get("abbreviation") or name, color if is_color else GRAY))
    return labels


def match_name(name: str) -> str | None:
    """Match an abbreviation or full name, ignoring case, hyphens and underscores.

    >>> match_name("Left-Dentate-Nucleus"), match_name("dn_r"), match_name("Snigra_L"), match_name("lesion")
    ('DN_L', 'DN_R', 'SN_L', None)
    """
    spaces = str.maketrans("-_", "  ")
    side, _, theirs = name.lower().translate(spaces).partition(" ")
    if theirs in ("l", "r") and side in PROGRAM_NAMES:
        side, theirs = {"l": "left", "r": "right"}[theirs], side
    name = f"{side} {PROGRAM_NAMES.get(theirs, theirs)}"
    for structure in ALL_STRUCTURES:
        if name in (structure.abbreviation.lower().translate(spaces), structure.name.lower().translate(spaces)):
            return structure.abbreviation
    return None


def format_color_tables(structures: Sequence[Structure]) -> dict[str, bytes]:
    """Write color tables of nuclei for viewers: file name → content.

    ``freesurfer.txt`` (Freeview, FreeSurfer), ``itksnap.txt`` (ITK-SNAP), ``slicer.ctbl`` (3D Slicer),
    ``fsleyes.lut`` (FSLeyes) and ``mricrogl.lut`` (MRIcroGL, MRIcron: 256 bytes each of red, green and blue).
    """
    rows = [(row.index, row.abbreviation, *bytes.fromhex(row.color[1:])) for row in structures]
    freesurfer = ["0 Unknown 0 0 0 0", *(f"{index:<4} {name:<20} {r} {g} {b} 0" for index, name, r, g, b in rows)]
    itksnap = ['0 0 0 0 0 0 0 "Clear Label"', *(f'{index} {r} {g} {b} 1 1 1 "{name}"' for index, name, r, g, b in rows)]
    slicer = ["# Color table file slicer.ctbl", f"# {len(rows) + 1} values", "0 Background 0 0 0 0"]
    slicer += [f"{index} {name} {r} {g} {b} 255" for index, name, r, g, b in rows]
    fsleyes = [f"{index} {r / 255:.5f} {g / 255:.5f} {b / 255:.5f} {name}" for index, name, r, g, b in rows]
    lines = {"freesurfer.txt": freesurfer, "itksnap.txt": itksnap, "slicer.ctbl": slicer, "fsleyes.lut": fsleyes}
    channels = [bytearray(256) for _ in "rgb"]
    for index, _, *rgb in rows:
        for channel, value in zip(channels, rgb, strict=True):
            channel[index] = value
    texts = {name: ("\n".join(table) + "\n").encode() for name, table in lines.items()}
    return {**texts, "mricrogl.lut": b"".join(channels)}
