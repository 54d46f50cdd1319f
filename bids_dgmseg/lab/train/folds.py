"""Train a published network on labelled and pseudo-labelled maps, fold by fold, into one model folder."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bids_dgmseg.bids.labelled_scans import LabelledMap, label_checksums, manual_labels, read_pseudo_labels
from bids_dgmseg.bids.masks_and_maps import find_images, name_scan
from bids_dgmseg.errors import InputError, list_some
from bids_dgmseg.image.grids import resample, world_grid
from bids_dgmseg.image.masks import valid_box
from bids_dgmseg.io.files import arrays_folder, atomic_write, read_json, sha256, store
from bids_dgmseg.lab.train.core import Run, use_all_cores, worker_options
from bids_dgmseg.lab.train.frame import (
    CHECKPOINT,
    Log,
    TrainingRequest,
    check_holdout,
    fit,
    list_checksums,
    read_maps,
    write_record,
)
from bids_dgmseg.lab.train.losses import main_logits
from bids_dgmseg.lab.train.patches import Case, StoredCase, WindowSamples, prepare_case
from bids_dgmseg.lab.train.recipe import NnunetRecipe, Recipe, Split, choose_some, read_recipe, read_sites, split_fold
from bids_dgmseg.models.model_folder import (
    DESCRIPTION,
    TRAINING,
    list_training_maps,
    load_object,
    pick_device,
    read_model_folder,
    read_weights,
    write_model_toml,
)
from bids_dgmseg.models.registry import Model
from bids_dgmseg.networks.attention_unet import ResNet50AttentionUNet25D
from bids_dgmseg.study.review_decisions import WHOLE_SCAN, explain_decisions, match_decisions, read_decisions

OUTPUT_LAYERS = ("head", "heads")
"""Modules of the networks whose shape depends on the classes."""

_REFERENCE_MM = 2.0
"""Voxel size of reference maps: registration uses 2.5 mm at the finest."""

_STEP_PPM = 1e-4
"""Resolution of stored values; as integers they compress to a third of the size."""


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


def train_folds(request: TrainingRequest, *, log: Log) -> Path:
    """Train folds one after the other; resumes the training in ``OUT``.

    ``OUT`` gets ``fold_N.safetensors`` and ``model.toml``, for an atlas localizer ``references/``, ``training.json``
    (what was trained on what), and a folder ``fold_N`` with the checkpoint and the learning curve; of nnunet2step the
    two nnU-Net model folders.

    Raises
    ------
    InputError
        If the dataset or the folder does not allow it.
    """
    use_all_cores()
    recipe = request.recipe
    if isinstance(recipe, Recipe):
        _check_recipe(request, recipe)
    with arrays_folder(request.out) as arrays:
        data = read_data(request, arrays, log)
        record, length = describe_training(request, data)
        if isinstance(recipe, NnunetRecipe):
            from bids_dgmseg.lab.train.nnunet_commands import find_cerebellum_masks, train_nnunet

            masks = find_cerebellum_masks(request, data.manual, log)
            record |= {"masks": {dseg.name: sha256(path) for dseg, path in masks.items()}}
            write_record(request, record, length=length)
            train_nnunet(request, recipe, data.manual, data.splits, masks=masks, log=log)
            return request.out
        assert recipe is not None
        data = replace(data, record=write_record(request, record, length=length))
        for fold in request.folds:
            split = data.splits[fold]
            sizes = f"{len(split.training)} training, {len(split.validation)} validation, {len(split.test)} test"
            log.log(f"fold {fold}: {sizes} participants")
            _train_fold(request, recipe, data, fold, log)
        used = set[str]()
        for fold, split in enumerate(data.splits):
            if (request.out / f"fold_{fold}.safetensors").is_file():
                # A fold's own part validates if there is no test set; such scans are not used otherwise.
                used |= {*split.training, *(split.validation if recipe.validation is not None else ())}
        _finish_folder(request, recipe, data.maps_of(used))
    return request.out


def _check_recipe(request: TrainingRequest, recipe: Recipe) -> None:
    """Refuse samples that differ from the model's input in use, if the classes are those of the model."""
    model, sampling = request.model, recipe.sampling
    usual = read_recipe(model)
    if tuple(recipe.classes) != model.classes or not isinstance(usual, Recipe):
        return
    for name in ("stack_axis", "normalized"):
        if getattr(sampling, name) != getattr(usual.sampling, name):
            value = getattr(usual.sampling, name)
            raise InputError(f"`recipe` sampling.{name}: {model.name} uses {value} for prediction; do not change it")


