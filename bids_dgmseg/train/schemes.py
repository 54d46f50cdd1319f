"""Ways to train with few labels: folds, transfer, pre-training and distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Split:
    """Participants of one fold."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def stratified_folds(sites: Mapping[str, str], folds: int, *, seed: int) -> list[list[str]]:
    """Deal participants out to folds, those of each site as evenly as can be.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    folds : int
        How many; sizes differ by one at most.
    seed : int
        Shuffles each site's participants.

    Raises
    ------
    ValueError
        If there are fewer participants than folds.
    """
    if len(sites) < folds:
        raise ValueError(f"{len(sites)} participants do not fill {folds} folds")
    generator = np.random.default_rng(seed)
    order: list[str] = []
    for site in sorted(set(sites.values())):
        members = sorted(one for one, place in sites.items() if place == site)
        order += [members[number] for number in generator.permutation(len(members))]
    return [sorted(order[fold::folds]) for fold in range(folds)]


def split_fold(sites: Mapping[str, str], *, folds: int, fold: int, seed: int, validation: float | None) -> Split:
    """Say who is learned from, watched and kept unseen in a fold.

    Parameters
    ----------
    sites : mapping
        Participant → site.
    folds, fold : int
        How many, and which, counted from 0. With one fold nobody is kept unseen.
    seed : int
        Of the dealing.
    validation : float or None
        Part of the training participants that is watched while the fold's own part stays unseen; None to watch the
        fold's own part.
    """
    own = stratified_folds(sites, folds, seed=seed)[fold] if folds > 1 else []
    rest = {one: site for one, site in sites.items() if one not in own}
    if own and validation is None:
        return Split(tuple(sorted(rest)), tuple(own), ())
    parts = round(1 / (validation or 0.2))
    watched = stratified_folds(rest, parts, seed=seed + 1)[0] if len(rest) >= parts else sorted(rest)[: len(rest) > 1]
    return Split(tuple(one for one in sorted(rest) if one not in watched), tuple(watched), tuple(own))


def choose_some(names: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """Choose a number of names at random; a smaller choice is a part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(names[number] for number in order)


def transfer(network: nn.Module, weights: Mapping[str, Tensor], *, new_heads: bool) -> list[str]:
    """Begin with the weights of a network that learned something else; all of them stay trainable (Zhao et al. 2022).

    Parameters
    ----------
    network : Module
        Untrained; changed in place.
    weights : mapping of str to Tensor
        Of a network of the same architecture; the output layers may have other classes.
    new_heads : bool
        Leave the output layers (``head`` or ``heads``) untrained.

    Returns
    -------
    list of str
        Parameters that stay untrained.

    Raises
    ------
    ValueError
        If the rest does not fit.
    """
    own = network.state_dict()
    kept = [name for name in own if new_heads and name.split(".")[0] in ("head", "heads")]
    wrong = [
        name
        for name, value in own.items()
        if name not in kept and (name not in weights or weights[name].shape != value.shape)
    ]
    if wrong or set(weights) - set(own):
        name = (wrong or sorted(set(weights) - set(own)))[0]
        raise ValueError(f"weights of another network (first difference: {name})")
    network.load_state_dict({**weights, **{name: own[name] for name in kept}})
    return kept


def majority_vote(labels: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Give each voxel the label that most of several segmentations give it (Kim et al. 2020, II.D).

    Parameters
    ----------
    labels : sequence of ndarray
        Of one shape. Where two labels have as many votes the lower number wins, background first.
    """
    highest = max(int(one.max(initial=0)) for one in labels)
    votes = np.zeros((highest + 1, *labels[0].shape), np.uint8)
    for number in range(highest + 1):
        for one in labels:
            votes[number] += one == number
    winner: NDArray[np.uint8] = votes.argmax(axis=0).astype(np.uint8)
    return winner
