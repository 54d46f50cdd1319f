"""Divide the participants of a dataset into folds with training, validation and test sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bids_dgmseg.bids.labelled_scans import LabelledMap
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.lab.train.patches import Case
from bids_dgmseg.lab.train.recipe import NnunetRecipe, Recipe
from bids_dgmseg.study.participants import read_labelled_table


@dataclass(frozen=True)
class Split:
    """Participants of one fold."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class FoldData:
    """Labelled and pseudo-labelled maps, and the split of each fold."""

    manual: Sequence[LabelledMap]
    pseudo: Sequence[LabelledMap]
    splits: Sequence[Split]
    arrays: Path
    """Folder for the arrays of maps."""
    record: Mapping[str, Any] = field(default_factory=dict)
    cases: dict[str, Case] = field(default_factory=dict)
    """Cache of prepared maps by name."""

    def maps_of(self, participants: Collection[str]) -> list[LabelledMap]:
        """Return the manually labelled maps of some participants."""
        return [labelled for labelled in self.manual if labelled.participant in participants]


def read_sites(dataset: Path, participants: set[str]) -> dict[str, str]:
    """Read the site of each participant from participants.tsv (``site`` or ``site_id``); without it all have one."""
    path = dataset / "participants.tsv"
    table = read_labelled_table(path, "participant_id") if path.is_file() else None
    columns = [] if table is None else [name for name in ("site", "site_id") if name in table.columns]
    if table is None or not columns:
        return dict.fromkeys(sorted(participants), MISSING)
    sites = table[columns[0]].fillna(MISSING)
    return {name: sites.get(name, MISSING) for name in sorted(participants)}


def split_fold(sites: Mapping[str, str], recipe: Recipe | NnunetRecipe, fold: int) -> Split:
    """Split participants (→ site) for one fold, counted from 0, each site in proportion.

    The sizes of folds differ by at most one. With one fold the test set is empty. See `Recipe.validation`; at least one
    participant validates, but of a single one none.
    """
    order = _shuffle_by_site(sites, seed=recipe.split_seed)
    part = sorted(order[fold :: recipe.folds]) if recipe.folds > 1 else []
    rest = {name: site for name, site in sites.items() if name not in part}
    if part and recipe.validation is None:
        return Split(tuple(sorted(rest)), tuple(part), ())
    if recipe.validation == 0:
        return Split(tuple(sorted(rest)), (), tuple(part))
    share = recipe.validation or 0.2
    if len(rest) < round(1 / share):
        validation = sorted(rest)[: len(rest) > 1]
    else:
        order = _shuffle_by_site(rest, seed=recipe.split_seed + 1)
        places = (int(number / share + 1e-9) for number in range(len(order)))
        validation = sorted(order[place] for place in places if place < len(order))
    return Split(tuple(name for name in sorted(rest) if name not in validation), tuple(validation), tuple(part))


def _shuffle_by_site(sites: Mapping[str, str], *, seed: int) -> list[str]:
    """Sort participants (→ site) by site, at random within it."""
    generator = np.random.default_rng(seed)
    order: list[str] = []
    for site in sorted(set(sites.values())):
        members = sorted(name for name, other in sites.items() if other == site)
        order += [members[number] for number in generator.permutation(len(members))]
    return order


def choose_some(names: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """Choose a number of names at random; a smaller choice is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(names[number] for number in order)


def check_holdout(labelled: Sequence[LabelledMap], holdout: Collection[str]) -> list[LabelledMap]:
    """Return the maps of the other participants; InputError if a held-out one has no map, or if none is left."""
    participants = {one.participant for one in labelled}
    if missing := sorted(set(holdout) - participants):
        raise InputError(
            f"`holdout` {missing[0]}: no labelled scan of this participant (labelled: {list_some(participants)})"
        )
    left = [one for one in labelled if one.participant not in holdout]
    if not left:
        raise InputError("`holdout`: leaves no training scan; hold out fewer participants")
    return left
