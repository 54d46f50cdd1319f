"""Train a published network on the labelled maps of a dataset, fold by fold, into one model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bids_dgmseg.bids.labelled_scans import (
    LabelledMap,
    label_checksums,
    manual_labels,
    read_labelled_maps,
    read_pseudo_labels,
)
from bids_dgmseg.errors import InputError, count, list_some
from bids_dgmseg.image.grids import world_grid
from bids_dgmseg.image.masks import valid_box
from bids_dgmseg.image.resample import resample
from bids_dgmseg.io.files import atomic_write, sha256, to_json
from bids_dgmseg.io.mapped_arrays import arrays_folder, store
from bids_dgmseg.lab.train.core import use_all_cores, worker_options
from bids_dgmseg.lab.train.learner import (
    CHECKPOINT,
    OUTPUT_LAYERS,
    RuntimeOptions,
    average_with_start,
    build_trainable,
    find_initial_weights,
    initialize,
    train_network,
)
from bids_dgmseg.lab.train.log import EpochLog, Log, write_record
from bids_dgmseg.lab.train.patches import Case, StoredCase, prepare_case
from bids_dgmseg.lab.train.recipe import Recipe
from bids_dgmseg.lab.train.recipes import get_recipe
from bids_dgmseg.lab.train.splits import Split, check_holdout, choose_some, read_sites, split_fold
from bids_dgmseg.models.model_folder import list_learned_maps, save_weights, write_model_toml
from bids_dgmseg.models.registry import Model

_REFERENCE_MM = 2.0
"""Voxel size of reference maps: registration uses 2.5 mm at the finest (`bids_dgmseg.segmentation.registration`)."""

_STEP_PPM = 1e-4
"""Resolution of stored values; as integers they compress to a third of the size."""


@dataclass(frozen=True, kw_only=True)
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
    arrays: Path
    """Folder for the arrays of maps."""


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
    with arrays_folder(training.out) as arrays:
        data = _read_data(training, arrays, log)
        record = _write_record(training, data)
        training = replace(training, options=replace(training.options, record=record))
        for fold in folds:
            split = _split(training, data, fold)
            log.log(
                f"fold {fold}: {len(split.training)} training, {len(split.validation)} validation, "
                f"{len(split.test)} test participants"
            )
            _train_fold(training, data, split, fold, log)
        used = set[str]()
        for fold in range(max(training.recipe.folds, 1)):
            if (training.out / f"fold_{fold}.safetensors").is_file():
                split = _split(training, data, fold)
                # A fold's own part validates if there is no test set; such scans are not used otherwise.
                used |= {*split.training, *(split.validation if training.recipe.validation is not None else ())}
        _finish_folder(training, [one for one in data.manual if one.participant in used])
    return training.out


def _check_recipe(training: RecipeTraining) -> None:
    """Refuse initial weights that do not exist, and samples that differ from the model's input in use.

    The latter only if the classes are those of the model.
    """
    model, sampling = training.model, training.recipe.sampling
    if training.start is not None:
        find_initial_weights(training.start, 0, model)
    if training.recipe.start_share and training.start is None:
        raise InputError("`recipe` start_share: there are no initial weights; name them with `start`")
    usual = get_recipe(model.name).sampling
    if tuple(training.recipe.classes) != model.classes:
        return
    for name in ("stack_axis", "normalized"):
        if getattr(sampling, name) != getattr(usual, name):
            raise InputError(
                f"`recipe` sampling.{name}: {model.name} uses {getattr(usual, name)} for prediction; do not change it"
            )
    if sampling.stack_axis is None:
        return
    n_slices, expected = sampling.size[sampling.stack_axis], model.arch.get("slices", 3)
    if n_slices % 2 == 0:
        raise InputError(
            f"`recipe` sampling.size: {n_slices} slices; take an odd number, as many on both sides of the slice that "
            "is labelled"
        )
    if expected != n_slices:
        raise InputError(
            f"`arch` slices={expected}: samples have {n_slices} slices; change `recipe` sampling.size, too"
        )


def _read_data(training: RecipeTraining, arrays: Path, log: Log) -> FoldData:
    """Read manual labels, pseudo-labels and sites; arrays of maps go into a folder."""
    model, recipe = training.model, training.recipe
    maps = read_labelled_maps(
        training.dataset,
        model,
        derivatives=training.derivatives,
        choose=training.choose,
        warn=log.log,
        progress=log.update,
        arrays=arrays,
    )
    manual = check_holdout(maps, training.holdout)
    for name in recipe.classes:
        channels = {model.labels.index(one) + 1 for one in recipe.structures(name) if one in model.labels}
        if unlabelled := [one.name for one in manual if not channels & set(one.channels)]:
            log.log(
                f"no {name} in the labels of {list_some(unlabelled)}: treated as background; use `holdout` if it was "
                "not segmented"
            )
    folders, parameter = (
        (training.pretrain_on, "pretrain_on") if training.pretrain_on else (training.distill, "distill")
    )
    pseudo: list[LabelledMap] = []
    if folders:
        pseudo = read_pseudo_labels(
            training.dataset,
            model,
            folders,
            exclude={one.name for one in maps},
            parameter=parameter,
            warn=log.log,
            derivatives=training.derivatives,
            holdout=training.holdout,
            arrays=arrays,
        )
    sites = read_sites(training.dataset, {one.participant for one in manual})
    if len(sites) < max(recipe.folds, 1):
        raise InputError(
            f"`folds` {recipe.folds}: only {len(sites)} labelled participants; use `folds` {max(len(sites), 1)} or less"
        )
    return FoldData(manual, pseudo, sites, {}, arrays)


def _split(training: RecipeTraining, data: FoldData, fold: int) -> Split:
    """Split the participants for a fold, with as many for training as asked for."""
    recipe, seed = training.recipe, training.recipe.split_seed
    split = split_fold(data.sites, folds=recipe.folds, fold=fold, seed=seed, validation=recipe.validation)
    return replace(split, training=tuple(choose_some(split.training, training.scans, seed=seed)))


def _write_record(training: RecipeTraining, data: FoldData) -> dict[str, Any]:
    """Write ``training.json``, or check that the training in the folder is the same; return what is trained on what."""
    recipe = asdict(training.recipe)
    recipe.pop("arch")  # part of the model's
    length = {name: recipe["pace"].pop(name) for name in ("epochs", "minutes", "patience", "milestones")}
    length["start_share"] = recipe.pop("start_share")
    record = {
        "model": training.model.name,
        "network": training.recipe.network or training.model.network,
        "arch": dict(training.model.arch),
        "recipe": recipe,
        "seed": training.options.seed,
        "start": "" if training.start is None else sha256(find_initial_weights(training.start, 0, training.model)[0]),
        "start_maps": list_start_maps(training),
        **label_checksums(data.manual),
        "maps": {one.name: sha256(one.file) for one in (*data.manual, *data.pseudo)},
        "pseudo_labels": {one.name: hashlib.sha256(one.channel_map.array.tobytes()).hexdigest() for one in data.pseudo},
        "pseudo_labels_for": ("pretrain" if training.pretrain_on else "distill") if data.pseudo else "",
        "folds": [asdict(_split(training, data, fold)) for fold in range(max(training.recipe.folds, 1))],
    }
    checkpoints = sorted(training.out.rglob(CHECKPOINT))
    begun = bool(checkpoints) or any(training.out.glob("fold_*.safetensors"))
    write_record(training.out, record, begun=begun, length=length, checkpoints=checkpoints)
    plain: dict[str, Any] = to_json(record)
    return plain


def list_start_maps(training: RecipeTraining) -> list[list[str]]:
    """List the checksums of the maps that the initial weights of each fold were trained on."""
    folds = range(max(training.recipe.folds, 1))
    if training.start is None:
        return [[] for _ in folds]
    return [list_learned_maps(find_initial_weights(training.start, fold, training.model)[0]) for fold in folds]


def _train_fold(training: RecipeTraining, data: FoldData, split: Split, fold: int, log: Log) -> None:
    """Train one fold, after its pretraining if there is one, and write its weights."""
    options = replace(training.options, seed=training.options.seed * 1000 + fold)
    try:
        network = build_trainable(training.model, training.recipe, seed=options.seed)
    except ValueError as error:
        raise InputError(f"`arch`: {error}; see docs/models.md for the arguments of {training.model.name}") from error
    log.log(f"fold {fold}: network with {sum(one.numel() for one in network.parameters()):,} parameters")
    start = _initialize(network, training, fold, log)
    manual = [one for one in data.manual if one.participant in split.training]
    validation = [one for one in data.manual if one.participant in split.validation]
    pseudo = [one for one in data.pseudo if one.participant not in {*split.validation, *split.test}]
    validation_cases = _prepare(training, data, validation, log)
    taught, maps = frozenset[str]().union(*(one.taught_by for one in pseudo)), training.options.record["maps"]
    if known := [one.name for one in data.manual if one.participant in split.test and maps[one.name] in taught]:
        log.log(
            f"fold {fold}: the pseudo-labels come from networks trained on {list_some(known)} of the test set; for "
            "a Dice of unseen scans make them with the network of this fold (docs/how-to/train.md)"
        )
    stages: dict[str, Sequence[LabelledMap]] = {f"fold_{fold}": [*manual, *(pseudo if training.distill else [])]}
    if data.pseudo and not pseudo:
        parameter = "pretrain_on" if training.pretrain_on else "distill"
        raise InputError(
            f"`{parameter}`: all maps belong to validation or test participants of fold {fold}; run bids_dgmseg on "
            "maps of others"
        )
    if training.pretrain_on:
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
            raise InputError(f"{name}: {error}; choose a new OUT and a lower `learning_rate`") from error
        except ValueError as error:
            raise InputError(f"{name}: {error}; see `recipe`, `arch`, `folds` and `scans`") from error
        curve.finish(state)
    if start and training.recipe.start_share:
        log.log(f"averaged with the initial weights, whose share is {training.recipe.start_share:g}")
        average_with_start(network, start, training.recipe, cases, options)
    save_weights(network.state_dict(), training.out / f"fold_{fold}.safetensors")


def _initialize(network: nn.Module, training: RecipeTraining, fold: int, log: Log) -> Path | None:
    """Load the initial weights of a fold, if there are any, and return their file."""
    if training.start is None:
        return None
    path, classes = find_initial_weights(training.start, fold, training.model)
    try:
        random = initialize(network, path, new_heads=classes != list(training.recipe.classes))
    except ValueError as error:
        raise InputError(f"`start` {training.start.name}: {error}; pass weights of the same network") from error
    heads_only = all(name.split(".")[0] in OUTPUT_LAYERS for name in random)
    rest = "" if not random else ", with new output layers" if heads_only else ", the encoder only"
    log.log(f"initialized from {training.start.name}{rest}")
    if random and training.recipe.start_share:
        raise InputError(
            f"`recipe` start_share: {training.start.name} has no weights for the output layers; pass those of the same "
            "network and classes"
        )
    return path


class _Preparation(Dataset["Case | InputError"]):
    """Prepares a map when it is read; an error is returned, since a process would add its traceback to the message."""

    def __init__(self, maps: Sequence[LabelledMap], training: RecipeTraining, arrays: Path) -> None:
        self.maps, self.training, self.arrays = maps, training, arrays

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Case | InputError:
        one, training = self.maps[index], self.training
        try:
            case = prepare_case(one, training.model, training.recipe, device=training.options.device)
            return store(case, StoredCase, self.arrays)
        except InputError as error:
            return InputError(f"{one.name}: {error}")
        except ValueError as error:
            return InputError(f"{error}; use `holdout`, or label it")


def _prepare(training: RecipeTraining, data: FoldData, labelled: Sequence[LabelledMap], log: Log) -> list[Case]:
    """Resample maps for the recipe, unless an earlier fold did; several processes do so if there are several."""
    if new := [one for one in labelled if one.name not in data.cases]:
        log.log(f"preparing {count(len(new), 'map')}")
        workers = training.options.workers if training.options.workers > 1 else 0  # a single one has all cores
        maps = _Preparation(new, training, data.arrays)
        prepared = iter(DataLoader(maps, batch_size=None, **worker_options(min(workers, len(new)))))
        for number, one in enumerate(new, start=1):
            log.update(f"preparing {one.name}, {number} of {len(new)}")  # localizing takes seconds per map
            case = next(prepared)
            if isinstance(case, InputError):
                raise case
            data.cases[one.name] = case
    return [data.cases[one.name] for one in labelled]


def _finish_folder(training: RecipeTraining, labelled: Sequence[LabelledMap]) -> None:
    """Write the description of the model folder, and some maps that folds used as references of an atlas localizer.

    References of an earlier call that are not chosen any more are deleted.
    """
    model, recipe, out = training.model, training.recipe, training.out
    network, sampling, classes = recipe.network or model.network, recipe.sampling, tuple(recipe.classes)
    as_registered = network == model.network and classes == model.classes and model.arch.get("independent", True)
    shown = replace(
        model.input,
        spacing_mm=recipe.voxel_size_mm(model),
        patch_mm=recipe.patch_mm(model),
        normalization=sampling.normalization,
        slices=0 if sampling.stack_axis is None else sampling.size[sampling.stack_axis],
        stack_axis=model.input.stack_axis if sampling.stack_axis is None else sampling.stack_axis,
        zero_padding=sampling.zero_padding,
    )
    trained = replace(model, network=network, input=shown, heads=model.heads if as_registered else (classes,))
    trained_on = f"{len(labelled)} labelled maps"
    about: dict[str, str | int | float] = {"trained_on": trained_on, "seed": training.options.seed}
    write_model_toml(trained, out, about=about)
    names = choose_some([one.name for one in labelled], recipe.references, seed=recipe.split_seed)
    for path in (out / "references").glob("*.nii.gz"):
        if path.name.rpartition("_")[0] not in names:
            path.unlink()
    for one in labelled:
        if one.name in names:
            _write_reference(one, model, out / "references")


def _write_reference(one: LabelledMap, model: Model, folder: Path) -> None:
    """Write a coarse map and its labels, unless they exist."""
    final = folder / f"{one.name}_Chimap.nii.gz"
    if not final.is_file():
        grid = world_grid(valid_box(one.chi), (_REFERENCE_MM,) * 3)
        coarse = np.clip(resample(one.chi, grid, antialias=True).array, -1, 1)
        _write(np.round(coarse / _STEP_PPM).astype(np.int16), grid.affine, final, slope=_STEP_PPM)
    final = folder / f"{one.name}_dseg.nii.gz"
    if not final.is_file():
        _write(manual_labels(one, model), one.chi.affine, final)


def _write(array: NDArray[np.integer], affine: NDArray[np.float64], final: Path, *, slope: float = 1.0) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    with atomic_write(final) as temporary:
        image.to_filename(temporary)
