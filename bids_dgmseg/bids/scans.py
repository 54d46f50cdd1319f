"""Find the chi maps of a BIDS dataset and of its derivatives, and the echoes of scans that have none.

Only the folders of the selected participants are listed, so that a large dataset costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from bids_dgmseg.bids.datasets import ECHO_NAME, MAP_NAME, Source, find_sources
from bids_dgmseg.bids.echoes import Echo, gather_echoes
from bids_dgmseg.bids.filters import Filter
from bids_dgmseg.bids.names import join_entities, split_entities
from bids_dgmseg.bids.sidecars import Sidecars
from bids_dgmseg.bids.skipped import explain_nothing
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import InputError, list_some


@dataclass(frozen=True)
class Scan:
    """One chi map, or the echoes it is to be reconstructed from, and what names and sidecars say."""

    participant: str
    """Without ``sub-``."""
    session: str | None
    """Without ``ses-``."""
    entities: Mapping[str, str]
    """The others, keys and values as in the file name (``acq``, ``rec``, ``run``, ``desc``, …), in BIDS order."""
    chi: Path
    """The map, or the phase of the first echo, on whose grid the map will lie; absolute."""
    sidecar: Mapping[str, Any]
    """Metadata merged by the inheritance principle; empty if there are none."""
    sidecar_path: Path | None
    """The nearest sidecar."""
    dataset_root: Path
    dataset_name: str
    """``raw`` or the derivative's name: BIDS URIs are ``bids:NAME:path``."""
    problem: str | None = None
    """Why it cannot be segmented, where its sidecar cannot be read: one line."""
    echoes: tuple[Echo, ...] = ()
    """What the map is to be reconstructed from, by rising time; empty where there is a map, or a `problem`."""

    @property
    def named_entities(self) -> dict[str, str]:
        """All entities, ``sub`` and ``ses`` first."""
        session = {"ses": self.session} if self.session else {}
        return {"sub": self.participant, **session, **self.entities}

    @property
    def name(self) -> str:
        """Entities without the suffix, such as ``sub-01_ses-1_acq-x_run-1``."""
        return join_entities(self.named_entities)

    @property
    def from_echoes(self) -> bool:
        """Whether there is no map yet."""
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


def find_scans(settings: Settings, *, echoes: bool = False, misplaced: list[str] | None = None) -> list[Scan]:
    """Find the chi maps that a run is to segment.

    Looked for in `settings.bids_dir` and in the derivatives given or, where none is given, in those below
    ``bids_dir/derivatives``. Besides BIDS names, SEPIA's (``Sepia_Chimap.nii.gz``) count inside ``sub-X`` folders.

    Parameters
    ----------
    settings : Settings
        The run's options.
    echoes : bool
        Whether sets of ``_MEGRE`` files count too, in sessions (or participants without sessions) that have no map.
    misplaced : list of str, optional
        Gets a line for each file in the folder of another participant or session, which is then left out; by default
        such a file is an error.

    Returns
    -------
    list of Scan
        Sorted by participant, session and name; never empty. One with a broken sidecar, or with two files for one map,
        has a `problem`.

    Raises
    ------
    InputError
        If the dataset or the selection does not allow a run, two datasets have maps of one scan, a folder cannot be
        listed, or all scans have one problem in common.
    """
    sources = find_sources(settings)
    _check_labels(settings, sources)
    choose = Filter.read(settings.bids_filter_file)
    found: dict[tuple[str, ...], list[tuple[Source, Scan]]] = defaultdict(list)
    listed = [(source, list(_in_their_places(source, _files(source, settings), misplaced))) for source in sources]
    for source, paths in listed:
        sidecars = Sidecars("Chimap")
        for path in paths:
            if not MAP_NAME.fullmatch(path.name) or not choose.keeps(_within(source, path), source.name, source.raw):
                continue
            scan = _read_scan(source, path, sidecars)
            found[_key(scan)].append((source, scan))
    if echoes:
        for scan, source in _find_echoes(listed, Filter.read(settings.bids_filter_file, "megre")):
            found[_key(scan)].append((source, scan))
    scans = [_choose_one(group) for group in found.values()]
    if not scans:
        raise InputError(misplaced[0] if misplaced else explain_nothing(settings, sources, echoes=echoes))
    if len(scans) > 1 and scans[0].problem and len({scan.problem for scan in scans}) == 1:
        raise InputError(scans[0].problem)  # a sidecar that all share
    return sorted(scans, key=lambda scan: (scan.participant, scan.session or "", scan.name))


