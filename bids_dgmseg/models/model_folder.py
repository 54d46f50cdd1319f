"""Folder of a trained model.

``model.toml``
    Name, licence and training of the model; its network with arguments, heads and input (spacing, patch,
    normalization, slices) if they differ from the registry; ``temperatures`` if the probabilities were calibrated;
    ``mirrored`` if mirror images are always averaged.
``fold_0.safetensors``, ``fold_1.safetensors``, …
    Networks of the folds, whose probabilities are averaged; without folds ``segmenter.safetensors``.
``segmenter_2.safetensors``
    Second checkpoint of the same network, averaged with the first by ``--ensemble``.
``localizer.safetensors``
    Whole-head network, for models that find their box with one.
``references/NAME_Chimap.nii.gz``, ``references/NAME_dseg.nii.gz``
    Atlases (labels numbered as in structures.tsv), for models that find their box by registration.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_text
from bids_dgmseg.models.registry import NETWORKS, Model, Normalization, Positive, to_record, weights_folder

DESCRIPTION = "model.toml"

SECOND_CHECKPOINT = "segmenter_2"

_INPUT = ("spacing_mm", "patch_mm", "normalization", "slices")
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


def read_model_folder(model: Model, folder: Path | None = None) -> Model:
    """Return a model with the network, heads and input of its folder; unchanged if there is no ``model.toml``.

    Parameters
    ----------
    model : Model
        Registry entry.
    folder : path, optional
        Model folder; by default the weights in the package.

    Raises
    ------
    InputError
        If ``model.toml`` cannot be read, belongs to another model, names an unknown network, or has other classes than
        the model.
    """
    path = (folder or weights_folder(model)) / DESCRIPTION
    if not path.is_file():
        return model
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: invalid TOML ({error}); copy the folder again") from error
    known = {name: value for name, value in content.items() if name in _Description.__dataclass_fields__}
    described = to_record(known, _Description, where=str(path), remedy="copy the folder again")
    if described.model not in (None, model.name):
        raise InputError(
            f"{path}: contains weights of {described.model}, not of {model.name}; use --model {described.model}"
        )
    network = described.network if described.network is not None else model.network
    if network != model.network and network not in NETWORKS:
        raise InputError(f"{path}: unknown network {network!r}; expected one of {', '.join(NETWORKS)}")
    changed = {name: value for name in _INPUT if (value := getattr(described, name)) is not None}
    trained = replace(
        model,
        network=network,
        arch={**(model.arch if network == model.network else {}), **described.arch},
        heads=model.heads if described.heads is None else described.heads,
        temperatures=described.temperatures,
        mirrored=model.mirrored if described.mirrored is None else described.mirrored,
        input=replace(model.input, **changed),
    )
    if trained.classes != model.classes:
        found, expected = (", ".join(one.classes) for one in (trained, model))
        raise InputError(
            f"{path.parent.name}: its network has the classes {found}, {model.name} needs {expected}; continue the "
            f"training from it (dgmseg train {model.name} DATASET OUT --from FOLDER) and use OUT"
        )
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


def segmenter_parts(model: Model, folder: Path | None = None) -> list[str]:
    """List the networks that are averaged: all folds, or the segmenter with its second checkpoint for an ensemble."""
    folder = folder or weights_folder(model)
    folds = sorted((path.stem for path in folder.glob("fold_*.safetensors")), key=lambda name: (len(name), name))
    second = (folder / f"{SECOND_CHECKPOINT}.safetensors").is_file() and model.ensemble
    return folds or ["segmenter", *([SECOND_CHECKPOINT] if second else [])]


def atlas_files(model: Model, folder: Path | None = None) -> list[tuple[Path, Path]]:
    """List the atlases of a model folder, maps and labels, sorted by name.

    Raises
    ------
    InputError
        If there are none, or one has no labels.
    """
    folder = (folder or weights_folder(model)) / "references"
    maps = sorted(folder.glob("*_Chimap.nii.gz"))
    if not maps:
        raise InputError(
            f"{model.name}: no atlases in {folder}; add NAME_Chimap.nii.gz with NAME_dseg.nii.gz, or choose another "
            "--model"
        )
    pairs = [(path, path.with_name(path.name.replace("_Chimap", "_dseg"))) for path in maps]
    if unlabelled := [labels.name for _, labels in pairs if not labels.is_file()]:
        raise InputError(f"{folder.parent.name}: references has no {unlabelled[0]}; add the labels of that map")
    return pairs
