"""Train a paper's network on the labelled maps of a dataset, fold by fold, into one model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bids_dgmseg import __version__
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import read_json, sha256, write_json
from bids_dgmseg.io.tables import MISSING
from bids_dgmseg.models.registry import Model
from bids_dgmseg.study.participants import read_participants
from bids_dgmseg.train.cases import Case, prepare_case
from bids_dgmseg.train.data import Labelled, read_labelled_maps, read_pseudo_labels
from bids_dgmseg.train.learner import CHECKPOINT, Learner, Means
from bids_dgmseg.train.loop import use_cores
from bids_dgmseg.train.model_output import find_start, finish_folder
from bids_dgmseg.train.progress import Teller
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.recipes import get_recipe
from bids_dgmseg.train.schemes import Split, choose_some, split_fold

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to train on what."""

    model: Model
    """With the arguments that its network is built with."""
    recipe: Recipe
    dataset: Path
    out: Path
    seed: int = 1
    device: str = "auto"
    workers: int = 0
    scans: int | None = None
    """Use so many of a fold's training scans; None for all."""
    start: Path | None = None
    """Model folder, or file of an encoder's weights, to begin with."""
    pretrain_on: tuple[Path, ...] = ()
    """Results of models on maps without labels: learned before the manual labels."""
    distill: tuple[Path, ...] = ()
    """The same: learned together with the manual labels."""
    holdout: tuple[str, ...] = ()
    """Participants that are not used at all, without ``sub-``."""
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()
    checkpoint_minutes: float = 2.0


@dataclass(frozen=True)
class Material:
    """What folds are made of."""

    manual: Sequence[Labelled]
    pseudo: Sequence[Labelled]
    sites: Mapping[str, str]
    cases: dict[str, Case]
    """Prepared on demand, by name of the scan and kind of labels."""


