"""Nuclei as sets of labels: numbers, names, colors, typical positions; both sides and parts together."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Structure:
    """One nucleus of one hemisphere, a row of ``data/structures.tsv``, or several labels that are measured together."""

    index: int
    """Label in the dseg of every model; 0 is background."""
    name: str
    """For example ``left dentate nucleus``; left is the patient's left."""
    abbreviation: str
    """Nucleus and side, for example ``DN_L``; names channels, rows and columns."""
    hemisphere: Literal["L", "R", ""]
    color: str
    """``#rrggbb``."""
    mapping: int
    """Index of the tissue in the standard label table of BIDS."""
    freesurfer: int = 0
    """Number in ``FreeSurferColorLUT.txt``; 0 if it has none."""
    mni_course_mm: tuple[tuple[float, float, float], ...] = ()
    """Points in MNI152 space, RAS+, that represent the nucleus: its typical centre, and more along nuclei whose ends
    are far from it (centres of slabs of the label template)."""
    part_of: str = ""
    """Abbreviation of the nucleus that it is a part of, such as ``GP_L``; empty for a whole nucleus."""
    members: tuple[Structure, ...] = ()
    """Structures that it joins: both sides of a nucleus, or its parts; empty for a single label."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels in a segmentation.

        >>> [joined.labels for joined in with_pairs(STRUCTURES.both_sides(["DN"]))]
        [(1,), (2,), (1, 2)]
        """
        return tuple(number for member in self.members for number in member.labels) or (self.index,)

    @property
    def nucleus(self) -> str:
        """Nucleus without its side.

        >>> STRUCTURES.named("DN_L").nucleus
        'DN'
        """
        return self.abbreviation.split("_")[0]

    @property
    def mni_mm(self) -> tuple[float, float, float]:
        """Typical centre in MNI152 space, RAS+.

        >>> STRUCTURES.named("DN_L").mni_mm
        (-15.0, -58.0, -35.0)
        """
        return self.mni_course_mm[0]

    @property
    def bids_label(self) -> str:
        """Value of the BIDS entity ``label-``.

        >>> STRUCTURES.named("DN_L").bids_label
        'DNleft'
        """
        return self.nucleus + ("left" if self.hemisphere == "L" else "right")


class Structures(tuple[Structure, ...]):
    """Structures in the order of their labels; those of all models are found by name and number."""

    def named(self, abbreviation: str) -> Structure:
        """Return the structure of an abbreviation such as ``DN_L``; raise `ValueError` if there is none."""
        for structure in ALL_STRUCTURES:
            if structure.abbreviation == abbreviation:
                return structure
        names = ", ".join(structure.abbreviation for structure in ALL_STRUCTURES)
        raise ValueError(f"unknown structure {abbreviation!r}; expected one of {names}")

    def numbered(self, index: int) -> Structure:
        """Return the structure of a label; raise `ValueError` if there is none."""
        for structure in ALL_STRUCTURES:
            if structure.index == index:
                return structure
        raise ValueError(f"no structure has the label {index}")

    def both_sides(self, nuclei: Sequence[str]) -> tuple[Structure, ...]:
        """Return both sides of each nucleus: ``["DN"]`` → DN_L, DN_R."""
        return tuple(self.named(f"{nucleus}_{side}") for nucleus in nuclei for side in "LR")


def whole_of(structure: Structure) -> Structure:
    """Return the nucleus that a structure is a part of; a whole nucleus is returned itself."""
    return STRUCTURES.named(structure.part_of) if structure.part_of else structure


def wholes_of(structures: Iterable[Structure]) -> tuple[Structure, ...]:
    """Return the nuclei of which there are parts among the structures, each once, with its parts.

    >>> [(whole.abbreviation, whole.labels) for whole in wholes_of(ALL_STRUCTURES)]
    [('GP_L', (17, 19)), ('GP_R', (18, 20)), ('SN_L', (21, 23)), ('SN_R', (22, 24))]
    """
    parts: dict[Structure, list[Structure]] = {}
    for structure in structures:
        if structure.part_of:
            parts.setdefault(whole_of(structure), []).append(structure)
    return tuple(replace(whole, members=tuple(members)) for whole, members in parts.items())


