"""Find the scans of a run: chi maps, and multi-echo GRE of sessions without a map; report what is skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import Filter, Inputs, SourceDataset, is_own
from bids_dgmseg.bids.echoes import Echo, group_echoes, read_echoes
from bids_dgmseg.bids.entities import (
    ECHO_NAME,
    MAP_NAME,
    ScanName,
    Sidecars,
    comparable,
    consistent_entities,
    describe_misplaced,
    is_in_standard_space,
    is_partial_chi,
    join_entities,
    split_entities,
    stem_of,
)
from bids_dgmseg.errors import InputError, list_some

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


@dataclass(frozen=True)
class Scan(ScanName):
    """A chi map, or the echoes it is reconstructed from, with entities and metadata."""

    chi: Path
    """Absolute path of the map, or of the first echo's phase, real part or complex values, which define its grid."""
    sidecar: Mapping[str, Any]
    """Metadata by the inheritance principle; empty if there are none."""
    sidecar_path: Path | None
    """The sidecar with the highest precedence."""
    dataset_root: Path
    dataset_name: str
    """``raw`` or the derivative's name: BIDS URIs are ``bids:NAME:path``."""
    problem: str | None = None
    """Why it cannot be processed, such as a broken sidecar: one line."""
    echoes: tuple[Echo, ...] = ()
    """Echoes of a scan without a map, by increasing echo time; empty if it has a map or a `problem`."""

    @property
    def from_echoes(self) -> bool:
        """Whether the map must be reconstructed."""
        return ECHO_NAME.fullmatch(self.chi.name) is not None

    @property
    def uri(self) -> str:
        """BIDS URI of `chi`."""
        return self._uri(self.chi)

    @property
    def files(self) -> tuple[Path, ...]:
        """All images that results depend on."""
        return tuple(path for echo in self.echoes for path in echo.files) or (self.chi,)

    @property
    def uris(self) -> list[str]:
        """BIDS URIs of `files`."""
        return [self._uri(path) for path in self.files]

    def _uri(self, path: Path) -> str:
        return f"bids:{self.dataset_name}:{path.relative_to(self.dataset_root).as_posix()}"


def find_scans(inputs: Inputs, *, echoes: bool = False, misplaced: list[str] | None = None) -> list[Scan]:
    """Find the chi maps to segment.

    Besides BIDS names, those of SEPIA (``Sepia_Chimap.nii.gz``) are found inside ``sub-X`` folders.

    Parameters
    ----------
    inputs : Inputs
        The datasets and the selection.
    echoes : bool
        Whether to find gradient echoes (``_MEGRE``, ``_T2starw``, ``_GRE``), too, in sessions (or participants without
        sessions) without a map. Echoes without phase are ignored.
    misplaced : list of str, optional
        Collects one line per file in the folder of another participant or session, which is then skipped; by default
        such a file is an error.

    Returns
    -------
    list of Scan
        Sorted by participant, session and name; never empty. Scans with a broken sidecar, missing echoes or two maps
        have a `problem`.

    Raises
    ------
    InputError
        If no scan is found, two datasets have maps of one scan, a folder cannot be listed, or all scans have the same
        problem.
    """
    listed = [(source, list(_consistent(source, misplaced))) for source in inputs.sources]
    found = [one for source, paths in choose_maps(listed, _map_filter(inputs))[0] for one in _read_maps(source, paths)]
    if echoes:
        maps = _find_sessionless(inputs)
        for source, paths in find_unmapped(listed, Filter.read(inputs.selection.filter_file, "megre"))[0]:
            scans_of_echoes = _read_echo_scans(source, paths)
            found += ((one, _check_sessionless(scan, maps.get(scan.participant, ()))) for one, scan in scans_of_echoes)
    by_name: dict[tuple[tuple[str, str], ...], list[tuple[SourceDataset, Scan]]] = defaultdict(list)
    for source, scan in found:
        by_name[tuple(comparable(scan.named_entities).items())].append((source, scan))
    scans = [_select_one(group) for group in by_name.values()]
    if not scans:
        raise InputError(misplaced[0] if misplaced else _explain_no_scans(inputs, reconstruct=echoes))
    if len(scans) > 1 and scans[0].problem and len({scan.problem for scan in scans}) == 1:
        raise InputError(scans[0].problem)  # a sidecar shared by all
    return sorted(scans, key=lambda scan: (scan.participant, scan.session or "", scan.name))


