"""Folder of a trained model: description, networks, weights, atlases. Nothing in it is ever unpickled.

``model.toml``
    Name, licence and training of the model; its network with arguments, heads and input (spacing, patch,
    normalization, slices, zero padding) if they differ from the registry; ``temperatures`` if the probabilities were
    calibrated; ``mirrored`` if mirror images are always averaged.
``fold_0.safetensors``, ``fold_1.safetensors``, …
    Networks of the folds, whose probabilities are averaged; without folds ``segmenter.safetensors``.
``localizer.safetensors``
    Whole-head network, for models that find their box with one.
``references/NAME_Chimap.nii.gz``, ``references/NAME_dseg.nii.gz``
    Atlases (labels numbered as in structures.tsv), for models that find their box by registration.
"""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import read_json, sha256, sha256_or_error, write_bytes, write_text
from bids_dgmseg.models.nnunet_folder import check_finite
from bids_dgmseg.models.registry import Model, Normalization, Positive, list_networks, to_record, weights_folder

DESCRIPTION = "model.toml"
"""How the network of a folder is run."""

TRAINING = "training.json"
"""Record of what the networks of a folder were trained on."""

_INPUT = ("spacing_mm", "patch_mm", "normalization", "slices", "stack_axis", "window_step", "zero_padding", "contrast")
"""Fields of the input that a training may change."""


@dataclass(frozen=True)
class _Description:
    """Content of ``model.toml`` that changes how the network is run; other keys are informative."""

    model: str | None = None
    network: str | None = None
    arch: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[tuple[str, ...], ...] | None = None
    temperatures: tuple[Positive, ...] = ()
    mirrored: bool | None = None
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    patch_mm: tuple[Positive, Positive, Positive] | None = None
    normalization: Normalization | None = None
    slices: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stack_axis: Annotated[int, msgspec.Meta(ge=0, le=2)] | None = None
    window_step: Annotated[int, msgspec.Meta(ge=0)] | None = None
    zero_padding: bool | None = None
    contrast: str | None = None


def read_model_folder(model: Model, folder: Path | None = None) -> Model:
    """Return a model with the network, heads and input of its folder; unchanged if there is no ``model.toml``.

    If the network has only some of the model's classes, so has the result.

    Parameters
    ----------
    model : Model
        Registry entry.
    folder : path, optional
        Model folder; by default the weights in the package.

    Raises
    ------
    InputError
        If ``model.toml`` cannot be read, belongs to another model, names an unknown network, or has a class that the
        model lacks.
    """
    path = (folder or weights_folder(model)) / DESCRIPTION
    if not path.is_file():
        return model
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: invalid TOML ({error}); copy the folder again") from error
    used = {name: value for name, value in content.items() if name in _Description.__dataclass_fields__}
    described = to_record(used, _Description, where=str(path), remedy="copy the folder again")
    if described.model not in (None, model.name):
        raise InputError(
            f"{path}: contains weights of {described.model}, not of {model.name}; use `model` {described.model}"
        )
    network = described.network if described.network is not None else model.network
    if network != model.network and network not in list_networks():
        raise InputError(f"{path}: unknown network {network!r}; expected one of {', '.join(list_networks())}")
    changed = {name: value for name in _INPUT if (value := getattr(described, name)) is not None}
    trained = replace(
        model.for_contrast(described.contrast or model.input.contrast),
        network=network,
        arch={**(model.arch if network == model.network else {}), **described.arch},
        heads=model.heads if described.heads is None else described.heads,
        temperatures=described.temperatures,
        mirrored=model.mirrored if described.mirrored is None else described.mirrored,
        input=replace(model.input, **changed),
    )
    if set(trained.classes) < set(model.classes) and not model.auxiliary:
        kept = {*trained.classes, *(f"{name}_{side}" for name in trained.classes for side in "LR")}
        trained = replace(trained, labels=tuple(label for label in model.labels if label in kept))
    elif trained.classes != model.classes:
        present, expected = (", ".join(each.classes) for each in (trained, model))
        raise InputError(
            f"{path.parent.name}: its network has the classes {present}, {model.name} needs {expected}; continue the "
            f"training from it (dgmseg train {model.name} DATASET OUT --from FOLDER) and use OUT"
        )
    if trained.input.slices and trained.input.slices % 2 == 0:
        raise InputError(f"{path}: slices is {trained.input.slices}; it must be odd, or 0 for volumes")
    n_channels = sum(1 + len(group) for group in trained.groups)
    if trained.temperatures and len(trained.temperatures) != n_channels:
        raise InputError(
            f"{path}: temperatures: {len(trained.temperatures)} values, expected {n_channels}; copy the folder again"
        )
    return trained


