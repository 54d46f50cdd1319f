"""Build, initialize and train one network by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json
from bids_dgmseg.lab.train.core import Run, State, StepResult, train
from bids_dgmseg.lab.train.losses import main_logits
from bids_dgmseg.lab.train.patches import Case, WindowSamples
from bids_dgmseg.lab.train.recipe import Recipe, convert
from bids_dgmseg.models.model_folder import (
    DESCRIPTION,
    TRAINING,
    load_object,
    pick_device,
    read_model_folder,
    read_weights,
    to_channels_last,
)
from bids_dgmseg.models.registry import Model
from bids_dgmseg.networks.attention_unet import ResNet50AttentionUNet25D

OUTPUT_LAYERS = ("head", "heads")
"""Modules of the networks whose shape depends on the classes."""

CHECKPOINT = "checkpoint.pt"

_STATISTICS_SAMPLES = 120
"""Samples from which a mean of two networks gets its running statistics."""


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions:
    """Seed and machine."""

    seed: int = 1
    """Of initial weights, samples and their order."""
    device: str = "auto"
    workers: int = 0
    checkpoint_minutes: float = 2.0
    record: Mapping[str, Any] = field(default_factory=dict)
    """What is trained on what; kept in the checkpoint."""


def build_trainable(model: Model, recipe: Recipe, *, seed: int) -> nn.Module:
    """Build a network with deep supervision, and try a sample and the loss before any map is prepared.

    `seed` is that of the initial weights. ValueError if the network does not accept its arguments or the recipe's
    samples; InputError if the loss does not accept the network's output.
    """
    torch.manual_seed(seed)
    kind = load_object(recipe.network or model.network)
    annotations = get_type_hints(kind.__init__)
    for name in model.arch.keys() & annotations.keys() - {"return"}:  # the network itself refuses unknown names
        try:
            convert(annotations[name], model.arch[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    try:
        network: nn.Module = kind(model.input.channels, len(recipe.classes) + 1, True, **model.arch)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from error
    sampling = recipe.sampling
    sample = torch.zeros(sampling.size)
    channels = sample[None] if sampling.stack_axis is None else sample.movedim(sampling.stack_axis, 0)
    try:
        with torch.inference_mode():
            answer = network.eval()(channels[None])
    except RuntimeError as error:
        raise ValueError(f"samples of {sampling.size} do not fit ({str(error).splitlines()[0]})") from error
    labels = torch.zeros(main_logits(answer)[:, 0].shape, dtype=torch.long)
    try:
        with torch.inference_mode():
            recipe.loss(network, answer, labels)
    except ValueError as error:
        raise InputError(f"`recipe` loss: {error}") from error
    return network


def find_initial_weights(path: Path, fold: int, model: Model) -> tuple[Path, list[str]]:
    """Find weights to start from, and the classes that they were trained for (empty if unknown).

    `path` is a ``.safetensors`` file, or a model folder: its ``fold_N`` (N is `fold`), else ``fold_0``, else
    ``segmenter``. A folder without ``training.json``, such as those in the package, has the classes of its
    ``model.toml``. InputError if there are no weights.
    """
    if path.is_file() and path.suffix != ".safetensors":  # other formats, such as those of torch, can run code
        raise InputError(f"`start` {path.name}: not a .safetensors file; convert it with safetensors.torch.save_file")
    parts = (f"fold_{fold}", "fold_0", "segmenter")
    files = [path] if path.is_file() else [path / f"{part}.safetensors" for part in parts]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise InputError(f"`start` {path.name}: no fold_0.safetensors or segmenter.safetensors; pass a model folder")
    record = found.parent / TRAINING
    if record.is_file():
        return found, list(read_json(record).get("recipe", {}).get("classes", {}))
    described = (found.parent / DESCRIPTION).is_file()
    return found, list(read_model_folder(model, found.parent).classes) if described else []


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
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    own = network.state_dict()
    kept = [name for name in own if new_heads and name.split(".")[0] in OUTPUT_LAYERS]
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


def train_network(
    network: nn.Module,
    recipe: Recipe,
    cases: Sequence[Case],
    validation: Sequence[Case],
    folder: Path,
    options: RuntimeOptions,
    *,
    report: Callable[[State, StepResult], None] = lambda state, result: None,
    finish_epoch: Callable[[State], bool | None] = lambda state: None,
) -> State:
    """Train a network on some maps and validate it on others; resumes from ``checkpoint.pt`` in the folder.

    When this returns, the network has the weights to keep: without validation the last ones. `report` and
    `finish_epoch` are called as by `bids_dgmseg.lab.train.core.train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = WindowSamples(cases, recipe, seed=options.seed, augment=True)
    fixed = WindowSamples(validation, recipe, seed=options.seed, augment=False) if validation else None
    device = pick_device(options.device)
    state = State.start(to_channels_last(network, device), recipe.pace)
    if (folder / CHECKPOINT).is_file():
        state.load(folder / CHECKPOINT)
    state.record = dict(options.record)
    run = Run(
        recipe.pace,
        recipe.loss,
        folder / CHECKPOINT,
        tuple(recipe.classes),
        seed=options.seed,
        device=device,
        workers=options.workers,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    train(state, samples, run, validation=fixed, report=report, finish_epoch=finish_epoch)
    network.load_state_dict(state.weights)
    return state


def average_with_start(
    network: nn.Module, path: Path, recipe: Recipe, cases: Sequence[Case], options: RuntimeOptions
) -> None:
    """Replace the weights of a network by a weighted mean of the initial ones and its own.

    Such a mean may keep more of what the initial weights knew about other maps (Wortsman et al. 2022,
    arXiv:2109.01903). Statistics of batch normalization cannot be averaged: they are computed again from samples of
    the maps.

    Parameters
    ----------
    network : Module
        Trained network.
    path : path
        Its initial weights, all of which were loaded.
    recipe : Recipe
        ``start_share`` is the weight of the initial ones.
    cases : sequence of Case
        Maps of the training.
    options : RuntimeOptions
        Seed and device.
    """
    start, share = read_weights(path), recipe.start_share
    own = {name: value.cpu() for name, value in network.state_dict().items()}
    network.load_state_dict(
        {
            name: torch.lerp(value, start[name], share) if value.is_floating_point() else value
            for name, value in own.items()
        }
    )
    samples = WindowSamples(cases, recipe, seed=options.seed, augment=False)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(samples), generator=generator)[:_STATISTICS_SAMPLES].tolist()
    device = pick_device(options.device)
    torch.manual_seed(options.seed)  # of dropout
    update_bn(DataLoader(Subset(samples, chosen), batch_size=recipe.pace.batch), network, device=device)
