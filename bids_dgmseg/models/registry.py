"""The one registry of models, read from ``data/models.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.structures import STRUCTURES, Structure

ALIASES = {"default": "dgm16"}

NORMALIZATIONS = ("ppm", "zscore", "minmax")


@dataclass(frozen=True)
class ModelInput:
    """What a network is shown."""

    spacing_mm: tuple[float, float, float]
    patch_mm: tuple[float, float, float]
    normalization: Literal["ppm", "zscore", "minmax"] = "ppm"
    channels: int = 1
    slices: int = 0
    """Neighbouring coronal slices that a 2D network sees to label the middle one; 0 for a 3D network."""
    window_step: int = 0
    """Voxels from one window to the next, all windows counting alike; 0: they overlap by half, their middles count."""
    window_slack: float = 0.0
    """Part of the patch by which a grid may be longer along an axis and still is seen in one window along it."""
    native_voxel_tolerance: float = 0.0
    """Largest difference of a map's voxels to ``spacing_mm``, relative to it, at which they are shown as they are."""


@dataclass(frozen=True)
class Localizer:
    """How the box that the network is shown is found.

    ``network`` runs a small whole-head network (the fields below describe it, as in `Model`), ``centre`` takes
    the middle of the brain, ``atlas`` registers the best of the model folder's reference maps, ``nnunet`` runs the
    nnU-Net of the model folder's ``cerebellum``.
    """

    kind: Literal["network", "atlas", "centre", "nnunet"]
    margin_mm: float = 0.0
    guard: str = ""
    """Model whose whole-head network sees to it that the box of ``centre`` or ``atlas`` cuts no nucleus; or none."""
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    input: ModelInput | None = None


@dataclass(frozen=True)
class Postprocessing:
    """What is done to each nucleus of one side between probabilities and labels."""

    threshold: float = 0.0
    """Probability that a voxel must exceed; 0: it goes to the most probable class, background included."""
    min_component_fraction: float = 0.25
    """Connected parts smaller than this share of the largest are dropped; 1 keeps the largest alone."""
    position_sd_mm: float = 0.0
    """By which nuclei vary about their places relative to one another: first of all, parts are compared by their sizes
    times a Gaussian of this SD of how far they lie from there; 0: wherever they lie."""
    valid_voxels_only: bool = False
    """Before all else, make every nucleus' probability 0 where the map shows nothing; not for nnU-Net folders."""
    fill_holes: bool = False
    smooth: bool = False
    """Give each voxel to the majority of itself and its six neighbours."""


@dataclass(frozen=True)
class Weights:
    """Where the learned parameters lie and what may be done with them."""

    files: Mapping[str, str]
    """File name (relative to the weights folder) → sha256."""
    licence: str
    trained_on: str


@dataclass(frozen=True)
class Model:
    """One way to segment: a block of ``models.toml``.

    ``labels`` are the abbreviations of the channels 1, 2, … of its probabilities; channel 0 is background.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    input: ModelInput
    localizer: Localizer
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[tuple[str, ...], ...] = ()
    """Groups of the network's classes, each with a background of its own; by default one group, the labels.

    A class without a side, such as ``DN``, is divided into left and right at the head's midplane."""
    temperatures: tuple[float, ...] = ()
    """What the logits are divided by, a number a channel, so that probabilities hold; empty for nothing."""
    mirrored: bool = False
    """Average over the map and its mirror image."""
    ensemble: bool = False
    """Average over mirror images and over all checkpoints of the weights: slower, a little better."""
    postprocessing: Postprocessing = Postprocessing()
    predictor: str | Callable[..., Any] = "bids_dgmseg.segmentation.predict:NetworkPredictor"
    weights: Weights | None = None
    memory_gb: float = 2.0
    citation: tuple[str, ...] = ()
    """Keys of ``data/boilerplate/references.bib``."""

    @property
    def uses_mirroring(self) -> bool:
        """Whether the map and its mirror image are averaged."""
        return self.mirrored or self.ensemble

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The nuclei in the order of the output channels."""
        return tuple(STRUCTURES.named(label) for label in self.labels)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The classes of each of the network's heads, without the backgrounds."""
        return self.heads or (self.labels,)

    @property
    def classes(self) -> tuple[str, ...]:
        """What the network tells apart besides background: labels, or nuclei of both sides."""
        return tuple(name for group in self.groups for name in group)


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
        known["heads"] = tuple(tuple(group) for group in known.get("heads", ()))
        known["postprocessing"] = Postprocessing(**known.get("postprocessing", {}))
        if "weights" in known:
            known["weights"] = Weights(**known["weights"])
        models[name] = Model(name=name, **known)
    return models


def get_model(name: str, *, option: str = "--model ") -> Model:
    """Look a model up by its key or alias; `option` is what messages put before it.

    Raises
    ------
    InputError
        If there is no such model.
    """
    key = ALIASES.get(name, name)
    if key not in MODELS:
        raise InputError(f"{option}{name}: no such model; choose from {', '.join([*ALIASES, *MODELS])}")
    return MODELS[key]


def weights_folder(model: Model) -> Path:
    """Where the package keeps a model's weights."""
    return Path(str(files("bids_dgmseg").joinpath("data", "weights", model.name)))


MODELS: dict[str, Model] = read_models(files("bids_dgmseg").joinpath("data", "models.toml").read_text(encoding="utf-8"))