def read_data(request: TrainingRequest, arrays: Path, log: Log) -> FoldData:
    """Read manual labels, pseudo-labels and sites, and split the participants."""
    model, recipe = request.model, request.recipe
    assert recipe is not None
    maps = read_maps(request, arrays, log)
    manual = check_holdout(maps, request.holdout)
    if isinstance(recipe, Recipe):
        for name in recipe.classes:
            channels = {model.labels.index(label) + 1 for label in recipe.structures(name) if label in model.labels}
            if unlabelled := [labelled.name for labelled in manual if not channels & set(labelled.channels)]:
                log.log(
                    f"no {name} in the labels of {list_some(unlabelled)}: treated as background; use `holdout` if it "
                    "was not segmented"
                )
    purpose = "pretrain_on" if request.pretrain_on else "distill"
    pseudo: list[LabelledMap] = []
    if folders := request.pretrain_on or request.distill:
        pseudo = read_pseudo_labels(
            request.dataset,
            model,
            folders,
            exclude={labelled.name for labelled in maps} | list_failed(folders, model, log),
            parameter=purpose,
            warn=log.log,
            derivatives=request.derivatives,
            holdout=request.holdout,
            arrays=arrays,
        )
    sites = read_sites(request.dataset, {labelled.participant for labelled in manual})
    if len(sites) < recipe.folds:
        raise InputError(f"`folds` {recipe.folds}: only {len(sites)} labelled participants; use {len(sites)} or fewer")
    splits = []
    for fold in range(recipe.folds):
        split = split_fold(sites, recipe, fold)
        chosen = choose_some(split.training, request.scans, seed=recipe.split_seed)
        splits.append(replace(split, training=tuple(chosen)))
    return FoldData(manual, pseudo, splits, arrays)


def list_failed(folders: Sequence[Path], model: Model, log: Log) -> set[str]:
    """List the scans whose pseudo-labels raters failed, as a whole or a nucleus (``qc_decisions.tsv`` in the folders).

    Raises
    ------
    InputError
        If the decisions cannot be read.
    """
    failed = set()
    for folder in folders:
        if (path := folder / "qc_decisions.tsv").is_file():
            images = find_images(folder, "dseg")
            rows = [{"name": name_scan(image), "model": model.name, "labels": sha256(image)} for image in images]
            scans = pd.DataFrame(rows)
            matched, warnings = match_decisions(read_decisions([path]), scans, is_selection=True)
            verdicts = explain_decisions(matched)
            failed |= {
                scans["name"][row]
                for (row, name), why in verdicts.items()
                if why and name in (WHOLE_SCAN, *model.labels)
            }
            for line in warnings:
                log.log(line)
    if failed:
        log.log(f"failed in qc_decisions.tsv: {list_some(failed)}; left out")
    return failed


