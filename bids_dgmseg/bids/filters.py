"""What ``--bids-filter-file`` selects, in the words of fMRIPrep's filter files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_json

_LONG = {
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

_BLOCKS = ("chimap", "megre")

_NOT_TOTAL = ("paramagnetic", "diamagnetic")


class Filter:
    """Which chi maps, or which echoes, count.

    Parameters
    ----------
    wanted : mapping
        Entity (pybids' name, such as ``acquisition``, or ``scope``) → value, list of values, ``"*"`` for any
        value, or None for "must not have it".
    """

    def __init__(self, wanted: Mapping[str, Any] | None = None) -> None:
        self.wanted = dict(wanted or {})

    @classmethod
    def read(cls, path: Path | None, name: str = "chimap") -> Filter:
        """Read one block of a filter file: ``chimap``, or ``megre`` for echoes; all count where it is left out.

        Raises
        ------
        InputError
            If the file is missing, is not JSON, has neither block, or names an entity that does not exist.
        """
        if path is None:
            return cls()
        blocks = read_json(path)
        if not any(isinstance(blocks.get(known), dict) for known in _BLOCKS):
            example = '{"chimap": {"acquisition": "x"}}'
            raise InputError(f'{path.name}: has no "chimap" block and no "megre" block; write {example}')
        block = blocks.get(name, {})
        if not isinstance(block, dict):
            raise InputError(f'{path.name}: "{name}" holds no object; write {{"{name}": {{"acquisition": "x"}}}}')
        wanted = {_LONG.get(str(key), str(key)): value for key, value in block.items()}
        known = {"scope", *(name for config in _configs() for name in config.entities)}
        if unknown := sorted(set(wanted) - known):
            some = "acquisition, reconstruction, run, session, space, desc, scope"
            raise InputError(f"{path.name}: no entity is called {list_some(unknown)}; use pybids' names ({some}, …)")
        if name == "megre":
            wanted.pop("part", None)  # a map needs both
        return cls(wanted)

    def keeps(self, relative: PurePosixPath, dataset: str, raw: bool) -> bool:
        """Tell whether a file is wanted.

        Parameters
        ----------
        relative : path
            The file within its dataset.
        dataset : str
            Name of the dataset, for ``scope``.
        raw : bool
            Whether the dataset is raw.
        """
        if "desc" not in self.wanted and any(f"_desc-{part}_" in relative.name for part in _NOT_TOTAL):
            return False  # a part of chi is not chi
        if not self.wanted:
            return True
        from bids.layout import parse_file_entities  # slow to import

        found = parse_file_entities(f"/{relative}", config=_configs())
        scopes = ("all", dataset, "raw" if raw else "derivatives")
        return all(
            any(scope in scopes for scope in _listed(wanted)) if key == "scope" else _agrees(found.get(key), wanted)
            for key, wanted in self.wanted.items()
        )


@cache
def _configs() -> list[Any]:
    from bids.layout.models import Config  # slow to import

    return [Config.load("bids"), Config.load("derivatives")]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _agrees(found: Any, wanted: Any) -> bool:
    """Compare an entity's value; numbers count by value, so that run 1 finds ``run-01``."""
    for choice in _listed(wanted):
        if choice is None or found is None:
            if choice is None and found is None:
                return True
        elif choice == "*" or str(choice) == str(found):
            return True
        elif str(choice).isdecimal() and str(found).isdecimal() and int(choice) == int(found):
            return True
    return False
