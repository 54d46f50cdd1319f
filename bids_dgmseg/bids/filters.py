"""Filters that select images by their entities, in the format of fMRIPrep's ``--bids-filter-file``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_dgmseg.bids.layout import pybids_entities
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_json

if TYPE_CHECKING:
    from bids_dgmseg.bids.dataset import SourceDataset

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


@dataclass(frozen=True)
class Filter:
    """A block of a filter file, with pybids' semantics."""

    entities: Mapping[str, Any] = field(default_factory=dict)
    """pybids' name of an entity → value, list of values, ``"*"`` for any value, or None for images without it."""
    scopes: Sequence[str] = ("all",)
    """``raw``, ``derivatives``, ``all``, or the name of a derivative or of the program that made it."""
    regex_search: bool = False
    """Whether values are regular expressions."""
    name: str = ""
    """Of the file or parameter, for messages."""

    @classmethod
    def read(cls, path: Path | None, block: str, *, chi: Sequence[str] = ()) -> Filter:
        """Read the block ``chimap`` or ``megre`` of a filter file; without the file or the block, all are wanted.

        A file without both blocks, as BABS writes it for one session, selects the session that its other blocks name.
        `chi` are entities of maps, such as ``desc-cosmos``, which are added to the block ``chimap``; several values of
        one entity are alternatives.
        """
        wanted = _read_block(path, block) if path else {}
        if block == "chimap":
            labels: dict[str, list[str]] = defaultdict(list)
            for key, _, label in (one.partition("-") for one in chi):
                labels[_PYBIDS_NAMES.get(key, key)].append(label)
            wanted |= labels
        name = path.name if path else "`chi`"
        if not wanted:
            return cls(name=name)
        if block == "megre":
            wanted.pop("part", None)  # reconstruction needs both parts
        scopes, regex_search = wanted.pop("scope", "all"), bool(wanted.pop("regex_search", False))
        if unknown := sorted(wanted.keys() - pybids_entities().keys()):
            some = "acquisition, reconstruction, run, session, space, desc, scope"
            raise InputError(f"{name}: unknown entity {list_some(unknown)}; use the names of pybids ({some}, …)")
        for key, value in wanted.items():
            if not all(one is None or isinstance(one, str | int | float) for one in _as_list(value)):
                raise InputError(f"{name}: {key} is {value!r:.40}, expected a text, a number, null or a list of them")
        return cls(wanted, list(map(str, _as_list(scopes))), regex_search, name)

    def select(self, source: SourceDataset, paths: Sequence[Path]) -> list[Path]:
        """Return the wanted images among those of a dataset."""
        if not {"all", "raw" if source.raw else "derivatives", *source.names}.intersection(self.scopes):
            return []
        if not self.entities:
            return list(paths)
        from bids.layout import Query

        special = {"*": Query.REQUIRED, None: Query.NONE}
        filters = {key: [special.get(one, one) for one in _as_list(value)] for key, value in self.entities.items()}
        try:
            wanted = set(source.index.find(filters, regex_search=self.regex_search))
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        return [path for path in paths if path in wanted]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_block(path: Path, name: str) -> dict[str, Any]:
    blocks = read_json(path)
    if not any(isinstance(blocks.get(known), dict) for known in ("chimap", "megre")):
        sessions = [block["session"] for block in blocks.values() if isinstance(block, dict) and "session" in block]
        if sessions and isinstance(sessions[0], str) and all(session == sessions[0] for session in sessions):
            return {"session": sessions[0]}
        example = '{"chimap": {"acquisition": "x"}}'
        raise InputError(f'{path.name}: no "chimap" or "megre" block; add one, such as {example}')
    block = blocks.get(name, {})
    if not isinstance(block, dict):
        raise InputError(f'{path.name}: "{name}" is not an object; write it as {{"{name}": {{"acquisition": "x"}}}}')
    return {_PYBIDS_NAMES.get(str(key), str(key)): value for key, value in block.items()}