def with_wholes(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    """Append the nuclei that are labelled in parts."""
    return (*structures, *wholes_of(structures))


def without_parts(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    """Replace the parts of nuclei by the whole nuclei."""
    wholes = {whole.abbreviation: whole for whole in wholes_of(structures)}
    nuclei = dict.fromkeys(map(whole_of, structures))
    return tuple(wholes.get(nucleus.abbreviation, nucleus) for nucleus in nuclei)


def with_pairs(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    """Insert a bilateral structure after the sides of each nucleus that has two.

    >>> [structure.name for structure in with_pairs(STRUCTURES.both_sides(["RN"]))]
    ['left red nucleus', 'right red nucleus', 'red nucleus']
    """
    nuclei = join_sides([structure.abbreviation for structure in structures])
    groups: dict[str, list[Structure]] = {}
    for structure in structures:
        groups.setdefault(nuclei.get(structure.abbreviation, structure.abbreviation), []).append(structure)
    rows = []
    for nucleus, sides in groups.items():
        rows += sides
        if nuclei.get(sides[0].abbreviation) == nucleus:
            side, _, name = sides[0].name.partition(" ")
            name = name if side in ("left", "right") else nucleus
            rows.append(replace(sides[0], abbreviation=nucleus, name=name, hemisphere="", members=tuple(sides)))
    return tuple(rows)


def wholes_among(abbreviations: Iterable[str]) -> set[str]:
    """Return the abbreviations of the nuclei of which there are parts.

    >>> sorted(wholes_among(["GPe_L", "GPi_L", "GP_L", "CN_L"]))
    ['GP_L']
    """
    part_of = {row.abbreviation: row.part_of for row in ALL_STRUCTURES}
    return {part_of[name] for name in abbreviations if part_of.get(name)}


def join_parts(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """Replace the labels of parts by those of their nuclei; without parts the same array is returned.

    >>> import numpy as np
    >>> join_parts(np.array([0, 1, 17, 18, 21, 27])).tolist()
    [0, 1, 15, 16, 7, 27]
    """
    import numpy as np  # not needed for --help

    parts = [part for part in ALL_STRUCTURES if part.part_of]
    if not np.isin(labels, [part.index for part in parts]).any():
        return labels
    joined = labels.copy()
    for part in parts:
        joined[labels == part.index] = whole_of(part).index
    return joined


def exchange_side(name: str) -> str:
    """Return the name of a class in the mirror image: left and right are exchanged, other names stay.

    >>> exchange_side("DN_L"), exchange_side("vein")
    ('DN_R', 'vein')
    """
    return name[:-2] + {"_L": "_R", "_R": "_L"}.get(name[-2:], name[-2:])


def join_sides(names: Collection[str]) -> dict[str, str]:
    """Map the names of both sides of a nucleus to the nucleus; others, also those of one side alone, are left out.

    >>> join_sides(["DN_L", "DN_R", "RN_L", "thalamus"])
    {'DN_L': 'DN', 'DN_R': 'DN'}
    """
    present = set(names)
    nuclei = {name: name[:-2] for name in names if name.endswith(("_L", "_R"))}
    return {name: nucleus for name, nucleus in nuclei.items() if {f"{nucleus}_L", f"{nucleus}_R"} <= present}


def names_of_pairs(names: Collection[str]) -> list[str]:
    """List the names of both sides together, such as ``DN``, among those of single sides.

    >>> names_of_pairs(["DN_L", "DN_R", "DN", "thalamus"])
    ['DN']
    """
    nuclei = set(join_sides(names).values())
    return [name for name in names if name in nuclei]


_TABLE = files("bids_dgmseg").joinpath("data", "structures.tsv").read_text(encoding="utf-8")


def _read_row(row: dict[str, str]) -> Structure:
    points = [point.split() for point in row.pop("mni_mm").split(";")]
    if row.get("freesurfer") in (None, "", "n/a"):
        row["freesurfer"] = "0"
    return msgspec.convert({**row, "mni_course_mm": points}, Structure, strict=False)


_ROWS = map(_read_row, csv.DictReader(_TABLE.splitlines(), delimiter="\t"))

ALL_STRUCTURES = Structures(sorted(_ROWS, key=lambda structure: structure.index))
"""Those of every model."""

STRUCTURES = Structures(structure for structure in ALL_STRUCTURES if structure.index <= 16)
"""The sixteen nuclei of the default model."""

GRAY = "#888888"
"""Color of labels without another one."""

_COLORS = {structure.abbreviation: structure.color for structure in ALL_STRUCTURES}

ABBREVIATIONS = {structure.name: structure.abbreviation for structure in ALL_STRUCTURES} | {
    structure.name.partition(" ")[2]: structure.nucleus for structure in ALL_STRUCTURES
}
"""Full names of nuclei, with their side or without one → abbreviations."""


def color_of(abbreviation: str) -> str:
    """Return the color of a nucleus in structures.tsv; gray for unknown names.

    >>> color_of("unknown")
    '#888888'
    """
    return _COLORS.get(abbreviation, GRAY)
