"""What a cohort's results were made from: studies, versions, settings, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from bids_dgmseg import __version__
from bids_dgmseg.description import linked_datasets, makers, read_description, source_datasets
from bids_dgmseg.links import follow_link
from bids_dgmseg.report.group_read import Cohort
from bids_dgmseg.report.numbers import say

_INPUT = {
    "input_units": "Units of the maps", "input_reference": "Reference of the maps", "input_made_of": "Made here of",
}  # fmt: skip
_SHOWN = 5


def name_studies(output_dir: Path) -> Sequence[str]:
    """Name the datasets that the output was made from, or its own folder where none is known.

    Their names are those of their ``dataset_description.json``, or of their folders where that cannot be read.
    """
    return _name_sources(output_dir, frozenset()) or [output_dir.resolve().name]


def _name_sources(output_dir: Path, seen: frozenset[Path]) -> list[str]:
    """Name what an output was made from; of those in `seen`, which may name each other in turn, nothing."""
    names = []
    for link in linked_datasets(output_dir).values():
        folder = follow_link(link, output_dir).resolve()
        names.append(str(read_description(folder).get("Name") or folder.name))
    if not names:  # merged from other outputs, which know theirs
        known = seen | {output_dir.resolve()}
        trees = [follow_link(link, output_dir).resolve() for link in source_datasets(output_dir)]
        names = [name for tree in trees if tree.is_dir() and tree not in known
                 for name in _name_sources(tree, known) or [tree.name]]  # fmt: skip
    return list(dict.fromkeys(names))


def say_facts(cohort: Cohort, output_dir: Path) -> dict[str, dict[str, str]]:
    """Gather headings, then names and values: the maps, settings of the group level, versions."""
    quality = cohort.tables.get("group_quality")
    rows = quality.rows if quality else pd.DataFrame()
    settings: dict[str, Any] = {}
    for table in cohort.tables.values():
        settings |= table.dictionary.get("Settings") or {}
    return {
        "Maps": {title: _say_values(rows[column]) for column, title in _INPUT.items() if column in rows},
        "Settings of the group level": {_spell(key): say(value) for key, value in settings.items()},
        "Versions": {
            **{f"{maker['Name']}, scans": say(maker.get("Version")) for maker in makers(output_dir)},
            "bids_dgmseg, this page": __version__,
        },
    }


def _spell(key: str) -> str:
    """Write a name of the data dictionaries as words.

    >>> _spell("GroupColumn")
    'Group column'
    """
    return re.sub("(?<=[a-z])(?=[A-Z])", " ", key).capitalize()


def _say_values(values: pd.Series) -> str:
    """Say the values of a column, with their number of scans where they differ.

    >>> _say_values(pd.Series(["ppm", "ppb", "ppm", None]))
    'ppm (2), ppb (1), n/a (1)'
    """
    counts = values.astype(object).where(values.notna(), None).map(say).value_counts()
    if len(counts) == 1:
        return str(counts.index[0])
    shown = ", ".join(f"{value} ({n})" for value, n in counts.head(_SHOWN).items())
    return shown if len(counts) <= _SHOWN else f"{shown} and {len(counts) - _SHOWN} more values"
