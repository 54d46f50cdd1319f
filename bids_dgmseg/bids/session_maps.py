"""Further images of a scan: maps of its session that are measured in its nuclei, and masks of excluded voxels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import Inputs, SourceDataset
from bids_dgmseg.bids.entities import (
    ScanName,
    comparable,
    is_in_standard_space,
    is_partial_chi,
    join_entities,
    split_entities,
    stem_of,
)
from bids_dgmseg.bids.irregular import describe_misplaced
from bids_dgmseg.bids.segmentations import find_images, name_scan
from bids_dgmseg.bids.sidecars import Sidecars
from bids_dgmseg.config import parse_map_name
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_optional_json

EXCLUDED = ("lesion", "haemorrhage", "hemorrhage", "calcification", "exclude")
"""Values of ``label`` or ``desc`` for masks of voxels that are not measured."""

_OF_MASKS = ("label", "desc", "space", "res", "den", "seg", "atlas")
"""Entities in which a mask may differ from its scan."""

_ANY_DIFFERENCE = ("space", "res", "den", "desc", "label", "echo", "part")
"""Entities that do not name the acquisition."""


@dataclass(frozen=True)
class SessionMap:
    """A map of the session of a scan."""

    path: Path
    uri: str
    """BIDS URI."""
    units: str
    """``Units`` in its sidecars by the inheritance principle; empty if they state none."""


def name_columns(text: str) -> str:
    """Return the name of a map in columns of tables.

    >>> name_columns("desc-paramagnetic_Chimap"), name_columns("R2starmap")
    ('paramagnetic_Chimap', 'R2starmap')
    """
    entities, suffix = parse_map_name(text)
    return "_".join([*entities.values(), suffix])


def find_session_maps(
    inputs: Inputs, scans: Sequence[ScanName], wanted: Sequence[str]
) -> tuple[dict[str, dict[str, SessionMap]], list[str]]:
    """Find further maps of the session of each scan in all datasets of the run.

    A map has the suffix and the entities of its name in `wanted`. Of several, those whose other entities, such as
    ``acq`` and ``run``, do not differ from those of the scan are preferred, then those with the fewest entities of
    their own. Maps in standard space, and those in the folder of another participant or session, are ignored.

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
    names = [name_columns(text) for text in wanted]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"`sample` {list_some(wanted)}: {twice[0]} would name two maps; choose one of them")
    parsed = [(comparable(entities), suffix) for entities, suffix in map(parse_map_name, wanted)]
    for text, (entities, suffix) in zip(wanted, parsed, strict=True):
        if suffix == "Chimap" and not entities:
            raise InputError(
                f"`sample` {text}: the chi map of each scan is measured anyway; name others by their entities, such as "
                "desc-paramagnetic_Chimap"
            )
    listed = _list_maps(inputs, sorted({suffix for _, suffix in parsed})) if wanted else {}
    sidecars = cache(Sidecars)
    maps: dict[str, dict[str, SessionMap]] = {scan.name: {} for scan in scans}
    warnings = []
    for name, text, (entities, suffix) in zip(names, wanted, parsed, strict=True):
        missing = []
        for scan in scans:
            every = listed.get((scan.participant, scan.session, suffix), [])
            found = _prefer([one for one in every if entities.items() <= one[2].items()], scan, entities)
            if not found:
                missing.append(scan.name)
            elif len(found) > 1:
                several = list_some(path.name for _, path, _ in found)
                warnings.append(f"{scan.name}: several maps for `sample` {text} ({several}); name one by its entities")
            else:
                source, path, _ = found[0]
                stem = stem_of(path)[: -len(suffix)].removesuffix("_")
                maps[scan.name][name] = _describe(source, path, sidecars(suffix), stem)
        if missing:
            warnings.append(
                f"{list_some(missing)}: no {text} in {'its' if len(missing) == 1 else 'their'} session; measures of it "
                "are n/a"
            )
    return maps, warnings


_Listed = tuple[SourceDataset, Path, Mapping[str, str]]


