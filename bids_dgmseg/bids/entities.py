"""Entities in BIDS file names, and the filters that select files by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_json

ORDER = (
    "sub tpl ses cohort sample task tracksys acq nuc voi ce trc stain rec dir run mod echo flip"
    " inv mt part proc hemi space split recording chunk atlas seg scale res den label desc"
).split()
"""Entities in the order of BIDS file names."""

_PAIR = re.compile(r"([a-zA-Z]+)-([0-9a-zA-Z+]+)")

_NUMBERED = ("run", "echo")
"""Entities with numbers, which may have leading zeros."""

_PYBIDS_NAMES = {
    "sub": "subject",
    "ses": "session",
    "acq": "acquisition",
    "rec": "reconstruction",
    "ce": "ceagent",
    "dir": "direction",
    "description": "desc",
    "resolution": "res",
    "seg": "segmentation",
}

_PARTIAL_CHI = ("paramagnetic", "diamagnetic")
"""Values of ``desc`` for maps that contain only a part of the susceptibility."""


def stem_of(path: Path) -> str:
    """Return a file name without its extensions."""
    return path.name.partition(".")[0]


def split_entities(stem: str) -> dict[str, str]:
    """Parse the ``key-value`` parts of a file name; other parts are ignored.

    >>> split_entities("sub-01_acq-x_Sepia_Chimap")
    {'sub': '01', 'acq': 'x'}
    """
    pairs = (_PAIR.fullmatch(part) for part in stem.split("_"))
    return {pair[1]: pair[2] for pair in pairs if pair}


def join_entities(entities: Mapping[str, str]) -> str:
    """Format entities in the order of BIDS, with unknown ones before ``atlas``.

    >>> join_entities({"desc": "x", "seg": "dgm16", "sub": "01"})
    'sub-01_seg-dgm16_desc-x'
    """
    # Not pybids' build_path: it drops entities that its pattern does not list, so that two scans could share a name,
    # and importing it takes 0.7 s.
    unknown = ORDER.index("atlas")
    ranked = sorted(entities, key=lambda key: ORDER.index(key) if key in ORDER else unknown - 0.5)
    return "_".join(f"{key}-{entities[key]}" for key in ranked)


def comparable(entities: Mapping[str, str]) -> dict[str, str]:
    """Remove leading zeros of numbers, so that ``run-1`` and ``run-01`` are equal."""
    return {
        key: str(int(value)) if key in _NUMBERED and value.isdecimal() else value for key, value in entities.items()
    }


def is_partial_chi(name: str) -> bool:
    """Return whether a file contains paramagnetic or diamagnetic susceptibility only."""
    return any(f"_desc-{part}_" in name for part in _PARTIAL_CHI)


@dataclass(frozen=True)
class Filter:
    """A block of a ``--bids-filter-file``, in the format of fMRIPrep's filter files."""

    wanted: Mapping[str, Any] = field(default_factory=dict)
    """Entity or ``scope`` → value, list of values, ``"*"`` for any value, or None for files without it."""

    @classmethod
    def read(cls, path: Path | None, name: str) -> Filter:
        """Read the block ``chimap`` or ``megre`` of a filter file; without the file or the block, all are wanted.

        A file without both blocks, as BABS writes it for one session, selects the session that its other blocks name.
        """
        if path is None:
            return cls()
        blocks = read_json(path)
        if not any(isinstance(blocks.get(known), dict) for known in ("chimap", "megre")):
            found = [block["session"] for block in blocks.values() if isinstance(block, dict) and "session" in block]
            if found and isinstance(found[0], str) and all(session == found[0] for session in found):
                return cls({"session": found[0]})
            example = '{"chimap": {"acquisition": "x"}}'
            raise InputError(f'{path.name}: no "chimap" or "megre" block; add one, such as {example}')
        block = blocks.get(name, {})
        if not isinstance(block, dict):
            raise InputError(
                f'{path.name}: "{name}" is not an object; write it as {{"{name}": {{"acquisition": "x"}}}}'
            )
        wanted = {_PYBIDS_NAMES.get(str(key), str(key)): value for key, value in block.items()}
        known = {"scope", *(entity for config in _pybids_configs() for entity in config.entities)}
        if unknown := sorted(set(wanted) - known):
            some = "acquisition, reconstruction, run, session, space, desc, scope"
            raise InputError(f"{path.name}: unknown entity {list_some(unknown)}; use the names of pybids ({some}, …)")
        if name == "megre":
            wanted.pop("part", None)  # reconstruction needs both parts
        return cls(wanted)

    def keeps(self, relative: Path, dataset: str, raw: bool) -> bool:
        """Return whether a file of a dataset is wanted; its path is relative to the dataset."""
        if "desc" not in self.wanted and is_partial_chi(relative.name):
            return False
        if not self.wanted:
            return True
        from bids.layout import parse_file_entities  # slow to import

        found = parse_file_entities(f"/{relative.as_posix()}", config=_pybids_configs())
        for key, wanted in self.wanted.items():
            choices, value = wanted if isinstance(wanted, list) else [wanted], found.get(key)
            if key == "scope":
                matches = any(scope in ("all", dataset, "raw" if raw else "derivatives") for scope in choices)
            elif value is None:
                matches = None in choices
            else:  # numbers are compared by value, so that run 1 matches run-01
                texts = [str(choice) for choice in choices if choice is not None]
                numbers = {int(text) for text in texts if text.isdecimal()}
                matches = bool({"*", str(value)}.intersection(texts)) or (
                    str(value).isdecimal() and int(value) in numbers
                )
            if not matches:
                return False
        return True


@cache
def _pybids_configs() -> list[Any]:
    from bids.layout.models import Config  # slow to import

    return [Config.load("bids"), Config.load("derivatives")]