def _consistent(source: SourceDataset, misplaced: list[str] | None) -> Iterator[Path]:
    """Yield the selected images, except those whose folders contradict their names."""
    for path in (path for paths in source.images.values() for path in paths):
        line = describe_misplaced(source.root, path)
        if not line:
            yield path
        elif misplaced is None:
            raise InputError(line)
        else:
            misplaced.append(line)


def _map_filter(inputs: Inputs) -> Filter:
    return Filter.read(inputs.selection.filter_file, "chimap", chi=inputs.selection.chi)


def _read_maps(source: SourceDataset, paths: Iterable[Path]) -> Iterator[tuple[SourceDataset, Scan]]:
    sidecars = Sidecars("Chimap")
    for path in paths:
        stem = path.name[: path.name.rindex("Chimap")].removesuffix("_")
        entities = consistent_entities(source.root, path, stem)
        sidecar: dict[str, Any] = {}
        nearest = problem = None
        try:
            sidecar, nearest = sidecars.inherit(source.root, path)
        except InputError as error:  # the other scans can be processed
            problem = str(error)
        yield source, _build_scan(source, entities, path, sidecar, nearest, problem)


def _read_echo_scans(source: SourceDataset, paths: Iterable[Path]) -> Iterator[tuple[SourceDataset, Scan]]:
    sidecars = cache(Sidecars)
    for files in group_echoes(source, paths):
        try:
            echoes, sidecar, nearest = read_echoes(source, files, sidecars)
        except InputError as error:
            yield source, _build_scan(source, files.entities, files.first, {}, None, str(error))
        else:
            first = echoes[0].files[0]
            yield source, _build_scan(source, files.entities, first, sidecar, nearest, None, echoes)


def _find_sessionless(inputs: Inputs) -> dict[str, list[Path]]:
    """List the maps without a session of each participant, if sessions are selected, so that they are not."""
    maps: dict[str, list[Path]] = defaultdict(list)
    for source in inputs.sources if inputs.selection.sessions else ():
        for path in source.index.find():
            if MAP_NAME.fullmatch(path.name) and not is_in_standard_space(path.name):
                entities = source.entities(path)
                if "ses" not in entities:
                    maps[entities["sub"]].append(path)
    return maps


def _check_sessionless(scan: Scan, maps: Iterable[Path]) -> Scan:
    """Return the echoes of a session, with a `problem` if a map without a session replaces them.

    A run without a selection of sessions uses that map.
    """
    own = comparable(scan.named_entities)
    for path in () if scan.problem else maps:
        if replaces_echoes(comparable(split_entities(stem_of(path))), own):
            why = f"has no session, but may be the map of ses-{scan.session}"
            advice = f"move it to ses-{scan.session}, or omit `session_label` to use it"
            return replace(scan, echoes=(), problem=f"{path.name}: {why}; {advice}")
    return scan


def _build_scan(
    source: SourceDataset,
    entities: Mapping[str, str],
    chi: Path,
    sidecar: Mapping[str, Any],
    sidecar_path: Path | None,
    problem: str | None,
    echoes: tuple[Echo, ...] = (),
) -> Scan:
    """Return a scan with its entities in BIDS order."""
    rest = split_entities(join_entities(entities))
    sub, ses = rest.pop("sub"), rest.pop("ses", None)
    return Scan(sub, ses, rest, chi, sidecar, sidecar_path, source.root, source.name, problem, echoes)


def _select_one(group: Sequence[tuple[SourceDataset, Scan]]) -> Scan:
    """Return the only scan of a name; of two in one dataset, the first, with a `problem`.

    Two datasets with the same scan are an `InputError`, because that affects all scans.
    """
    (source, scan), (other, twin) = group[0], group[-1]
    if scan is twin:
        return scan
    path, second = scan.chi, twin.chi
    if path.parent == second.parent and path.name.removesuffix(".gz") == second.name.removesuffix(".gz"):
        return replace(scan, echoes=(), problem=f"{path.name} and {second.name} both exist; keep one")
    kind, block = ("maps", "chimap") if MAP_NAME.fullmatch(path.name) else ("echoes", "megre")
    shown = (f"{one.root.name}/{found.chi.relative_to(one.root).as_posix()}" for one, found in (group[0], group[-1]))
    both = f"{' and '.join(shown)} are {kind} of the same scan"
    if source == other:
        advice = "keep one, rename one with desc-, or select one with `filter_file`"
        return replace(scan, echoes=(), problem=f"{both}; {advice}")
    sites = source.raw and other.raw
    example = f'{{"{block}": {{"scope": "{source.names[1] if sites else source.name}"}}}}'
    how = "run each dataset by itself, or select one with" if sites else "select one dataset with `derivatives` or"
    raise InputError(f"{both}; {how} `filter_file` ({example})")


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


