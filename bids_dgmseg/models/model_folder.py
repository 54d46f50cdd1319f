"""The folder of a trained model: which files it has, and what it says of itself.

``model.toml``
    The model's key, licence and training, and its network with arguments, heads and input (voxels, patch,
    normalization, slices of a stack) where they differ from the registry's; also ``temperatures``, which make the
    probabilities hold, and ``mirrored``, where the probabilities of a map and of its mirror image are to be averaged
    always.
``fold_0.safetensors``, ``fold_1.safetensors``, …
    The networks of the folds, averaged; a model without folds has one ``segmenter.safetensors``.
``segmenter_2.safetensors``
    Another checkpoint of the same network, averaged with it where the best is wanted (``--ensemble``).
``localizer.safetensors``
    The whole-head network, for models that find their box with one.
``references/NAME_Chimap.nii.gz``, ``references/NAME_dseg.nii.gz``
    Maps and labels (numbers of structures.tsv), for models that find their box by registration.
"""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_text
from bids_dgmseg.models.registry import NORMALIZATIONS, Model, weights_folder

DESCRIPTION = "model.toml"

SECOND = "segmenter_2"
"""Another checkpoint of the same network, for ``--ensemble``."""

_INPUT = ("spacing_mm", "patch_mm", "normalization", "slices")
"""What a training may show a network otherwise than the registry says."""

_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "spacing_mm": ("three numbers above 0", lambda value: _are_above_0(value) and len(value) == 3),
    "patch_mm": ("three numbers above 0", lambda value: _are_above_0(value) and len(value) == 3),
    "temperatures": ("numbers above 0, one a class", lambda value: _are_above_0(value)),
    "slices": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0),
    "heads": ("lists of classes", lambda value: _are(value, list) and all(_are(group, str) for group in value)),
    "mirrored": ("true or false", lambda value: isinstance(value, bool)),
    "arch": ("a table of arguments", lambda value: isinstance(value, dict)),
}
"""What the values of a description must be."""

_NETWORKS = "bids_dgmseg.networks."
"""A folder from elsewhere must not have anything else imported."""


def own_folder(model: Model, folder: Path | None) -> Path:
    """Choose the folder of the weights: the one given, or the package's."""
    return folder or weights_folder(model)


def read_model_folder(model: Model, folder: Path | None = None) -> Model:
    """Give a model the network, heads and input that its folder names; without ``model.toml`` it stays as registered.

    Parameters
    ----------
    model : Model
        The registry entry.
    folder : path, optional
        Takes the place of the weights in the package.

    Raises
    ------
    InputError
        If the description cannot be read, is of another model, names a network that this program does not have, or is
        of other classes than the model's.
    """
    path = own_folder(model, folder) / DESCRIPTION
    if not path.is_file():
        return model
    described = _read(path)
    if (name := described.get("model", model.name)) != model.name:
        raise InputError(f"{path}: holds weights of {name}, not of {model.name}; choose --model {name}")
    network = described.get("network", model.network)
    if network != model.network and not _is_ours(network):
        raise InputError(f"{path}: network {network} is none of this program's; choose another folder")
    shown: dict[str, Any] = {
        name: tuple(value) if isinstance(value := described[name], list) else value
        for name in _INPUT
        if name in described
    }
    if shown.get("normalization", "ppm") not in NORMALIZATIONS:
        raise InputError(
            f"{path}: normalization {shown['normalization']} is none of {', '.join(NORMALIZATIONS)}; "
            "choose another folder"
        )
    arch = {**(model.arch if network == model.network else {}), **described.get("arch", {})}
    heads = tuple(tuple(group) for group in described.get("heads", model.heads))
    temperatures = tuple(float(value) for value in described.get("temperatures", ()))
    trained = replace(
        model,
        network=network,
        arch=arch,
        heads=heads,
        temperatures=temperatures,
        mirrored=bool(described.get("mirrored", model.mirrored)),
        input=replace(model.input, **shown),
    )
    if trained.classes != model.classes:
        found, wanted = (", ".join(one.classes) for one in (trained, model))
        raise InputError(
            f"{path.parent.name}: its network tells {found} apart, {model.name} needs {wanted}; train on from it "
            f"(dgmseg train {model.name} DATASET OUT --from FOLDER) and give OUT"
        )
    if temperatures and len(temperatures) != sum(1 + len(group) for group in trained.groups):
        raise InputError(f"{path}: temperatures is not {_KINDS['temperatures'][0]}; copy the folder again")
    return trained


def _read(path: Path) -> dict[str, Any]:
    """Read a description whose values are of their kinds."""
    try:
        described = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}); copy the folder again") from error
    for name, (kind, is_kind) in _KINDS.items():
        if name in described and not is_kind(described[name]):
            raise InputError(f"{path}: {name} is not {kind}; copy the folder again")
    return described


def _are(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in values)


def _are_above_0(values: Any) -> bool:
    return _are(values, (int, float)) and all(one > 0 for one in values)


def _is_ours(network: Any) -> bool:
    """Tell whether this program has a network; nothing but its own modules is imported to see."""
    from torch import nn

    module, _, name = str(network).partition(":")
    if not module.startswith(_NETWORKS) or name.startswith("_"):
        return False
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module


def write_model_toml(model: Model, folder: Path, *, about: Mapping[str, str | int | float | list[float]]) -> Path:
    """Write a folder's ``model.toml``.

    Parameters
    ----------
    model : Model
        With the arguments that its network was built with.
    folder : path
        Where the weights are, or will be.
    about : mapping
        What else to say, such as ``licence``, ``trained_on`` or ``seed``.
    """
    named = {
        "model": model.name,
        "network": model.network,
        "heads": model.heads,
        "mirrored": model.mirrored,
        **{name: getattr(model.input, name) for name in _INPUT},
    }
    lines = [f"{key} = {_toml(value)}" for key, value in {**named, **about}.items()]
    lines += ["", "[arch]", *(f"{key} = {_toml(value)}" for key, value in model.arch.items())]
    return write_text("\n".join(lines), folder / DESCRIPTION)


def _toml(value: Any) -> str:
    """Write a text, number, truth value or list of them, which JSON and TOML write alike."""
    return json.dumps(value, ensure_ascii=False)


def segmenter_parts(model: Model, folder: Path | None = None) -> list[str]:
    """Name the networks that are averaged.

    ``fold_0``, ``fold_1``, … where there are folds, else ``segmenter``, with `SECOND` where there is one and the model
    is to give its best.
    """
    place = own_folder(model, folder)
    folds = sorted((path.stem for path in place.glob("fold_*.safetensors")), key=lambda name: (len(name), name))
    second = [SECOND] if model.ensemble and (place / f"{SECOND}.safetensors").is_file() else []
    return folds or ["segmenter", *second]


def atlas_files(model: Model, folder: Path | None = None) -> list[tuple[Path, Path]]:
    """List the reference maps with their labels, by name.

    Raises
    ------
    InputError
        If there are none, or one has no labels.
    """
    place = own_folder(model, folder) / "references"
    maps = sorted(place.glob("*_Chimap.nii.gz"))
    if not maps:
        raise InputError(
            f"{model.name}: no reference maps in {place}; add NAME_Chimap.nii.gz with NAME_dseg.nii.gz, or choose "
            "another --model"
        )
    pairs = [(path, path.with_name(path.name.replace("_Chimap", "_dseg"))) for path in maps]
    if bare := [labels.name for _, labels in pairs if not labels.is_file()]:
        raise InputError(f"{place.parent.name}: references has no {bare[0]}; add the labels of that map")
    return pairs