def write_model_toml(model: Model, folder: Path, *, about: Mapping[str, str | int | float | list[float]]) -> Path:
    """Write the ``model.toml`` of a model folder.

    Parameters
    ----------
    model : Model
        With the arguments that its network was built with.
    folder : path
        Model folder.
    about : mapping
        More keys, such as ``licence``, ``trained_on`` or ``seed``.
    """
    content = {
        "model": model.name,
        "network": model.network,
        "heads": model.heads,
        "mirrored": model.mirrored,
        **{name: getattr(model.input, name) for name in _INPUT},
        **about,
    }
    # JSON and TOML write strings, numbers, booleans and lists of them alike.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    lines += ["", "[arch]"]
    lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in model.arch.items()]
    path = folder / DESCRIPTION
    write_text("\n".join(lines) + "\n", path)
    return path


def segmenter_parts(folder: Path, *, folds: Collection[int] = ()) -> list[str]:
    """List the networks that are averaged: `folds`, all of them if empty; or the only one."""
    return [f"fold_{fold}" for fold in list_folds(folder) if fold in folds or not folds] or ["segmenter"]


def list_folds(folder: Path) -> list[int]:
    """List the folds with weights in a model folder, or in the nnU-Nets inside it."""
    patterns = ("fold_*.safetensors", "fold_*/checkpoint_*.pth", "*/fold_*/checkpoint_*.pth")
    names = [path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)]
    matches = (re.search(r"fold_(\d+)[./]", name) for name in names)
    return sorted({int(fold[1]) for fold in matches if fold})


@dataclass(frozen=True)
class _TrainingRecord:
    """Content of ``training.json`` about participants; other keys are informative."""

    maps: Mapping[str, str] = field(default_factory=dict)
    """Scan → checksum of its map."""
    folds: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    """Part (``training``, ``validation``, ``test``) → participants."""
    pseudo_labels: Mapping[str, Any] = field(default_factory=dict)
    """Scans without manual labels."""
    start_maps: tuple[tuple[str, ...], ...] = ()
    """Fold → checksums of the maps that its initial weights were trained on."""

    def training_maps(self, fold: int) -> set[str]:
        """Return the checksums of the maps that a fold or its initial weights were trained on."""
        digests = (
            digest for scan, digest in self.maps.items() if fold < len(self.folds) and self.was_trained_on(fold, scan)
        )
        return set(digests).union(*self.start_maps[fold : fold + 1])

    def participants(self, fold: int) -> set[str]:
        """Return the labels of the participants that a fold was trained on, or selected by."""
        used = self.folds[fold] if fold < len(self.folds) else {}
        return {*used.get("training", ()), *used.get("validation", ())}

    def was_trained_on(self, fold: int, scan: str) -> bool:
        """Return whether a fold was trained on a scan, or selected by it."""
        used, participant = self.folds[fold], participant_of(scan)
        if scan in self.pseudo_labels:
            return participant not in (*used.get("validation", ()), *used.get("test", ()))
        return participant in self.participants(fold)


def participant_of(scan: str) -> str:
    """Return the label of a scan's participant.

    >>> participant_of("sub-01_ses-2")
    '01'
    """
    return scan.partition("_")[0].removeprefix("sub-")


def _read_training_record(folder: Path) -> _TrainingRecord:
    path = folder / TRAINING
    if not path.is_file() and (folder / "plans.json").is_file():  # one of the two nnU-Nets of a model folder
        path = folder.parent / TRAINING
    content = read_json(path) if path.is_file() else {}
    used = {name: value for name, value in content.items() if name in _TrainingRecord.__dataclass_fields__}
    return to_record(used, _TrainingRecord, where=str(path), remedy="copy the folder again")


