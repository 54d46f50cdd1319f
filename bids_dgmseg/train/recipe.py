"""What a methods section says of a training, as plain values that each can be changed by name."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from bids_dgmseg.errors import InputError
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.train.objectives import Objective
from bids_dgmseg.train.recipe_values import AnyLength, Limits, fit
from bids_dgmseg.train.status_line import part_over

_Block = TypeVar("_Block")

Count = Annotated[int, Limits(1)]

Positive = Annotated[float, Limits(0, above=True)]

Axis = Annotated[int, Limits(0, 2)]

Network = Literal[
    "",
    "bids_dgmseg.networks.attention_unet:AttentionUNet25D",
    "bids_dgmseg.networks.attention_unet:ResNet50AttentionUNet25D",
    "bids_dgmseg.networks.dcn_net:DCNNet",
    "bids_dgmseg.networks.deepqsmseg:DeepQSMSeg",
    "bids_dgmseg.networks.plain_unet:PlainUNet",
]
"""Empty for the model's own."""


@dataclass(frozen=True)
class Sampling:
    """What one sample is, and which samples an epoch holds; voxels and axes are those of a RAS+ grid."""

    size: tuple[Count, Count, Count]
    """Voxels of a sample."""
    step: tuple[int, int, int]
    """Distance of neighbouring samples; 0 for one sample, in the middle."""
    region: Literal["labels", "localizer"]
    """Samples lie around the labels, or in the box where the model looks."""
    margin: int = 0
    """Voxels around the labels."""
    stack_axis: Axis | None = None
    """Axis of 2.5D samples: its slices are the channels, and the middle one's labels are learned."""
    empty: Annotated[float, Limits(0, 1)] = 1.0
    """Part of the samples without any label that is kept."""
    normalization: Literal["ppm", "zscore", "minmax"] = "zscore"
    normalized: Literal["sample", "region"] = "sample"
    """What `normalization` is computed over."""


@dataclass(frozen=True)
class Augmentation:
    """How samples are moved anew each time; 0 for not at all."""

    axes: Annotated[tuple[Axis, ...], AnyLength()] = (0, 1, 2)
    """Axes that move; rotations are those within them."""
    shift: float = 0.0
    """Largest shift along each axis, in voxels."""
    rotation_deg: float = 0.0
    """Largest rotation about each axis."""
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Lowest and highest factor, drawn for each axis by itself."""

    @property
    def moves(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.shift or self.rotation_deg or self.scale != (1.0, 1.0))


@dataclass(frozen=True)
class Pace:
    """How long and how fast to learn; Adam throughout."""

    epochs: Count
    batch: Count
    learning_rate: Positive
    patience: Count | None = None
    """Epochs without a lower validation loss after which the training ends; None for never."""
    milestones: Annotated[tuple[int, ...], AnyLength()] = ()
    """Epochs from which on the learning rate is a tenth of what it was."""
    minutes: Positive | None = None
    """Time of learning after which the training ends, however many epochs a machine takes in it."""

    def rate(self, epoch: int, seconds: float = 0.0) -> float:
        """Learning rate of an epoch; where the time rules, `milestones` fall when as large a part of it is over."""
        part = self.part(epoch, seconds)
        return float(self.learning_rate * 0.1 ** sum(part >= milestone / self.epochs for milestone in self.milestones))

    def part(self, epoch: float, seconds: float) -> float:
        """Part of the training that lies behind, 0 to 1, after some epochs and seconds of learning."""
        return part_over(epoch / self.epochs, seconds, self.minutes)

    def shortened(self, epochs: int) -> Pace:
        """Take another number of epochs, the milestones at the same part of them, none before the first has begun."""
        milestones = tuple(max(1, round(milestone * epochs / self.epochs)) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)


@dataclass(frozen=True)
class Recipe:
    """How a network learns."""

    classes: Mapping[str, tuple[str, ...]]
    """Output classes 1, 2, … → nuclei (both sides, as ``DN``; or one, as ``DN_L``) that are it."""
    sampling: Sampling
    loss: Objective
    pace: Pace
    augmentation: Augmentation = field(default_factory=Augmentation)
    network: Network = ""
    """Takes the place of the model's own network."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Takes the place of the model's own."""
    folds: Count = 5
    validation: Annotated[float, Limits(0, 0.5, above=True)] | None = None
    """Part of the training scans that early stopping watches, rounded to one in so many, while the fold's own part
    stays unseen as a test; None lets it watch the fold's own part."""
    references: int = 0
    """Training scans that go into the model folder for an atlas localizer."""

    def patch_mm(self, model: Model) -> tuple[float, float, float]:
        """Size of a sample, which is that of the crop in use; along a stack of slices the model's own."""
        x, y, z = (
            patch if axis == self.sampling.stack_axis else round(size * step, 4)
            for axis, (patch, size, step) in enumerate(
                zip(model.input.patch_mm, self.sampling.size, self.voxel_size_mm(model), strict=True)
            )
        )
        return x, y, z

    def voxel_size_mm(self, model: Model) -> tuple[float, float, float]:
        """Give the spacing of samples: the recipe's own or the model's."""
        return self.spacing_mm or model.input.spacing_mm

    def structures(self, name: str) -> tuple[str, ...]:
        """Abbreviations of the nuclei of a class, sides apart."""
        wanted = self.classes[name]
        return tuple(one.abbreviation for one in STRUCTURES if one.abbreviation in wanted or one.nucleus in wanted)


def changed(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change a recipe by texts such as ``pace.batch=4`` or ``sampling.step=[9, 9, 9]``.

    Raises
    ------
    InputError
        If there is no such value, or one is given that it cannot have.
    """
    for text in settings:
        key, value = read_setting(text, option="--recipe")
        recipe = _changed(recipe, key.split("."), value, key)
    return recipe


def read_setting(text: str, *, option: str) -> tuple[str, Any]:
    """Read ``key=value``, the value as in TOML; a bare word is a text.

    Raises
    ------
    InputError
        If it is not of this form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{option} {text}: is not KEY=VALUE; write it such as {option} name=4")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _changed(block: _Block, path: list[str], value: Any, key: str) -> _Block:
    first, *rest = path
    known = {part.name: getattr(block, part.name) for part in dataclasses.fields(block)}  # type: ignore[arg-type]  # a dataclass
    if first not in known:
        raise InputError(f"--recipe {key}: there is no {first}; choose from {', '.join(known)}")
    old = known[first]
    if rest and dataclasses.is_dataclass(old):
        return replace(block, **{first: _changed(old, rest, value, key)})  # type: ignore[type-var]  # a dataclass
    if rest or dataclasses.is_dataclass(old) or isinstance(old, Mapping):
        raise InputError(f"--recipe {key}: is not a single value; see the recipe in training.json")
    kind = get_type_hints(type(block), include_extras=True)[first]
    fixed = AnyLength() not in getattr(kind, "__metadata__", ())
    if fixed and isinstance(old, tuple) and old and isinstance(value, list) and len(value) != len(old):
        raise InputError(f"--recipe {key}: {value} has not as many values as {list(old)}; give {len(old)}")
    try:
        new = fit(kind, value)
    except ValueError as error:
        raise InputError(f"--recipe {key}: {error}; give such a value") from error
    return replace(block, **{first: new})  # type: ignore[type-var]  # a dataclass
