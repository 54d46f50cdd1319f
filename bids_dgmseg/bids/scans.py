"""Find the scans of a run: chi maps, and multi-echo GRE of sessions without a map; report what is skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import ECHO_NAME, MAP_NAME, Inputs, Sidecars, SourceDataset
from bids_dgmseg.bids.echoes import Echo, group_echoes, read_echoes
from bids_dgmseg.bids.entities import Filter, comparable, join_entities, split_entities, stem_of
from bids_dgmseg.errors import InputError, list_some


@dataclass(frozen=True)
class Scan:
    """A chi map, or the echoes it is reconstructed from, with entities and metadata."""

    participant: str
    """Without ``sub-``."""
    session: str | None
    """Without ``ses-``."""
    entities: Mapping[str, str]
    """The other entities (``acq``, ``rec``, ``run``, ``desc``, …) in BIDS order; without ``echo`` and ``part``."""
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
    def named_entities(self) -> dict[str, str]:
        """All entities, ``sub`` and ``ses`` first."""
        session = {"ses": self.session} if self.session else {}
        return {"sub": self.participant, **session, **self.entities}

    @property
    def name(self) -> str:
        """Entities without suffix, such as ``sub-01_ses-1_acq-x_run-1``."""
        return join_entities(self.named_entities)

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
    maps = Filter.read(inputs.selection.filter_file, "chimap")
    listed = [(source, list(_consistent(source, misplaced))) for source in inputs.sources]
    found = list(_find_maps(listed, maps))
    if echoes:
        found += _find_echoes(listed, Filter.read(inputs.selection.filter_file, "megre"))
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
    """Yield the selected files, except maps and echoes whose folders contradict their names."""
    for path in (path for paths in source.files.values() for path in paths):
        line = _describe_misplaced(source, path)
        if not line:
            yield path
        elif misplaced is None:
            raise InputError(line)
        else:
            misplaced.append(line)


def _describe_misplaced(source: SourceDataset, path: Path) -> str:
    """Describe how the folders of a map or an echo contradict its name; empty if they do not."""
    if MAP_NAME.fullmatch(path.name) or ECHO_NAME.fullmatch(path.name):
        try:
            source.consistent_entities(path, path.name.rpartition("_")[0])
        except InputError as error:
            return str(error)
    return ""


def _find_maps(
    listed: Sequence[tuple[SourceDataset, Sequence[Path]]], wanted: Filter
) -> Iterator[tuple[SourceDataset, Scan]]:
    for source, paths in listed:
        sidecars = Sidecars("Chimap")
        for path in paths:
            match = MAP_NAME.fullmatch(path.name)
            if not match or not wanted.keeps(path.relative_to(source.root), source.name, source.raw):
                continue
            entities = source.consistent_entities(path, match[1])
            sidecar: dict[str, Any] = {}
            nearest = problem = None
            try:
                sidecar, nearest = sidecars.inherit(source.root, path, match[1], entities.items())
            except InputError as error:  # the other scans can be processed
                problem = str(error)
            yield source, _build_scan(source, entities, path, sidecar, nearest, problem)


def _find_echoes(
    listed: Sequence[tuple[SourceDataset, Sequence[Path]]], wanted: Filter
) -> Iterator[tuple[SourceDataset, Scan]]:
    """Group the echoes of sessions without any map, selected or not, by scan."""
    mapped = {_session(source, path) for source, paths in listed for path in paths if MAP_NAME.fullmatch(path.name)}
    for source, paths in listed:
        named = [path for path in paths if ECHO_NAME.fullmatch(path.name)]
        selected = [
            path
            for path, (sub, ses) in ((path, _session(source, path)) for path in named)
            if not {(sub, ses), (sub, None)} & mapped
            and wanted.keeps(path.relative_to(source.root), source.name, source.raw)
        ]
        sidecars = cache(Sidecars)
        for files in group_echoes(source, selected):
            try:
                echoes, sidecar, nearest = read_echoes(source, files, sidecars)
            except InputError as error:
                yield source, _build_scan(source, files.entities, files.first, {}, None, str(error))
            else:
                first = echoes[0].files[0]
                yield source, _build_scan(source, files.entities, first, sidecar, nearest, None, echoes)


def _session(source: SourceDataset, path: Path) -> tuple[str | None, str | None]:
    entities = source.entities(path)
    return entities.get("sub"), entities.get("ses")


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
        return replace(scan, echoes=(), problem=f"{path.name}: {second.name} exists, too; keep one of them")
    kind, block = ("maps", "chimap") if MAP_NAME.fullmatch(path.name) else ("echoes", "megre")
    shown = (f"{one.root.name}/{found.chi.relative_to(one.root).as_posix()}" for one, found in (group[0], group[-1]))
    both = f"{' and '.join(shown)} are {kind} of the same scan"
    if source == other:
        advice = "keep one, rename one with desc-, or select one with --bids-filter-file"
        return replace(scan, echoes=(), problem=f"{both}; {advice}")
    example = f'{{"{block}": {{"scope": "{source.name}"}}}}'
    raise InputError(f"{both}; select one dataset with --derivatives or --bids-filter-file ({example})")


def find_skipped(inputs: Inputs, scans: Iterable[Scan]) -> list[str]:
    """Describe what a run skips, in one line each.

    These are selected participants without a scan, unless `find_scans` reports that their files are misplaced; sessions
    without a scan that have echoes or were selected by name; parts of file names that are not valid entities; and
    folders that are not valid BIDS names.
    """
    scans = list(scans)
    found: dict[str, set[str | None]] = defaultdict(set)
    for scan in scans:
        found[scan.participant].add(scan.session)
    lines = []
    for label in sorted({label for source in inputs.sources for label in source.selected}):
        if label not in found:
            if not any(
                _describe_misplaced(source, path) for source in inputs.sources for path in source.files.get(label, ())
            ):
                lines.append(f"sub-{label}: {_explain_no_map(inputs, *_has_files(inputs, label))}; skipped")
            continue
        sessions = {session for source in inputs.sources for session in source.sessions(label)} - found[label]
        for session in sorted(sessions.intersection(inputs.selection.sessions or sessions)):
            maps, echoes = _has_files(inputs, label, session)
            if not maps and (echoes or inputs.selection.sessions):
                reason = _explain_no_map(inputs, maps, echoes) if echoes else "no _Chimap"
                lines.append(f"sub-{label}_ses-{session}: {reason}; skipped")
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


def _has_files(inputs: Inputs, participant: str | None = None, session: str | None = None) -> tuple[bool, str]:
    """Return whether there are chi maps, and the suffix of echoes if there are any, selected or not.

    T2*-weighted images are echoes only with ``part-``: most are magnitudes for looking at.
    """
    names = [
        path.name
        for source in inputs.sources
        for label in (source.files if participant is None else (participant,))
        for path in source.files.get(label, ())
        if session in (None, source.entities(path).get("ses")) and not _describe_misplaced(source, path)
    ]
    suffixes = [
        match[1]
        for match in map(ECHO_NAME.fullmatch, names)
        if match and (match[1] == "_MEGRE" or "_part-" in match[0])
    ]
    return any(map(MAP_NAME.fullmatch, names)), min(suffixes, default="")


def _explain_no_map(inputs: Inputs, maps: bool, echoes: str) -> str:
    """Explain why no chi map was selected, given whether there are maps, and the suffix of echoes."""
    selection = inputs.selection
    selected = f" selected by {selection.filter_file.name}" if selection.filter_file else ""
    if not maps and echoes:
        return f"no _Chimap, and no {echoes} with part-phase{selected}"
    if not maps:
        sessions = list_some(f"ses-{label}" for label in selection.sessions)
        return f"no _Chimap in {sessions}" if sessions else "no _Chimap"
    return f"no _Chimap{selected}" if selected else "only maps of paramagnetic or diamagnetic sources"


def _explain_no_scans(inputs: Inputs, *, reconstruct: bool) -> str:
    """Explain why a run finds no scan; `reconstruct` is whether it may reconstruct maps."""
    name, selection = inputs.root.name, inputs.selection
    maps, echoes = _has_files(inputs)
    labels = [f"sub-{label}" for label in selection.participants] + [f"ses-{label}" for label in selection.sessions]
    whom = f" for {list_some(labels)}" if labels else ""
    if selection.filter_file and (maps or (echoes and reconstruct)):
        kind = "_Chimap" if maps else echoes
        return f"{name}: no {kind} files{whom} selected by {selection.filter_file.name}; check --bids-filter-file"
    if maps:
        return (
            f"{name}: only _Chimap files of paramagnetic or diamagnetic sources{whom}; provide maps of total "
            "susceptibility, or select these by desc with --bids-filter-file"
        )
    if echoes and not reconstruct:
        return (
            f"{name}: {echoes} but no _Chimap files{whom}; reconstruct the chi maps first, with bids_dgmseg at the "
            "participant level or QSMxT, and pass their folder to --derivatives"
        )
    if echoes:
        return (
            f"{name}: {echoes} files without part-phase and no _Chimap files{whom}; add the phase images, or pass the "
            "folder of the chi maps to --derivatives"
        )
    if labels:
        return f"{name}: no _Chimap or _MEGRE files{whom}; check --participant-label and --session-label"
    return f"{name}: no _Chimap or _MEGRE files; pass the folder of the chi maps to --derivatives"