def find_folds_trained_on(folder: Path, chi: Path) -> dict[int, bool]:
    """Find out which folds of a model folder were trained on a map, or selected by it.

    Maps are recognized by their checksum in ``training.json``; a folder without folds is fold 0. Maps of the weights
    that a training started from count, too.

    Returns
    -------
    dict of int to bool
        Fold → whether it was trained on the map; empty if the folder has no record of its training.

    Raises
    ------
    InputError
        If the record is damaged.
    """
    record = _read_training_record(folder)
    if not record.folds:
        return {}
    digest = sha256_or_error(chi)
    steps = [numbers for part in folder.iterdir() if part.is_dir() and (numbers := list_folds(part))]
    folds = set(list_folds(folder)).intersection(*steps)  # of nnU-Nets those that every step has
    return {fold: digest in record.training_maps(fold) for fold in sorted(folds) or [0] if fold < len(record.folds)}


def list_training_maps(weights: Path) -> list[str]:
    """List the checksums of the maps that ``fold_N.safetensors`` was trained on, by the ``training.json`` beside it.

    A file of another name is fold 0. The maps of the weights that it started from are among them.
    """
    return sorted(_read_training_record(weights.parent).training_maps(_fold_of(weights)))


def list_training_participants(weights: Path) -> set[str]:
    """List the labels of the participants that ``fold_N.safetensors`` was trained on, or selected by."""
    return _read_training_record(weights.parent).participants(_fold_of(weights))


def _fold_of(weights: Path) -> int:
    fold = re.fullmatch(r"fold_(\d+)", weights.stem)
    return int(fold[1]) if fold else 0


def list_folder_maps(folder: Path) -> list[str]:
    """List the checksums of the maps that any fold of a model folder, or its initial weights, was trained on."""
    record = _read_training_record(folder)
    return sorted(set().union(*(record.training_maps(fold) for fold in list_folds(folder) or [0])))


TRAINED_ON_MAP = "trained_on_map"
"""Key in the settings of a ``_qc.json``: true if networks were trained on the map."""

TRAINING_MAPS = "training_maps"
"""Key in the settings of a ``_qc.json``: checksums of the maps that networks were trained on."""


def describe_folds_trained_on(folder: Path, chi: Path) -> str:
    """Describe which folds of a model folder were trained on a map; empty if none did (see `find_folds_trained_on`)."""
    folds = find_folds_trained_on(folder, chi)
    if not any(folds.values()):
        return ""
    networks = f"{sum(folds.values())} of {len(folds)} networks" if len(folds) > 1 else "its network"
    return (
        f"{folder.name}: {networks} trained on this map ({TRAINING}), so the segmentation may be better than those "
        "of other maps; for accuracy use dgmseg cross-validate"
    )


def atlas_files(model: Model, folder: Path | None = None, *, folds: Collection[int] = ()) -> list[tuple[Path, Path]]:
    """List the atlases of a model folder, maps and labels, sorted by name, without the test set of `folds`.

    Raises
    ------
    InputError
        If there are none, or one has no labels.
    """
    folder = (folder or weights_folder(model)) / "references"
    maps = sorted(folder.glob("*_Chimap.nii.gz"))
    if folds:
        trained = _read_training_record(folder.parent).folds
        unseen = {scan for fold in folds if fold < len(trained) for scan in trained[fold].get("test", ())}
        maps = [path for path in maps if participant_of(path.name) not in unseen]
    if not maps:
        raise InputError(
            f"{model.name}: no atlases in {folder}; add NAME_Chimap.nii.gz with NAME_dseg.nii.gz, or choose another "
            "`model`"
        )
    pairs = [(path, path.with_name(path.name.replace("_Chimap", "_dseg"))) for path in maps]
    if unlabelled := [labels.name for _, labels in pairs if not labels.is_file()]:
        raise InputError(f"{folder.parent.name}: references has no {unlabelled[0]}; add the labels of that map")
    return pairs


def load_object(dotted: str) -> Any:
    """Import ``package.module:Name``; names in users' files are checked before (`read_model_folder`)."""
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def segmenter_network(model: Model) -> nn.Module:
    """Build the untrained segmentation network of a model."""
    build = load_object(model.network)
    return build(model.input.channels, len(model.classes) + 1, **model.arch)


