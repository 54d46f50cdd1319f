"""Recipes: what a methods section says about a training, as values that can be changed by name."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.train.augment import Augmentation
from bids_dgmseg.train.losses import Objective
from bids_dgmseg.train.recipe_values import AnyLength, Axis, Count, Limits, Positive, convert
from bids_dgmseg.train.schedule import Pace

_Block = TypeVar("_Block")

Network = Literal[
    "",
    "bids_dgmseg.networks.attention_unet:AttentionUNet25D",
    "bids_dgmseg.networks.attention_unet:ResNet50AttentionUNet25D",
    "bids_dgmseg.networks.dcn_net:DCNNet",
    "bids_dgmseg.networks.deepqsmseg:DeepQSMSeg",
    "bids_dgmseg.networks.plain_unet:PlainUNet",
]
"""Empty for the network of the model."""


@dataclass(frozen=True)
class Sampling:
    """Samples of an epoch; voxels and axes are those of a RAS+ grid."""

    size: tuple[Count, Count, Count]
    """Size of a sample in voxels."""
    step: tuple[int, int, int]
    """Distance of neighbouring samples in voxels; 0 for one sample, in the centre."""
    region: Literal["labels", "localizer"]
    """Samples are taken around the labels, or from the box of the model's localizer."""
    margin: int = 0
    """Margin around the labels in voxels."""
    stack_axis: Axis | None = None
    """Axis of 2.5D samples: its slices are the channels, and the labels are those of the middle slice."""
    empty: Annotated[float, Limits(0, 1)] = 1.0
    """Fraction of the samples without labels that is used."""
    normalization: Literal["ppm", "zscore", "minmax"] = "zscore"
    normalized: Literal["sample", "region"] = "sample"
    """Voxels over which `normalization` is computed."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    classes: Mapping[str, tuple[str, ...]]
    """Output classes 1, 2, … → their nuclei (both hemispheres, as ``DN``, or one, as ``DN_L``)."""
    sampling: Sampling
    loss: Objective
    pace: Pace
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: Network = ""
    """Replaces the network of the model."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Replaces the voxel size of the model."""
    folds: Count = 5
    validation: Annotated[float, Limits(0, 0.5, above=True)] | None = None
    """Fraction of the training participants for validation, with the fold's own part as test set; None validates on the
    fold's own part."""
    references: int = 0
    """Number of training scans that are copied to the model folder for an atlas localizer."""

    def patch_mm(self, model: Model) -> tuple[float, float, float]:
        """Return the size of a sample and of the crop in use; along a stack of slices that of the model."""
        x, y, z = (
            patch if axis == self.sampling.stack_axis else round(size * step, 4)
            for axis, (patch, size, step) in enumerate(
                zip(model.input.patch_mm, self.sampling.size, self.voxel_size_mm(model), strict=True)
            )
        )
        return x, y, z

    def voxel_size_mm(self, model: Model) -> tuple[float, float, float]:
        """Return the voxel size of samples."""
        return self.spacing_mm or model.input.spacing_mm

    def structures(self, name: str) -> tuple[str, ...]:
        """Return the abbreviations of the nuclei of a class, with hemispheres."""
        wanted = self.classes[name]
        return tuple(one.abbreviation for one in STRUCTURES if one.abbreviation in wanted or one.nucleus in wanted)


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change values of a recipe by settings such as ``pace.batch=4`` or ``sampling.step=[9, 9, 9]``.

    Raises
    ------
    InputError
        If there is no such value, or the new one is invalid.
    """
    for text in settings:
        key, value = read_setting(text, option="--recipe")
        recipe = _override(recipe, key.split("."), value, key)
    return recipe


def read_setting(text: str, *, option: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as in TOML; an unquoted word is text.

    Raises
    ------
    InputError
        If it does not have this form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{option} {text}: expected KEY=VALUE, for example {option} name=4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _override(block: _Block, path: list[str], value: Any, key: str) -> _Block:
    first, *rest = path
    known = {part.name: getattr(block, part.name) for part in dataclasses.fields(block)}  # type: ignore[arg-type]  # a dataclass
    if first not in known:
        raise InputError(f"--recipe {key}: unknown value {first}; choose from {', '.join(known)}")
    old = known[first]
    if rest and dataclasses.is_dataclass(old):
        return replace(block, **{first: _override(old, rest, value, key)})  # type: ignore[type-var]  # a dataclass
    if rest or dataclasses.is_dataclass(old) or isinstance(old, Mapping):
        raise InputError(f"--recipe {key}: not a single value; see the recipe in training.json")
    kind = get_type_hints(type(block), include_extras=True)[first]
    fixed = AnyLength() not in getattr(kind, "__metadata__", ())
    if fixed and isinstance(old, tuple) and old and isinstance(value, list) and len(value) != len(old):
        raise InputError(f"--recipe {key}: {value} has {len(value)} values; give {len(old)}, as in {list(old)}")
    try:
        new = convert(kind, value)
    except ValueError as error:
        raise InputError(f"--recipe {key}: {error}; change the value") from error
    return replace(block, **{first: new})  # type: ignore[type-var]  # a dataclass
