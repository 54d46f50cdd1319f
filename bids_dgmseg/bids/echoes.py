"""Gather the echoes of a scan: their phase, magnitude and times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.datasets import ECHO_NAME, Source
from bids_dgmseg.bids.names import join_entities, split_entities
from bids_dgmseg.bids.sidecars import Sidecars
from bids_dgmseg.errors import InputError

_SHORTEST_S, _LONGEST_S = 1e-4, 0.5
"""Echo times beyond are in other units."""

_LEAST_APART_S = 1e-4

_WEAKEST_T, _STRONGEST_T = 0.01, 20.0


@dataclass(frozen=True)
class Echo:
    """One echo of a scan."""

    phase: Path
    magnitude: Path
    time_s: float
    units: str = ""
    """Of the phase, as its sidecar has them."""


@dataclass(frozen=True)
class EchoSet:
    """The echoes that one susceptibility map is reconstructed from."""

    entities: Mapping[str, str]
    """Those of all files, without ``echo`` and ``part``."""
    phase: Path
    """Of the first echo, on whose grid the map will lie."""
    echoes: tuple[Echo, ...]
    """By rising time."""
    sidecar: Mapping[str, Any]
    """Metadata of the first echo's phase."""
    sidecar_path: Path | None
    problem: str | None = None
    """Why nothing can be reconstructed from them: one line."""


@dataclass
class _Files:
    """Files of a scan by part and echo."""

    phase: dict[str, Path] = field(default_factory=dict)
    magnitude: dict[str, Path] = field(default_factory=dict)
    problem: str | None = None


def gather_echoes(source: Source, paths: Iterable[Path]) -> list[EchoSet]:
    """Gather ``_MEGRE`` files to sets of echoes; sets without a phase image are none.

    Parameters
    ----------
    source : Source
        The dataset.
    paths : iterable of Path
        Files in it.

    Returns
    -------
    list of EchoSet
        In the order of their names. One that lacks files or metadata has a `problem`.

    Raises
    ------
    InputError
        If a file lies in another participant's folder.
    """
    scans: dict[str, _Files] = defaultdict(_Files)
    for path in sorted(paths):
        if not ECHO_NAME.fullmatch(path.name):
            continue
        named = source.read_entities(path, _stem(path))
        part, echo = named.pop("part", "mag"), named.pop("echo", "1")
        kinds = {"phase": scans[join_entities(named)].phase, "mag": scans[join_entities(named)].magnitude}
        if part in kinds and (twin := kinds[part].setdefault(_number(echo), path)) != path:
            scans[join_entities(named)].problem = f"{path.name}: is the same echo as {twin.name}; keep one of the two"
    sidecars = Sidecars("MEGRE")
    return [_gather(source, name, files, sidecars) for name, files in sorted(scans.items()) if files.phase]


def _gather(source: Source, name: str, files: _Files, sidecars: Sidecars) -> EchoSet:
    entities, first = split_entities(name), files.phase[min(files.phase, key=lambda echo: (len(echo), echo))]
    try:
        if files.problem:
            raise InputError(files.problem)
        _check_parts(files)
        read = {path: _read(source, path, sidecars) for path in files.phase.values()}
        times = {echo: _echo_time_s(path, read[path][0]) for echo, path in files.phase.items()}
        order = sorted(times, key=lambda echo: (times[echo], len(echo), echo))
        _check_field(files.phase[order[0]], read[files.phase[order[0]]][0])
    except InputError as error:
        return EchoSet(entities, first, (), {}, None, str(error))
    echoes = tuple(
        Echo(files.phase[echo], files.magnitude[echo], times[echo], str(read[files.phase[echo]][0].get("Units", "")))
        for echo in order
    )
    problem = next(
        (
            f"{after.phase.name}: has the EchoTime of {before.phase.name}, {after.time_s:g} s; correct one of them"
            for before, after in pairwise(echoes)
            if after.time_s - before.time_s < _LEAST_APART_S
        ),
        None,
    )
    return EchoSet(entities, echoes[0].phase, echoes, *read[echoes[0].phase], problem)


def _check_parts(files: _Files) -> None:
    for here, there, part in ((files.phase, files.magnitude, "mag"), (files.magnitude, files.phase, "phase")):
        for echo, path in here.items():
            if echo not in there:
                raise InputError(f"{path.name}: no part-{part} of this echo beside it; add it, or remove this echo")


def _read(source: Source, path: Path, sidecars: Sidecars) -> tuple[dict[str, Any], Path | None]:
    return sidecars.inherit(source.root, path, _stem(path), source.read_entities(path, _stem(path)).items())


def _echo_time_s(path: Path, sidecar: Mapping[str, Any]) -> float:
    name = f"{_stem(path)}_MEGRE.json"
    time_s = _number_in(name, sidecar, "EchoTime", "s")
    if not _SHORTEST_S <= time_s <= _LONGEST_S:
        raise InputError(f"{name}: EchoTime is {time_s:g}, expected seconds (about 0.005 to 0.05); correct it")
    return time_s


def _check_field(path: Path, sidecar: Mapping[str, Any]) -> None:
    name = f"{_stem(path)}_MEGRE.json"
    field_t = _number_in(name, sidecar, "MagneticFieldStrength", "T")
    if not _WEAKEST_T <= field_t <= _STRONGEST_T:
        raise InputError(f"{name}: MagneticFieldStrength is {field_t:g}, expected tesla (such as 3); correct it")


def _number_in(name: str, sidecar: Mapping[str, Any], key: str, unit: str) -> float:
    spelled = {"s": "seconds", "T": "tesla"}[unit]
    if key not in sidecar:
        raise InputError(f"{name}: {key} is missing; add it in {spelled}")
    value = sidecar[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise InputError(f"{name}: {key} is {value!r:.40}, expected a number above 0 in {spelled}; correct it")
    return float(value)


def _number(echo: str) -> str:
    """Echo ``01`` is echo ``1``."""
    return str(int(echo)) if echo.isdecimal() else echo


def _stem(path: Path) -> str:
    return path.name.partition("_MEGRE.")[0]
