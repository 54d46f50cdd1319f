"""Recipes, as TOML files that name what differs from a paper's methods section, and the folds that they ask for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import MISSING
from bids_dgmseg.lab.simulate.ranges import uniform
from bids_dgmseg.lab.train.core import Count, Pace
from bids_dgmseg.lab.train.losses import AnyLoss, DCNNetLoss
from bids_dgmseg.models.registry import Model, Normalization, Positive, list_networks
from bids_dgmseg.models.structures import ALL_STRUCTURES
from bids_dgmseg.study.participants import read_labelled_table

RECIPES = Path(__file__).with_name("recipes")
"""``MODEL.toml`` is the paper's recipe, to be compared with its methods section line by line; ``MODEL-NAME.toml`` has
what another training of the paper changes."""

Size = tuple[Count, Count, Count]
Share = Annotated[float, msgspec.Meta(ge=0, le=0.5)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Axis = Annotated[int, msgspec.Meta(ge=0, le=2)]


class Augmentation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Geometric augmentation of a recipe; the default is none."""

    axes: tuple[Axis, ...] = (0, 1, 2)
    """Axes along which samples are shifted and scaled; rotations are those within them."""
    shift: Amount = 0.0
    """Largest shift along each axis, in voxels."""
    rotation_deg: Amount = 0.0
    """Largest rotation about each axis."""
    scale: tuple[Positive, Positive] = (1.0, 1.0)
    """Lowest and highest scale, drawn per axis."""

    @property
    def moves(self) -> bool:
        """True if it does anything."""
        return bool(self.shift or self.rotation_deg or self.scale != (1.0, 1.0))

    def draw_points(
        self,
        start: tuple[int, int, int],
        size: tuple[int, int, int],
        spacing_mm: tuple[float, float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Rotate, scale and shift a window about its centre.

        `start` and `size` are its first voxel and number of voxels; rotations are those of the head, not of the array.
        Returns the fractional voxel indices (*size, 3) to read the map at.
        """
        angles, factors, shifts = np.zeros(3), torch.ones(3), torch.zeros(3)
        for axis in self.axes:
            factors[axis] = uniform(generator, *self.scale)
            shifts[axis] = uniform(generator, -self.shift, self.shift)
        for axis in range(3):
            if {0, 1, 2} - {axis} <= set(self.axes):
                angles[axis] = np.deg2rad(uniform(generator, -self.rotation_deg, self.rotation_deg))
        centre = torch.tensor(start) + (torch.tensor(size) - 1) / 2
        grids = torch.meshgrid(
            *(torch.arange(first, first + n, dtype=torch.float32) for first, n in zip(start, size, strict=True)),
            indexing="ij",
        )
        spacing = torch.tensor(spacing_mm)
        rotation = torch.tensor(Rotation.from_euler("xyz", angles).as_matrix(), dtype=torch.float32)
        # Reading closer to the centre makes things larger: hence the division.
        matrix = rotation * (spacing / factors) / spacing[:, None]
        return (torch.stack(grids, dim=-1) - centre) @ matrix.T + centre - shifts


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Samples of an epoch; voxels and axes are those of a RAS+ grid."""

    size: Size
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
    empty: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    """Fraction of the samples without labels that is used."""
    normalization: Normalization = "zscore"
    normalized: Literal["sample", "region"] = "sample"
    """Voxels over which `normalization` is computed."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a network is trained."""

    classes: dict[str, tuple[str, ...]]
    """Output classes 1, 2, … → their nuclei (both hemispheres, as ``DN``, or one, as ``DN_L``)."""
    sampling: Sampling
    loss: AnyLoss
    pace: Pace
    augmentation: Augmentation = Augmentation()
    network: str = ""
    """Replaces the network of the model, unless it is empty."""
    arch: dict[str, Any] = {}
    """Arguments of the network that differ from the registry's."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Replaces the voxel size of the model."""
    contrast: str = "chi"
    """``Contrast`` in the sidecars of the images, such as b0 (Kim et al. 2020); chi needs none."""
    window_step: Count | None = None
    """Replaces the distance of sliding windows in use, in voxels."""
    folds: Count = 5
    validation: Share | None = None
    """Fraction of the training participants for validation, with the fold's own part as test set; 0 to keep the last
    weights without validation; None validates on the fold's own part."""
    split_seed: int = 1
    """Seed of folds, validation set, subsets and references; not that of initial weights and samples."""
    references: int = 0
    """Number of training scans that are copied to the model folder for an atlas localizer."""

    def __post_init__(self) -> None:
        """Refuse a network that is not in the registry's list, and weights of other heads."""
        if self.network and self.network not in list_networks():
            raise ValueError(f"network {self.network} is not one of {', '.join(list_networks())}")
        if isinstance(self.loss, DCNNetLoss) and len(self.loss.heads) != len(self.classes):
            raise ValueError(f"loss.heads has {len(self.loss.heads)} values for {len(self.classes)} classes")

    def arch_of(self, model: Model) -> dict[str, Any]:
        """Return the arguments of the network; those of the registry belong to the model's own network only."""
        return {**({} if self.network else model.arch), **self.arch}

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
        nuclei = self.classes[name]
        return tuple(row.abbreviation for row in ALL_STRUCTURES if row.abbreviation in nuclei or row.nucleus in nuclei)


class NnunetPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size of the nnU-Net of a step."""

    spacing_mm: Positive = 0.86
    memory_gb: Positive = 8.0
    """GPU memory for which nnU-Net's planner chooses the patch."""
    features: tuple[Count, Count] | None = None
    """Filters of the first stage, doubled at each further one, and their maximum; None for nnU-Net's own."""


class NnunetRecipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the two nnU-Nets of nnunet2step are trained."""

    cerebellum: NnunetPlan = NnunetPlan()
    dentate: NnunetPlan = NnunetPlan()
    epochs: Count = 5000
    """Of 50 steps; nnU-Net's own 1000 have 250."""
    folds: Count = 5
    validation: Share = 0.125
    """Of the participants outside the fold's own part: with five folds 70, 10 and 20 % of all."""
    split_seed: int = 1


def read_recipe(model: Model, changes: str | Path | None = None) -> Recipe | NnunetRecipe:
    """Read the recipe of a model's paper with the changes of a TOML file.

    `changes` is a path, or the name of a file in the package, such as ``attunet25d-source``. Values in it replace those
    of the paper's recipe one by one; ``classes``, and a loss of another ``kind``, as a whole.

    Raises
    ------
    InputError
        If there is no such file, or it has an unknown or invalid value.
    """
    path, content = RECIPES / f"{model.name}.toml", {}
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml") if "-" not in file.stem))
        raise InputError(f"{model.name}: no training recipe; choose from {names}")
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    if changes is not None:
        path = RECIPES / f"{changes}.toml" if not Path(changes).suffix else Path(changes)
        try:
            content = _merge(content, tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            names = ", ".join(sorted(file.stem for file in RECIPES.glob(f"{model.name}-*.toml")))
            raise InputError(f"`recipe` {changes}: no such file; pass a TOML file, or one of {names}") from error
        except ValueError as error:
            raise InputError(f"`recipe` {path.name}: not a TOML file ({error}); correct it") from error
    kind: type[Recipe | NnunetRecipe] = Recipe if "classes" in content else NnunetRecipe
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        text = str(error).replace("`", "").replace("$.", "")
        raise InputError(f"`recipe` {path.name}: {text}; compare it with {RECIPES / model.name}.toml") from error


def _merge(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Replace values one by one, in tables of tables too."""
    merged = dict(content)
    for name, value in changes.items():
        replaced = name == "classes" or not isinstance(value, Mapping) or "kind" in value
        merged[name] = value if replaced else _merge(content.get(name, {}), value)
    return merged


@dataclass(frozen=True)
class Split:
    """Participants of one fold."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def read_sites(dataset: Path, participants: set[str]) -> dict[str, str]:
    """Read the site of each participant from participants.tsv (``site`` or ``site_id``); without it all have one."""
    path = dataset / "participants.tsv"
    table = read_labelled_table(path, "participant_id") if path.is_file() else None
    columns = [] if table is None else [name for name in ("site", "site_id") if name in table.columns]
    if table is None or not columns:
        return dict.fromkeys(sorted(participants), MISSING)
    sites = table[columns[0]].fillna(MISSING)
    return {name: sites.get(name, MISSING) for name in sorted(participants)}


def split_fold(sites: Mapping[str, str], recipe: Recipe | NnunetRecipe, fold: int) -> Split:
    """Split participants (→ site) for one fold, counted from 0, each site in proportion.

    The sizes of folds differ by at most one. With one fold the test set is empty. See `Recipe.validation`; at least one
    participant validates, but of a single one none.
    """
    order = _shuffle_by_site(sites, seed=recipe.split_seed)
    part = sorted(order[fold :: recipe.folds]) if recipe.folds > 1 else []
    rest = {name: site for name, site in sites.items() if name not in part}
    if part and recipe.validation is None:
        return Split(tuple(sorted(rest)), tuple(part), ())
    if recipe.validation == 0:
        return Split(tuple(sorted(rest)), (), tuple(part))
    share = recipe.validation or 0.2
    if len(rest) < round(1 / share):
        validation = sorted(rest)[: len(rest) > 1]
    else:
        order = _shuffle_by_site(rest, seed=recipe.split_seed + 1)
        places = (int(number / share + 1e-9) for number in range(len(order)))
        validation = sorted(order[place] for place in places if place < len(order))
    return Split(tuple(name for name in sorted(rest) if name not in validation), tuple(validation), tuple(part))


def _shuffle_by_site(sites: Mapping[str, str], *, seed: int) -> list[str]:
    """Sort participants (→ site) by site, at random within it."""
    generator = np.random.default_rng(seed)
    order: list[str] = []
    for site in sorted(set(sites.values())):
        members = sorted(name for name, other in sites.items() if other == site)
        order += [members[number] for number in generator.permutation(len(members))]
    return order


def choose_some(names: Sequence[str], count: int | None, *, seed: int) -> list[str]:
    """Choose a number of names at random; a smaller choice is part of a larger one."""
    order = np.random.default_rng(seed).permutation(len(names))[:count]
    return sorted(names[number] for number in order)
