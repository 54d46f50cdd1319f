"""Find the chi maps of a BIDS dataset and of its derivatives.

Only the folders of the selected participants are listed, so that a large dataset costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bids_dgmseg.bids.filters import Filter
from bids_dgmseg.bids.folders import MAP_NAME, Source, find_sources
from bids_dgmseg.bids.left_out import explain_nothing
from bids_dgmseg.bids.names import join_entities, list_some, split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.jsonfile import read_json
from bids_dgmseg.settings import Settings


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
    scans = []
    for source in sources:
        for path in source.files(settings.participant_label, settings.session_label):
            relative = PurePosixPath(path.relative_to(source.root).as_posix())
            if not MAP_NAME.fullmatch(path.name) or not choose.keeps(relative, dataset=source.name, raw=source.raw):
                continue
            scan = _read_scan(source, path, sidecars_in)
            if settings.session_label and scan.session not in settings.session_label:
                continue
            found[_key(scan)].append((source, path))
            scans.append(scan)
    _check_unique(found.values())
    if not scans:
        raise InputError(explain_nothing(settings, sources))
    if all(scan.problem for scan in scans):
        raise InputError(scans[0].problem)
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


def _read_scan(source: Source, path: Path, sidecars_in: Callable[[Path], list[Path]]) -> Scan:
    named = split_entities(_stem(path))
    for prefix, label in source.place(path).items():
        if named.setdefault(prefix, label) != label:
            raise InputError(f"{path.name}: lies in {prefix}-{label}; rename the file or move it")
    everything = tuple(named.items())
    participant, session = named.pop("sub"), named.pop("ses", None)
    ordered = split_entities(join_entities(named))
    try:
        sidecar, nearest = _inherit(source.root, path, everything, sidecars_in)
    except InputError as error:  # one scan's sidecar must not keep the others from being done
        return Scan(participant, session, ordered, path, {}, None, source.root, source.name, str(error))
    return Scan(participant, session, ordered, path, sidecar, nearest, source.root, source.name)


def _stem(path: Path) -> str:
    match = MAP_NAME.fullmatch(path.name)
    return match[1] if match else path.name.partition(".")[0]


def _inherit(
    root: Path, path: Path, own: Iterable[tuple[str, str]], sidecars_in: Callable[[Path], list[Path]]
) -> tuple[dict[str, Any], Path | None]:
    """Merge the sidecars that apply to a map of these entities, from the root of its dataset down to its folder."""
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
