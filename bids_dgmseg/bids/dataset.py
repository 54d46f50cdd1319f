"""Find the chi maps of a BIDS dataset and of its derivatives.

Only the folders of the selected participants are listed, so that a large dataset costs nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bids_dgmseg.absent import is_there
from bids_dgmseg.bids.filters import Filter
from bids_dgmseg.bids.names import join_entities, list_some, split_entities
from bids_dgmseg.description import DATASET_DESCRIPTION, is_own
from bids_dgmseg.errors import InputError
from bids_dgmseg.jsonfile import read_json
from bids_dgmseg.settings import Settings

_MAP = re.compile(r"(.*?)_?Chimap\.nii(\.gz)?")
_ECHO = re.compile(r".*_MEGRE\.nii(\.gz)?")
_FOLDER = re.compile(r"(sub|ses)-([0-9a-zA-Z+]+)")
_DEPTH = 3  # sub-X/ses-Y/anat


@dataclass(frozen=True)
class Scan:
    """One chi map and what its name and sidecar say."""

    participant: str
    """Without ``sub-``."""
    session: str | None
    """Without ``ses-``."""
    entities: Mapping[str, str]
    """The others, keys and values as in the file name (``acq``, ``rec``, ``run``, ``desc``, …), in BIDS order."""
    chi: Path
    """Absolute."""
    sidecar: Mapping[str, Any]
    """Metadata merged by the inheritance principle; empty if there are none."""
    sidecar_path: Path | None
    """The nearest sidecar."""
    dataset_root: Path
    dataset_name: str
    """``raw`` or the derivative's name: BIDS URIs are ``bids:NAME:path``."""
    problem: str | None = None
    """Why it cannot be segmented, where its sidecar cannot be read: one line."""

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
    def uri(self) -> str:
        """BIDS URI of the chi map."""
        return f"bids:{self.dataset_name}:{self.chi.relative_to(self.dataset_root).as_posix()}"


@dataclass(frozen=True)
class Source:
    """A dataset that chi maps are looked for in."""

    root: Path
    name: str
    raw: bool

    def folders(self, participants: Sequence[str] = ()) -> dict[str, Path]:
        """Find the ``sub-X`` folders by label, those of the participants given or all."""
        if not participants:
            return _labelled(self.root, "sub")
        named = {label: self.root / f"sub-{label}" for label in participants}
        return {label: folder for label, folder in named.items() if folder.is_dir()}

    def misnamed(self) -> list[str]:
        """List the folders that begin as a participant's do, but whose label BIDS does not allow."""
        folders = [path.name for path in sorted(self.root.glob("sub-*")) if path.is_dir()]
        return [name for name in folders if not _FOLDER.fullmatch(name)]

    def files(self, participants: Sequence[str], sessions: Sequence[str]) -> Iterator[Path]:
        """Yield the files of the selected participants; a session's choice leaves other ``ses-Y`` folders unread."""
        for folder in self.folders(participants).values():
            yield from _walk(folder, _DEPTH, sessions)

    def show(self, path: Path) -> str:
        """Name a file so that one of several datasets is recognised."""
        return (self.root.name / PurePosixPath(path.relative_to(self.root).as_posix())).as_posix()


def find_scans(settings: Settings) -> list[Scan]:
    """Find the chi maps that a run is to segment.

    Looked for in `settings.bids_dir` and in the derivatives given or, where none is given, in those below
    ``bids_dir/derivatives``. Besides BIDS names, SEPIA's (``Sepia_Chimap.nii.gz``) count inside ``sub-X`` folders.

    Returns
    -------
    list of Scan
        Sorted by participant, session and name; never empty. One with a broken sidecar has a `problem`.

    Raises
    ------
    InputError
        If the dataset or the selection does not allow a run, two maps would share a name, a folder cannot be listed,
        or no scan has a sidecar that can be read.
    """
    sources = find_sources(settings)
    _check_labels(settings, sources)
    choose = Filter.read(settings.bids_filter_file)
    sidecars_in = cache(lambda folder: sorted(folder.glob("*Chimap.json")))
    found: dict[tuple[str, ...], list[tuple[Source, Path]]] = defaultdict(list)
    echoes = False
    scans = []
    for source in sources:
        for path in source.files(settings.participant_label, settings.session_label):
            echoes |= bool(_ECHO.fullmatch(path.name))
            relative = PurePosixPath(path.relative_to(source.root).as_posix())
            if not _MAP.fullmatch(path.name) or not choose.keeps(relative, dataset=source.name, raw=source.raw):
                continue
            scan = _read_scan(source, path, sidecars_in)
            if settings.session_label and scan.session not in settings.session_label:
                continue
            found[_key(scan)].append((source, path))
            scans.append(scan)
    _check_unique(found.values())
    if not scans:
        raise InputError(_nothing(settings, echoes=echoes))
    if all(scan.problem for scan in scans):
        raise InputError(scans[0].problem)
    return sorted(scans, key=lambda scan: (scan.participant, scan.session or "", scan.name))


