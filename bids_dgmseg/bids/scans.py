"""Find the scans of a run: chi maps, and echoes of sessions without a map; report what is skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import ECHO_NAME, MAP_NAME, Inputs, Sidecars, SourceDataset
from bids_dgmseg.bids.echoes import Echo, gather_echoes
from bids_dgmseg.bids.entities import (
    Filter,
    comparable,
    invalid_entities,
    join_entities,
    split_entities,
    stem_of,
)
from bids_dgmseg.errors import InputError, list_some


@dataclass(frozen=True)
class Scan:
    """A chi map, or the echoes it is reconstructed from, with entities and metadata."""

    participant: str
    """Without ``sub-``."""
    session: str | None
    """Without ``ses-``."""
    entities: Mapping[str, str]
    """The other entities (``acq``, ``rec``, ``run``, ``desc``, …) in BIDS order."""
    chi: Path
    """Absolute path of the map, or of the first echo's phase, which defines the grid of the map."""
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
        return tuple(path for echo in self.echoes for path in (echo.phase, echo.magnitude)) or (self.chi,)

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
        Whether to find echoes (``_MEGRE``), too, in sessions (or participants without sessions) without a map.
    misplaced : list of str, optional
        Collects one line per file in the folder of another participant or session, which is then skipped; by default
        such a file is an error.

    Returns
    -------
    list of Scan
        Sorted by participant, session and name; never empty. Scans with a broken sidecar or with two maps have a
        `problem`.

    Raises
    ------
    InputError
        If no scan is found, two datasets have maps of one scan, a folder cannot be listed, or all scans have the same
        problem.
    """
    maps = Filter.read(inputs.selection.filter_file, "chimap")
    found: dict[tuple[str, ...], list[tuple[SourceDataset, Scan]]] = defaultdict(list)
    listed = [(source, list(_consistent(source, misplaced))) for source in inputs.sources]
    for source, paths in listed:
        sidecars = Sidecars("Chimap")
        for path in paths:
            if MAP_NAME.fullmatch(path.name) and maps.keeps(source.relative(path), source.name, source.raw):
                scan = _read_scan(source, path, sidecars)
                found[_key(scan)].append((source, scan))
    if echoes:
        for source, scan in _find_echoes(listed, Filter.read(inputs.selection.filter_file, "megre")):
            found[_key(scan)].append((source, scan))
    scans = [_select_one(group) for group in found.values()]
    if not scans:
        raise InputError(misplaced[0] if misplaced else _explain_no_scans(inputs, echoes=echoes))
    if len(scans) > 1 and scans[0].problem and len({scan.problem for scan in scans}) == 1:
        raise InputError(scans[0].problem)  # a sidecar shared by all
    return sorted(scans, key=lambda scan: (scan.participant, scan.session or "", scan.name))


def _consistent(source: SourceDataset, misplaced: list[str] | None) -> Iterator[Path]:
    """Yield the selected files, except maps and echoes whose folders contradict their names."""
    for path in (path for paths in source.files.values() for path in paths):
        try:
            if MAP_NAME.fullmatch(path.name) or ECHO_NAME.fullmatch(path.name):
                source.consistent_entities(path, path.name.rpartition("_")[0])
            yield path
        except InputError as error:
            if misplaced is None:
                raise
            misplaced.append(str(error))


def _read_scan(source: SourceDataset, path: Path, sidecars: Sidecars) -> Scan:
    match = MAP_NAME.fullmatch(path.name)
    stem = match[1] if match else stem_of(path)
    entities = source.consistent_entities(path, stem)
    sidecar: dict[str, Any] = {}
    nearest = problem = None
    try:
        sidecar, nearest = sidecars.inherit(source.root, path, stem, tuple(entities.items()))
    except InputError as error:  # the other scans can be processed
        problem = str(error)
    participant, session = entities.pop("sub"), entities.pop("ses", None)
    ordered = split_entities(join_entities(entities))
    return Scan(participant, session, ordered, path, sidecar, nearest, source.root, source.name, problem)


def _find_echoes(
    listed: Sequence[tuple[SourceDataset, Sequence[Path]]], wanted: Filter
) -> Iterator[tuple[SourceDataset, Scan]]:
    """Find echoes in sessions without any map, selected or not."""
    mapped = {_session(source, path) for source, paths in listed for path in paths if MAP_NAME.fullmatch(path.name)}
    for source, paths in listed:
        echoes = [(path, _session(source, path)) for path in paths if ECHO_NAME.fullmatch(path.name)]
        unmapped = [path for path, (sub, ses) in echoes if not {(sub, ses), (sub, None)} & mapped]
        kept = [path for path in unmapped if wanted.keeps(source.relative(path), source.name, source.raw)]
        for one in gather_echoes(source, kept):
            entities = dict(one.entities)
            scan = Scan(
                participant=entities.pop("sub"),
                session=entities.pop("ses", None),
                entities=entities,
                chi=one.phase,
                sidecar=one.sidecar,
                sidecar_path=one.sidecar_path,
                dataset_root=source.root,
                dataset_name=source.name,
                problem=one.problem,
                echoes=one.echoes,
            )
            yield source, scan


def _session(source: SourceDataset, path: Path) -> tuple[str | None, str | None]:
    entities = source.entities(path)
    return entities.get("sub"), entities.get("ses")


def _key(scan: Scan) -> tuple[str, ...]:
    return tuple(f"{key}-{value}" for key, value in comparable(scan.named_entities).items())


def _select_one(group: Sequence[tuple[SourceDataset, Scan]]) -> Scan:
    """Return the only scan of a name; of two in one dataset, the first, with a `problem`.

    Raises
    ------
    InputError
        If they are in two datasets, which affects all scans.
    """
    (source, scan), (other, twin) = group[0], group[-1]
    if scan is twin:
        return scan
    path, second = scan.chi, twin.chi
    if path.parent == second.parent and path.name.removesuffix(".gz") == second.name.removesuffix(".gz"):
        return replace(scan, echoes=(), problem=f"{path.name}: {second.name} exists, too; keep one of them")
    kind, block = ("maps", "chimap") if MAP_NAME.fullmatch(path.name) else ("echoes", "megre")
    both = f"{source.show(path)} and {other.show(second)} are {kind} of the same scan"
    if source == other:
        advice = "keep one, rename one with desc-, or select one with --bids-filter-file"
        return replace(scan, echoes=(), problem=f"{both}; {advice}")
    example = f'{{"{block}": {{"scope": "{source.name}"}}}}'
    raise InputError(f"{both}; select one dataset with --derivatives or --bids-filter-file ({example})")


def find_skipped(inputs: Inputs, scans: Iterable[Scan]) -> list[str]:
    """Describe what a run skips, in one line each.

    These are selected participants without a scan; sessions without a scan that have echoes or were selected by name;
    parts of file names that are not valid entities; and folders that are not valid BIDS names.
    """
    scans = list(scans)
    found: dict[str, set[str | None]] = defaultdict(set)
    for scan in scans:
        found[scan.participant].add(scan.session)
    lines = []
    for label in sorted({label for source in inputs.sources for label in source.selected()}):
        if label not in found:
            lines.append(f"sub-{label}: {_explain_no_map(inputs, _Seen.among(inputs, label))}; skipped")
            continue
        sessions = {session for source in inputs.sources for session in source.sessions(label)} - found[label]
        for session in sorted(sessions.intersection(inputs.selection.sessions or sessions)):
            seen = _Seen.among(inputs, label, session)
            if not seen.maps and (seen.echoes or inputs.selection.sessions):
                reason = _explain_no_map(inputs, seen) if seen.echoes else "no _Chimap"
                lines.append(f"sub-{label}_ses-{session}: {reason}; skipped")
    for scan in scans:
        if invalid := invalid_entities(stem_of(scan.chi)):
            lines.append(
                f"{scan.chi.name}: {', '.join(invalid)} is not a valid BIDS entity (key-value with letters and digits) "
                f"and was ignored; the scan is treated as {scan.name}; rename the file"
            )
    if not inputs.selection.participants:
        lines += [
            f"{name}: not a valid BIDS name (sub- and letters or digits); skipped, rename the folder"
            for name in inputs.sources[0].invalid_folders()
        ]
    return lines


@dataclass(frozen=True)
class _Seen:
    """Whether some folders contain maps and echoes, selected or not."""

    maps: bool
    echoes: bool

    @classmethod
    def among(cls, inputs: Inputs, participant: str | None = None, session: str | None = None) -> _Seen:
        names = [
            path.name
            for source in inputs.sources
            for label, paths in source.files.items()
            for path in paths
            if participant in (None, label) and session in (None, source.entities(path).get("ses"))
        ]
        return cls(*(any(map(kind.fullmatch, names)) for kind in (MAP_NAME, ECHO_NAME)))


def _explain_no_map(inputs: Inputs, seen: _Seen) -> str:
    """Explain why no chi map was selected among these files."""
    selection = inputs.selection
    selected = f" selected by {selection.filter_file.name}" if selection.filter_file else ""
    if not seen.maps and seen.echoes:
        return f"no _Chimap, and no _MEGRE with part-phase{selected}"
    if not seen.maps:
        sessions = list_some(f"ses-{label}" for label in selection.sessions)
        return f"no _Chimap in {sessions}" if sessions else "no _Chimap"
    return f"no _Chimap{selected}" if selected else "only maps of paramagnetic or diamagnetic sources"


def _explain_no_scans(inputs: Inputs, *, echoes: bool) -> str:
    """Explain why a run finds no scan; `echoes` is whether it may reconstruct maps."""
    name, selection, seen = inputs.root.name, inputs.selection, _Seen.among(inputs)
    labels = [f"sub-{label}" for label in selection.participants] + [f"ses-{label}" for label in selection.sessions]
    whom = f" for {list_some(labels)}" if labels else ""
    if selection.filter_file and (seen.maps or (seen.echoes and echoes)):
        kind = "_Chimap" if seen.maps else "_MEGRE"
        return f"{name}: no {kind} files{whom} selected by {selection.filter_file.name}; check --bids-filter-file"
    if seen.maps:
        return (
            f"{name}: only _Chimap files of paramagnetic or diamagnetic sources{whom}; provide maps of total "
            "susceptibility, or select these by desc with --bids-filter-file"
        )
    if seen.echoes and not echoes:
        return (
            f"{name}: _MEGRE but no _Chimap files{whom}; reconstruct the chi maps first, with bids_dgmseg at the "
            "participant level or QSMxT, and pass their folder to --derivatives"
        )
    if seen.echoes:
        return (
            f"{name}: _MEGRE files without part-phase and no _Chimap files{whom}; add the phase images, or pass the "
            "folder of the chi maps to --derivatives"
        )
    if labels:
        return f"{name}: no _Chimap or _MEGRE files{whom}; check --participant-label and --session-label"
    return f"{name}: no _Chimap or _MEGRE files; pass the folder of the chi maps to --derivatives"
