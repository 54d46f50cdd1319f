"""The one registry of models, read from ``data/models.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from bids_dgmseg.errors import InputError
from bids_dgmseg.structures import STRUCTURES, Structure

ALIASES = {"default": "dgm16"}


@dataclass(frozen=True)
class ModelInput:
    """What a network is shown."""

    spacing_mm: tuple[float, float, float]
    patch_mm: tuple[float, float, float]
    normalization: Literal["ppm", "zscore", "minmax"] = "ppm"
    channels: int = 1


@dataclass(frozen=True)
class Localizer:
    """How the box that the network is shown is found.

    ``network`` runs a small whole-head network (the fields below describe it, as in `Model`), ``centre`` takes
    the middle of the brain.
    """

    kind: Literal["network", "centre"]
    margin_mm: float = 0.0
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    input: ModelInput | None = None


@dataclass(frozen=True)
class Weights:
    """Where the learned parameters lie and what may be done with them."""

    files: Mapping[str, str]
    """File name (relative to the weights folder) → sha256, one entry a network (``segmenter``, ``localizer``)."""
    licence: str
    trained_on: str


@dataclass(frozen=True)
class Model:
    """One way to segment: a block of ``models.toml``.

    ``labels`` are the abbreviations of output channels 1, 2, …; channel 0 is background.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    input: ModelInput
    localizer: Localizer
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    predictor: str | Callable[..., Any] = "bids_dgmseg.segment.predict:NetworkPredictor"
    weights: Weights | None = None
    memory_gb: float = 2.0
    citation: tuple[str, ...] = ()
    """Keys of ``data/boilerplate/references.bib``."""

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The nuclei in the order of the output channels."""
        return tuple(STRUCTURES.named(label) for label in self.labels)


def _triple(values: list[float]) -> tuple[float, float, float]:
    x, y, z = values
    return float(x), float(y), float(z)


def _read_input(block: Mapping[str, Any]) -> ModelInput:
    known = dict(block)
    return ModelInput(**{**known, "spacing_mm": _triple(known["spacing_mm"]), "patch_mm": _triple(known["patch_mm"])})


def _read_localizer(block: Mapping[str, Any]) -> Localizer:
    known = dict(block)
    if "input" in known:
        known["input"] = _read_input(known["input"])
    known["labels"] = tuple(known.get("labels", ()))
    return Localizer(**known)


def read_models(text: str) -> dict[str, Model]:
    """Read a registry.

    Parameters
    ----------
    text : str
        TOML, one table a model.
    """
    models = {}
    for name, block in tomllib.loads(text).items():
        known = dict(block)
        known["input"] = _read_input(known["input"])
        known["localizer"] = _read_localizer(known["localizer"])
        known["labels"] = tuple(known["labels"])
        known["citation"] = tuple(known.get("citation", ()))
        if "weights" in known:
            known["weights"] = Weights(**known["weights"])
        models[name] = Model(name=name, **known)
    return models


def get_model(name: str) -> Model:
    """Look a model up by its key or alias.

    Raises
    ------
    InputError
        If there is no such model.
    """
    key = ALIASES.get(name, name)
    if key not in MODELS:
        raise InputError(f"--model {name}: no such model; choose from {', '.join([*ALIASES, *MODELS])}")
    return MODELS[key]


def weights_folder(model: Model) -> Path:
    """Where the package keeps a model's weights."""
    return Path(str(files("bids_dgmseg").joinpath("data", "weights", model.name)))


MODELS: dict[str, Model] = read_models(
    files("bids_dgmseg").joinpath("data", "models.toml").read_text(encoding="utf-8")
)
