"""Samples of the papers' recipes: patches, stacks of slices or whole crops of labelled maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from bids_dgmseg.image.grids import Box, Grid, box_of_mask, world_grid
from bids_dgmseg.image.resample import resample, sample_points
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.segmentation.localize import run_localizer
from bids_dgmseg.simulate.ranges import chance
from bids_dgmseg.train.data import LabelledMap
from bids_dgmseg.train.labelled_patches import most_probable, soft_masks
from bids_dgmseg.train.recipe import Recipe, Sampling
from bids_dgmseg.train.schedule import mix


@dataclass(frozen=True)
class Case:
    """A labelled map on the grid that a network sees, with the classes of a recipe."""

    name: str
    chi: Tensor
    """(X, Y, Z), in ppm or already normalized, RAS+."""
    labels: Tensor
    """(X, Y, Z) uint8, classes of the recipe; 0 is background."""
    region: tuple[slice, slice, slice]
    """Where samples lie; the map is larger, for samples that are shifted or rotated."""
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)


def prepare_case(labelled: LabelledMap, model: Model, recipe: Recipe, *, device: str = "cpu") -> Case:
    """Resample a labelled map to the spacing and region of a recipe.

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
    classes = labelled.labels.with_array(_to_classes(labelled.labels.array, model, recipe))
    if not classes.array.any():
        raise ValueError(f"{labelled.name}: none of {', '.join(recipe.classes)} is labelled")
    inner = world_grid(_find_region(labelled, classes, model, recipe, device), spacing_mm)
    outer, region = _with_margin(inner, recipe)
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


def _find_region(labelled: LabelledMap, classes: Volume, model: Model, recipe: Recipe, device: str) -> Box:
    """Find the box that samples are taken from, at least as large as one sample."""
    sampling, spacing_mm = recipe.sampling, recipe.voxel_size_mm(model)
    if sampling.region == "localizer":
        # The box that the trained model will see, whose patch may differ from that of the model in the package.
        trained = replace(model, input=replace(model.input, patch_mm=recipe.patch_mm(model)))
        box = run_localizer(labelled.chi, trained, device=device).box
    else:
        box = box_of_mask(classes.with_array(classes.array > 0)).expanded(sampling.margin * max(spacing_mm))
    x, y, z = np.maximum(box.size_mm, np.multiply(sampling.size, spacing_mm)).tolist()
    return box if (x, y, z) == box.size_mm else Box.centred(np.array(box.centre_mm), (x, y, z))


def _with_margin(inner: Grid, recipe: Recipe) -> tuple[Grid, tuple[slice, slice, slice]]:
    """Enlarge a grid by what augmented samples reach beyond it; returns it and where the smaller grid lies in it."""
    sampling, augmentation = recipe.sampling, recipe.augmentation
    reach = augmentation.shift + max(sampling.size) / 4 if augmentation.moves else 0.0
    neighbours = [size // 2 if axis == sampling.stack_axis else 0 for axis, size in enumerate(sampling.size)]
    margin = [
        int(np.ceil(max(size - width, 0) / 2 + (reach if axis in augmentation.axes else 0))) + max(1, neighbours[axis])
        for axis, (size, width) in enumerate(zip(sampling.size, inner.shape, strict=True))
    ]
    affine = inner.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ margin
    x, y, z = (width + 2 * more for width, more in zip(inner.shape, margin, strict=True))
    a, b, c = (slice(more, more + width) for width, more in zip(inner.shape, margin, strict=True))
    return Grid((x, y, z), affine), (a, b, c)


@dataclass(frozen=True)
class Window:
    """Position of one sample."""

    case: int
    start: tuple[int, int, int]


def list_windows(cases: Sequence[Case], sampling: Sampling, *, seed: int) -> list[Window]:
    """List the samples of an epoch, in the order of the cases; `seed` chooses which ones without labels are kept."""
    windows = []
    for number, case in enumerate(cases):
        starts = product(*(_starts(case.region[axis], axis, sampling) for axis in range(3)))
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        windows += [
            Window(number, (x, y, z))
            for x, y, z in starts
            if _has_labels(case, (x, y, z), sampling) or chance(generator, sampling.empty)
        ]
    return windows


def _starts(extent: slice, axis: int, sampling: Sampling) -> list[int]:
    """List the first voxels of the samples along an axis: evenly spaced, and one more at the end for a remainder."""
    size, step = sampling.size[axis], sampling.step[axis]
    if axis == sampling.stack_axis and step:
        return [middle - size // 2 for middle in range(extent.start, extent.stop, step)]
    last = extent.stop - extent.start - size
    if step == 0 or last <= 0:
        return [extent.start + last // 2]
    starts = list(range(0, last + 1, step))
    return [extent.start + start for start in [*starts, *([last] if starts[-1] < last else [])]]


def _has_labels(case: Case, start: tuple[int, int, int], sampling: Sampling) -> bool:
    block = [slice(first, first + size) for first, size in zip(start, sampling.size, strict=True)]
    if (axis := sampling.stack_axis) is not None:
        middle = start[axis] + sampling.size[axis] // 2
        block[axis] = slice(middle, middle + 1)
    return bool(case.labels[tuple(block)].any())


class WindowSamples(Dataset[tuple[Tensor, Tensor]]):
    """Samples of all epochs: index e · n + i is sample i of epoch e, the same whenever it is read.

    Parameters
    ----------
    cases : sequence of Case
        Maps.
    recipe : Recipe
        Sampling, augmentation and normalization.
    seed : int
        Of the augmentation.
    augment : bool
        Apply the recipe's augmentation.

    Raises
    ------
    ValueError
        If there is no sample.
    """

    def __init__(self, cases: Sequence[Case], recipe: Recipe, *, seed: int, augment: bool) -> None:
        self.cases, self.recipe, self.seed = tuple(cases), recipe, seed
        self.windows = list_windows(self.cases, recipe.sampling, seed=seed)
        self.augment = augment and recipe.augmentation.moves
        if not self.windows:
            raise ValueError("there is no training sample")

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a sample: input (channels, ...) and classes (...), in 2.5D without the axis of the stack."""
        if get_worker_info() is not None:
            torch.set_num_threads(1)
        epoch, number = divmod(index, len(self.windows))
        window, sampling = self.windows[number], self.recipe.sampling
        case = self.cases[window.case]
        if self.augment:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, number))
            points = self.recipe.augmentation.draw_points(window.start, sampling.size, case.spacing_mm, generator)
            chi = sample_points(case.chi[None], points)[0]
            labels = sample_points(case.labels[None].float(), points, nearest=True)[0].to(torch.uint8)
        else:
            x, y, z = (slice(first, first + n) for first, n in zip(window.start, sampling.size, strict=True))
            chi, labels = (values[x, y, z].contiguous() for values in (case.chi, case.labels))
        if sampling.normalized == "sample":
            chi = torch.from_numpy(NORMALIZATIONS[sampling.normalization](chi.numpy()))
        if (axis := sampling.stack_axis) is None:
            return chi[None], labels
        return chi.movedim(axis, 0), labels.select(axis, sampling.size[axis] // 2)
