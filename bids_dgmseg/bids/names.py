"""BIDS file names: entities, their order, and what a name says."""

from __future__ import annotations

import re
from collections.abc import Mapping

ORDER = (
    "sub",
    "tpl",
    "ses",
    "cohort",
    "sample",
    "task",
    "tracksys",
    "acq",
    "nuc",
    "voi",
    "ce",
    "trc",
    "stain",
    "rec",
    "dir",
    "run",
    "mod",
    "echo",
    "flip",
    "inv",
    "mt",
    "part",
    "proc",
    "hemi",
    "space",
    "split",
    "recording",
    "chunk",
    "atlas",
    "seg",
    "scale",
    "res",
    "den",
    "label",
    "desc",
)
"""Entities as BIDS orders them in a file name."""

_PAIR = re.compile(r"([a-zA-Z]+)-([0-9a-zA-Z+]+)")


def split_entities(stem: str) -> dict[str, str]:
    """Read the ``key-value`` parts of a file name; other parts are passed over.

    >>> split_entities("sub-01_acq-x_Sepia_Chimap")
    {'sub': '01', 'acq': 'x'}
    """
    pairs = (_PAIR.fullmatch(part) for part in stem.split("_"))
    return {pair[1]: pair[2] for pair in pairs if pair}


def find_odd_parts(stem: str) -> list[str]:
    """List the parts of a file name that look like entities and are none.

    >>> find_odd_parts("sub-01_acq-my-map_run-1_Chimap")
    ['acq-my-map']
    """
    return [part for part in stem.split("_") if "-" in part and not _PAIR.fullmatch(part)]


def join_entities(entities: Mapping[str, str]) -> str:
    """Write entities in the order of BIDS; those it does not know stand just before ``seg``.

    >>> join_entities({"desc": "x", "seg": "dgm16", "sub": "01"})
    'sub-01_seg-dgm16_desc-x'
    """
    unknown = ORDER.index("atlas")
    ranked = sorted(entities, key=lambda key: ORDER.index(key) if key in ORDER else unknown - 0.5)
    return "_".join(f"{key}-{entities[key]}" for key in ranked)
