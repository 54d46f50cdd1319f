"""Build networks and load their weights; nothing is ever unpickled."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256, write_bytes
from bids_dgmseg.models.model_folder import DESCRIPTION, read_model_folder, segmenter_parts
from bids_dgmseg.models.registry import Model, weights_folder


def load_object(dotted: str) -> Any:
    """Import ``package.module:Name``; names in users' files are checked before (`read_model_folder`)."""
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)


def build_network(dotted: str, arch: Mapping[str, Any], *, input_channels: int, classes: int) -> nn.Module:
    """Build an untrained network from its name and arguments."""
    network: nn.Module = load_object(dotted)(input_channels, classes, **arch)
    return network


def segmenter_network(model: Model) -> nn.Module:
    """Build the untrained segmentation network of a model."""
    return build_network(model.network, model.arch, input_channels=model.input.channels, classes=len(model.classes) + 1)


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
    return build_network(
        localizer.network, localizer.arch, input_channels=localizer.input.channels, classes=len(localizer.labels) + 1
    )


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
    if not path.is_file():
        train = f"train it (dgmseg train {model.name}) and pass --weights FOLDER"
        raise InputError(
            f"{model.name}: no weights in the package; {train}, or choose another --model"
            if not folder
            else f"{model.name}: no weights in {path.parent}; pass --weights FOLDER or choose another --model"
        )
    if folder is None and model.weights and sha256(path) != model.weights.files.get(path.name):
        raise InputError(f"{path.name}: its checksum differs from the registry's; install the package again")
    try:
        state = load_file(path)
        network.load_state_dict({name: values.float() for name, values in state.items()})
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not weights of {model.name} ({reason}); use the folder of its training") from error
    return network.eval().requires_grad_(False)


def load_segmenters(model: Model, folder: Path | None = None) -> list[nn.Module]:
    """Build and load the networks of a model folder whose probabilities are averaged; see `load_weights`."""
    trained = read_model_folder(model, folder)
    parts = segmenter_parts(model, folder)
    try:
        networks = [segmenter_network(trained) for _ in parts]
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        path = (folder or weights_folder(model)) / DESCRIPTION
        raise InputError(f"{path}: invalid arch of {trained.network} ({error}); copy the folder again") from error
    return [load_weights(network, trained, part, folder) for network, part in zip(networks, parts, strict=True)]


def save_weights(state: Mapping[str, Tensor], path: Path) -> str:
    """Write parameters as float16 safetensors, atomically; return the file's sha256."""
    numbers = {name: values.detach().cpu().contiguous() for name, values in state.items()}
    # Not save_file, which creates files that only their owner can read.
    write_bytes(save({name: one.half() if one.is_floating_point() else one for name, one in numbers.items()}), path)
    return sha256(path)


def pick_device(device: str) -> torch.device:
    """Return the device of ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        If CUDA is requested but not available.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def to_channels_last(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to a device, in the memory layout in which small convolutions are fastest."""
    flat = any(parameter.ndim == 4 for parameter in network.parameters())
    return network.to(device).to(memory_format=torch.channels_last if flat else torch.channels_last_3d)


def limit_threads(count: int) -> None:
    """Limit the number of threads that PyTorch uses in this process."""
    torch.set_num_threads(count)
