"""Samples of labelled maps: windows of voxels for the papers' recipes, patches in mm for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from bids_dgmseg.bids.labelled_scans import LabelledMap
from bids_dgmseg.image.grids import (
    Box,
    Grid,
    OrientedBox,
    aligned_grid,
    block_affine,
    box_of_mask,
    covering_block,
    resample,
    sample_points,
    smooth_for_grid,
    world_grid,
)
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.files import MappedArray, store
from bids_dgmseg.lab.simulate.anatomy import LabelMap, draw_head_points
from bids_dgmseg.lab.simulate.artefacts import blur
from bids_dgmseg.lab.simulate.ranges import HeadRanges, chance, smooth_noise, uniform
from bids_dgmseg.lab.train.core import mix
from bids_dgmseg.lab.train.recipe import Recipe, Sampling
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.structures import exchange_side
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.segmentation.localize import enclosing_axes, run_localizer
from bids_dgmseg.segmentation.postprocess import postprocess
from bids_dgmseg.segmentation.predict import (
    InferenceOptions,
    ProbabilityBlock,
    merge_auxiliary,
    network_grid,
    predict_on_grid,
)

_FINER = 0.75
"""Voxel size of fine-tuning's targets relative to the network's: they are read by nearest neighbour."""

_SHIFT_MM = 6.0
"""Largest error of the localizer that fine-tuning prepares for."""

_MARGIN_MM = 30.0
"""Margin around a patch of fine-tuning, for samples that are rotated, shifted and bent."""


class MappedTensor(MappedArray):
    """The same as a tensor."""

    def __get__(self, record: object, owner: type | None = None) -> Any:
        """Map the file into memory."""
        return torch.from_numpy(super().__get__(record, owner))


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


class StoredCase(Case):
    """A case whose tensors are in files; see `bids_dgmseg.io.files.store`."""

    chi: Any = MappedTensor()
    labels: Any = MappedTensor()


def prepare_case(labelled: LabelledMap, model: Model, recipe: Recipe, *, device: str = "cpu") -> Case:
    """Resample a labelled map to the spacing and region of a recipe; ValueError if none of its classes is labelled.

    `model` gives spacing and localizer, whose network runs on `device` ("cpu", "cuda" or "auto").
    """
    spacing_mm = recipe.voxel_size_mm(model)
    class_of = np.zeros(len(model.labels) + 1, np.uint8)
    for number, name in enumerate(recipe.classes, start=1):
        for abbreviation in recipe.structures(name):
            if abbreviation in model.labels:
                class_of[model.labels.index(abbreviation) + 1] = number
    classes = labelled.channel_map.with_array(class_of[labelled.channel_map.array])
    if not classes.array.any():
        raise ValueError(f"{labelled.name}: none of {', '.join(recipe.classes)} is labelled")
    box = _find_region(labelled, classes, model, recipe, device)
    native = Grid(labelled.chi.shape, labelled.chi.affine)
    inner = aligned_grid(box, spacing_mm, native, model.input.native_voxel_tolerance)  # as in prediction
    outer, region = _with_margin(inner, recipe)
    chi = resample(labelled.chi, outer, antialias=True).array.astype(np.float32)
    labels = most_probable(soft_masks(classes), outer, at_least=0.5)
    if recipe.sampling.normalized == "region":
        chi[region] = NORMALIZATIONS[recipe.sampling.normalization](chi[region])
    if recipe.sampling.zero_padding:
        outside = np.ones(chi.shape, bool)
        outside[region] = False
        chi[outside], labels[outside] = 0, 0
    return Case(labelled.name, torch.from_numpy(chi), torch.from_numpy(labels), region, spacing_mm)


def _find_region(labelled: LabelledMap, classes: Volume, model: Model, recipe: Recipe, device: str) -> Box:
    """Find the box that samples are taken from; without padding it is at least as large as one sample."""
    sampling, spacing_mm = recipe.sampling, recipe.voxel_size_mm(model)
    seen = replace(model.input, spacing_mm=spacing_mm, zero_padding=sampling.zero_padding)
    if sampling.region == "localizer":
        # The box that the trained model will see, whose patch may differ from that of the model in the package.
        trained = replace(model, input=replace(seen, patch_mm=recipe.patch_mm(model)))
        box = run_localizer(labelled.chi, trained, InferenceOptions(device=device)).box
    else:
        labels = classes.with_array(classes.array > 0)
        box = box_of_mask(labels, axes=enclosing_axes(labelled.chi, seen)).expanded(sampling.margin * max(spacing_mm))
    return box if sampling.zero_padding else box.at_least(np.multiply(sampling.size, spacing_mm).tolist())


def _with_margin(inner: Grid, recipe: Recipe) -> tuple[Grid, tuple[slice, slice, slice]]:
    """Enlarge a grid by what augmented samples reach beyond it; returns it and where the smaller grid lies in it."""
    sampling, augmentation = recipe.sampling, recipe.augmentation
    reach = augmentation.shift + max(sampling.size) / 4 if augmentation.moves else 0.0
    neighbours = [size // 2 if axis == sampling.stack_axis else 0 for axis, size in enumerate(sampling.size)]
    margin = [
        int(np.ceil(max(size - width, 0) / 2 + (reach if axis in augmentation.axes else 0)))
        + max(1, neighbours[axis], size // 2 if sampling.zero_padding else 0)
        for axis, (size, width) in enumerate(zip(sampling.size, inner.shape, strict=True))
    ]
    affine = inner.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ margin
    x, y, z = (width + 2 * more for width, more in zip(inner.shape, margin, strict=True))
    a, b, c = (slice(more, more + width) for width, more in zip(inner.shape, margin, strict=True))
    return Grid((x, y, z), affine), (a, b, c)


def list_windows(cases: Sequence[Case], sampling: Sampling, *, seed: int) -> list[tuple[int, tuple[int, int, int]]]:
    """List the samples of an epoch: the numbers of their cases, which ascend, and their first voxels.

    `seed` chooses which ones without labels are kept.
    """
    windows = []
    for number, case in enumerate(cases):
        labels = case.labels
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        for x, y, z in product(*(_starts(case.region[axis], axis, sampling) for axis in range(3))):
            block = [slice(first, first + size) for first, size in zip((x, y, z), sampling.size, strict=True)]
            if (axis := sampling.stack_axis) is not None:
                middle = block[axis].start + sampling.size[axis] // 2
                block[axis] = slice(middle, middle + 1)
            if labels[tuple(block)].any() or chance(generator, sampling.empty):
                windows.append((number, (x, y, z)))
    return windows


def _starts(extent: slice, axis: int, sampling: Sampling) -> list[int]:
    """List the first voxels of the samples along an axis: evenly spaced, and one more at the end for a remainder.

    In a region padded with zeros, samples begin half their size before it and leave a remainder out (Kim et al. 2020).
    """
    size, step = sampling.size[axis], sampling.step[axis]
    if axis == sampling.stack_axis and step:
        return [middle - size // 2 for middle in range(extent.start, extent.stop, step)]
    if sampling.zero_padding and step:
        return list(range(extent.start - size // 2, extent.stop + size // 2 - size + 1, step))
    last = extent.stop - extent.start - size
    if step == 0 or last <= 0:
        return [extent.start + last // 2]
    starts = list(range(0, last + 1, step))
    return [extent.start + start for start in [*starts, *([last] if starts[-1] < last else [])]]


class WindowSamples(Dataset[tuple[Tensor, Tensor]]):
    """Samples of all epochs: index e · n + i is sample i of epoch e, the same whenever it is read.

    `seed` is that of the augmentation, which `augment` applies. ValueError if there is no sample.
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
        epoch, number = divmod(index, len(self.windows))
        (place, start), sampling = self.windows[number], self.recipe.sampling
        case = self.cases[place]
        if self.augment:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch, number))
            points = self.recipe.augmentation.draw_points(start, sampling.size, case.spacing_mm, generator)
            chi = sample_points(case.chi[None], points)[0]
            labels = sample_points(case.labels[None].float(), points, nearest=True)[0].to(torch.uint8)
        else:
            x, y, z = (slice(first, first + n) for first, n in zip(start, sampling.size, strict=True))
            chi, labels = (values[x, y, z].contiguous() for values in (case.chi, case.labels))
        if sampling.normalized == "sample":
            chi = torch.from_numpy(NORMALIZATIONS[sampling.normalization](chi.numpy()))
        if (axis := sampling.stack_axis) is None:
            return chi[None], labels
        return chi.movedim(axis, 0), labels.select(axis, sampling.size[axis] // 2)


@dataclass(frozen=True)
class PreparedMap:
    """A labelled map from which many samples can be drawn."""

    chi: Tensor
    """(X, Y, Z), in ppm, smoothed for the spacing."""
    world_to_index: Tensor
    """RAS+ mm to indices of `chi`, (4, 4)."""
    target: LabelMap
    """Channels to learn, 0 for background."""
    box: Box
    """Box of the localizer."""

    def stored(self, folder: Path) -> PreparedMap:
        """Return the same with its tensors in files of a folder; see `bids_dgmseg.io.files`."""
        return store(replace(self, target=store(self.target, _StoredLabelMap, folder)), _StoredMap, folder)


class _StoredLabelMap(LabelMap):
    labels: Any = MappedTensor()


class _StoredMap(PreparedMap):
    chi: Any = MappedTensor()


def prepare_map(
    labelled: LabelledMap, box: Box, model: Model, *, weights: Path | None, device: str = "cpu"
) -> PreparedMap:
    """Compute the target of each voxel.

    Manual labels count. Elsewhere a nucleus without manual labels in this map, and an auxiliary class, lies where the
    starting weights predict it; a nucleus with manual labels does not, whatever they predict.

    Slices may be thick and in any orientation. `box` is that of the model's localizer; `weights` is the folder of the
    starting weights (None for those in the package), which run on `device` ("cpu", "cuda" or "auto").
    """
    spacing_mm = model.input.spacing_mm
    centre_mm, (_, axes) = np.array(box.centre_mm), box.frame
    wide = Box.around(centre_mm, OrientedBox.from_axes(axes, model.input.patch_mm))
    wide = replace(wide, oriented=None).expanded(_MARGIN_MM)
    x, y, z = (_FINER * step for step in spacing_mm)
    fine = world_grid(wide, (x, y, z))
    grid = network_grid(labelled.chi, box, model)
    probabilities = predict_on_grid(
        labelled.chi, grid, read_model_folder(model, weights), InferenceOptions(weights=weights, device=device)
    )
    nuclei = merge_auxiliary(probabilities, model)
    kept = postprocess(ProbabilityBlock(nuclei, (slice(None),) * 3, voxel_size_mm=grid.voxel_size_mm), model)
    nuclei[1:, (kept == 0) & (nuclei.argmax(axis=0) > 0)] = 0
    parts = enumerate(probabilities[1:], start=1)
    predicted = most_probable(((channel, Volume(part, grid.affine)) for channel, part in parts), fine)
    drawn = most_probable(soft_masks(labelled.channel_map), fine, at_least=0.5)
    target = np.where(np.isin(predicted, labelled.channels), 0, predicted)
    target[drawn > 0] = drawn[drawn > 0]
    chi = smooth_for_grid(labelled.chi, Grid(fine.shape, np.diag([*spacing_mm, 1.0])))
    block = covering_block(Grid(chi.shape, chi.affine), wide)
    to_index = torch.tensor(np.linalg.inv(block_affine(chi.affine, block)), dtype=torch.float32)
    values = torch.from_numpy(np.ascontiguousarray(chi.array[block], np.float32))
    return PreparedMap(values, to_index, LabelMap.from_volume(Volume(target, fine.affine)), box)


def soft_masks(labels: Volume) -> Iterator[tuple[int, Volume]]:
    """Turn labels into fractions that rise with the distance from the outline, 0.5 on it.

    Interpolated linearly they move the outline gradually from one thick slice to the next (Raya and Udupa 1990);
    fractions of 0 and 1 would repeat each slice.
    """
    width_mm = 2 * max(labels.voxel_size_mm)
    for channel, place in enumerate(ndimage.find_objects(labels.array), start=1):
        if place is None:
            continue
        block = tuple(slice(max(side.start - 3, 0), side.stop + 3) for side in place)
        mask = np.pad(labels.array[block] == channel, 1)
        inner, outer = (ndimage.distance_transform_edt(side, labels.voxel_size_mm) for side in (mask, ~mask))
        depth_mm = (inner - outer)[1:-1, 1:-1, 1:-1]
        soft = np.clip(0.5 + depth_mm / (2 * width_mm), 0, 1).astype(np.float32)
        yield channel, Volume(soft, block_affine(labels.affine, block))


def most_probable(
    fractions: Iterable[tuple[int, Volume]], grid: Grid, *, at_least: float | None = None
) -> NDArray[np.uint8]:
    """Resample fractions (0 to 1) of classes linearly to a grid, and label each voxel with the class of the largest.

    Fractions less than `at_least` become background; by default those less than what all classes lack to a sum of 1.
    """
    labels = np.zeros(grid.shape, np.uint8)
    largest, total = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
    for number, volume in fractions:
        present = volume.array > 0.02
        if not present.any():
            continue
        around = box_of_mask(volume.with_array(present)).expanded(max(volume.voxel_size_mm))
        block = covering_block(grid, around)
        x, y, z = (piece.stop - piece.start for piece in block)
        if not x * y * z:
            continue
        part = resample(volume, Grid((x, y, z), block_affine(grid.affine, block))).array
        larger = part > largest[block]
        labels[block][larger] = number
        largest[block][larger] = part[larger]
        total[block] += part
    labels[largest < (1 - total if at_least is None else at_least)] = 0
    return labels


@dataclass(frozen=True)
class Variation:
    """Augmentation of fine-tuning; pairs are the lowest and highest value."""

    head: HeadRanges = field(
        default_factory=lambda: HeadRanges(
            scale=(0.9, 1.1),
            axis_scale=(0.95, 1.05),
            rotation_deg=(10.0, 8.0, 8.0),
            shear=0.06,
            shift_mm=(_SHIFT_MM, _SHIFT_MM, _SHIFT_MM),
            bends=((30.0, 3.0), (12.5, 1.0)),
        )
    )
    gain: tuple[float, float] = (0.8, 1.25)
    """Log-uniform factor."""
    shift_ppm: float = 0.01
    """Largest shift of the zero."""
    slow_ppm: float = 0.01
    """Largest amplitude of a slowly varying field."""
    noise_ppm: tuple[float, float] = (0.001, 0.015)
    """Log-uniform SD of white noise."""
    blur_mm: float = 0.8
    """Largest SD of smoothing along each axis, in a third of the samples."""
    mirrored: float = 0.5
    """Fraction of the samples whose left and right are exchanged."""

    def draw_points(
        self,
        box: Box,
        shape: tuple[int, int, int],
        spacing_mm: float,
        size_mm: tuple[float, float, float],
        generator: torch.Generator,
    ) -> Tensor:
        """Draw the world coordinates (*shape, 3) in mm of a sample, which lies anywhere in a larger box."""
        x, y, z = (
            shift + max(size - seen, 0) / 2
            for shift, size, seen in zip(self.head.shift_mm, box.frame[0], size_mm, strict=True)
        )
        ranges = replace(self.head, shift_mm=(x, y, z))
        points = draw_head_points(shape, spacing_mm, centre_mm=box.centre_mm, ranges=ranges, generator=generator)
        if box.oriented:  # the network sees boxes along their own axes
            centre_mm = torch.tensor(box.centre_mm, dtype=torch.float32)
            points = (points - centre_mm) @ torch.tensor(box.oriented.axes.T, dtype=torch.float32) + centre_mm
        return points

    def change_values(self, chi: Tensor, spacing_mm: float, generator: torch.Generator) -> Tensor:
        """Change values inside the brain as other scans and reconstructions would."""
        inside = chi != 0
        low, high = np.log(self.gain)
        changed = chi * float(np.exp(uniform(generator, low, high)))
        if chance(generator, 1 / 3):
            sigma = [uniform(generator, 0, self.blur_mm) / spacing_mm for _ in range(3)]
            changed = blur(changed, sigma)
        x, y, z = chi.shape
        slow = smooth_noise((x, y, z), 40 / spacing_mm, generator)[0]
        changed = changed + uniform(generator, 0, self.slow_ppm) * slow
        low, high = np.log(self.noise_ppm)
        changed += torch.randn(chi.shape, generator=generator) * float(np.exp(uniform(generator, low, high)))
        changed += uniform(generator, -self.shift_ppm, self.shift_ppm)
        return torch.where(inside, changed, chi)


def mirrored_labels(model: Model) -> Tensor:
    """Return a table of labels and auxiliary classes with left and right exchanged.

    A nucleus whose other side the model lacks becomes 0.
    """
    names = (*model.labels, *model.auxiliary)
    exchanged = map(exchange_side, names)
    return torch.tensor([0, *(names.index(name) + 1 if name in names else 0 for name in exchanged)], dtype=torch.uint8)


class LabelledPatches(Dataset[tuple[Tensor, Tensor]]):
    """Augmented patches of labelled maps; sample i of a seed is always the same, and two seeds share no sample.

    Each map is drawn once before any is drawn again. Samples lie anywhere in the box; their `size_mm` is that of the
    model's patch by default, and the model's voxels are isotropic.
    """

    def __init__(
        self,
        maps: Sequence[PreparedMap],
        model: Model,
        *,
        seed: int,
        variation: Variation | None = None,
        size_mm: tuple[float, float, float] | None = None,
    ) -> None:
        self.maps, self.seed, self.variation = tuple(maps), seed, variation or Variation()
        self.spacing_mm = model.input.spacing_mm[0]
        self.size_mm = size_mm or model.input.patch_mm
        x, y, z = (round(size / self.spacing_mm) for size in self.size_mm)
        self.shape = (x, y, z)
        self.normalize = NORMALIZATIONS[model.input.normalization]
        self.mirrored = mirrored_labels(model)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and channels (X, Y, Z)."""
        turn, number = divmod(index, len(self.maps))
        drawn = self.maps[np.random.default_rng((self.seed, turn)).permutation(len(self.maps))[number]]
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + index)
        points = self.variation.draw_points(drawn.box, self.shape, self.spacing_mm, self.size_mm, generator)
        indices = points @ drawn.world_to_index[:3, :3].T + drawn.world_to_index[:3, 3]
        chi = sample_points(drawn.chi[None], indices)[0]
        labels = drawn.target.at(drawn.target.indices(points))
        chi = self.variation.change_values(chi, self.spacing_mm, generator)
        if chance(generator, self.variation.mirrored):
            chi, labels = chi.flip(0), self.mirrored[labels.flip(0).long()]
        return torch.from_numpy(self.normalize(chi.numpy()))[None], labels
