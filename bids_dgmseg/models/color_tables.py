"""Tables of label numbers, names and colors in the formats of viewers."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.structures import Structure

_GRAY = "#888888"

_ITKSNAP_HEADER = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    IDX:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""

_NUMBERS_FIRST = re.compile(r"\s*(\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(.+?)\s*")
"""FSLeyes: number, red, green, blue, name; ITK-SNAP with more columns before the name."""

_NAME_SECOND = re.compile(r"\s*(\d+)\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+)(\s+\d+)?.*")
"""FreeSurfer and 3D Slicer: number, name, red, green, blue, alpha."""

_COLOR = re.compile("#?([0-9a-fA-F]{6})")

_NAMES = ("abbreviation", "name", "index")
"""Columns of a BIDS table that name a label; the first that is not missing does."""


@dataclass(frozen=True)
class LabelColor:
    """Row of a color table."""

    index: int
    name: str
    color: str
    """``#rrggbb``."""


def format_color_tables(structures: Sequence[Structure]) -> dict[str, bytes]:
    """Write color tables of nuclei for viewers: file name → content.

    ``freesurfer.txt`` (Freeview, FreeSurfer), ``itksnap.txt`` (ITK-SNAP), ``slicer.ctbl`` (3D Slicer),
    ``fsleyes.lut`` (FSLeyes) and, if all numbers are below 256, ``mricrogl.lut`` (MRIcroGL, MRIcron: 256 bytes each of
    red, green and blue).
    """
    rows = [(one.index, one.abbreviation, _rgb(one.color)) for one in structures]
    background = "Unknown"
    freesurfer = [f"#No. {'Label Name:':<20} R   G   B   A", f"{0:<4} {background:<20} 0   0   0   0"]
    freesurfer += [f"{index:<4} {name:<20} {r:<3} {g:<3} {b:<3} 0" for index, name, (r, g, b) in rows]
    itksnap = [f'{0:>5} {0:>5} {0:>4} {0:>4} {0:>8} {0:>2} {0:>2}    "Clear Label"']
    itksnap += [f'{index:>5} {r:>5} {g:>4} {b:>4} {1:>8} {1:>2} {1:>2}    "{name}"' for index, name, (r, g, b) in rows]
    slicer = ["# Color table file slicer.ctbl", f"# {len(rows) + 1} values", "0 Background 0 0 0 0"]
    slicer += [f"{index} {name} {r} {g} {b} 255" for index, name, (r, g, b) in rows]
    fsleyes = [f"{index} {r / 255:.5f} {g / 255:.5f} {b / 255:.5f} {name}" for index, name, (r, g, b) in rows]
    texts = {
        "freesurfer.txt": "\n".join(freesurfer) + "\n",
        "itksnap.txt": _ITKSNAP_HEADER + "\n".join(itksnap) + "\n",
        "slicer.ctbl": "\n".join(slicer) + "\n",
        "fsleyes.lut": "\n".join(fsleyes) + "\n",
    }
    tables = {name: text.encode() for name, text in texts.items()}
    if max(index for index, _, _ in rows) > 255:
        return tables
    channels = [bytearray(256) for _ in range(3)]
    for index, _, rgb in rows:
        for channel, value in zip(channels, rgb, strict=True):
            channel[index] = value
    return {**tables, "mricrogl.lut": b"".join(channels)}


def read_color_table(path: Path) -> list[LabelColor]:
    """Read the labels of a segmentation from a table, without 0.

    It is a BIDS label table (TSV with ``index``, and ``abbreviation`` or ``name``) or a text file of FreeSurfer,
    ITK-SNAP, 3D Slicer or FSLeyes.

    Raises
    ------
    InputError
        If it cannot be read, has no label, or lists a number twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check `lut`") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name}: not a text file; provide a table of labels and names") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    columns = lines[0].split("\t") if lines else []
    rows = _read_bids(lines) if "index" in columns else [row for line in lines if (row := _read_line(line))]
    rows = [row for row in rows if row.index > 0]
    if not rows:
        raise InputError(
            f"{path.name}: no labels found; expected a TSV with index and name, or a table of FreeSurfer, ITK-SNAP, 3D "
            "Slicer or FSLeyes"
        )
    numbers = [row.index for row in rows]
    if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
        raise InputError(f"{path.name}: {twice[0]} is listed twice; keep one row per label")
    return rows


def _read_bids(lines: Sequence[str]) -> list[LabelColor]:
    rows = [row for row in csv.DictReader(lines, delimiter="\t") if (row["index"] or "").strip().isdecimal()]
    colors = [_COLOR.fullmatch((row.get("color") or "").strip()) for row in rows]
    return [
        LabelColor(
            int(row["index"]),
            next(text for key in _NAMES if (text := (row.get(key) or "n/a").strip()) != "n/a"),
            f"#{color[1].lower()}" if color else _GRAY,
        )
        for row, color in zip(rows, colors, strict=True)
    ]


def _read_line(line: str) -> LabelColor | None:
    """Read a line of a text table; None if it is not one."""
    if match := _NUMBERS_FIRST.fullmatch(line):
        number, *channels, name = match.groups()
        if quoted := re.fullmatch(r"[\d.]+\s+\d\s+\d\s+\"(.*)\"", name):
            name = quoted[1]
        values = [float(channel) for channel in channels]
        is_fraction = max(values) <= 1 and not quoted
        rgb = [round(255 * value) if is_fraction else round(value) for value in values]
    elif match := _NAME_SECOND.fullmatch(line):
        number, name, *rest = match.groups()
        rgb = [int(value) for value in rest[:3]]
    else:
        return None
    return LabelColor(int(number), name, "#" + "".join(f"{min(value, 255):02x}" for value in rgb))


def _rgb(color: str) -> tuple[int, int, int]:
    """Return the channels of a color.

    >>> _rgb("#e6194b")
    (230, 25, 75)
    """
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue
