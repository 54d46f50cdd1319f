"""Train a published network on the labelled maps of a dataset, fold by fold, into one model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.io.files import sha256
from bids_dgmseg.models.model_folder import save_weights
from bids_dgmseg.models.registry import Model
from bids_dgmseg.train.checkpoints import write_record
from bids_dgmseg.train.core import use_all_cores
from bids_dgmseg.train.data import LabelledMap, check_holdout, read_labelled_maps, read_pseudo_labels
from bids_dgmseg.train.learner import (
    CHECKPOINT,
    RuntimeOptions,
    build_trainable,
    find_start,
    initialize,
    train_network,
)
from bids_dgmseg.train.log import EpochLog, Log
from bids_dgmseg.train.model_output import finish_folder
from bids_dgmseg.train.patches import Case, prepare_case
from bids_dgmseg.train.recipe import Recipe
from bids_dgmseg.train.recipes import get_recipe
from bids_dgmseg.train.splits import Split, choose_some, read_sites, split_fold


@dataclass(frozen=True)
class RecipeTraining:
    """What to train on what."""

    model: Model
    """With the arguments of its network."""
    recipe: Recipe
    dataset: Path
    out: Path
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    scans: int | None = None
    """Number of training participants per fold; None for all."""
    start: Path | None = None
    """Model folder, or file with an encoder's weights, to start from."""
    pretrain_on: tuple[Path, ...] = ()
    """Model outputs for maps without manual labels, used before the manual labels."""
    distill: tuple[Path, ...] = ()
    """The same, used together with the manual labels."""
    holdout: tuple[str, ...] = ()
    """Participants that are not used at all, without ``sub-``."""
    derivatives: tuple[Path, ...] = ()
    choose: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoldData:
    """Data that folds share."""

    manual: Sequence[LabelledMap]
    pseudo: Sequence[LabelledMap]
    sites: Mapping[str, str]
    cases: dict[str, Case]
    """Cache of prepared maps by name."""


def train_folds(training: RecipeTraining, folds: Sequence[int], *, log: Log) -> Path:
    """Train folds one after the other; resumes the training in ``OUT``.

    ``OUT`` gets ``fold_N.safetensors`` and ``model.toml``, for an atlas localizer ``references/``, ``training.json``
    (what was trained on what), and a folder ``fold_N`` with the checkpoint and the learning curve.

    Parameters
    ----------
    training : RecipeTraining
        What to train on what.
    folds : sequence of int
        Which folds, counted from 0.
    log : Log
        Where lines go.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    use_all_cores()
    _check_recipe(training)
    data = _read_data(training, log)
    _write_record(training, data)
    for fold in folds:
        split = _split(training, data, fold)
        log.log(
            f"fold {fold}: {len(split.training)} training, {len(split.validation)} validation, "
            f"{len(split.test)} test participants"
        )
        _train_fold(training, data, split, fold, log)
    finish_folder(
        training.model,
        training.out,
        _used_scans(training, data),
        recipe=training.recipe,
        seed=training.options.seed,
    )
    return training.out


def _used_scans(training: RecipeTraining, data: FoldData) -> list[LabelledMap]:
    """List the scans that some fold in the folder used for training, or for validation beside a test set."""
    n_folds = max(training.recipe.folds, 1)
    folds = [fold for fold in range(n_folds) if (training.out / f"fold_{fold}.safetensors").is_file()]
    splits = [_split(training, data, fold) for fold in folds]
    validated = {one for split in splits for one in split.validation if training.recipe.validation is not None}
    used = validated.union(*(split.training for split in splits))
    return [one for one in data.manual if one.participant in used]


def _check_recipe(training: RecipeTraining) -> None:
    """Refuse samples that differ from the model's input in use, if the classes are those of the model."""
    model, sampling = training.model, training.recipe.sampling
    usual = get_recipe(model.name).sampling
    if tuple(training.recipe.classes) != model.classes:
        return
    for name in ("stack_axis", "normalized"):
        if getattr(sampling, name) != getattr(usual, name):
            raise InputError(
                f"--recipe sampling.{name}: {model.name} uses {getattr(usual, name)} for prediction; do not change it"
            )
    if sampling.stack_axis is not None and model.arch.get("slices", 3) != sampling.size[sampling.stack_axis]:
        raise InputError(
            f"--arch slices={model.arch.get('slices', 3)}: samples have {sampling.size[sampling.stack_axis]} slices; "
            "change --recipe sampling.size too"
        )


def _read_data(training: RecipeTraining, log: Log) -> FoldData:
    """Read manual labels, pseudo-labels and sites."""
    model, recipe = training.model, training.recipe
    maps = read_labelled_maps(
        training.dataset, model, derivatives=training.derivatives, choose=training.choose, warn=log.log
    )
    manual = check_holdout(maps, training.holdout)
    for name in recipe.classes:
        channels = {model.labels.index(one) + 1 for one in recipe.structures(name) if one in model.labels}
        if unlabelled := [one.name for one in manual if not channels & set(one.channels)]:
            log.log(
                f"no {name} in the labels of {list_some(unlabelled)}: treated as background; use --holdout if it was "
                "not segmented"
            )
    folders, option = (
        (training.pretrain_on, "--pretrain-on") if training.pretrain_on else (training.distill, "--distill")
    )
    pseudo: list[LabelledMap] = []
    if folders:
        pseudo = read_pseudo_labels(
            training.dataset,
            model,
            folders,
            exclude={one.name for one in maps},
            option=option,
            warn=log.log,
            derivatives=training.derivatives,
            holdout=training.holdout,
        )
    sites = read_sites(training.dataset, {one.participant for one in manual})
    if len(sites) < max(recipe.folds, 1):
        raise InputError(
            f"--folds {recipe.folds}: only {len(sites)} labelled participants; use --folds {max(len(sites), 1)} or less"
        )
    return FoldData(manual, pseudo, sites, {})


def _split(training: RecipeTraining, data: FoldData, fold: int) -> Split:
    recipe, seed = training.recipe, training.options.seed
    split = split_fold(data.sites, folds=recipe.folds, fold=fold, seed=seed, validation=recipe.validation)
    return replace(split, training=tuple(choose_some(split.training, training.scans, seed=seed)))


def _write_record(training: RecipeTraining, data: FoldData) -> None:
    """Write ``training.json``, or check that the training in the folder is the same."""
    recipe = asdict(training.recipe)
    length = {name: recipe["pace"].pop(name) for name in ("epochs", "minutes", "patience", "milestones")}
    record = {
        "model": training.model.name,
        "network": training.recipe.network or training.model.network,
        "arch": dict(training.model.arch),
        "recipe": recipe,
        "seed": training.options.seed,
        "start": "" if training.start is None else sha256(find_start(training.start, 0, training.model)[0]),
        "labels": {one.dseg.name: sha256(one.dseg) for one in data.manual},
        "pseudo_labels": {one.name: hashlib.sha256(one.labels.array.tobytes()).hexdigest() for one in data.pseudo},
        "pseudo_labels_for": ("pretrain" if training.pretrain_on else "distill") if data.pseudo else "",
        "folds": [asdict(_split(training, data, fold)) for fold in range(max(training.recipe.folds, 1))],
    }
    begun = any(training.out.rglob(CHECKPOINT)) or any(training.out.glob("fold_*.safetensors"))
    write_record(training.out, record, begun=begun, length=length)


def _train_fold(training: RecipeTraining, data: FoldData, split: Split, fold: int, log: Log) -> None:
    options = replace(training.options, seed=training.options.seed * 1000 + fold)
    try:
        network = build_trainable(training.model, training.recipe, seed=options.seed)
    except ValueError as error:
        raise InputError(f"--arch: {error}; see docs/models.md for the arguments of {training.model.name}") from error
    if training.start is not None:
        _initialize(network, training, training.start, fold, log)
    manual = [one for one in data.manual if one.participant in split.training]
    validation = [one for one in data.manual if one.participant in split.validation]
    pseudo = [one for one in data.pseudo if one.participant not in {*split.validation, *split.test}]
    validation_cases = _prepare(training, data, validation, log)
    stages: dict[str, Sequence[LabelledMap]] = {f"fold_{fold}": [*manual, *(pseudo if training.distill else [])]}
    if training.pretrain_on:
        if not pseudo:
            raise InputError(
                f"--pretrain-on: all maps belong to validation or test participants of fold {fold}; run bids_dgmseg on "
                "maps of others"
            )
        stages = {f"fold_{fold}/pretraining": pseudo, **stages}
    for name, labelled in stages.items():
        folder, recipe = training.out / name, training.recipe
        curve = EpochLog(name, tuple(recipe.classes), recipe.pace, folder, log)
        cases = _prepare(training, data, labelled, log)
        try:
            state = train_network(
                network,
                recipe,
                cases,
                validation_cases,
                folder,
                options,
                report=curve.step,
                finish_epoch=curve.epoch,
            )
        except FloatingPointError as error:
            raise InputError(f"{name}: {error}; choose a new OUT and a lower --learning-rate") from error
        except ValueError as error:
            raise InputError(f"{name}: {error}; see --recipe, --arch, --folds and --scans") from error
        curve.finish(state)
    save_weights(network.state_dict(), training.out / f"fold_{fold}.safetensors")


def _initialize(network: nn.Module, training: RecipeTraining, start: Path, fold: int, log: Log) -> None:
    """Load starting weights; output layers stay random if they were trained for other classes."""
    path, classes = find_start(start, fold, training.model)
    try:
        random = initialize(network, path, new_heads=classes != list(training.recipe.classes))
    except ValueError as error:
        raise InputError(f"--from {start.name}: {error}; pass weights of the same network") from error
    log.log(f"initialized from {start.name}{', with new output layers' if random else ''}")


def _prepare(training: RecipeTraining, data: FoldData, labelled: Sequence[LabelledMap], log: Log) -> list[Case]:
    for number, one in enumerate(labelled, start=1):
        if one.name not in data.cases:
            log.update(f"preparing {one.name}, {number} of {len(labelled)}")  # localizing takes seconds per map
            try:
                case = prepare_case(one, training.model, training.recipe, device=training.options.device)
            except ValueError as error:
                raise InputError(f"{error}; use --holdout, or label it") from error
            data.cases[one.name] = case
    return [data.cases[one.name] for one in labelled]