def _list_maps(inputs: Inputs, suffixes: Sequence[str]) -> dict[tuple[str, str | None, str], list[_Listed]]:
    """List the maps by participant, session and suffix."""
    listed: dict[tuple[str, str | None, str], list[_Listed]] = defaultdict(list)
    for source in inputs.sources:
        for path in source.find_maps(suffixes):
            entities = comparable(source.entities(path))
            if not is_in_standard_space(path.name) and not describe_misplaced(source.root, path):
                suffix = stem_of(path).rpartition("_")[2]
                listed[entities["sub"], entities.get("ses"), suffix].append((source, path, entities))
    return listed


def _prefer(found: Sequence[_Listed], scan: ScanName, wanted: Mapping[str, str]) -> list[_Listed]:
    """Return the maps that fit a scan best."""
    own = comparable(scan.named_entities)

    def rank(entities: Mapping[str, str]) -> tuple[int, int]:
        acquisition = [key for key in entities if key not in _ANY_DIFFERENCE and key not in wanted]
        differing = sum(key in own and own[key] != entities[key] for key in acquisition)
        return differing, len(entities.keys() - own.keys() - wanted.keys())

    found = [one for one in found if "desc" in wanted or not is_partial_chi(one[1].name)]
    ranks = [rank(entities) for _, _, entities in found]
    return [one for one, place in zip(found, ranks, strict=True) if place == min(ranks)]


def _describe(source: SourceDataset, path: Path, sidecars: Sidecars, stem: str) -> SessionMap:
    """Return a map with its unit; a broken sidecar is reported when the map is read."""
    try:
        about: Mapping[str, Any] = sidecars.inherit(source.root, path, stem, source.entities(path).items())[0]
    except InputError:
        about = read_optional_json(path.with_name(f"{stem_of(path)}.json"))
    known = {key.casefold(): value for key, value in about.items()}
    units = known.get("units", known.get("unit", ""))
    uri = f"bids:{source.name}:{path.relative_to(source.root).as_posix()}"
    return SessionMap(path, uri, units if isinstance(units, str) else "")


def find_exclusion_masks(folder: Path | None, scans: Sequence[ScanName]) -> tuple[dict[str, list[Path]], list[str]]:
    """Find the masks of voxels that are not measured, by the name of the scan; several of one scan are combined.

    A mask is a ``_mask`` with one of `EXCLUDED` as ``label`` or ``desc``. It has the entities of its scan, or only
    those of its participant and session. The second value are warnings about masks of no scan.

    Raises
    ------
    InputError
        If the folder has no such mask.
    """
    if folder is None:
        return {}, []
    masks = []
    for path in find_images(folder, "mask", parameter="exclude_mask"):
        entities = split_entities(stem_of(path))
        if {entities.get(key, "").casefold() for key in ("label", "desc")} & set(EXCLUDED):
            masks.append(path)
    if not masks:
        raise InputError(
            f"{folder.name}: no _label-lesion_mask.nii[.gz] or _desc-lesion_mask.nii[.gz] files (or "
            f"{', '.join(EXCLUDED[1:])}); rename the masks, or choose another folder for `exclude_mask`"
        )
    names, sessions = {}, {}
    for scan in scans:
        names[scan.name] = name_scan(Path(f"{scan.name}_Chimap.nii.gz"), ignored=_OF_MASKS)
        entities = {"sub": scan.participant, **({"ses": scan.session} if scan.session else {})}
        sessions[scan.name] = join_entities(entities)
    participants = {f"sub-{scan.participant}" for scan in scans}
    found: dict[str, list[Path]] = defaultdict(list)
    unused = []
    for path in masks:
        own = name_scan(path, ignored=_OF_MASKS)
        chosen = [name for name, other in names.items() if other == own]
        chosen = chosen or [name for name, session in sessions.items() if session == own]
        for name in chosen:
            found[name].append(path)
        without_session = "_ses-" not in own and own.partition("_")[0] in participants
        if not chosen and (without_session or any(own.startswith(f"{session}_") for session in sessions.values())):
            unused.append(path.name)
    lines = (
        [f"{list_some(unused)}: of no scan in the dataset (`exclude_mask` {folder.name}); ignored"] if unused else []
    )
    return dict(found), lines
