"""The metadata of an image, by BIDS' inheritance principle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from bids_dgmseg.bids.names import join_entities, split_entities
from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json


def _read_text(path: Path) -> dict[str, Any]:
    """Read a sidecar all of whose text can be written again."""
    data = read_json(path)
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise InputError(f"{path.name}: holds half a letter ({half}); correct the file") from error
    return data


class Sidecars:
    """The sidecars of one kind of images; each folder is listed once.

    Parameters
    ----------
    suffix : str
        Such as ``Chimap``.
    """

    def __init__(self, suffix: str) -> None:
        self._end = f"{suffix}.json"
        self._in_folder = cache(lambda folder: sorted(folder.glob(f"*{self._end}")))

    def inherit(
        self, root: Path, path: Path, stem: str, entities: Iterable[tuple[str, str]]
    ) -> tuple[dict[str, Any], Path | None]:
        """Merge the sidecars that apply to an image, from the root of its dataset down to its folder.

        Parameters
        ----------
        root, path : Path
            The dataset and the image in it.
        stem : str
            The image's name without suffix and extension.
        entities : iterable of (str, str)
            What the image's name and folders say.

        Returns
        -------
        metadata : dict
            Empty if there are no sidecars.
        nearest : Path or None
            The sidecar that has the last word.

        Raises
        ------
        InputError
            If one of them cannot be read.
        """
        own = set(entities)
        merged: dict[str, Any] = {}
        nearest = None
        for folder in (parent for parent in reversed(path.parents) if parent.is_relative_to(root)):
            candidates = [sidecar for sidecar in self._in_folder(folder) if self._applies(sidecar, stem, own)]
            for candidate in sorted(candidates, key=lambda sidecar: len(split_entities(sidecar.stem))):
                merged.update(_read_text(candidate))
                nearest = candidate
        return merged, nearest

    def _applies(self, sidecar: Path, stem: str, own: set[tuple[str, str]]) -> bool:
        """Tell whether a sidecar's entities are among the image's; SEPIA's free prefix must be the same."""
        shared = sidecar.name.removesuffix(self._end).rstrip("_")
        if shared == stem:
            return True
        named = split_entities(shared)
        return join_entities(named) == shared and named.items() <= own
