"""Gradient echoes in a dataset: group the files of a scan, and read their metadata."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.dataset import SourceDataset
from bids_dgmseg.bids.entities import ECHO_NAME, Sidecars, consistent_entities, join_entities, stem_of
from bids_dgmseg.errors import InputError
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
        expected = parts.get(other, {})
        if lone := [path.name for echo, path in parts.get(part, {}).items() if echo not in expected]:
            break
    remedy = "add it, or remove this echo" if expected else f"add the part-{other} files of all echoes"
    if other == "mag" and not expected:
        remedy += "; they weight the echoes, so they are needed with `brain_masks`, too"
    raise InputError(f"{lone[0]}: no part-{other} file of this echo; {remedy}")


def _read_number(path: Path, sidecar: Mapping[str, Any], key: str, limits: tuple[float, float]) -> float:
    """Read a positive number within limits from the metadata of an echo."""
    name = f"{stem_of(path)}.json"
    units, example = {"EchoTime": ("seconds", "0.005 to 0.05"), "MagneticFieldStrength": ("tesla", "3")}[key]
    if key not in sidecar:
        raise InputError(f"{name}: {key} is missing; add it in {units}")
    value = sidecar[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise InputError(f"{name}: {key} is {value!r:.40}, expected a positive number in {units}; correct it")
    if not limits[0] <= value <= limits[1]:
        raise InputError(f"{name}: {key} is {value:g}, expected {units} (such as {example}); correct it")
    return float(value)
