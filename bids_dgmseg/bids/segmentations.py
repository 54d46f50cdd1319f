"""Find segmentations of the same scans in several datasets, and read what their numbers mean."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.description import DATASET_DESCRIPTION
from bids_dgmseg.bids.names import join_entities, split_entities
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.models.structures import STRUCTURES

_NOT_SCAN = ("seg", "atlas", "label", "scale")

_NOT_SHARED = ("desc", "space", "res", "den")

_NUMBERS = ("run", "echo")

_PART = re.compile(r"_desc-(para|dia)magnetic_Chimap\.")


@dataclass(frozen=True)
class LabelTable:
    """What the numbers of a segmentation mean."""

    abbreviations: Mapping[int, str]
    source: Path | None
    """The file read; None where there was none and the numbers of ``structures.tsv`` are taken."""


def find_images(root: Path, suffix: str, *, option: str = "") -> list[Path]:
    """List the images of a dataset with a suffix, such as ``dseg``, below its ``sub-X`` folders.

    Of chi maps, those of paramagnetic or diamagnetic sources alone are passed over. `option` is what the user gave the
    dataset with.

    Raises
    ------
    InputError
        If there is none.
    """
    pattern = re.compile(rf"(?!\.).*_{suffix}\.nii(\.gz)?")
    folders = sorted(path for path in root.glob("sub-*") if path.is_dir())
    paths = (path for folder in folders for path in sorted(folder.rglob(f"*_{suffix}.nii*")))
    found = [path for path in paths if pattern.fullmatch(path.name) and not _PART.search(path.name)]
    if not found:
        where = f" to {option}" if option else ""
        raise InputError(
            f"{root}: no _{suffix}.nii[.gz] in sub-X folders; give the root folder of a dataset with them{where}"
        )
    return found


def name_scan(path: Path) -> str:
    """Name the scan that an image belongs to, by its entities; a name without entities stands for itself.

    >>> name_scan(Path("sub-01_run-02_seg-dgm16_dseg.nii.gz"))
    'sub-01_run-2'
    """
    return join_entities(_entities(path, _NOT_SCAN)) or _stem(path)


def match_scans(reference: Sequence[Path], other: Sequence[Path], *, choose: Sequence[str] = ()) -> dict[Path, Path]:
    """Find the partner of each image of one dataset in another.

    Partners have the same entities but for ``seg`` and its like; where no such partner is found, ``desc``, ``space``,
    ``res`` and ``den`` do not count either. ``run-1`` and ``run-01`` are one run.

    Parameters
    ----------
    reference, other : sequence of Path
        Images named as BIDS does.
    choose : sequence of str
        Entities, such as ``seg-dgm16``, that decide where several images of one dataset would be partners of one.

    Raises
    ------
    InputError
        If several images of a dataset belong to one scan and `choose` does not decide.
    """
    partners: dict[Path, Path] = {}
    done: set[Path] = set()
    for ignored in (_NOT_SCAN, (*_NOT_SCAN, *_NOT_SHARED)):
        left, right = (_by_scan((p for p in paths if p not in done), ignored) for paths in (reference, other))
        for scan in sorted(left.keys() & right.keys()):
            partners[_only(left[scan], choose)] = _only(right[scan], choose)
            done.update(left[scan], right[scan])  # those not chosen are no partners of others
    return {path: partners[path] for path in reference if path in partners}


def _by_scan(paths: Iterable[Path], ignored: Sequence[str]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[join_entities(_entities(path, ignored)) or _stem(path)].append(path)
    return groups


def _only(paths: Sequence[Path], choose: Sequence[str]) -> Path:
    if len(paths) == 1:
        return paths[0]
    wanted = [path for path in paths if any(part in choose for part in _stem(path).split("_"))]
    if len(wanted) == 1:
        return wanted[0]
    some = list_some(path.name for path in wanted or paths)
    raise InputError(f"{some} are of the same scan; say which with --choose, such as --choose {_difference(paths)}")


def _difference(paths: Sequence[Path]) -> str:
    """Name an entity that the first of several images has alone."""
    first, *others = [_stem(path).split("_") for path in paths]
    return next((part for part in first if all(part not in other for other in others)), "seg-NAME")


def _entities(path: Path, ignored: Sequence[str]) -> dict[str, str]:
    named = split_entities(_stem(path))
    return {
        key: str(int(value)) if key in _NUMBERS and value.isdecimal() else value
        for key, value in named.items()
        if key not in ignored
    }


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def read_label_table(path: Path) -> LabelTable:
    """Read the label table that applies to a segmentation.

    Looked for beside the image under its own name, then as ``seg-X_dseg.tsv`` or ``dseg.tsv`` in its folder and in
    those above it, up to the root of its dataset.

    Returns
    -------
    LabelTable
        Without a table, the numbers of ``structures.tsv``.

    Raises
    ------
    InputError
        If the table is not one.
    """
    own = path.with_name(f"{_stem(path)}.tsv")
    seg = split_entities(_stem(path)).get("seg")
    names = [*([f"seg-{seg}_dseg.tsv"] if seg else []), "dseg.tsv"]
    inherited = (folder / name for folder in _up_to_root(path) for name in names)
    source = next((table for table in (own, *inherited) if table.is_file()), None)
    if source is None:
        return LabelTable({structure.index: structure.abbreviation for structure in STRUCTURES}, None)
    return LabelTable(_read_rows(source), source)


def _up_to_root(path: Path) -> list[Path]:
    """Folders of an image, nearest first; without a dataset around it, its own."""
    parents = list(path.parents)
    roots = [place for place, folder in enumerate(parents) if (folder / DATASET_DESCRIPTION).is_file()]
    above = [place + 1 for place, folder in enumerate(parents) if folder.name.startswith("sub-")]
    return parents[: (roots or above or [0])[0] + 1]


def _read_rows(path: Path) -> dict[int, str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: cannot be read ({error}); check the file") from error
    column = next((name for name in ("abbreviation", "name") if rows and name in rows[0]), None)
    if column is None or "index" not in rows[0]:
        raise InputError(f"{path.name}: has no columns index and abbreviation; write a BIDS label table")
    table: dict[int, str] = {}
    for row in rows:
        number, abbreviation = (row["index"] or "").strip(), (row[column] or "").strip()
        if not number.isdecimal() or not abbreviation:
            raise InputError(f"{path.name}: index {number!r} with {column} {abbreviation!r}; give each label both")
        if int(number) in table or (abbreviation in table.values() and abbreviation != "n/a"):
            raise InputError(f"{path.name}: {number} or {abbreviation} is there twice; give each label one row")
        table[int(number)] = abbreviation
    return {number: name for number, name in table.items() if number > 0 and name != "n/a"}
