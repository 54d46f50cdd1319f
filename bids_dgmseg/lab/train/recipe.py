"""Recipes: what a methods section says about a training, as values that can be changed by name."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import torch
from torch import Tensor, nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.lab.train.augment import Augmentation, Axis
from bids_dgmseg.lab.train.losses import (
    DCNNetTerms,
    attention_unet_loss,
    dcn_net_loss,
    deepqsmseg_loss,
    dice_and_cross_entropy,
    hybrid_loss,
    main_logits,
)
from bids_dgmseg.lab.train.schedule import Count, Pace
from bids_dgmseg.models.registry import NETWORKS, Model, Normalization, Positive
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.networks.dcn_net import Attended, DCNNet

_Block = TypeVar("_Block")

_ANY_LENGTH = ("axes", "milestones", "scale_weights")
"""Lists whose length may change; others have one value per axis, class or head."""


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
    zero_padding: bool = False
    """Surround the normalized region with zeros, half a sample on every side, from which samples are taken as well;
    otherwise the region is at least as large as a sample."""
    stack_axis: Axis | None = None
    """Axis of 2.5D samples: its slices are the channels, and the labels are those of the middle slice."""
    empty: Annotated[float, msgspec.Meta(le=1)] = 1.0
    """Fraction of the samples without labels that is used."""
    normalization: Normalization = "zscore"
    normalized: Literal["sample", "region"] = "sample"
    """Voxels over which `normalization` is computed."""


class Objective(Protocol):
    """A loss function of a network's output in training mode."""

    def __call__(self, network: nn.Module, answer: Any, labels: Tensor) -> Tensor:
        """Compute the loss; labels (B, ...) hold classes."""