def _check_labels(settings: Settings, sources: Sequence[Source]) -> None:
    name = settings.bids_dir.name
    for label in settings.participant_label:
        if not any(source.folders([label]) for source in sources):
            everyone = {other for source in sources for other in source.folders()}
            some = list_some(f"sub-{other}" for other in everyone) or "no sub-X folders"
            raise InputError(f"{name}: no sub-{label}; check --participant-label (there are {some})")
    if settings.session_label:
        sessions = {label for source in sources for label in source.sessions(settings.participant_label)}
        for label in settings.session_label:
            if label not in sessions:
                some = list_some(f"ses-{other}" for other in sessions) or "no ses-Y folders"
                raise InputError(f"{name}: no ses-{label}; check --session-label (there are {some})")


def _files(source: Source, settings: Settings) -> list[Path]:
    """List the files of the selected participants and sessions."""
    chosen = settings.session_label
    paths = source.files(settings.participant_label, chosen)
    return [path for path in paths if not chosen or _place(source, path).get("ses") in chosen]


def _in_their_places(source: Source, paths: Iterable[Path], misplaced: list[str] | None) -> Iterator[Path]:
    """Yield files; of maps and echoes only those whose folders say what their names do."""
    for path in paths:
        try:
            if MAP_NAME.fullmatch(path.name) or ECHO_NAME.fullmatch(path.name):
                source.read_entities(path, path.name.rpartition("_")[0])
            yield path
        except InputError as error:
            if misplaced is None:
                raise
            misplaced.append(str(error))


def _within(source: Source, path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(source.root).as_posix())


def _place(source: Source, path: Path) -> dict[str, str]:
    """Read entities from a file's name and folders."""
    return {**split_entities(path.name.partition(".")[0]), **source.place(path)}


def _read_scan(source: Source, path: Path, sidecars: Sidecars) -> Scan:
    stem = _stem(path)
    named = source.read_entities(path, stem)
    everything = tuple(named.items())
    participant, session = named.pop("sub"), named.pop("ses", None)
    ordered = split_entities(join_entities(named))
    try:
        sidecar, nearest = sidecars.inherit(source.root, path, stem, everything)
    except InputError as error:  # one scan's sidecar must not keep the others from being done
        return Scan(participant, session, ordered, path, {}, None, source.root, source.name, str(error))
    return Scan(participant, session, ordered, path, sidecar, nearest, source.root, source.name)


def _stem(path: Path) -> str:
    match = MAP_NAME.fullmatch(path.name)
    return match[1] if match else path.name.partition(".")[0]


def _find_echoes(listed: Sequence[tuple[Source, Sequence[Path]]], choose: Filter) -> Iterator[tuple[Scan, Source]]:
    """Find sets of echoes in sessions without any map, chosen or not."""
    mapped = {_session(source, path) for source, paths in listed for path in paths if MAP_NAME.fullmatch(path.name)}
    for source, paths in listed:
        echoes = [(path, _session(source, path)) for path in paths if ECHO_NAME.fullmatch(path.name)]
        wanted = [path for path, (sub, ses) in echoes if not {(sub, ses), (sub, None)} & mapped]
        kept = [path for path in wanted if choose.keeps(_within(source, path), source.name, source.raw)]
        for one in gather_echoes(source, kept):
            named = dict(one.entities)
            participant, session = named.pop("sub"), named.pop("ses", None)
            yield (
                Scan(
                    participant,
                    session,
                    named,
                    one.phase,
                    one.sidecar,
                    one.sidecar_path,
                    source.root,
                    source.name,
                    one.problem,
                    one.echoes,
                ),
                source,
            )


def _session(source: Source, path: Path) -> tuple[str | None, str | None]:
    named = _place(source, path)
    return named.get("sub"), named.get("ses")


def _key(scan: Scan) -> tuple[str, ...]:
    """Entities as a key; ``run-1`` and ``run-01`` are one run."""
    return tuple(
        f"{key}-{int(value) if key in ('run', 'echo') and value.isdecimal() else value}"
        for key, value in scan.named_entities.items()
    )


def _choose_one(group: Sequence[tuple[Source, Scan]]) -> Scan:
    """Give the only scan of its name; where a dataset has two, one that says so.

    Raises
    ------
    InputError
        If they lie in two datasets: which one is meant holds for all scans.
    """
    (source, scan), (other, twin) = group[0], group[-1]
    if scan is twin:
        return scan
    path, beside = scan.chi, twin.chi
    if path.parent == beside.parent and path.name.removesuffix(".gz") == beside.name.removesuffix(".gz"):
        return replace(scan, echoes=(), problem=f"{path.name}: lies beside {beside.name}; keep one of the two")
    kind, block = ("maps", "chimap") if MAP_NAME.fullmatch(path.name) else ("echoes", "megre")
    both = f"{source.show(path)} and {other.show(beside)} are {kind} of the same scan"
    if source == other:
        choice = "keep one, tell them apart by desc-, or choose with --bids-filter-file"
        return replace(scan, echoes=(), problem=f"{both}; {choice}")
    choice = f'{{"{block}": {{"scope": "{source.name}"}}}}'
    raise InputError(f"{both}; choose one source with --derivatives or --bids-filter-file ({choice})")
