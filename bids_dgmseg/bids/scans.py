"""Find the scans of a run: chi maps, and multi-echo GRE of sessions without a map; report what is skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import Filter, Inputs, SourceDataset
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
from bids_dgmseg.image.units import ECHO_TIME_LIMITS_S, FIELD_LIMITS_T

_PAIRS = (("phase", "mag"), ("real", "imag"))
"""Parts that make up a complex signal, in order of preference."""

_SUFFIXES = ("MEGRE", "T2starw", "GRE")
"""In order of preference, if a scan has several; BIDS does not know the last one, of older converters."""

_MIN_ECHO_SPACING_S = 1e-4


@dataclass(frozen=True)
class Echo:
    """One echo of a scan."""

    parts: Mapping[str, Path]
    """Files by part: ``phase`` and ``mag``, ``real`` and ``imag``, or ``complex``."""
    time_s: float
    units: str = ""
    """Units of the phase in its sidecar."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files; the first defines the grid of the map."""
        return tuple(self.parts.values())


@dataclass(frozen=True)
class EchoFiles:
    """The files of a scan, not yet read."""

    entities: Mapping[str, str]
    """Without ``echo`` and ``part``."""
    parts: Mapping[str, dict[str, Path]] = field(default_factory=lambda: defaultdict(dict))
    """Part → number of the echo → file."""
    problems: list[str] = field(default_factory=list)
    """Why the scan cannot be processed."""

    @property
    def first(self) -> Path:
        """The file of the lowest echo that has phase, after which a scan with problems is named."""
        numbered = next(self.parts[part] for part in ("phase", "real", "imag", "complex") if part in self.parts)
        return numbered[min(numbered, key=lambda echo: (len(echo), echo))]

    @property
    def has_phase(self) -> bool:
        """Whether there is any phase; no map can be reconstructed from magnitudes alone."""
        return bool(self.parts.keys() & {"phase", "real", "imag", "complex"})


def group_echoes(source: SourceDataset, paths: Iterable[Path]) -> list[EchoFiles]:
    """Group files by scan, sorted by name; scans without phase are left out.

    A file without ``part-`` contains complex values if its header says so and no part has phase, else magnitudes. A
    MEGRE file whose header cannot be read, because it was not fetched or is damaged, may contain either: the scan has a
    problem. Of several suffixes of one scan, the first in MEGRE, T2starw and GRE with phase is used.
    """
    scans: dict[tuple[str, str], EchoFiles] = {}
    for path in sorted(path for path in paths if ECHO_NAME.fullmatch(path.name)):
        entities = consistent_entities(source.root, path, _stem(path))
        part, echo = entities.pop("part", "mag"), entities.pop("echo", "1")
        number = str(int(echo)) if echo.isdecimal() else echo  # echo-01 is echo-1
        scan = scans.setdefault((join_entities(entities), _suffix(path)), EchoFiles(entities))
        if "coil" in entities:
            scan.problems.append(f"{path.name}: image of a single coil; combine the coils, and remove `coil-`")
        if (twin := scan.parts[part].setdefault(number, path)) != path:
            scan.problems.append(f"{path.name}: same echo as {twin.name}; keep one of them")
    for (_, suffix), scan in scans.items():
        if scan.has_phase or "mag" not in scan.parts:  # other parts are not known
            continue
        try:
            is_complex = _is_complex(next(iter(scan.parts["mag"].values())))
        except InputError as error:
            is_complex = suffix == "MEGRE"  # most images with the other suffixes are magnitudes for looking at
            scan.problems.insert(0, str(error))
        if is_complex:
            scan.parts["complex"].update(scan.parts["mag"])
    ranked = sorted(scans.items(), key=lambda item: (item[0][0], _SUFFIXES.index(item[0][1])), reverse=True)
    chosen = {name: scan for (name, _), scan in ranked if scan.has_phase}  # the first suffix replaces the others
    return [chosen[name] for name in sorted(chosen)]


def _stem(path: Path) -> str:
    """Return a name without suffix and extension."""
    return stem_of(path).rpartition("_")[0]


def _suffix(path: Path) -> str:
    return stem_of(path).rpartition("_")[2]


def _is_complex(path: Path) -> bool:
    """Return whether a file has no ``part-`` and complex values; `InputError` if its header cannot be read."""
    from bids_dgmseg.io.nifti import load_image  # nibabel is slow to import, and `--help` does not need it

    return "_part-" not in path.name and load_image(path).get_data_dtype().kind == "c"


