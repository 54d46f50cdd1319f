"""Choose the map of each acquisition, and the echoes that no map replaces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import ItemsView, Iterable, Mapping, Sequence
from pathlib import Path

from bids_dgmseg.bids.dataset import SourceDataset
from bids_dgmseg.bids.echoes import group_echoes
from bids_dgmseg.bids.entities import comparable, is_in_standard_space, is_partial_chi, join_entities
from bids_dgmseg.bids.filters import Filter
from bids_dgmseg.bids.irregular import ECHO_NAME, MAP_NAME

Listed = Sequence[tuple[SourceDataset, Sequence[Path]]]
"""Images by dataset."""

PREFERRED_CHI = (None, "cosmos", "mms", "singlepass", "total")
"""Values of ``desc`` by which QSMxT tells several chi maps of one acquisition apart, in order of preference.

Without ``desc`` it is the map that QSMxT and other programs make of every acquisition, so that all participants of a
study have the same kind. COSMOS and the mean of the susceptibility tensor (``mms``) combine several orientations. The
first of two passes has more streaks than their combination, and the total of a separation of sources is a by-product.
"""

_PROCESSING = ("desc", "space", "res", "den", "atlas", "seg", "label", "scale")
"""Entities of derivatives, which the echoes of a map lack."""


def choose_maps(listed: Listed, wanted: Filter) -> tuple[Listed, dict[Path, Path]]:
    """Select the maps by a filter, and of several maps of one acquisition the preferred one.

    If the filter names ``desc``, all maps that it selects are kept. Returns the maps, and for each map that was left
    out the preferred one.
    """
    chosen: list[tuple[SourceDataset, Sequence[Path]]] = []
    replaced: dict[Path, Path] = {}
    for source, paths in listed:
        maps = wanted.select(source, [path for path in paths if MAP_NAME.fullmatch(path.name)])
        if "space" not in wanted.entities:
            maps = [path for path in maps if not is_in_standard_space(path.name)]
        if "desc" not in wanted.entities:
            maps = [path for path in maps if not is_partial_chi(path.name)]
            replaced |= _find_preferred(source, maps)
        chosen.append((source, [path for path in maps if path not in replaced]))
    return chosen, replaced


def _find_preferred(source: SourceDataset, maps: Iterable[Path]) -> dict[Path, Path]:
    """Return for each map that a preferred one replaces (`PREFERRED_CHI`) that map.

    It has the same entities or more: QSMxT names a COSMOS map without the entity that distinguishes its orientations.
    """
    ranked = []
    for path in maps:
        entities = comparable(source.entities(path))
        if (desc := entities.pop("desc", None)) in PREFERRED_CHI:
            ranked.append((PREFERRED_CHI.index(desc), path, entities.items()))
    ranked.sort(key=lambda one: one[:2])
    by_session: dict[tuple[str | None, str | None], list[tuple[int, Path, ItemsView[str, str]]]] = defaultdict(list)
    for one in ranked:
        by_session[_session(source, one[1])].append(one)
    return {
        path: better[0]
        for alternatives in by_session.values()
        for rank, path, entities in alternatives
        if (better := [other for kind, other, more in alternatives if kind < rank and more >= entities])
    }


def find_unmapped(listed: Listed, wanted: Filter) -> tuple[Listed, list[str]]:
    """Find the echoes without any map, selected or not.

    Any map of a session, or of a participant without sessions, replaces the echoes, unless both have a ``run`` and it
    differs, or the map is in standard space.

    Returns the echoes to reconstruct, and the names of scans that a map of another acquisition replaces.
    """
    maps: dict[tuple[str | None, str | None], list[dict[str, str]]] = defaultdict(list)
    for source, paths in listed:
        for path in paths:
            if MAP_NAME.fullmatch(path.name) and not is_in_standard_space(path.name):
                maps[_session(source, path)].append(comparable(source.entities(path)))
    unmapped, replaced = [], set[str]()
    for source, paths in listed:
        echoes, others = [], []
        for path in wanted.select(source, [path for path in paths if ECHO_NAME.fullmatch(path.name)]):
            entities = comparable(source.entities(path))
            sub, ses = entities["sub"], entities.get("ses")
            candidates = [one for key in {(sub, ses), (sub, None)} for one in maps[key]]
            differences = [_differing(one, entities) for one in candidates if replaces_echoes(one, entities)]
            if not differences:
                echoes.append(path)
            elif all(differences):
                others.append(path)
        unmapped.append((source, echoes))
        replaced |= {join_entities(scan.entities) for scan in group_echoes(source, others)}
    return unmapped, sorted(replaced)


def replaces_echoes(chi: Mapping[str, str], echoes: Mapping[str, str]) -> bool:
    """Return whether a map replaces echoes, by their entities: not if both have a ``run`` and it differs."""
    return "run" not in _differing(chi, echoes)


def _differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """List the entities of an acquisition that both have, with different values."""
    return [key for key in one.keys() & other.keys() if key not in _PROCESSING and one[key] != other[key]]


def _session(source: SourceDataset, path: Path) -> tuple[str | None, str | None]:
    entities = source.entities(path)
    return entities.get("sub"), entities.get("ses")