@dataclass(frozen=True)
class DCNNetObjective:
    """`dcn_net_loss`, and the L2 penalty of the published program; attention counts in training mode alone."""

    terms: DCNNetTerms = field(default_factory=DCNNetTerms)
    l2: float = 1e-4

    def __call__(self, network: nn.Module, answer: Attended | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss; jointly estimated classes (``independent = false``) have the hybrid loss alone."""
        attention = answer.auxiliary.float() if isinstance(answer, Attended) else None
        logits = main_logits(answer)
        if logits.shape[1] == 2 * len(self.terms.heads):
            loss = dcn_net_loss(logits, labels, attention=attention, terms=self.terms)
        else:
            loss = hybrid_loss(logits, labels, terms=self.terms)
        if self.l2 and isinstance(network, DCNNet):
            squares = torch.stack([weight.square().sum() for weight in network.decayed_weights()])
            loss = loss + self.l2 * squares.sum()
        return loss


@dataclass(frozen=True)
class AttentionUNetObjective:
    """`attention_unet_loss`."""

    class_weights: tuple[float, ...] = (0.4, 0.2, 0.4)
    scale_weights: tuple[float, ...] = (0.6, 0.3, 0.1)
    """λ, full resolution first; as many as the network has scales."""
    smooth: float = 1e-2

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        if isinstance(answer, list) and len(answer) != len(self.scale_weights):
            found = f"{len(self.scale_weights)} values for {len(answer)} scales of the network"
            raise ValueError(f"scale_weights has {found}; give one per scale")
        return attention_unet_loss(
            answer, labels, class_weights=self.class_weights, scale_weights=self.scale_weights, smooth=self.smooth
        )


@dataclass(frozen=True)
class DeepQSMSegObjective:
    """`deepqsmseg_loss`."""

    focal_weight: float = 0.5
    epsilon: float = 1e-20

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        return deepqsmseg_loss(main_logits(answer), labels, focal_weight=self.focal_weight, epsilon=self.epsilon)


@dataclass(frozen=True)
class DiceCrossEntropyObjective:
    """`dice_and_cross_entropy`."""

    foreground_weight: float = 3.0
    smooth: float = 1.0

    def __call__(self, network: nn.Module, answer: list[Tensor] | Tensor, labels: Tensor) -> Tensor:
        """Compute the loss."""
        logits = main_logits(answer)
        return dice_and_cross_entropy(logits, labels, foreground_weight=self.foreground_weight, smooth=self.smooth)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    classes: Mapping[str, tuple[str, ...]]
    """Output classes 1, 2, … → their nuclei (both hemispheres, as ``DN``, or one, as ``DN_L``)."""
    sampling: Sampling
    loss: Objective
    pace: Pace
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: str = ""
    """Replaces the network of the model, unless it is empty."""
    arch: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model's network that differ from the registry's."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Replaces the voxel size of the model."""
    folds: Count = 5
    validation: Annotated[float, msgspec.Meta(ge=0, le=0.5)] | None = None
    """Fraction of the training participants for validation, with the fold's own part as test set; 0 to keep the last
    weights without validation; None validates on the fold's own part."""
    split_seed: int = 1
    """Seed of folds, validation set, subsets and references; not that of initial weights and samples."""
    start_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """Fraction of the initial weights in the final ones, which are a weighted mean of both (Wortsman et al. 2022)."""
    references: int = 0
    """Number of training scans that are copied to the model folder for an atlas localizer."""

    def __post_init__(self) -> None:
        """Refuse a network that is not in the registry's list."""
        if self.network not in ("", *NETWORKS):
            raise ValueError(f"{self.network!r} is not one of {', '.join(NETWORKS)}")

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
        return tuple(one.abbreviation for one in ALL_STRUCTURES if one.abbreviation in wanted or one.nucleus in wanted)


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change values of a recipe by settings such as ``pace.batch=4`` or ``sampling.step=[9, 9, 9]``.

    Raises
    ------
    InputError
        If there is no such value, or the new one is invalid.
    """
    for text in settings:
        key, value = read_setting(text, parameter="recipe")
        recipe = _override(recipe, key.split("."), value, key)
    return recipe


def read_setting(text: str, *, parameter: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as in TOML; an unquoted word is text.

    Raises
    ------
    InputError
        If it does not have this form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"`{parameter}` {text}: expected KEY=VALUE, for example `{parameter}` name=4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _override(block: _Block, path: list[str], value: Any, key: str) -> _Block:
    first, *rest = path
    known = {part.name: getattr(block, part.name) for part in dataclasses.fields(block)}  # type: ignore[arg-type]  # a dataclass
    if first not in known:
        raise InputError(f"`recipe` {key}: unknown value {first}; choose from {', '.join(known)}")
    old = known[first]
    if rest and dataclasses.is_dataclass(old):
        return replace(block, **{first: _override(old, rest, value, key)})  # type: ignore[type-var]  # a dataclass
    if rest or dataclasses.is_dataclass(old) or isinstance(old, Mapping):
        raise InputError(f"`recipe` {key}: not a single value; see the recipe in training.json")
    if first not in _ANY_LENGTH and isinstance(old, tuple) and isinstance(value, list) and len(value) != len(old):
        raise InputError(f"`recipe` {key}: {value} has {len(value)} values; give {len(old)}, as in {list(old)}")
    try:
        new = convert(get_type_hints(type(block), include_extras=True)[first], value)
        return replace(block, **{first: new})  # type: ignore[type-var]  # a dataclass
    except ValueError as error:
        raise InputError(f"`recipe` {key}: {error}; change the value") from error


def convert(kind: Any, value: Any) -> Any:
    """Convert a value read from TOML to its annotation; numbers must be finite and at least 0.

    Raises
    ------
    ValueError
        If it has another type or lies outside the range.
    """
    try:
        new = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        problem = (
            str(error).partition(" - at")[0].replace("`", "").replace(" | null", "").replace("Expected", "expected")
        )
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        expected = f"choose from {', '.join(map(str, choices))}" if choices else problem.lower()
        raise ValueError(f"{value!r}: {expected}") from error
    if not _is_valid(new):
        raise ValueError(f"{value!r}: expected finite numbers of at least 0")
    return new


def _is_valid(value: Any) -> bool:
    """Check that numbers are finite and at least 0, and that no sequence of any length (a list) is empty."""
    if isinstance(value, tuple | list):
        return value != [] and all(map(_is_valid, value))
    return not isinstance(value, int | float) or 0 <= value < math.inf