def find_skipped(inputs: Inputs, scans: Iterable[Scan]) -> list[str]:
    """Describe what a run skips, in one line each.

    These are selected participants without a scan, unless `find_scans` reports that their files are misplaced; sessions
    without a scan that have echoes or were selected by name; maps in MNI space, except those of this program; maps
    that a preferred one replaces; echoes that a map of another acquisition replaces; parts of file names that are not
    valid entities; and folders that are not valid BIDS names.
    """
    scans = list(scans)
    found: dict[str, set[str | None]] = defaultdict(set)
    for scan in scans:
        found[scan.participant].add(scan.session)
    lines = []
    for label in sorted({label for source in inputs.sources for label in source.selected}):
        if label not in found:
            images = ((source, path) for source in inputs.sources for path in source.images.get(label, ()))
            if not any(describe_misplaced(source.root, path) for source, path in images):
                lines.append(f"sub-{label}: {_explain_no_map(inputs, *_has_files(inputs, label))}; skipped")
            continue
        sessions = {session for source in inputs.sources for session in source.sessions(label)} - found[label]
        for session in sorted(sessions.intersection(inputs.selection.sessions or sessions)):
            maps, echoes = _has_files(inputs, label, session)
            if not maps and (echoes or inputs.selection.sessions):
                reason = _explain_no_map(inputs, maps, echoes) if echoes else "no _Chimap"
                lines.append(f"sub-{label}_ses-{session}: {reason}; skipped")
    listed = [(source, list(_consistent(source, []))) for source in inputs.sources]
    wanted = _map_filter(inputs)
    lines += _describe_normalized(listed, wanted) + _describe_choice(choose_maps(listed, wanted)[1])
    lines += [
        f"{name}: echoes without a map of their own; not reconstructed, because the session "
        "has a map of another acquisition"
        for name in find_unmapped(listed, Filter.read(inputs.selection.filter_file, "megre"))[1]
    ]
    for scan in scans:
        if invalid := [part for part in stem_of(scan.chi).split("_") if "-" in part and not split_entities(part)]:
            lines.append(
                f"{scan.chi.name}: {', '.join(invalid)} is not a valid BIDS entity (key-value with letters and digits) "
                f"and was ignored; the scan is treated as {scan.name}; rename the file"
            )
    if not inputs.selection.participants:
        source = inputs.sources[0]
        lines += [
            f"{path.name}: not a valid BIDS name (sub- and letters or digits); skipped, rename the folder"
            for path in sorted(source.root.glob("sub-*"))
            if path.is_dir() and path.name.removeprefix("sub-") not in source.participants
        ]
    return lines


def _describe_normalized(listed: Listed, wanted: Filter) -> list[str]:
    others = [path.name for source, paths in listed if not is_own(source.root) for path in paths]
    maps = [name for name in others if MAP_NAME.fullmatch(name) and is_in_standard_space(name)]
    if not maps or "space" in wanted.entities:
        return []
    return [f"{list_some(maps)}: in MNI space, where volumes are not those of the participant; skipped"]


def _describe_choice(replaced: Mapping[Path, Path]) -> list[str]:
    """Describe which of several maps of an acquisition are used, in one line per kind."""
    others: dict[Path, list[str]] = defaultdict(list)
    for path, preferred in replaced.items():
        others[preferred].append(_name_desc(path))
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for preferred, descs in others.items():
        kinds[_name_desc(preferred), ", ".join(sorted(set(descs)))].append(preferred.name)
    return [
        f"{list_some(names)}: used instead of maps of the same acquisition with {descs}; select others with `chi` or "
        "`filter_file`"
        for (_, descs), names in kinds.items()
    ]


def _name_desc(path: Path) -> str:
    return f"desc-{split_entities(stem_of(path)).get('desc', '')}"