def describe_training(request: TrainingRequest, data: FoldData) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is trained on what, for ``training.json``, and what may differ when a training is continued."""
    recipe = request.recipe
    content = msgspec.to_builtins(recipe)
    pace = content.get("pace", content)
    length = {name: pace.pop(name) for name in ("epochs", "minutes", "patience", "milestones") if name in pace}
    if isinstance(recipe, Recipe):
        content["arch"] = recipe.arch_of(request.model)
    record = {
        "recipe": content,
        "start": "" if request.start is None else sha256(find_initial_weights(request.start, 0, request.model)[0]),
        "start_maps": list_start_maps(request),
        **label_checksums(data.manual),
        "maps": list_checksums([*data.manual, *data.pseudo]),
        "pseudo_labels": {
            labelled.name: hashlib.sha256(labelled.channel_map.array.tobytes()).hexdigest() for labelled in data.pseudo
        },
        "pseudo_labels_for": ("pretrain_on" if request.pretrain_on else "distill") if data.pseudo else "",
        "folds": [asdict(split) for split in data.splits],
    }
    return record, length


def find_start_weights(request: TrainingRequest) -> list[Path]:
    """Find the initial weights of each fold; empty if training starts from random ones."""
    if request.start is None:
        return []
    folds = range(request.recipe.folds if request.recipe else 1)
    return [find_initial_weights(request.start, fold, request.model)[0] for fold in folds]


def list_start_maps(request: TrainingRequest) -> list[list[str]]:
    """List the checksums of the maps that the initial weights of each fold were trained on."""
    n_folds = request.recipe.folds if request.recipe else 1
    return [list_training_maps(weights) for weights in find_start_weights(request)] or [[]] * n_folds


def _train_fold(request: TrainingRequest, recipe: Recipe, data: FoldData, fold: int, log: Log) -> None:
    """Train one fold, after its pretraining if there is one, and write its weights."""
    seed, split, name = request.seed * 1000 + fold, data.splits[fold], f"fold_{fold}"
    network = build_trainable(request.model, recipe, seed=seed)
    log.log(f"{name}: network with {sum(values.numel() for values in network.parameters()):,} parameters")
    _initialize(network, request, recipe, fold, log)
    manual, validation = data.maps_of(split.training), data.maps_of(split.validation)
    pseudo = [row for row in data.pseudo if row.participant not in {*split.validation, *split.test}]
    if data.pseudo and not pseudo:
        raise InputError(
            f"`{data.record['pseudo_labels_for']}`: all maps belong to validation or test participants of fold {fold}; "
            "run bids_dgmseg on maps of others"
        )
    trained_on = frozenset[str]().union(*(labelled.training_maps for labelled in pseudo))
    if seen := [test.name for test in data.maps_of(split.test) if data.record["maps"][test.name] in trained_on]:
        log.log(
            f"{name}: the pseudo-labels come from networks trained on {list_some(seen)} of the test set; for "
            "a Dice of unseen scans make them with the network of this fold (docs/how-to/train.md)"
        )
    stages: dict[str, Sequence[LabelledMap]] = {name: [*manual, *(pseudo if request.distill else [])]}
    if request.pretrain_on:
        stages = {f"{name}/pretraining": pseudo, **stages}
    for stage, labelled in stages.items():
        cases, validation_cases = (_prepare(request, recipe, data, maps, log) for maps in (labelled, validation))
        run = Run(
            recipe.pace,
            recipe.loss,
            request.out / stage / CHECKPOINT,
            tuple(recipe.classes),
            seed=seed,
            device=pick_device(request.device),
            workers=request.workers,
            checkpoint_minutes=request.checkpoint_minutes,
        )
        try:
            samples = WindowSamples(cases, recipe, seed=seed, augment=True)
            fixed = WindowSamples(validation_cases, recipe, seed=seed, augment=False) if validation_cases else None
        except ValueError as error:
            raise InputError(f"{stage}: {error}; see `recipe`, `folds` and `scans`") from error
        weights = request.out / f"{name}.safetensors" if stage == name else None
        fit(network, samples, run, weights, log=log, record=data.record, validation=fixed)


def build_trainable(model: Model, recipe: Recipe, *, seed: int) -> nn.Module:
    """Build a network with deep supervision, and try a sample and the loss before any map is prepared.

    `seed` is that of the initial weights. InputError if the network does not accept its arguments or the recipe's
    samples, or the loss its output.
    """
    torch.manual_seed(seed)
    kind, sampling = load_object(recipe.network or model.network), recipe.sampling
    try:
        network: nn.Module = kind(model.input.channels, len(recipe.classes) + 1, True, **recipe.arch_of(model))
        sample = torch.zeros(sampling.size)
        channels = sample[None] if sampling.stack_axis is None else sample.movedim(sampling.stack_axis, 0)
        with torch.inference_mode():
            answer = network.eval()(channels[None])
            recipe.loss(network, answer, torch.zeros(main_logits(answer)[:, 0].shape, dtype=torch.long))
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`recipe`: network, sampling or loss do not fit together ({reason}); correct it") from error
    return network


def find_initial_weights(path: Path, fold: int, model: Model) -> tuple[Path, list[str]]:
    """Find weights to start from, and the classes that they were trained for (empty if unknown).

    `path` is a ``.safetensors`` file, or a model folder: its ``fold_N`` (N is `fold`), else ``fold_0``, else
    ``segmenter``. InputError if there are no weights.
    """
    if path.is_file() and path.suffix != ".safetensors":  # other formats, such as those of torch, can run code
        raise InputError(f"`start` {path.name}: not a .safetensors file; convert it with safetensors.torch.save_file")
    parts = (f"fold_{fold}", "fold_0", "segmenter")
    files = [path] if path.is_file() else [path / f"{part}.safetensors" for part in parts]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        raise InputError(f"`start` {path.name}: no fold_0.safetensors or segmenter.safetensors; pass a model folder")
    if (record := weights.parent / TRAINING).is_file():
        return weights, list(read_json(record).get("recipe", {}).get("classes", {}))
    described = (weights.parent / DESCRIPTION).is_file()
    return weights, list(read_model_folder(model, weights.parent).classes) if described else []


def _initialize(network: nn.Module, request: TrainingRequest, recipe: Recipe, fold: int, log: Log) -> None:
    """Load the initial weights of a fold, if there are any."""
    if request.start is None:
        return
    path, classes = find_initial_weights(request.start, fold, request.model)
    try:
        random = initialize(network, path, new_heads=classes != list(recipe.classes))
    except ValueError as error:
        raise InputError(f"`start` {request.start.name}: {error}; pass weights of the same network") from error
    heads_only = all(name.split(".")[0] in OUTPUT_LAYERS for name in random)
    rest = "" if not random else ", with new output layers" if heads_only else ", the encoder only"
    log.log(f"initialized from {request.start.name}{rest}")


def initialize(network: nn.Module, path: Path, *, new_heads: bool) -> list[str]:
    """Load weights from a safetensors file into a network; all of them stay trainable (Zhao et al. 2022).

    With `new_heads` the output layers (``head`` or ``heads``) stay as they are, since the classes differ; an ImageNet
    ResNet-50 only gives the encoder. Returns the names of the parameters that were not loaded. ValueError if the file
    has no weights, or those of another network.
    """
    try:
        weights = read_weights(path)
        if isinstance(network, ResNet50AttentionUNet25D) and not any("heads" in name for name in weights):
            network.load_imagenet(weights)
            return [name for name in network.state_dict() if not name.startswith("encoder.")]
        state = network.state_dict()
        kept = {name: values for name, values in state.items() if new_heads and name.split(".")[0] in OUTPUT_LAYERS}
        network.load_state_dict({**weights, **kept})
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"weights of another network ({' '.join(str(error).split())[:200]})") from error
    return list(kept)


class _Preparation(Dataset[Case]):
    """Prepares a map when it is read."""

    def __init__(self, maps: Sequence[LabelledMap], request: TrainingRequest, recipe: Recipe, arrays: Path) -> None:
        self.maps, self.request, self.recipe, self.arrays = maps, request, recipe, arrays

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> Case:
        case = prepare_case(self.maps[index], self.request.model, self.recipe, device=self.request.device)
        return store(case, StoredCase, self.arrays)


def _prepare(
    request: TrainingRequest, recipe: Recipe, data: FoldData, labelled: Sequence[LabelledMap], log: Log
) -> list[Case]:
    """Resample maps for the recipe, unless an earlier fold did; several processes do so if there are several."""
    if new := [row for row in labelled if row.name not in data.cases]:
        log.log(f"preparing {len(new)} map(s)")
        workers = request.workers if request.workers > 1 else 0  # a single one has all cores
        maps = _Preparation(new, request, recipe, data.arrays)
        prepared = iter(DataLoader(maps, batch_size=None, **worker_options(min(workers, len(new)))))
        for number, row in enumerate(new, start=1):
            log.update(f"preparing {row.name}, {number} of {len(new)}")  # localizing takes seconds per map
            try:
                data.cases[row.name] = next(prepared)
            except (InputError, ValueError) as error:
                reason = str(error).strip().splitlines()[-1].rpartition("Error: ")[2]  # a process adds its traceback
                raise InputError(f"{row.name}: {reason}; use `holdout`, or correct it") from error
    return [data.cases[row.name] for row in labelled]


def _finish_folder(request: TrainingRequest, recipe: Recipe, labelled: Sequence[LabelledMap]) -> None:
    """Write the description of the model folder, and some maps that folds used as references of an atlas localizer.

    References of an earlier call that are not chosen any more are deleted.
    """
    model, out, sampling, classes = request.model, request.out, recipe.sampling, tuple(recipe.classes)
    network, arch = recipe.network or model.network, recipe.arch_of(model)
    as_registered = classes == model.classes and arch.get("independent", network == model.network)
    shown = replace(
        model.input,
        spacing_mm=recipe.voxel_size_mm(model),
        patch_mm=recipe.patch_mm(model),
        normalization=sampling.normalization,
        slices=0 if sampling.stack_axis is None else sampling.size[sampling.stack_axis],
        stack_axis=model.input.stack_axis if sampling.stack_axis is None else sampling.stack_axis,
        contrast=recipe.contrast,
        window_step=recipe.window_step or model.input.window_step,
        zero_padding=sampling.zero_padding,
    )
    heads = model.heads if as_registered else (classes,)
    trained = replace(model, network=network, arch=arch, input=shown, heads=heads)
    write_model_toml(trained, out, about={"trained_on": f"{len(labelled)} labelled maps", "seed": request.seed})
    names = choose_some([row.name for row in labelled], recipe.references, seed=recipe.split_seed)
    for path in (out / "references").glob("*.nii.gz"):
        if path.name.rpartition("_")[0] not in names:
            path.unlink()
    for reference in labelled:
        if reference.name in names:
            _write_reference(reference, model, out / "references")


def _write_reference(labelled: LabelledMap, model: Model, folder: Path) -> None:
    """Write a coarse map and its labels, unless they exist."""
    chi, dseg = (folder / f"{labelled.name}_{suffix}.nii.gz" for suffix in ("Chimap", "dseg"))
    if not chi.is_file():
        grid = world_grid(valid_box(labelled.chi), (_REFERENCE_MM,) * 3)
        coarse = np.clip(resample(labelled.chi, grid, antialias=True).array, -1, 1)
        _write(np.round(coarse / _STEP_PPM).astype(np.int16), grid.affine, chi, slope=_STEP_PPM)
    if not dseg.is_file():
        _write(manual_labels(labelled, model), labelled.chi.affine, dseg)


def _write(array: NDArray[np.integer], affine: NDArray[np.float64], final: Path, *, slope: float = 1.0) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_slope_inter(slope, 0)
    with atomic_write(final) as temporary:
        image.to_filename(temporary)
