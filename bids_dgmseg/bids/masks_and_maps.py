"""Find the images that belong to a scan: segmentations, masks and further maps, matched by entities."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import DATASET_DESCRIPTION, Inputs, SourceDataset
from bids_dgmseg.bids.entities import (
    ScanName,
    Sidecars,
    comparable,
    describe_misplaced,
    is_in_standard_space,
    is_partial_chi,
    join_entities,
    split_entities,
    stem_of,
)
from bids_dgmseg.config import parse_map_name
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.models.label_tables import match_name, read_label_table
from bids_dgmseg.models.structures import ABBREVIATIONS, ALL_STRUCTURES

LESIONS = ("lesion", "haemorrhage", "hemorrhage", "calcification", "exclude")
"""Values of ``label`` or ``desc`` for masks of voxels that are not measured."""

_SEGMENTATION_ENTITIES = ("seg", "atlas", "label", "scale")
"""Entities that distinguish segmentations of a scan."""

_DIFFERING_ENTITIES = (*_SEGMENTATION_ENTITIES, "desc", "space", "res", "den")
"""Entities that may also differ between a scan and its images, because processing adds them."""


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
    images = [
        path
        for path in paths
        if pattern.fullmatch(path.name)
        and not is_in_standard_space(path.name)
        and not (suffix == "Chimap" and is_partial_chi(path.name))
    ]
    if not images:
        where = f" to `{parameter}`" if parameter else ""
        raise InputError(
            f"{root}: no _{suffix}.nii[.gz] files in sub-X folders; pass the root directory of a dataset with "
            f"them{where}"
        )
    return images


def name_scan(path: Path, *, ignored: Collection[str] = _SEGMENTATION_ENTITIES) -> str:
    """Return the name of the scan that an image belongs to, from its entities; without entities, its stem.

    >>> name_scan(Path("sub-01_run-02_seg-dgm16_dseg.nii.gz"))
    'sub-01_run-2'
    """
    entities = comparable(split_entities(stem_of(path)))
    return join_entities({key: value for key, value in entities.items() if key not in ignored}) or stem_of(path)


def images_of_scan(scan: ScanName, paths: Sequence[Path]) -> list[list[Path]]:
    """Find the images that belong to a scan, in order of precedence.

    These are images with its entities apart from ``seg``, ``atlas``, ``label`` and ``scale``; those that also differ in
    ``desc``, ``space``, ``res`` or ``den``; and those of its participant and session without further entities.

    Returns
    -------
    list of list of Path
        The three kinds; an image is in the first that fits.
    """
    named = Path(f"{scan.name}_x")
    session = join_entities({key: label for key, label in scan.named_entities.items() if key in ("sub", "ses")})
    kinds: list[list[Path]] = [[], [], []]
    for path in paths:
        if name_scan(path) == name_scan(named):
            kinds[0].append(path)
        elif name_scan(path, ignored=_DIFFERING_ENTITIES) == name_scan(named, ignored=_DIFFERING_ENTITIES):
            kinds[1].append(path)
        elif name_scan(path, ignored=_DIFFERING_ENTITIES) == session:
            kinds[2].append(path)
    return kinds


def match_one(scan: ScanName, paths: Sequence[Path], *, folder: Path, parameter: str) -> Path | None:
    """Return the image of a scan with the highest precedence (`images_of_scan`, not of its whole session), if any.

    Raises
    ------
    InputError
        If there are several.
    """
    matches = next(filter(None, images_of_scan(scan, paths)[:2]), [None])
    if len(matches) > 1:
        several = list_some(path.name for path in matches if path)
        raise InputError(f"{several} are of {scan.name}; keep one of them in {folder.name} (`{parameter}`)")
    return matches[0]


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
    some = list_some(path.name for path in wanted or paths)
    raise InputError(f"{some} are of the same scan; select one by its entities, such as `choose` seg-NAME")


def find_label_table(path: Path) -> LabelTable:
    """Find and read the label table that applies to a segmentation.

    It is searched beside the image under its name, then as ``seg-X_dseg.tsv`` or ``dseg.tsv`` in its folder and in the
    folders above, up to the root of its dataset. Without a table, the labels of ``structures.tsv`` are assumed.
    Full names of nuclei are replaced by abbreviations: ``left red nucleus``, or ``red nucleus`` of both sides; so are
    names as `bids_dgmseg.models.label_tables.match_name` knows them, such as ``Left-Caudate``.

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
    beside = path.with_name(f"{stem_of(path)}.tsv")
    source = next((table for table in (beside, *inherited) if table.is_file()), None)
    if source is None:
        return LabelTable({structure.index: structure.abbreviation for structure in ALL_STRUCTURES}, None)
    labels: dict[int, str] = {}
    for row in read_label_table(source):
        abbreviation = ABBREVIATIONS.get(row.abbreviation) or match_name(row.abbreviation) or row.abbreviation
        if abbreviation in labels.values():
            raise InputError(f"{source.name}: {abbreviation} is listed twice; keep one row per label")
        labels[row.index] = abbreviation
    return LabelTable(labels, source)