def _has_files(inputs: Inputs, participant: str | None = None, session: str | None = None) -> tuple[list[str], str]:
    """Return the names of chi maps, and the suffix of echoes if there are any, selected or not.

    T2*-weighted images are echoes only with ``part-``: most are magnitudes for looking at.
    """
    names = [
        path.name
        for source in inputs.sources
        for label in (source.images if participant is None else (participant,))
        for path in source.images.get(label, ())
        if session in (None, source.entities(path).get("ses")) and not describe_misplaced(source.root, path)
    ]
    suffixes = [
        match[1]
        for match in map(ECHO_NAME.fullmatch, names)
        if match and (match[1] == "_MEGRE" or "_part-" in match[0])
    ]
    return [name for name in names if MAP_NAME.fullmatch(name)], min(suffixes, default="")


def _describe_selection(inputs: Inputs) -> str:
    """Describe the selection of maps by entities; empty if all are wanted."""
    chi, filter_file = inputs.selection.chi, inputs.selection.filter_file
    entities = f" with {', '.join(chi)}" if chi else ""
    return f"{entities} selected by {filter_file.name}" if filter_file else entities


def _describe_unwanted(maps: Iterable[str]) -> str:
    """Describe maps that are never selected by default."""
    if all(map(is_in_standard_space, maps)):
        return "in MNI space"
    return "of paramagnetic or diamagnetic sources, or of anisotropy"


def _explain_no_map(inputs: Inputs, maps: Sequence[str], echoes: str) -> str:
    """Explain why no chi map was selected, given the names of maps, and the suffix of echoes."""
    selection, selected = inputs.selection, _describe_selection(inputs)
    if not maps and echoes:
        return f"no _Chimap, and no {echoes} with part-phase{selected if selection.filter_file else ''}"
    if not maps:
        sessions = list_some(f"ses-{label}" for label in selection.sessions)
        return f"no _Chimap in {sessions}" if sessions else "no _Chimap"
    return f"no _Chimap{selected}" if selected else f"only maps {_describe_unwanted(maps)}"


def _explain_no_scans(inputs: Inputs, *, reconstruct: bool) -> str:
    """Explain why a run finds no scan; `reconstruct` is whether it may reconstruct maps."""
    name, selection = inputs.root.name, inputs.selection
    maps, echoes = _has_files(inputs)
    labels = [f"sub-{label}" for label in selection.participants] + [f"ses-{label}" for label in selection.sessions]
    whom = f" for {list_some(labels)}" if labels else ""
    if selection.filter_file and (maps or (echoes and reconstruct)):
        kind = "_Chimap" if maps else echoes
        return f"{name}: no {kind} files{whom} selected by {selection.filter_file.name}; check `filter_file`"
    if maps and selection.chi:
        return f"{name}: no _Chimap files{_describe_selection(inputs)}{whom}; check `chi`"
    if maps:
        return (
            f"{name}: only _Chimap files {_describe_unwanted(maps)}{whom}; provide maps of total susceptibility in the "
            "space of the scan, or select these with `chi`"
        )
    if echoes and not reconstruct:
        return (
            f"{name}: {echoes} but no _Chimap files{whom}; reconstruct the chi maps first, with bids_dgmseg at the "
            "participant level or QSMxT, and pass their folder to `derivatives`"
        )
    if echoes:
        return (
            f"{name}: {echoes} files without part-phase and no _Chimap files{whom}; add the phase images, or pass the "
            "folder of the chi maps to `derivatives`"
        )
    if labels:
        return f"{name}: no _Chimap or _MEGRE files{whom}; check `participant_label` and `session_label`"
    return f"{name}: no _Chimap or _MEGRE files; pass the folder of the chi maps to `derivatives`"


def group_sessions(scans: Sequence[Scan]) -> tuple[dict[str, tuple[Scan, ...]], list[str]]:
    """Find the scans that are labelled together: of one participant, equal in all entities but the session.

    Those with a `problem` are among them, because the others are not to be labelled without them.

    Returns
    -------
    groups : dict
        Name of a scan → scans of its group in their order, itself among them; only groups of at least two sessions.
    warnings : list of str
        Scans that belong to no group.
    """
    members: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        rest = {key: value for key, value in comparable(scan.named_entities).items() if key != "ses"}
        members[join_entities(rest)].append(scan)
    groups = {scan.name: tuple(group) for group in members.values() if len(group) > 1 for scan in group}
    alone = [scan.name for group in members.values() if len(group) == 1 for scan in group if not scan.problem]
    if not alone:
        return groups, []
    return groups, [f"{list_some(alone)}: no map of another session; labelled without `longitudinal`"]
