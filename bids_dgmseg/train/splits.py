"""Split participants into training, validation and test sets, each site in proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bids_dgmseg.io.tables import MISSING
from bids_dgmseg.study.participants import read_participants

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
    table = read_participants(path, participants) if path.is_file() else None
    columns = [] if table is None else [name for name in ("site", "site_id") if name in table.columns]
    if table is None or not columns:
        return dict.fromkeys(sorted(participants), MISSING)
    sites = table[columns[0]].fillna(MISSING)
    return {one: sites.get(one, MISSING) for one in sorted(participants)}


def stratified_folds(sites: Mapping[str, str], folds: int, *, seed: int) -> list[list[str]]:
    """Assign participants to folds, those of each site as evenly as possible.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    folds : int
        Number of folds; their sizes differ by at most one.
    seed : int
        Shuffles the participants of each site.

    Raises
    ------
    ValueError
        If there are fewer participants than folds.
    """
    if len(sites) < folds:
        raise ValueError(f"{len(sites)} participants are too few for {folds} folds")
    generator = np.random.default_rng(seed)
    order: list[str] = []
    for site in sorted(set(sites.values())):
        members = sorted(one for one, other in sites.items() if other == site)
        order += [members[number] for number in generator.permutation(len(members))]
    return [sorted(order[fold::folds]) for fold in range(folds)]


def split_fold(sites: Mapping[str, str], *, folds: int, fold: int, seed: int, validation: float | None) -> Split:
    """Split participants for one fold.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    folds, fold : int
        Number of folds, and which one, counted from 0. With one fold the test set is empty.
    seed : int
        Of the assignment.
    validation : float or None
        Fraction of the training participants for validation, with the fold's own part as test set; None to validate on
        the fold's own part.
    """
    own = stratified_folds(sites, folds, seed=seed)[fold] if folds > 1 else []
    rest = {one: site for one, site in sites.items() if one not in own}
    if own and validation is None:
        return Split(tuple(sorted(rest)), tuple(own), ())
    parts = round(1 / (validation or 0.2))
    chosen = stratified_folds(rest, parts, seed=seed + 1)[0] if len(rest) >= parts else sorted(rest)[: len(rest) > 1]
    return Split(tuple(one for one in sorted(rest) if one not in chosen), tuple(chosen), tuple(own))


def choose_some(names: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """Choose a number of names at random; a smaller choice is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(names[number] for number in order)


def split_by_site(sites: Mapping[str, str], *, seed: int) -> dict[str, Part]:
    """Split participants into training, validation and test set by `FRACTIONS`, each site in proportion.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    seed : int
        Shuffles the participants of each site.

    Returns
    -------
    dict
        Participant → part. With three or more participants no part is empty.
    """
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