def _find_masks(folder: Path, labels: Collection[str], *, parameter: str) -> list[Path]:
    """List the masks of a folder with one of some values of ``label`` or ``desc``; `InputError` if there is none."""
    masks = []
    for path in find_images(folder, "mask", parameter=parameter):
        entities = split_entities(stem_of(path))
        if {entities.get(key, "").casefold() for key in ("label", "desc")}.intersection(labels):
            masks.append(path)
    if not masks:
        names = " or ".join(f"_label-{label}_mask.nii[.gz]" for label in labels)
        raise InputError(
            f"{folder.name}: no {names} files; rename the masks, or choose another folder for `{parameter}`"
        )
    return masks


def find_scan_masks(
    folder: Path | None, scans: Sequence[ScanName], labels: Collection[str], *, parameter: str
) -> dict[str, Path]:
    """Find the user's mask of each scan, by the name of the scan; empty without a folder.

    Parameters
    ----------
    folder : path or None
        Folder of masks ``_label-X_mask`` or ``_desc-X_mask``.
    scans : sequence of ScanName
    labels : collection of str
        Values X, in lower case.
    parameter : str
        Name of `folder` in messages.

    Raises
    ------
    InputError
        If the folder has no such mask, or several of one scan.
    """
    masks = _find_masks(folder, labels, parameter=parameter) if folder else []
    matches = {scan.name: match_one(scan, masks, folder=folder or Path(), parameter=parameter) for scan in scans}
    return {name: path for name, path in matches.items() if path}


def find_lesion_masks(folder: Path | None, scans: Sequence[ScanName]) -> tuple[dict[str, list[Path]], list[str]]:
    """Find the masks of voxels that are not measured, by the name of the scan; all of one scan are combined.

    A mask is a ``_mask`` with one of `LESIONS` as ``label`` or ``desc``, of the scan or of its whole session. The
    second value are warnings about masks of no scan.

    Raises
    ------
    InputError
        If the folder has no such mask.
    """
    if folder is None:
        return {}, []
    masks = _find_masks(folder, LESIONS, parameter="lesion_masks")
    by_scan = {scan.name: [path for paths in images_of_scan(scan, masks) for path in paths] for scan in scans}
    participants = {scan.participant for scan in scans}
    unused = set(masks).difference(*by_scan.values())
    names = [path.name for path in sorted(unused) if split_entities(path.name).get("sub") in participants]
    lines = [f"{list_some(names)}: matches no scan (`lesion_masks` {folder.name}); ignored"] if names else []
    return {name: sorted(paths) for name, paths in by_scan.items() if paths}, lines


