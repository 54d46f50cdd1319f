"""Echoes of multi-echo GRE scans: phase, magnitude and echo times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import ECHO_NAME, Sidecars, SourceDataset
from bids_dgmseg.bids.entities import join_entities, split_entities
from bids_dgmseg.errors import InputError

_ECHO_TIME_LIMITS_S = 1e-4, 0.5
"""Echo times beyond these are in other units."""

_MIN_ECHO_SPACING_S = 1e-4

_FIELD_LIMITS_T = 0.01, 20.0


@dataclass(frozen=True)
class Echo:
    """One echo of a scan."""

    phase: Path
    magnitude: Path
    time_s: float
    units: str = ""
    """Units of the phase in its sidecar."""


@dataclass(frozen=True)
class EchoSet:
    """The echoes from which one chi map is reconstructed."""

    entities: Mapping[str, str]
    """Entities of all files, without ``echo`` and ``part``."""
    phase: Path
    """Phase of the first echo, which defines the grid of the map."""
    echoes: tuple[Echo, ...]
    """By increasing echo time."""
    sidecar: Mapping[str, Any]
    """Metadata of the first echo's phase."""
    sidecar_path: Path | None
    problem: str | None = None
    """Why no map can be reconstructed from them: one line."""


@dataclass
class _Files:
    """Files of a scan by part and echo."""

    phase: dict[str, Path] = field(default_factory=dict)
    mag: dict[str, Path] = field(default_factory=dict)
    problem: str | None = None


def gather_echoes(source: SourceDataset, paths: Iterable[Path]) -> list[EchoSet]:
    """Group ``_MEGRE`` files by scan; scans without phase images are ignored.

    Parameters
    ----------
    source : SourceDataset
        The dataset.
    paths : iterable of path
        Files in it.

    Returns
    -------
    list of EchoSet
        In the order of their names. Sets that lack files or metadata have a `problem`.

    Raises
    ------
    InputError
        If a file is in the folder of another participant.
    """
    scans: dict[str, _Files] = defaultdict(_Files)
    for path in sorted(paths):
        if not ECHO_NAME.fullmatch(path.name):
            continue
        entities = source.consistent_entities(path, _stem(path))
        part, echo = entities.pop("part", "mag"), entities.pop("echo", "1")
        files = scans[join_entities(entities)]
        by_echo = {"phase": files.phase, "mag": files.mag}.get(part, {})
        number = str(int(echo)) if echo.isdecimal() else echo  # echo-01 is echo-1
        if (twin := by_echo.setdefault(number, path)) != path:
            files.problem = f"{path.name}: same echo as {twin.name}; keep one of them"
    sidecars = Sidecars("MEGRE")
    return [_read_echoes(source, name, files, sidecars) for name, files in sorted(scans.items()) if files.phase]


def _read_echoes(source: SourceDataset, name: str, files: _Files, sidecars: Sidecars) -> EchoSet:
    entities, first = split_entities(name), files.phase[min(files.phase, key=lambda echo: (len(echo), echo))]
    try:
        if files.problem:
            raise InputError(files.problem)
        for present, expected, part in ((files.phase, files.mag, "mag"), (files.mag, files.phase, "phase")):
            if lone := [path.name for echo, path in present.items() if echo not in expected]:
                raise InputError(f"{lone[0]}: no part-{part} file of this echo; add it, or remove this echo")
        metadata = {
            path: sidecars.inherit(
                source.root, path, _stem(path), source.consistent_entities(path, _stem(path)).items()
            )
            for path in files.phase.values()
        }
        times = {
            echo: _read_number(path, metadata[path][0], "EchoTime", _ECHO_TIME_LIMITS_S)
            for echo, path in files.phase.items()
        }
        order = sorted(times, key=lambda echo: (times[echo], len(echo), echo))
        earliest = files.phase[order[0]]
        _read_number(earliest, metadata[earliest][0], "MagneticFieldStrength", _FIELD_LIMITS_T)
    except InputError as error:
        return EchoSet(entities, first, (), {}, None, str(error))
    echoes = tuple(
        Echo(files.phase[echo], files.mag[echo], times[echo], str(metadata[files.phase[echo]][0].get("Units", "")))
        for echo in order
    )
    problem = next(
        (
            f"{after.phase.name}: same EchoTime as {before.phase.name} ({after.time_s:g} s); correct one of them"
            for before, after in pairwise(echoes)
            if after.time_s - before.time_s < _MIN_ECHO_SPACING_S
        ),
        None,
    )
    return EchoSet(entities, earliest, echoes, *metadata[earliest], problem)


def _read_number(path: Path, sidecar: Mapping[str, Any], key: str, limits: tuple[float, float]) -> float:
    """Read a positive number within limits from the metadata of an echo."""
    name = f"{_stem(path)}_MEGRE.json"
    units, example = {
        "EchoTime": ("seconds", "0.005 to 0.05"),
        "MagneticFieldStrength": ("tesla", "3"),
    }[key]
    if key not in sidecar:
        raise InputError(f"{name}: {key} is missing; add it in {units}")
    value = sidecar[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise InputError(f"{name}: {key} is {value!r:.40}, expected a positive number in {units}; correct it")
    if not limits[0] <= value <= limits[1]:
        raise InputError(f"{name}: {key} is {value:g}, expected {units} (such as {example}); correct it")
    return float(value)


def _stem(path: Path) -> str:
    return path.name.partition("_MEGRE.")[0]