def read_echoes(
    source: SourceDataset, scan: EchoFiles, sidecars: Callable[[str], Sidecars]
) -> tuple[tuple[Echo, ...], Mapping[str, Any]]:
    """Read the metadata of a scan's echoes; `sidecars` are those of a suffix.

    Returns the echoes by increasing echo time, and the metadata of the first.

    Raises
    ------
    InputError
        If a file or metadata are missing, or two echoes have one echo time.
    """
    if scan.problems:
        raise InputError(scan.problems[0])
    entries = []
    for number, parts in _complete_parts(scan.parts).items():
        first = next(iter(parts.values()))
        sidecar = sidecars(_suffix(first)).inherit(source.root, first)
        time_s = _read_number(first, sidecar, "EchoTime", ECHO_TIME_LIMITS_S)
        entries.append((time_s, len(number), number, Echo(parts, time_s, str(sidecar.get("Units", ""))), sidecar))
    *_, echoes, metadata = zip(*sorted(entries, key=lambda echo: echo[:3]), strict=True)
    _read_number(echoes[0].files[0], metadata[0], "MagneticFieldStrength", FIELD_LIMITS_T)
    for before, after in pairwise(echoes):
        if after.time_s - before.time_s < _MIN_ECHO_SPACING_S:
            same = f"same EchoTime as {before.files[0].name} ({after.time_s:g} s)"
            raise InputError(f"{after.files[0].name}: {same}; correct one of them")
    return echoes, metadata[0]


def _complete_parts(parts: Mapping[str, Mapping[str, Path]]) -> dict[str, dict[str, Path]]:
    """Return the files of each echo by part: of the first pair that is complete in all echoes, or complex values."""
    if "complex" in parts:
        return {echo: {"complex": path} for echo, path in parts["complex"].items()}
    pairs = [pair for pair in _PAIRS if parts.get(pair[0])] or [_PAIRS[-1]]
    for pair in pairs:
        if parts.get(pair[0], {}).keys() == parts.get(pair[1], {}).keys():
            return {echo: {part: parts[part][echo] for part in pair} for echo in parts[pair[0]]}
    for part, other in (pairs[0], pairs[0][::-1]):
        if lone := [path.name for echo, path in parts.get(part, {}).items() if echo not in parts.get(other, {})]:
            break
    raise InputError(f"{lone[0]}: no part-{other} file of this echo; add it, or remove this echo")


