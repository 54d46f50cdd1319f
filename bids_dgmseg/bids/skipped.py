"""What a run leaves out, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bids_dgmseg.bids.datasets import ECHO_NAME, MAP_NAME, Source, find_sources
from bids_dgmseg.bids.names import find_odd_parts, split_entities
from bids_dgmseg.config import Settings
from bids_dgmseg.errors import list_some

if TYPE_CHECKING:
    from bids_dgmseg.bids.scans import Scan


def find_left_out(settings: Settings, scans: Iterable[Scan]) -> list[str]:
    """Say who is left out, one line each.

    Selected participants without a chosen chi map and without echoes to reconstruct one from; of the others, sessions
    that have echoes or were asked for by name, but neither; parts of file names that are passed over; and folders whose
    names are not of BIDS.
    """
    scans = list(scans)
    sources = find_sources(settings)
    done: dict[str, set[str | None]] = defaultdict(set)
    for scan in scans:
        done[scan.participant].add(scan.session)
    lines = []
    for label in sorted({label for source in sources for label in source.folders(settings.participant_label)}):
        if label not in done:
            seen = _look(sources, [label], settings.session_label)
            lines.append(f"sub-{label}: {_why_none(settings, seen)}; left out")
            continue
        sessions = {session for source in sources for session in source.sessions([label])} - done[label]
        for session in sorted(sessions.intersection(settings.session_label or sessions)):
            seen = _look(sources, [label], [session])
            if not seen.maps and (seen.echoes or settings.session_label):
                reason = _why_none(settings, seen) if seen.echoes else "no _Chimap"
                lines.append(f"sub-{label}_ses-{session}: {reason}; left out")
    for scan in scans:
        if odd := find_odd_parts(scan.chi.name.partition(".")[0]):
            lines.append(
                f"{scan.chi.name}: {', '.join(odd)} is no entity of BIDS (letters and digits behind one hyphen), so it "
                f"is passed over and the scan is {scan.name}; rename the file"
            )
    misnamed = [] if settings.participant_label else sources[0].misnamed()
    return lines + [
        f"{name}: not a BIDS name (letters and digits behind sub-); left out, so rename it" for name in misnamed
    ]


def explain_nothing(settings: Settings, sources: Sequence[Source], *, echoes: bool) -> str:
    """Say in one line why a run finds no scan at all; `echoes` tells whether it would have taken echoes too."""
    name, seen = settings.bids_dir.name, _look(sources, settings.participant_label, settings.session_label)
    chosen = [f"sub-{label}" for label in settings.participant_label]
    chosen += [f"ses-{label}" for label in settings.session_label]
    whom = f" for {list_some(chosen)}" if chosen else ""
    if seen.maps and settings.bids_filter_file:
        return f"{name}: no _Chimap{whom} that {settings.bids_filter_file.name} selects; check --bids-filter-file"
    if seen.maps:
        return (
            f"{name}: no _Chimap of all sources{whom}, only of para- or diamagnetic ones; give maps of total "
            "susceptibility, or choose these by desc with --bids-filter-file"
        )
    if seen.echoes and not echoes:
        return (
            f"{name}: _MEGRE but no _Chimap{whom}; reconstruct the chi maps first, with bids_dgmseg at the participant "
            "level or QSMxT, and give their folder with --derivatives"
        )
    if seen.echoes and settings.bids_filter_file:
        return f"{name}: no _MEGRE{whom} that {settings.bids_filter_file.name} selects; check --bids-filter-file"
    if seen.echoes:
        return (
            f"{name}: _MEGRE without part-phase and no _Chimap{whom}; add the phase images, or give the folder of the "
            "chi maps with --derivatives"
        )
    if chosen:
        return f"{name}: no _Chimap and no _MEGRE{whom}; check --participant-label and --session-label"
    return f"{name}: no _Chimap and no _MEGRE in it; give the folder of the chi maps with --derivatives"


@dataclass(frozen=True)
class _Seen:
    """What lies in the folders of some participants and sessions, chosen or not."""

    maps: bool
    echoes: bool


def _look(sources: Sequence[Source], participants: Sequence[str], sessions: Sequence[str]) -> _Seen:
    names = [
        path.name
        for source in sources
        for path in source.files(participants, sessions)
        if not sessions or _session(source, path) in sessions
    ]
    return _Seen(*(any(map(kind.fullmatch, names)) for kind in (MAP_NAME, ECHO_NAME)))


def _session(source: Source, path: Path) -> str | None:
    return {**split_entities(path.name.partition(".")[0]), **source.place(path)}.get("ses")


def _why_none(settings: Settings, seen: _Seen) -> str:
    """Say why no chi map was chosen where these files were seen."""
    if not seen.maps and seen.echoes:
        chosen = f" that {settings.bids_filter_file.name} selects" if settings.bids_filter_file else ""
        return f"no _Chimap, and no _MEGRE with part-phase{chosen}"
    if not seen.maps:
        sessions = list_some(f"ses-{label}" for label in settings.session_label)
        return f"no _Chimap in {sessions}" if sessions else "no _Chimap"
    if settings.bids_filter_file:
        return f"no _Chimap that {settings.bids_filter_file.name} selects"
    return "no _Chimap of all sources, only of para- or diamagnetic ones"
