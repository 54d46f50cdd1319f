"""Divide the participants of a dataset into training, validation and test sets, and into folds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bids_dgmseg.bids.labelled_scans import LabelledMap
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.study.participants import read_labelled_table

Part = Literal["train", "tune", "test"]

FRACTIONS: Mapping[Part, float] = {"train": 0.7, "tune": 0.1, "test": 0.2}
"""As in DentateSeg's study; ``tune`` is the validation set."""


@dataclass(frozen=True)
class Split:
    """Participants of one fold."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read_sites(dataset: Path, participants: set[str]) -> dict[str, str]:
    """Read the site of each participant from participants.tsv (``site`` or ``site_id``); without it all have one."""
    path = dataset / "participants.tsv"
    table = read_labelled_table(path, "participant_id") if path.is_file() else None
    columns = [] if table is None else [name for name in ("site", "site_id") if name in table.columns]
    if table is None or not columns:
        return dict.fromkeys(sorted(participants), MISSING)
    sites = table[columns[0]].fillna(MISSING)
    return {one: sites.get(one, MISSING) for one in sorted(participants)}


def stratified_folds(sites: Mapping[str, str], folds: int, *, seed: int) -> list[list[str]]:
    """Assign participants (→ site) to folds, those of each site as evenly as possible; ValueError if they are too few.

    The sizes of folds differ by at most one; `seed` shuffles the participants of each site.
    """
    if len(sites) < folds:
        raise ValueError(f"{len(sites)} participants are too few for {folds} folds")
    order = _shuffle_by_site(sites, seed=seed)
    return [sorted(order[fold::folds]) for fold in range(folds)]


def _shuffle_by_site(sites: Mapping[str, str], *, seed: int) -> list[str]:
    """Sort participants (→ site) by site, at random within it."""
    generator = np.random.default_rng(seed)
    order: list[str] = []
    for site in sorted(set(sites.values())):
        members = sorted(one for one, other in sites.items() if other == site)
        order += [members[number] for number in generator.permutation(len(members))]
    return order


def split_fold(sites: Mapping[str, str], *, folds: int, fold: int, seed: int, validation: float | None) -> Split:
    """Split participants (→ site) for one fold, counted from 0; with one fold the test set is empty.

    `validation` is the fraction of the training participants for validation, with the fold's own part as test set; 0
    for no validation, None to validate on the fold's own part.
    """
    own = stratified_folds(sites, folds, seed=seed)[fold] if folds > 1 else []
    rest = {one: site for one, site in sites.items() if one not in own}
    if own and validation is None:
        return Split(tuple(sorted(rest)), tuple(own), ())
    if validation == 0:
        return Split(tuple(sorted(rest)), (), tuple(own))
    chosen = _choose_validation(rest, validation or 0.2, seed=seed + 1)
    return Split(tuple(one for one in sorted(rest) if one not in chosen), tuple(chosen), tuple(own))


def _choose_validation(sites: Mapping[str, str], share: float, *, seed: int) -> list[str]:
    """Choose a share of the participants (→ site), of each site alike: at least one, but of a single one none."""
    if len(sites) < round(1 / share):
        return sorted(sites)[: len(sites) > 1]
    order = _shuffle_by_site(sites, seed=seed)
    places = (int(number / share + 1e-9) for number in range(len(order)))
    return sorted(order[place] for place in places if place < len(order))


def choose_some(names: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """Choose a number of names at random; a smaller choice is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(names[number] for number in order)


def split_by_site(sites: Mapping[str, str], *, seed: int, test: Collection[str] = ()) -> dict[str, Part]:
    """Split participants (→ site) into training, validation and test set by `FRACTIONS`, each site in proportion.

    `seed` shuffles the participants of each site. With three or more participants no part is empty. If `test` names the
    test set, only the others are split.
    """
    if test:
        others = {name: site for name, site in sites.items() if name not in test}
        share = FRACTIONS["tune"] / (FRACTIONS["train"] + FRACTIONS["tune"])
        tuned = _choose_validation(others, share, seed=seed)
        return {name: "test" if name in test else "tune" if name in tuned else "train" for name in sites}
    random = np.random.default_rng(seed)
    order = [name for _, _, name in sorted((sites[name], random.random(), name) for name in sorted(sites))]
    counts: dict[Part, int] = dict.fromkeys(FRACTIONS, 0)
    parts: dict[str, Part] = {}
    for number, name in enumerate(order, start=1):
        lacking = {part: fraction * number - counts[part] for part, fraction in FRACTIONS.items()}
        parts[name] = max(lacking, key=lambda part: lacking[part])
        counts[parts[name]] += 1
    if len(order) >= 3:
        for part in ("tune", "test"):
            if part not in parts.values():
                training = [name for name in order if parts[name] == "train"]
                parts[training[-1]] = part
    return parts


def check_holdout(labelled: Sequence[LabelledMap], holdout: Collection[str]) -> list[LabelledMap]:
    """Return the maps of the other participants; InputError if a held-out one has no map, or if none is left."""
    known = {one.participant for one in labelled}
    if missing := sorted(set(holdout) - known):
        raise InputError(f"`holdout` {missing[0]}: no labelled scan of this participant (labelled: {list_some(known)})")
    left = [one for one in labelled if one.participant not in holdout]
    if not left:
        raise InputError("`holdout`: leaves no training scan; hold out fewer participants")
    return left