@dataclass(frozen=True)
class FurtherMap:
    """A further map of the session of a scan, which is measured in its nuclei."""

    path: Path
    root: Path
    """Its dataset."""
    uri: str
    """BIDS URI."""
    units: str
    """``Units`` in its sidecars by the inheritance principle; empty if they state none."""


def find_further_maps(
    inputs: Inputs, scans: Sequence[ScanName], wanted: Sequence[str]
) -> tuple[dict[str, dict[str, FurtherMap]], list[str]]:
    """Find further maps of the session of each scan in all datasets of the run.

    A map has the suffix and the entities of its name in `wanted`. Of several in a session, that of the scan
    (`images_of_scan`) is used. Maps in standard space, and those in the folder of another participant or session, are
    ignored.

    Parameters
    ----------
    inputs : Inputs
        Datasets and selection.
    scans : sequence of ScanName
    wanted : sequence of str
        Names such as ``R2starmap`` or ``desc-paramagnetic_Chimap``.

    Returns
    -------
    maps : dict
        Scan → name of the map in columns → map.
    warnings : list of str
        One line per map that some scans lack, or have several times.

    Raises
    ------
    InputError
        If a name is that of the chi map itself, or two names are equal in columns.
    """
    parsed = [parse_map_name(text) for text in wanted]
    names = ["_".join([*entities.values(), suffix]) for entities, suffix in parsed]  # such as paramagnetic_Chimap
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"`further_maps` {list_some(wanted)}: {twice[0]} would name two maps; choose one of them")
    if "Chimap" in wanted:
        raise InputError(
            "`further_maps` Chimap: the chi map of each scan is measured anyway; name others by their entities, such "
            "as desc-paramagnetic_Chimap"
        )
    sidecars = cache(Sidecars)
    maps: dict[str, dict[str, FurtherMap]] = {scan.name: {} for scan in scans}
    warnings = []
    for name, text, (entities, suffix) in zip(names, wanted, parsed, strict=True):
        listed = _list_maps(inputs, suffix, comparable(entities))
        missing = []
        for scan in scans:
            in_session = listed.get((scan.participant, scan.session), {})
            matches = next(filter(None, images_of_scan(scan, list(in_session))), list(in_session))
            if not matches:
                missing.append(scan.name)
            elif len(matches) > 1:
                several = list_some(path.name for path in matches)
                warnings.append(
                    f"{scan.name}: several maps for `further_maps` {text} ({several}); name one by its entities"
                )
            else:
                maps[scan.name][name] = _describe(in_session[matches[0]], matches[0], sidecars(suffix))
        if missing:
            warnings.append(f"{list_some(missing)}: {text} missing; its columns are n/a")
    return maps, warnings


def _list_maps(
    inputs: Inputs, suffix: str, wanted: Mapping[str, str]
) -> dict[tuple[str, str | None], dict[Path, SourceDataset]]:
    """List the maps with a suffix and some entities by participant and session, with their dataset."""
    listed: dict[tuple[str, str | None], dict[Path, SourceDataset]] = defaultdict(dict)
    for source in inputs.sources:
        for path in source.find_maps(suffix):
            entities = comparable(source.entities(path))
            unusable = is_in_standard_space(path.name) or describe_misplaced(source.root, path)
            if (
                not unusable
                and wanted.items() <= entities.items()
                and ("desc" in wanted or not is_partial_chi(path.name))
            ):
                listed[entities["sub"], entities.get("ses")][path] = source
    return listed


def _describe(source: SourceDataset, path: Path, sidecars: Sidecars) -> FurtherMap:
    """Return a map with its unit; a broken sidecar is reported when the map is read."""
    units: Any = ""
    with suppress(InputError):
        units = sidecars.inherit(source.root, path).get("Units", "")
    uri = f"bids:{source.name}:{path.relative_to(source.root).as_posix()}"
    return FurtherMap(path, source.root, uri, units if isinstance(units, str) else "")
