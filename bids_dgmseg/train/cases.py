"""Labelled maps on the grid that a network sees, with the classes that it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bids_dgmseg.image.boxes import Box, box_of_mask
from bids_dgmseg.image.grids import Grid, world_grid
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.segmentation.localize import run_localizer
from bids_dgmseg.train.labelled_patches import LabelledMap, most_probable, soft_masks
from bids_dgmseg.train.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """One map to draw samples from."""

    name: str
    chi: Tensor
    """(X, Y, Z), in ppm or already normalized, along the world's axes."""
    labels: Tensor
    """(X, Y, Z) uint8, classes of the recipe; 0 is background."""
    region: tuple[slice, slice, slice]
    """Where samples lie; beyond it the map goes on, for samples that are moved."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)


def prepare_case(labelled: LabelledMap, model: Model, recipe: Recipe, *, device: str = "cpu") -> Case:
    """Bring a labelled map to the spacing and region of a recipe.

    Parameters
    ----------
    labelled : LabelledMap
        Map, and labels as channels of `model`.
    model : Model
        Gives spacing and localizer.
    recipe : Recipe
        Gives classes, region and normalization.
    device : {"cpu", "cuda", "auto"}
        Where a localizer's network runs.

    Raises
    ------
    ValueError
        If no class of the recipe is labelled.
    """
    spacing_mm = recipe.voxel_size_mm(model)
    classes = Volume(_to_classes(labelled.labels.array, model, recipe), labelled.labels.affine)
    if not classes.array.any():
        raise ValueError(f"{labelled.name}: none of {', '.join(recipe.classes)} is labelled")
    inner = world_grid(_region(labelled, classes, model, recipe, spacing_mm, device), spacing_mm)
    outer, region = _with_room(inner, recipe)
    chi = resample(labelled.chi, outer, antialias=True).array.astype(np.float32)
    labels = most_probable(soft_masks(classes), outer, at_least=0.5)
    if recipe.sampling.normalized == "region":
        chi[region] = NORMALIZATIONS[recipe.sampling.normalization](chi[region])
    return Case(labelled.name, torch.from_numpy(chi), torch.from_numpy(labels), region, spacing_mm)


def _to_classes(channels: NDArray[np.uint8], model: Model, recipe: Recipe) -> NDArray[np.uint8]:
    table = np.zeros(len(model.labels) + 1, np.uint8)
    for number, name in enumerate(recipe.classes, start=1):
        for abbreviation in recipe.structures(name):
            if abbreviation in model.labels:
                table[model.labels.index(abbreviation) + 1] = number
    classes: NDArray[np.uint8] = table[channels]
    return classes


def _region(
    labelled: LabelledMap,
    classes: Volume,
    model: Model,
    recipe: Recipe,
    spacing_mm: tuple[float, float, float],
    device: str,
) -> Box:
    """Lay the box that samples come from, at least as large as one of them."""
    sampling = recipe.sampling
    if sampling.region == "localizer":
        # As in use of what is being trained, not of what is in the package.
        own = replace(model, input=replace(model.input, patch_mm=recipe.patch_mm(model)))
        box = run_localizer(labelled.chi, own, device=device).box
    else:
        box = box_of_mask(classes.with_array(classes.array > 0)).expanded(sampling.margin * max(spacing_mm))
    x, y, z = np.maximum(box.size_mm, np.multiply(sampling.size, spacing_mm)).tolist()
    return box if (x, y, z) == box.size_mm else Box.centred(np.array(box.centre_mm), (x, y, z))


def _with_room(inner: Grid, recipe: Recipe) -> tuple[Grid, tuple[slice, slice, slice]]:
    """Add what moved samples reach beyond a grid; returns the larger grid and where the other lies in it."""
    sampling, augmentation = recipe.sampling, recipe.augmentation
    reach = augmentation.shift + max(sampling.size) / 4 if augmentation.moves else 0.0
    neighbours = [size // 2 if axis == sampling.stack_axis else 0 for axis, size in enumerate(sampling.size)]
    room = [
        int(np.ceil(max(size - width, 0) / 2 + (reach if axis in augmentation.axes else 0))) + max(1, neighbours[axis])
        for axis, (size, width) in enumerate(zip(sampling.size, inner.shape, strict=True))
    ]
    affine = inner.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ room
    x, y, z = (width + 2 * more for width, more in zip(inner.shape, room, strict=True))
    a, b, c = (slice(more, more + width) for width, more in zip(inner.shape, room, strict=True))
    return Grid((x, y, z), affine), (a, b, c)