def localizer_network(model: Model) -> nn.Module:
    """Build the untrained whole-head network of a model.

    Raises
    ------
    ValueError
        If its localizer has no network.
    """
    localizer = model.localizer
    if localizer.input is None:
        raise ValueError(f"{model.name}: its localizer {localizer.kind!r} has no network")
    build = load_object(localizer.network)
    return build(localizer.input.channels, len(localizer.labels) + 1, **localizer.arch)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file in float32; ValueError if a parameter is not finite."""
    weights = {name: values.float() for name, values in load_file(path).items()}
    check_finite(weights)
    return weights


def load_weights(network: nn.Module, model: Model, part: str, folder: Path | None = None) -> nn.Module:
    """Load weights into a network and set it to inference mode.

    Parameters
    ----------
    network : Module
        Untrained network.
    model : Model
        Registry entry.
    part : str
        ``segmenter``, ``fold_0``, ``localizer``, …; the file is ``PART.safetensors``.
    folder : path, optional
        Model folder; by default the weights in the package.

    Raises
    ------
    InputError
        If the file is missing, damaged or belongs to another network, or its checksum differs from the registry's.
    """
    path = (folder or weights_folder(model)) / f"{part}.safetensors"
    if not path.is_file() and not folder and model.weights and path.name in model.weights.files:
        raise InputError(f"{path.name}: not found in the package; install it again")
    if not path.is_file():
        remedy = f"train it (dgmseg train {model.name}) and pass its folder as `weights`, or choose another `model`"
        if folder:
            remedy = "pass another folder as `weights` or choose another `model`"
        raise InputError(f"{model.name}: no weights in {folder or 'the package'}; {remedy}")
    if folder is None and model.weights and sha256(path) != model.weights.files.get(path.name):
        raise InputError(f"{path.name}: its checksum differs from the registry's; reinstall the package")
    try:
        weights = read_weights(path)
        if differing := _differing_shape(network, weights):
            raise ValueError(differing)
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not weights of {model.name} ({reason}); use the folder of its training, or train again"
        ) from error
    return network.eval().requires_grad_(False)


def _differing_shape(network: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Describe the last parameter whose shape differs, which is often that of another number of classes."""
    for name, values in reversed(network.state_dict().items()):
        if name in weights and weights[name].shape != values.shape:
            present, expected = ("×".join(map(str, tensor.shape)) for tensor in (weights[name], values))
            return f"{name} is {present}, expected {expected}: another network, or the classes of another version"
    return None


def load_segmenters(model: Model, folder: Path | None = None, *, folds: Collection[int] = ()) -> list[nn.Module]:
    """Build and load the networks of a model folder whose probabilities are averaged; see `load_weights`.

    `model` is the result of `read_model_folder`, `folds` are those of `segmenter_parts`.
    """
    parts = segmenter_parts(folder or weights_folder(model), folds=folds)
    try:
        networks = [segmenter_network(model) for _ in parts]
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        path = (folder or weights_folder(model)) / DESCRIPTION
        raise InputError(f"{path}: invalid arch of {model.network} ({error}); copy the folder again") from error
    return [load_weights(network, model, part, folder) for network, part in zip(networks, parts, strict=True)]


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Write parameters as float16 safetensors, atomically; return the file's sha256.

    What does not fit into float16, such as large variances of batch normalization, stays in float32.
    """
    numbers = {name: halve(values.detach().cpu().contiguous()) for name, values in state.items()}
    write_bytes(save(numbers), path)  # not save_file, which creates files that only their owner can read
    return sha256(path)


def halve(values: Tensor) -> Tensor:
    """Convert parameters to float16 if all of them fit; integers stay as they are."""
    fits = values.is_floating_point() and bool((values.abs() <= torch.finfo(torch.float16).max).all())
    return values.half() if fits else values


def pick_device(device: str) -> torch.device:
    """Return the device of ``auto``, ``cpu``, ``cuda`` or ``mps`` (Apple); ``auto`` chooses CUDA or the CPU.

    Raises
    ------
    InputError
        If the device is not available.
    """
    if device == "mps" and not torch.backends.mps.is_available():
        raise InputError("`device` mps: no Apple GPU is available to PyTorch; use `device` cpu")
    if device == "mps":
        return torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("`device` cuda: no CUDA device is available; use `device` cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def to_channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in the memory layout in which small convolutions are fastest.

    Apple's GPUs compute convolutions in the default layout only.
    """
    if device.type == "mps":
        return network.to(device)
    flat = any(parameter.ndim == 4 for parameter in network.parameters())
    layout: Any = {"memory_format": torch.channels_last if flat else torch.channels_last_3d}  # untyped in torch 2.13
    return network.to(device).to(**layout)


def limit_threads(count: int) -> None:
    """Limit the number of threads that PyTorch uses in this process."""
    torch.set_num_threads(count)