def find_left_out(settings: Settings, scans: Iterable[Scan]) -> list[str]:
    """Say who is left out: selected participants without a chosen chi map, and folders whose names are not of BIDS."""
    sources = find_sources(settings)
    selected = {label for source in sources for label in source.folders(settings.participant_label)}
    without = sorted(selected - {scan.participant for scan in scans})
    misnamed = [] if settings.participant_label else sources[0].misnamed()
    return [
        *(f"sub-{label}: no _Chimap; left out" for label in without),
        *(f"{name}: not a BIDS name (letters and digits behind sub-); left out, so rename it" for name in misnamed),
    ]


def find_sources(settings: Settings) -> list[Source]:
    """List the datasets to look in, the main one first.

    Raises
    ------
    InputError
        If the main one is no BIDS dataset or a derivative does not exist.
    """
    root = settings.bids_dir
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the root folder of the BIDS dataset")
    if not is_there(root / DATASET_DESCRIPTION):
        raise InputError(f"{root.name}: no {DATASET_DESCRIPTION}; give the root folder of the BIDS dataset")
    raw = read_json(root / DATASET_DESCRIPTION).get("DatasetType") != "derivative"
    sources = [Source(root, "raw" if raw else _link_name(root, []), raw)]
    folders = _given(settings.derivatives) if settings.derivatives else _own_derivatives(settings)
    for folder in folders:
        if folder.resolve() not in {source.root.resolve() for source in sources}:
            sources.append(Source(folder, _link_name(folder, [source.name for source in sources]), raw=False))
    return sources


def _given(derivatives: Sequence[Path]) -> Iterator[Path]:
    """Yield the derivatives named; a folder of derivatives stands for those in it."""
    for folder in derivatives:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; check --derivatives")
        inner = [folder] if _labelled(folder, "sub") else _datasets_in(folder)
        if not inner:
            raise InputError(f"{folder.name}: no sub-X folder; give the root folder of a derivative to --derivatives")
        yield from inner


def _own_derivatives(settings: Settings) -> list[Path]:
    """List the derivatives below the dataset that are not this program's own output."""
    folder = settings.bids_dir / "derivatives"
    found = _datasets_in(folder) if folder.is_dir() else []
    return [dataset for dataset in found if dataset != settings.output_dir]


def _datasets_in(folder: Path) -> list[Path]:
    inner = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in inner if _labelled(path, "sub") and not is_own(path)]


def _link_name(folder: Path, taken: Sequence[str]) -> str:
    """Name a derivative in URIs by its folder; letters, digits, ``-`` and ``_`` only, each name once."""
    plain = re.sub(r"[^0-9a-zA-Z_-]+", "-", folder.name) or "derivative"
    names = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken and name != "raw")


def _labelled(folder: Path, prefix: str) -> dict[str, Path]:
    matches = ((_FOLDER.fullmatch(path.name), path) for path in sorted(folder.glob(f"{prefix}-*")) if path.is_dir())
    return {match[2]: path for match, path in matches if match}


def _walk(folder: Path, depth: int, sessions: Sequence[str]) -> Iterator[Path]:
    for path in _list(folder):
        match = _FOLDER.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif depth > 1 and not (match and sessions and match[1] == "ses" and match[2] not in sessions):
            yield from _walk(path, depth - 1, sessions)


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{folder.name}: cannot be read ({error.strerror}); correct its permissions or choose other participants"
        ) from error


def _check_labels(settings: Settings, sources: Sequence[Source]) -> None:
    name = settings.bids_dir.name
    for label in settings.participant_label:
        if not any(source.folders([label]) for source in sources):
            everyone = {other for source in sources for other in source.folders()}
            some = list_some(f"sub-{other}" for other in everyone) or "no sub-X folders"
            raise InputError(f"{name}: no sub-{label}; check --participant-label (there are {some})")
    if settings.session_label:
        folders = [folder for source in sources for folder in source.folders(settings.participant_label).values()]
        sessions = {label for folder in folders for label in _labelled(folder, "ses")}
        for label in settings.session_label:
            if label not in sessions:
                some = list_some(f"ses-{other}" for other in sessions) or "no ses-Y folders"
                raise InputError(f"{name}: no ses-{label}; check --session-label (there are {some})")


