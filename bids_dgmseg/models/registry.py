"""Model registry: one block of ``data/models.toml`` per model."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import msgspec

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import sha256
from bids_dgmseg.models.structures import STRUCTURES, Structure

Record = TypeVar("Record")

Positive = Annotated[float, msgspec.Meta(gt=0)]

Normalization = Literal["ppm", "zscore", "minmax", "magnitude"]

ALIASES = {"default": "dgm16"}

LATERAL_VENTRICLE = "lateral_ventricle"
"""Auxiliary class of a network that keeps nuclei apart from the ventricle."""

VEIN = "vein"
"""Auxiliary class of a network that keeps nuclei apart from veins."""

NETWORKS = (
    "bids_dgmseg.networks.attention_unet:AttentionUNet25D",
    "bids_dgmseg.networks.attention_unet:ResNet50AttentionUNet25D",
    "bids_dgmseg.networks.attention_unet:UNet3D",
    "bids_dgmseg.networks.dcn_net:DCNNet",
    "bids_dgmseg.networks.dcn_net:DilatedDenseNet",
    "bids_dgmseg.networks.dcn_net:FCDenseNet",
    "bids_dgmseg.networks.deepqsmseg:DeepQSMSeg",
    "bids_dgmseg.networks.deepqsmseg:VNet",
    "bids_dgmseg.networks.plain_unet:PlainUNet",
)
"""Networks of this package."""

NETWORK_GROUP = "bids_dgmseg.networks"
"""Entry points by which other packages add networks, ``name = "package.module:Class"``."""


def list_networks() -> tuple[str, ...]:
    """List the networks that a user's file may name; nothing else is imported for one.

    They are those of this package, and those that installed packages declare as entry points of `NETWORK_GROUP`.
    """
    return (*NETWORKS, *sorted(point.value for point in entry_points(group=NETWORK_GROUP)))


@dataclass(frozen=True)
class ModelInput:
    """Input of a network."""

    spacing_mm: tuple[Positive, Positive, Positive]
    patch_mm: tuple[Positive, Positive, Positive]
    normalization: Normalization = "ppm"
    channels: int = 1
    slices: int = 0
    """Adjacent slices from which a 2D network labels the middle one; 0 for a 3D network."""
    stack_axis: int = 1
    """Axis across the slices: 0 sagittal, 1 coronal, 2 axial."""
    window_step: int = 0
    """Voxels between sliding windows of equal weight; 0: windows overlap by half and have Gaussian weights."""
    window_slack: float = 0.0
    """Fraction of the patch by which the grid may exceed it along an axis and still be predicted in one window."""
    zero_padding: bool = False
    """Surround the normalized box with zeros to the size of the patch; otherwise the box is at least that large."""
    contrast: str = "chi"
    """``Contrast`` in the sidecars of images that are no susceptibility maps, such as b0; others are refused."""
    native_voxel_tolerance: float = 0.0
    """Maximum relative difference from ``spacing_mm`` at which the voxels of the map are used without resampling."""


@dataclass(frozen=True)
class Localizer:
    """How the region of interest is found.

    ``network`` runs a whole-head network on a coarse grid (described by the fields below, as in `Model`), ``centre``
    takes the middle of the brain, ``atlas`` registers the best of the atlases in the model folder, ``nnunet`` runs the
    nnU-Net in the subfolder ``cerebellum``.
    """

    kind: Literal["network", "atlas", "centre", "nnunet"]
    margin_mm: float = 0.0
    guard: str = ""
    """Model whose whole-head network corrects a box of ``centre`` or ``atlas`` that cuts a nucleus; empty for none."""
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    input: ModelInput | None = None


@dataclass(frozen=True)
class Postprocessing:
    """Steps from probabilities to labels, per nucleus and side."""

    threshold: float = 0.0
    """Probability that a labelled voxel must exceed; 0: the most probable class, including background."""
    min_component_fraction: float = 0.25
    """Components smaller than this fraction of the largest are removed; 1 keeps only the largest."""
    position_sd_mm: float = 0.0
    """SD of the positions of nuclei relative to each other. Before the step above, components are compared by size
    times a Gaussian of their distance from the expected position; 0: position is ignored."""
    own_side_only: bool = False
    """Set the probabilities of nuclei to 0 on the other side of the midplane first."""
    region_sd_mm: float = 0.0
    """SD of the distance of cerebellar nuclei from where the default model's localizer finds them. With
    ``own_side_only``: of each nucleus the component with the largest size times a Gaussian of it is kept; 0: all."""
    valid_voxels_only: bool = False
    """Set the probabilities of all nuclei to 0 outside the field of view first; not for nnU-Net folders."""
    without_veins: tuple[str, ...] = ()
    """Nuclei, as ``CN_L``, whose thin parts are removed if they are as bright as veins."""
    fill_holes: bool = False
    smooth: bool = False
    """Majority vote of each voxel and its six neighbours."""


@dataclass(frozen=True)
class Weights:
    """Weights of a model in the package."""

    files: Mapping[str, str]
    """File name relative to the weights folder → sha256."""
    licence: str
    trained_on: str


@dataclass(frozen=True)
class Model:
    """One block of ``models.toml``.

    ``labels`` are the abbreviations of channels 1, 2, … of the probabilities; channel 0 is background.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    input: ModelInput
    localizer: Localizer
    network: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[tuple[str, ...], ...] = ()
    """Classes of each softmax head, which also has its own background; by default one head with all labels.

    A class without a side, such as ``DN``, is split into left and right at the midplane of the head."""
    auxiliary: tuple[str, ...] = ()
    """Classes of the network that are no labels, such as a ventricle beside a nucleus; they become background."""
    ventricles: str = ""
    """Model in the package that finds the lateral ventricles, an auxiliary class of it; empty: the localizer does, if
    they are among its labels."""
    temperatures: tuple[Positive, ...] = ()
    """One per channel of the network, by which logits are divided to calibrate probabilities; empty: uncalibrated."""
    mirrored: bool = False
    """Average the predictions of the map and its mirror image."""
    postprocessing: Postprocessing = Postprocessing()
    engine: Literal["networks", "nnunet"] = "networks"
    """Runs the model, see `bids_dgmseg.segmentation.engines`: networks of this package, or nnU-Net model folders."""
    predictor: Any = "bids_dgmseg.segmentation.predict:NetworkPredictor"
    """``module:Class`` of a `bids_dgmseg.segmentation.predict.Predictor`, or the class; for the engine ``networks``."""
    label_numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Nucleus, or ``cerebellum`` → its numbers in the model folder; for the engine ``nnunet``."""
    weights: Weights | None = None
    memory_gb: float = 2.0
    ages: tuple[float, float] | None = None
    """Lowest and highest age in years of the model's training; None if that is unknown."""
    citation: tuple[str, ...] = ()
    """Keys of ``data/boilerplate/references.bib``."""

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Nuclei in the order of the output channels."""
        return tuple(STRUCTURES.named(label) for label in self.labels)

    def years_beyond_training(self, age: float) -> float:
        """Return how far an age in years is outside of `ages`; 0 inside."""
        low, high = self.ages or (age, age)
        return max(low - age, age - high, 0.0)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Classes of each head, without the backgrounds."""
        return self.heads or ((*self.labels, *self.auxiliary),)

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the network besides background: labels, or nuclei without a side."""
        return tuple(name for group in self.groups for name in group)

    @property
    def lacks_sides(self) -> bool:
        """Whether the network has classes without a side, which are split at the midplane."""
        return self.classes != (*self.labels, *self.auxiliary)

    def for_contrast(self, contrast: str) -> Model:
        """Return the model for images that are no susceptibility maps, which alone the guard of the box knows."""
        if contrast == self.input.contrast:
            return self
        localizer = replace(self.localizer, guard="")
        return replace(self, input=replace(self.input, contrast=contrast), localizer=localizer)


def to_record(content: Mapping[str, Any], kind: type[Record], *, where: str, remedy: str) -> Record:
    """Convert the content of a TOML file to a frozen dataclass.

    Parameters
    ----------
    content : mapping
        From `tomllib`.
    kind : type
        Dataclass; its annotations are the rules.
    where, remedy : str
        First and last part of the error message.

    Raises
    ------
    InputError
        If a key is unknown or missing, or a value has another type or range.
    """
    if unknown := next(_unknown_keys(content, kind), None):
        raise InputError(f"{where}: unknown key {unknown}; {remedy}")
    try:
        return msgspec.convert(dict(content), kind)
    except msgspec.ValidationError as error:
        problem, _, key = str(error).replace("`", "").replace(" | null", "").partition(" - at $.")
        prefix = f"{key}: " if key else ""
        raise InputError(f"{where}: {prefix}{problem[0].lower()}{problem[1:]}; {remedy}") from error


def _unknown_keys(content: Mapping[str, Any], kind: Any) -> Iterator[str]:
    """Yield keys that no field has; msgspec ignores them for dataclasses."""
    hints = get_type_hints(kind)
    names = {entry.name for entry in fields(kind)}
    for key, value in content.items():
        if key not in names:
            yield key
            continue
        nested = next((hint for hint in (hints[key], *get_args(hints[key])) if is_dataclass(hint)), None)
        if nested and isinstance(value, Mapping):
            yield from (f"{key}.{name}" for name in _unknown_keys(value, nested))


def read_models(text: str) -> dict[str, Model]:
    """Read a registry: TOML, one table per model.

    Raises
    ------
    InputError
        If a model lacks a value or has an unknown or impossible one.
    """
    return {
        name: to_record({"name": name, **block}, Model, where=f"models.toml: {name}", remedy="correct the registry")
        for name, block in tomllib.loads(text).items()
    }


def get_model(name: str, labels: Sequence[str] = (), *, prefix: str = "`model` ") -> Model:
    """Return the model of a name or alias, with the nuclei that other weights label.

    `prefix` precedes the name in error messages.

    Raises
    ------
    InputError
        If there is no such model.
    """
    key = ALIASES.get(name, name)
    if key not in MODELS:
        raise InputError(f"{prefix}{name}: no such model; choose from {', '.join([*ALIASES, *MODELS])}")
    return replace(MODELS[key], labels=tuple(labels)) if labels else MODELS[key]


def weights_folder(model: Model) -> Path:
    """Return the folder in the package where the weights of a model are."""
    return Path(str(files("bids_dgmseg").joinpath("data", "weights", model.name)))


def check_shipped_weights(model: Model) -> None:
    """Compare the weights of a model in the package with their checksums; quick, because nothing is loaded.

    Raises
    ------
    InputError
        If a file is missing or differs.
    """
    for name, checksum in (model.weights.files if model.weights else {}).items():
        path = weights_folder(model) / name
        if not path.is_file() or sha256(path) != checksum:
            raise InputError(f"{name}: its checksum differs from the registry's; reinstall the package")


_REGISTRY = read_models(files("bids_dgmseg").joinpath("data", "models.toml").read_text(encoding="utf-8"))

BRAIN_MASK = _REGISTRY.pop("brain-mask")
"""Network that finds the brain in a magnitude; not a model of nuclei."""

MODELS: dict[str, Model] = _REGISTRY
"""Name → model of nuclei."""
