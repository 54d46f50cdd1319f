"""Match segmentations and masks with scans by their entities, and read label tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION
from bids_dgmseg.bids.entities import (
    comparable,
    is_in_standard_space,
    is_partial_chi,
    join_entities,
    split_entities,
    stem_of,
)
from bids_dgmseg.bids.scans import Scan
from bids_dgmseg.config import ReferenceRegion
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_tsv
from bids_dgmseg.models.label_map import match_name
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import ABBREVIATIONS, ALL_STRUCTURES, wholes_of

MASK_LABELS = ("CSF", "ventricles")
"""Values of ``label`` for masks of cerebrospinal fluid, in any case."""

_SEGMENTATION_ENTITIES = ("seg", "atlas", "label", "scale")
"""Entities that distinguish segmentations of a scan."""

_PROCESSING_ENTITIES = ("desc", "space", "res", "den")
"""Entities that may differ between a scan and its segmentation."""

_DIFFERING_ENTITIES = (*_SEGMENTATION_ENTITIES, *_PROCESSING_ENTITIES)


@dataclass(frozen=True)
class LabelTable:
    """Structures of a segmentation."""

    abbreviations: Mapping[int, str]
    source: Path | None
    """The table; None if there is none and the labels of ``structures.tsv`` are assumed."""


def find_images(root: Path, suffix: str, *, parameter: str = "") -> list[Path]:
    """List the images with a suffix, such as ``dseg``, in the ``sub-X`` folders of a dataset.

    The folder may contain a dataset per fold, ``fold-N``, as ``dgmseg cross-validate`` writes them.
    Chi maps of paramagnetic or diamagnetic sources are ignored. `parameter` is the name of `root` in messages.

    Raises
    ------
    InputError
        If there is none.
    """
    pattern = re.compile(rf"(?!\.).*_{suffix}\.nii(\.gz)?")
    folders = sorted(path for path in (*root.glob("sub-*"), *root.glob("fold-*/sub-*")) if path.is_dir())
    paths = (path for folder in folders for path in sorted(folder.rglob(f"*_{suffix}.nii*")))
    found = [
        path
        for path in paths
        if pattern.fullmatch(path.name)
        and not is_in_standard_space(path.name)
        and not (suffix == "Chimap" and is_partial_chi(path.name))
    ]
    if not found:
        where = f" to `{parameter}`" if parameter else ""
        raise InputError(
            f"{root}: no _{suffix}.nii[.gz] files in sub-X folders; pass the root directory of a dataset with "
            f"them{where}"
        )
    return found


def name_scan(path: Path, *, ignored: Collection[str] = _SEGMENTATION_ENTITIES) -> str:
    """Return the name of the scan that an image belongs to, from its entities; without entities, its stem.

    >>> name_scan(Path("sub-01_run-02_seg-dgm16_dseg.nii.gz"))
    'sub-01_run-2'
    """
    entities = comparable(split_entities(stem_of(path)))
    return join_entities({key: value for key, value in entities.items() if key not in ignored}) or stem_of(path)


def match_scans(reference: Sequence[Path], other: Sequence[Path], *, choose: Sequence[str] = ()) -> dict[Path, Path]:
    """Find the image of the same scan in another dataset, for each image of a dataset.

    Images of the same scan have equal entities, except ``seg``, ``atlas``, ``label`` and ``scale``; if there is no such
    image, ``desc``, ``space``, ``res`` and ``den`` may differ, too. ``run-1`` and ``run-01`` are equal.

    Parameters
    ----------
    reference, other : sequence of path
        Images with BIDS names.
    choose : sequence of str
        Entities, such as ``seg-dgm16``, that decide between several images of the same scan.

    Raises
    ------
    InputError
        If a dataset has several images of the same scan and `choose` does not decide.
    """
    partners: dict[Path, Path] = {}
    done: set[Path] = set()
    first = _prefer_chosen(reference, other, choose)
    second = _prefer_chosen(other, first, choose)
    for ignored in (_SEGMENTATION_ENTITIES, _DIFFERING_ENTITIES):
        left: dict[str, list[Path]] = defaultdict(list)
        right: dict[str, list[Path]] = defaultdict(list)
        for groups, paths in ((left, first), (right, second)):
            for path in (path for path in paths if path not in done):
                groups[name_scan(path, ignored=ignored)].append(path)
        for scan in sorted(left.keys() & right.keys()):
            partners[_select_one(left[scan], choose)] = _select_one(right[scan], choose)
            done.update(left[scan], right[scan])  # those not chosen are not matched in the second pass
    return {path: partners[path] for path in reference if path in partners}


def _prefer_chosen(paths: Sequence[Path], others: Sequence[Path], choose: Sequence[str]) -> list[Path]:
    """Leave out images of scans with a chosen one that only matches if ``desc``, ``space``, … may differ."""
    exact = set(map(name_scan, others))
    wanted = {
        name_scan(path, ignored=_DIFFERING_ENTITIES)
        for path in paths
        if _is_chosen(path, choose) and name_scan(path) not in exact
    }
    return [
        path for path in paths if _is_chosen(path, choose) or name_scan(path, ignored=_DIFFERING_ENTITIES) not in wanted
    ]


def _is_chosen(path: Path, choose: Sequence[str]) -> bool:
    return any(part in choose for part in stem_of(path).split("_"))


def _select_one(paths: Sequence[Path], choose: Sequence[str]) -> Path:
    if len(paths) == 1:
        return paths[0]
    wanted = [path for path in paths if _is_chosen(path, choose)]
    if len(wanted) == 1:
        return wanted[0]
    first, *others = [stem_of(path).split("_") for path in paths]
    example = next((part for part in first if all(part not in other for other in others)), "seg-NAME")
    some = list_some(path.name for path in wanted or paths)
    raise InputError(f"{some} are of the same scan; select one with `choose`, such as `choose` {example}")


def read_label_table(path: Path) -> LabelTable:
    """Read the label table that applies to a segmentation.

    It is searched beside the image under its name, then as ``seg-X_dseg.tsv`` or ``dseg.tsv`` in its folder and in the
    folders above, up to the root of its dataset. Without a table, the labels of ``structures.tsv`` are assumed.
    Full names of nuclei are replaced by abbreviations: ``left red nucleus``, or ``red nucleus`` of both sides; so are
    names as `bids_dgmseg.models.label_map.match_name` knows them, such as ``Left-Caudate``.

    Raises
    ------
    InputError
        If the table is not valid.
    """
    seg = split_entities(stem_of(path)).get("seg")
    names = [*([f"seg-{seg}_dseg.tsv"] if seg else []), "dseg.tsv"]
    parents = list(path.parents)
    roots = [level for level, folder in enumerate(parents) if (folder / DATASET_DESCRIPTION).is_file()]
    above = [level + 1 for level, folder in enumerate(parents) if folder.name.startswith("sub-")]
    folders = parents[: (roots or above or [0])[0] + 1]  # only the image's own if it is not in a dataset
    inherited = (folder / name for folder in folders for name in names)
    own = path.with_name(f"{stem_of(path)}.tsv")
    source = next((table for table in (own, *inherited) if table.is_file()), None)
    if source is None:
        return LabelTable({structure.index: structure.abbreviation for structure in ALL_STRUCTURES}, None)
    table = read_tsv(source, dtype=str, na_filter=False)
    column = next((name for name in ("abbreviation", "name") if name in table), None)
    if column is None or "index" not in table or table.empty:
        raise InputError(f"{source.name}: columns index and abbreviation are missing; provide a BIDS label table")
    labels: dict[int, str] = {}
    for number, name in zip(table["index"].str.strip(), table[column].str.strip(), strict=True):
        abbreviation = ABBREVIATIONS.get(name) or match_name(name) or name
        if not number.isdecimal() or not abbreviation:
            raise InputError(
                f"{source.name}: index {number!r} with {column} {abbreviation!r}; every row needs an integer and a name"
            )
        if int(number) in labels or (abbreviation in labels.values() and abbreviation != "n/a"):
            raise InputError(f"{source.name}: {number} or {abbreviation} is listed twice; keep one row per label")
        labels[int(number)] = abbreviation
    return LabelTable({number: name for number, name in labels.items() if number > 0 and name != "n/a"}, source)


def check_reference(reference: ReferenceRegion, model: Model) -> None:
    """Check that the options of the reference region fit each other and the model; `InputError` if not."""
    known = [*model.structures, *wholes_of(model.structures)]
    names = [*dict.fromkeys(one.nucleus for one in known), *(one.abbreviation for one in known)]
    if reference.kind == "structure" and reference.structure is None:
        raise InputError(
            f"`reference` structure: requires `reference_structure`; add it, such as `reference_structure` {names[0]}"
        )
    if reference.kind != "structure" and reference.structure is not None:
        raise InputError(
            f"`reference_structure` {reference.structure}: requires `reference` structure, not {reference.kind}; "
            "add `reference` structure"
        )
    if reference.structure is not None and reference.structure not in names:
        raise InputError(
            f"`reference_structure` {reference.structure}: not labelled by {model.name}; choose from {', '.join(names)}"
        )
    if reference.masks and reference.kind != "csf":
        raise InputError(f"`reference_mask`: requires `reference` csf, not {reference.kind}; add `reference` csf")
    if reference.kind == "csf" and not reference.masks and "ventricles" not in model.localizer.labels:
        raise InputError(
            f"`reference` csf: {model.name} does not label the ventricles; provide masks with `reference_mask`"
        )


def find_reference_masks(folder: Path | None, scans: Sequence[Scan]) -> dict[str, Path]:
    """Find the user's ``_label-CSF_mask`` or ``_label-ventricles_mask`` of each scan, by the name of the scan.

    A mask has the entities of its scan; if there is none, it may differ in ``desc``, ``space`` or ``res``. Without a
    folder the result is empty.

    Raises
    ------
    InputError
        If the folder has no such mask, or several of one scan.
    """
    labels = {("label", label.casefold()) for label in MASK_LABELS}
    names = "_label-CSF_mask.nii[.gz] or _label-ventricles_mask.nii[.gz]"
    return _find_masks(folder, scans, labels, names=names, parameter="reference_mask")


def find_brain_masks(folder: Path | None, scans: Sequence[Scan]) -> dict[str, Path]:
    """Find the user's ``_desc-brain_mask`` or ``_label-brain_mask`` of each scan whose map is to be reconstructed.

    Like `find_reference_masks`, but every scan with echoes must have a mask.
    """
    echoes = [scan for scan in scans if scan.from_echoes]
    labels = {("desc", "brain"), ("label", "brain")}
    names = "_desc-brain_mask.nii[.gz] or _label-brain_mask.nii[.gz]"
    found = _find_masks(folder, echoes, labels, names=names, parameter="brain_masks")
    if folder and (missing := [scan.name for scan in echoes if scan.name not in found]):
        raise InputError(f"{folder.name}: no mask of {list_some(missing)}; add it, or omit `brain_masks`")
    return found


def _find_masks(
    folder: Path | None, scans: Sequence[Scan], wanted: Collection[tuple[str, str]], *, names: str, parameter: str
) -> dict[str, Path]:
    """Find the mask of each scan among those with one of some entities."""
    if folder is None:
        return {}
    masks: dict[str, list[Path]] = defaultdict(list)
    for path in find_images(folder, "mask", parameter=parameter):
        entities = split_entities(stem_of(path))
        if any((key, value.casefold()) in wanted for key, value in entities.items()):
            masks[entities.get("sub", "")].append(path)
    if not masks:
        raise InputError(
            f"{folder.name}: no {names} files; rename the masks, or choose another folder for `{parameter}`"
        )
    found: dict[str, Path] = {}
    for scan in scans:
        named = Path(f"{scan.name}_Chimap.nii.gz")  # files of SEPIA are not named after their scan
        try:
            matched = match_scans([named], masks[scan.participant])
        except InputError as error:
            several = str(error).partition("; ")[0]
            raise InputError(f"{several}; keep one of them in the folder of `{parameter}`") from error
        if matched:
            found[scan.name] = matched[named]
    return found