def _read_scan(source: Source, path: Path, sidecars_in: Callable[[Path], list[Path]]) -> Scan:
    named = split_entities(_stem(path))
    inside = path.relative_to(source.root).parts[:-1]
    for prefix, label in (match.groups() for match in map(_FOLDER.fullmatch, inside) if match):
        if named.setdefault(prefix, label) != label:
            raise InputError(f"{path.name}: lies in {prefix}-{label}; rename the file or move it")
    participant, session = named.pop("sub"), named.pop("ses", None)
    ordered = split_entities(join_entities(named))
    try:
        sidecar, nearest = _inherit(source.root, path, sidecars_in)
    except InputError as error:  # one scan's sidecar must not keep the others from being done
        return Scan(participant, session, ordered, path, {}, None, source.root, source.name, str(error))
    return Scan(participant, session, ordered, path, sidecar, nearest, source.root, source.name)


def _stem(path: Path) -> str:
    match = _MAP.fullmatch(path.name)
    return match[1] if match else path.name.partition(".")[0]


def _inherit(
    root: Path, path: Path, sidecars_in: Callable[[Path], list[Path]]
) -> tuple[dict[str, Any], Path | None]:
    """Merge the sidecars that apply to a map, from the root of its dataset down to its folder."""
    own = split_entities(_stem(path)).items()
    parents = [parent for parent in reversed(path.parents) if parent.is_relative_to(root)]
    merged: dict[str, Any] = {}
    nearest = None
    for folder in parents:
        candidates = [json for json in sidecars_in(folder) if _applies(json, path, own)]
        for candidate in sorted(candidates, key=lambda json: len(split_entities(json.stem))):
            merged.update(read_json(candidate))
            nearest = candidate
    return merged, nearest


def _applies(sidecar: Path, path: Path, own: Iterable[tuple[str, str]]) -> bool:
    """Tell whether a sidecar's entities are among the map's; SEPIA's free prefix must be the same."""
    stem = sidecar.name.removesuffix("Chimap.json").rstrip("_")
    if stem == _stem(path):
        return True
    named = split_entities(stem)
    return join_entities(named) == stem and named.items() <= set(own)


def _key(scan: Scan) -> tuple[str, ...]:
    """Entities as a key; ``run-1`` and ``run-01`` are one run."""
    return tuple(
        f"{key}-{int(value) if key in ('run', 'echo') and value.isdecimal() else value}"
        for key, value in scan.named_entities.items()
    )


def _check_unique(groups: Iterable[Sequence[tuple[Source, Path]]]) -> None:
    for group in groups:
        if len(group) == 1:
            continue
        (source, path), (other, twin) = group[:2]
        if path.parent == twin.parent and path.name.removesuffix(".gz") == twin.name.removesuffix(".gz"):
            raise InputError(f"{path.name}: lies beside {twin.name}; keep one of the two")
        both = f"{source.show(path)} and {other.show(twin)} are maps of the same scan"
        if source == other:
            raise InputError(f"{both}; keep one, tell them apart by desc-, or choose with --bids-filter-file")
        choice = f'{{"chimap": {{"scope": "{source.name}"}}}}'
        raise InputError(f"{both}; choose one source with --derivatives or --bids-filter-file ({choice})")


def _nothing(settings: Settings, *, echoes: bool) -> str:
    name = settings.bids_dir.name
    chosen = [f"sub-{label}" for label in settings.participant_label]
    chosen += [f"ses-{label}" for label in settings.session_label]
    whom = f" for {list_some(chosen)}" if chosen else ""
    if echoes:
        return (
            f"{name}: _MEGRE but no _Chimap{whom}; reconstruct the chi maps first, for example with QSMxT, "
            "and give their folder with --derivatives"
        )
    if settings.bids_filter_file:
        return f"{name}: no _Chimap{whom} that {settings.bids_filter_file.name} selects; check --bids-filter-file"
    if chosen:
        return f"{name}: no _Chimap and no _MEGRE{whom}; check --participant-label and --session-label"
    return f"{name}: no _Chimap and no _MEGRE in it; give the folder of the chi maps with --derivatives"