def _read_number(path: Path, sidecar: Mapping[str, Any], key: str, limits: tuple[float, float]) -> float:
    """Read a positive number within limits from the metadata of an echo."""
    name = f"{stem_of(path)}.json"
    units, example = {"EchoTime": ("seconds", "0.005 to 0.05"), "MagneticFieldStrength": ("tesla", "3")}[key]
    if key not in sidecar:
        raise InputError(f"{name}: {key} is missing; add it in {units}")
    value = sidecar[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not limits[0] <= value <= limits[1]:
        raise InputError(f"{name}: {key} is {value!r:.40}, expected {units} (such as {example}); correct it")
    return float(value)


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
    pairs = [
        pair for source, paths in choose_maps(listed, _map_filter(inputs))[0] for pair in _read_maps(source, paths)
    ]
    if echoes:
        for source, paths in find_unmapped(listed, Filter.read(inputs.selection.filter_file, "megre"))[0]:
            pairs += _read_echo_scans(source, paths)
    by_name: dict[tuple[tuple[str, str], ...], list[tuple[SourceDataset, Scan]]] = defaultdict(list)
    for source, scan in pairs:
        by_name[tuple(comparable(scan.named_entities).items())].append((source, scan))
    scans = [_select_one(group) for group in by_name.values()]
    if not scans:
        chosen = inputs.selection
        labels = [f"sub-{label}" for label in chosen.participants] + [f"ses-{label}" for label in chosen.sessions]
        where = f"{inputs.root.name}: " + (f"{list_some(labels)}: " if labels else "")
        advice = "check the selection, or pass the folder of the chi maps to `derivatives`"
        raise InputError(misplaced[0] if misplaced else f"{where}{_explain_no_map(inputs)}; {advice}")
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
        problem = None
        try:
            sidecar = sidecars.inherit(source.root, path)
        except InputError as error:  # the other scans can be processed
            problem = str(error)
        yield source, _build_scan(source, entities, path, sidecar, problem)


def _read_echo_scans(source: SourceDataset, paths: Iterable[Path]) -> Iterator[tuple[SourceDataset, Scan]]:
    sidecars = cache(Sidecars)
    for files in group_echoes(source, paths):
        try:
            echoes, sidecar = read_echoes(source, files, sidecars)
        except InputError as error:
            yield source, _build_scan(source, files.entities, files.first, {}, str(error))
        else:
            first = echoes[0].files[0]
            yield source, _build_scan(source, files.entities, first, sidecar, None, echoes)


def _build_scan(
    source: SourceDataset,
    entities: Mapping[str, str],
    chi: Path,
    sidecar: Mapping[str, Any],
    problem: str | None,
    echoes: tuple[Echo, ...] = (),
) -> Scan:
    """Return a scan with its entities in BIDS order."""
    rest = split_entities(join_entities(entities))
    sub, ses = rest.pop("sub"), rest.pop("ses", None)
    return Scan(sub, ses, rest, chi, sidecar, source.root, source.name, problem, echoes)


def _select_one(group: Sequence[tuple[SourceDataset, Scan]]) -> Scan:
    """Return the only scan of a name; of two in one dataset, the first, with a `problem`.

    Two datasets with the same scan are an `InputError`, because that affects all scans.
    """
    (source, scan), (other, twin) = group[0], group[-1]
    if scan is twin:
        return scan
    first, last = (
        f"{dataset.root.name}/{each.chi.relative_to(dataset.root).as_posix()}"
        for dataset, each in group[:: len(group) - 1]
    )
    kind, block = ("echoes", "megre") if scan.from_echoes else ("maps", "chimap")
    both = f"{first} and {last} are {kind} of the same scan"
    if source == other:
        advice = "keep one, rename one with desc-, or select one with `filter_file`"
        return replace(scan, echoes=(), problem=f"{both}; {advice}")
    example = f'{{"{block}": {{"scope": "{source.names[1] if source.raw else source.name}"}}}}'
    raise InputError(f"{both}; select one dataset with `derivatives` or `filter_file` ({example})")


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
    ranked.sort(key=lambda entry: entry[:2])
    by_session: dict[tuple[str | None, str | None], list[tuple[int, Path, ItemsView[str, str]]]] = defaultdict(list)
    for entry in ranked:
        by_session[_session(source, entry[1])].append(entry)
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
            candidates = [chi for key in {(sub, ses), (sub, None)} for chi in maps[key]]
            differences = [_differing(chi, entities) for chi in candidates]
            differences = [keys for keys in differences if "run" not in keys]
            if not differences:
                echoes.append(path)
            elif all(differences):
                others.append(path)
        unmapped.append((source, echoes))
        replaced |= {join_entities(scan.entities) for scan in group_echoes(source, others)}
    return unmapped, sorted(replaced)


def _differing(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """List the entities of an acquisition that both have, with different values."""
    return [key for key in first.keys() & other.keys() if key not in _PROCESSING and first[key] != other[key]]


def _session(source: SourceDataset, path: Path) -> tuple[str | None, str | None]:
    entities = source.entities(path)
    return entities.get("sub"), entities.get("ses")


def find_skipped(inputs: Inputs, scans: Iterable[Scan]) -> list[str]:
    """Describe what a run skips, in one line each.

    These are selected participants, and sessions with echoes or selected by name, without a scan; maps that a preferred
    one replaces; echoes that a map of another acquisition replaces; and folders that are not valid BIDS names.
    """
    lines = list(_describe_missing(inputs, scans))
    listed = [(source, list(_consistent(source, []))) for source in inputs.sources]
    if replaced := choose_maps(listed, _map_filter(inputs))[1]:
        used, left_out = ({path.name for path in paths} for paths in (replaced.values(), replaced))
        lines.append(
            f"{list_some(sorted(used))}: used instead of other maps of the same acquisition "
            f"({list_some(sorted(left_out))}); select others with `chi` or `filter_file`"
        )
    if others := find_unmapped(listed, Filter.read(inputs.selection.filter_file, "megre"))[1]:
        lines.append(f"{list_some(others)}: echoes skipped; the session already has a chi map of another acquisition")
    if not inputs.selection.participants:
        source = inputs.sources[0]
        folders = (path for path in sorted(source.root.glob("sub-*")) if path.is_dir())
        invalid = [path.name for path in folders if path.name.removeprefix("sub-") not in source.participants]
        lines += [f"{list_some(invalid)}: not a valid BIDS name; skipped, rename the folder"] if invalid else []
    return lines


def _describe_missing(inputs: Inputs, scans: Iterable[Scan]) -> Iterator[str]:
    """Describe the participants without a scan, and sessions without one that have echoes or were selected by name."""
    sessions_of: dict[str, set[str | None]] = defaultdict(set)
    for scan in scans:
        sessions_of[scan.participant].add(scan.session)
    echoes = {
        _session(source, path)
        for source in inputs.sources
        for paths in source.images.values()
        for path in paths
        if "_MEGRE" in path.name
    }
    for label in sorted({label for source in inputs.sources for label in source.selected}):
        if label not in sessions_of:
            yield f"sub-{label}: {_explain_no_map(inputs)}; skipped"
            continue
        sessions = {session for source in inputs.sources for session in source.sessions(label)} - sessions_of[label]
        for session in sorted(sessions.intersection(inputs.selection.sessions or sessions)):
            if inputs.selection.sessions or (label, session) in echoes:
                yield f"sub-{label}_ses-{session}: {_explain_no_map(inputs)}; skipped"


def _explain_no_map(inputs: Inputs) -> str:
    """Explain what a participant or session without a scan lacks."""
    chosen = inputs.selection
    by = [chosen.filter_file.name] if chosen.filter_file else chosen.chi
    kind = f"selected by {', '.join(by)}" if by else "of total susceptibility in the space of the participant"
    return f"no _Chimap {kind} and no _MEGRE, _T2starw or _GRE with part-phase"


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