def train_folds(plan: Plan, folds: Sequence[int], *, say: Say, show: Say) -> Path:
    """Train folds one after the other, going on where ``OUT`` stopped.

    ``OUT`` gets ``fold_N.safetensors`` and ``model.toml``, for an atlas localizer ``references/``, ``training.json``
    (what was trained on what), and a folder ``fold_N`` with the checkpoint and the curve as table and picture.

    Parameters
    ----------
    plan : Plan
        What to train on what.
    folds : sequence of int
        Which, counted from 0.
    say, show : callable
        Get lines to keep, and lines that the next one may replace.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    use_cores()
    _check_usable(plan)
    material = _read(plan, say)
    _claim(plan, material)
    for fold in folds:
        split = _split(plan, material, fold)
        say(
            f"fold {fold}: {len(split.training)} participants to learn from, {len(split.validation)} to validate, "
            f"{len(split.test)} unseen"
        )
        _train_fold(plan, material, split, fold, say, show)
    learned = _learned_from(plan, material)
    finish_folder(plan.model, plan.out, learned, recipe=plan.recipe, seed=plan.seed)
    return plan.out


def _learned_from(plan: Plan, material: Material) -> list[Labelled]:
    """List the scans that some fold in the folder has learned from, or watched while its own part stayed unseen."""
    folds = [fold for fold in range(max(plan.recipe.folds, 1)) if (plan.out / f"fold_{fold}.safetensors").is_file()]
    splits = [_split(plan, material, fold) for fold in folds]
    watched = {one for split in splits for one in split.validation if plan.recipe.validation is not None}
    seen = watched.union(*(split.training for split in splits))
    return [one for one in material.manual if one.participant in seen]


def _check_usable(plan: Plan) -> None:
    """Refuse samples that the model will not be shown in use, where its classes are those of the model."""
    sampling = plan.recipe.sampling
    usual = get_recipe(plan.model.name).sampling
    if tuple(plan.recipe.classes) != plan.model.classes:
        return
    for name in ("stack_axis", "normalized"):
        if getattr(sampling, name) != getattr(usual, name):
            raise InputError(
                f"--recipe sampling.{name}: {plan.model.name} is shown {getattr(usual, name)} in use; leave it as it is"
            )
    if sampling.stack_axis is not None and plan.model.arch.get("slices", 3) != sampling.size[sampling.stack_axis]:
        raise InputError(
            f"--arch slices={plan.model.arch.get('slices', 3)}: samples have "
            f"{sampling.size[sampling.stack_axis]} slices; change --recipe sampling.size too"
        )


def _read(plan: Plan, say: Say) -> Material:
    manual = read_labelled_maps(plan.dataset, plan.model, derivatives=plan.derivatives, choose=plan.choose, say=say)
    there = {one.participant for one in manual}
    if missing := sorted(set(plan.holdout) - there):
        raise InputError(f"--holdout {missing[0]}: no labelled scan of it (there are {list_some(there)})")
    used = [one for one in manual if one.participant not in plan.holdout]
    _say_missing(used, plan, say)
    folders, option = (plan.pretrain_on, "--pretrain-on") if plan.pretrain_on else (plan.distill, "--distill")
    pseudo = (
        []
        if not folders
        else read_pseudo_labels(
            plan.dataset,
            plan.model,
            folders,
            besides={one.map.name for one in manual},
            option=option,
            say=say,
            derivatives=plan.derivatives,
            holdout=plan.holdout,
        )
    )
    sites = read_sites(plan.dataset, {one.participant for one in used})
    if len(sites) < max(plan.recipe.folds, 1):
        raise InputError(
            f"--folds {plan.recipe.folds}: there are {len(sites)} labelled participants; give --folds "
            f"{max(len(sites), 1)} or less, or 1 for no folds"
        )
    return Material(used, pseudo, sites, {})


def _say_missing(used: Sequence[Labelled], plan: Plan, say: Say) -> None:
    """Warn of nuclei that are taught to be absent from a scan."""
    model = plan.model
    for name in plan.recipe.classes:
        channels = {model.labels.index(one) + 1 for one in plan.recipe.structures(name) if one in model.labels}
        if bare := [one.map.name for one in used if not channels & set(one.map.channels)]:
            say(
                f"no {name} in the labels of {list_some(bare)}: learned as background there; hold them out if it was "
                "not drawn"
            )


def read_sites(dataset: Path, participants: set[str]) -> dict[str, str]:
    """Look the sites up in participants.tsv; without a column ``site`` or ``site_id`` all are of one."""
    path = dataset / "participants.tsv"
    table = read_participants(path, participants) if path.is_file() else None
    columns = [] if table is None else [name for name in ("site", "site_id") if name in table.columns]
    if table is None or not columns:
        return dict.fromkeys(sorted(participants), MISSING)
    sites = table[columns[0]].fillna(MISSING)
    return {one: sites.get(one, MISSING) for one in sorted(participants)}


def _split(plan: Plan, material: Material, fold: int) -> Split:
    """Divide the participants; of those to learn from, some are chosen where fewer are wanted."""
    split = split_fold(
        material.sites, folds=plan.recipe.folds, fold=fold, seed=plan.seed, validation=plan.recipe.validation
    )
    return replace(split, training=tuple(choose_some(split.training, plan.scans, seed=plan.seed)))


def _claim(plan: Plan, material: Material) -> None:
    """Write what this training is, or see that the one begun in the folder is the same; only its length may change."""
    recipe = asdict(plan.recipe)
    length = {name: recipe["pace"].pop(name) for name in ("epochs", "minutes", "patience", "milestones")}
    splits = [asdict(_split(plan, material, fold)) for fold in range(max(plan.recipe.folds, 1))]
    record = {
        "model": plan.model.name,
        "network": plan.recipe.network or plan.model.network,
        "arch": dict(plan.model.arch),
        "recipe": recipe,
        "seed": plan.seed,
        "start": "" if plan.start is None else sha256(find_start(plan.start, 0, plan.model)[0]),
        "labels": {one.dseg.name: sha256(one.dseg) for one in material.manual},
        "pseudo_labels": {one.map.name: _fingerprint(one) for one in material.pseudo},
        "pseudo_labels_for": ("pretrain" if plan.pretrain_on else "distill") if material.pseudo else "",
        "folds": splits,
    }
    path = plan.out / "training.json"
    begun = any(plan.out.rglob(CHECKPOINT)) or any(plan.out.glob("fold_*.safetensors"))
    if begun and path.is_file():
        earlier, now = read_json(path), _as_json(record)
        if differing := [name for name, value in now.items() if earlier.get(name) != value]:
            raise InputError(
                f"{plan.out.name}: holds another training (other {', '.join(differing)}); give a new folder for OUT"
            )
    write_json({**record, "length": length, "version": __version__}, path)


def _fingerprint(one: Labelled) -> str:
    """Tell the labels that models gave to a map from any others."""
    return hashlib.sha256(one.map.labels.array.tobytes()).hexdigest()


def _as_json(value: Any) -> Any:
    """Give a value the form that it has after a way through a JSON file."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _train_fold(plan: Plan, material: Material, split: Split, fold: int, say: Say, show: Say) -> None:
    manual = [one for one in material.manual if one.participant in split.training]
    means = Means(plan.seed * 1000 + fold, plan.device, plan.workers, plan.checkpoint_minutes)
    try:
        learner = Learner(plan.model, plan.recipe, means)
    except ValueError as error:
        raise InputError(f"--arch: {error}; see docs/models.md for the arguments of {plan.model.name}") from error
    if plan.start is not None:
        _begin_with(learner, plan, plan.start, fold, say)
    watched = _cases(plan, material, [one for one in material.manual if one.participant in split.validation], show)
    aside = {*split.validation, *split.test}
    pseudo = [one for one in material.pseudo if one.participant not in aside]
    stages: dict[str, Sequence[Labelled]] = {f"fold_{fold}": [*manual, *(pseudo if plan.distill else [])]}
    if plan.pretrain_on:
        if not pseudo:
            raise InputError(
                f"--pretrain-on: all its maps are of participants that fold {fold} keeps aside; label "
                "maps of others with bids_dgmseg"
            )
        stages = {f"fold_{fold}/pretraining": pseudo, **stages}
    for name, labelled in stages.items():
        tell = Teller(name, plan.recipe, plan.out / name, say, show)
        cases = _cases(plan, material, labelled, show)
        try:
            state = learner.learn(cases, watched, plan.out / name, report=tell.step, finish_epoch=tell.epoch)
        except FloatingPointError as error:
            raise InputError(f"{name}: {error}; give a new folder for OUT and a lower --learning-rate") from error
        except ValueError as error:
            raise InputError(f"{name}: {error}; see --recipe, --arch, --folds and --scans") from error
        tell.finish(state)
    learner.save(plan.out / f"fold_{fold}.safetensors")


def _begin_with(learner: Learner, plan: Plan, start: Path, fold: int, say: Say) -> None:
    """Transfer weights; output layers stay new where the other training's classes were others."""
    path, classes = find_start(start, fold, plan.model)
    try:
        kept = learner.begin_with(path, new_heads=classes != list(plan.recipe.classes))
    except ValueError as error:
        raise InputError(f"--from {start.name}: {error}; give weights of the same network") from error
    say(f"begins with {start.name}{', output layers new' if kept else ''}")


def _cases(plan: Plan, material: Material, labelled: Sequence[Labelled], show: Say) -> list[Case]:
    for number, one in enumerate(labelled, start=1):
        if one.map.name not in material.cases:
            # To find a scan's box can take seconds, and there may be hundreds.
            show(f"prepares {one.map.name}, {number} of {len(labelled)}")
            try:
                material.cases[one.map.name] = prepare_case(one.map, plan.model, plan.recipe, device=plan.device)
            except ValueError as error:
                raise InputError(f"{error}; leave it out with --holdout, or label it") from error
    return [material.cases[one.map.name] for one in labelled]
