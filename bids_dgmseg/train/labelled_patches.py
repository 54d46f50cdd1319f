"""Samples from labelled maps: what a user drew, and what the model knew about the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from bids_dgmseg.image.boxes import Box, OrientedBox, box_of_mask
from bids_dgmseg.image.grids import Grid, block_affine, covering_block, world_grid
from bids_dgmseg.image.resample import resample, sample_points, smooth_for_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.segmentation.postprocess import postprocess
from bids_dgmseg.segmentation.predict import network_grid, predict_on_grid
from bids_dgmseg.segmentation.results import ProbabilityBlock
from bids_dgmseg.simulate.acquisition import blur
from bids_dgmseg.simulate.anatomy import HeadRanges, LabelMap, draw_head_points
from bids_dgmseg.simulate.ranges import chance, smooth_noise, uniform

_FINER = 0.75
"""Edge of a voxel of the targets relative to the network's: they are looked up by nearest neighbour."""

_ROOM_MM = 30.0
"""Kept around the patch, for samples that are turned, shifted and bent."""

_SHIFT_MM = 6.0
"""How far the localizer may be wrong."""


@dataclass(frozen=True)
class LabelledMap:
    """A map with labels of some nuclei.

    Parameters
    ----------
    name : str
        Of the scan.
    chi : Volume
        In ppm, finite.
    labels : Volume
        On the grid of `chi`: channels of the model (1, 2, … in the order of its labels), 0 where nothing was drawn.
    """

    name: str
    chi: Volume
    labels: Volume

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the nuclei that were drawn; of others nothing is known."""
        return tuple(int(channel) for channel in np.unique(self.labels.array) if channel)


@dataclass(frozen=True)
class Prepared:
    """A labelled map ready to be seen in many ways."""

    chi: Tensor
    """(X, Y, Z), in ppm, smoothed for the spacing."""
    world_to_index: Tensor
    """RAS+ mm to indices of `chi`, (4, 4)."""
    target: LabelMap
    """Channels to learn, 0 for background."""
    box: Box
    """Where the localizer looks."""


@dataclass(frozen=True)
class Variation:
    """How far samples differ from the map they are drawn from; a pair is the lowest and highest value."""

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
    """Log-uniform."""
    shift_ppm: float = 0.01
    """Largest shift of the zero."""
    slow_ppm: float = 0.01
    """Largest amplitude of a slowly varying field."""
    noise_ppm: tuple[float, float] = (0.001, 0.015)
    """Log-uniform."""
    blur_mm: float = 0.8
    """Largest SD along each axis, in a third of the samples."""
    mirrored: float = 0.5
    """Part of the samples whose sides are exchanged."""


def prepare(labelled: LabelledMap, box: Box, model: Model, *, weights: Path | None, device: str = "cpu") -> Prepared:
    """Say for each place of a map what is to be learned there.

    What was drawn counts. Elsewhere a nucleus that was not drawn in this map lies where the starting weights see
    it, and one that was drawn does not, whatever they see.

    Parameters
    ----------
    labelled : LabelledMap
        Map and labels; slices may be thick and in any orientation.
    box : Box
        Where the model's localizer looks.
    model : Model
        With a network of its own.
    weights : path or None
        Folder of the starting weights; None for the model's own.
    device : {"cpu", "cuda", "auto"}
        Where they run.
    """
    spacing_mm = model.input.spacing_mm
    centre_mm, (_, axes) = np.array(box.centre_mm), box.frame
    wide = Box.around(centre_mm, OrientedBox.from_axes(axes, model.input.patch_mm)).expanded(_ROOM_MM)
    x, y, z = (_FINER * step for step in spacing_mm)
    fine = world_grid(wide, (x, y, z))
    known = _known_before(labelled.chi, box, model, fine, weights=weights, device=device)
    drawn = most_probable(soft_masks(labelled.labels), fine, at_least=0.5)
    target = np.where(np.isin(known, labelled.channels), 0, known)
    target[drawn > 0] = drawn[drawn > 0]
    chi = smooth_for_grid(labelled.chi, Grid(fine.shape, np.diag([*spacing_mm, 1.0])))
    block = covering_block(Grid(chi.shape, chi.affine), wide)
    to_index = torch.tensor(np.linalg.inv(block_affine(chi.affine, block)), dtype=torch.float32)
    values = torch.from_numpy(np.ascontiguousarray(chi.array[block], np.float32))
    return Prepared(values, to_index, LabelMap.from_volume(Volume(target, fine.affine)), box)


def _known_before(
    chi: Volume, box: Box, model: Model, fine: Grid, *, weights: Path | None, device: str
) -> NDArray[np.uint8]:
    """Label a grid as the starting weights do, stray parts dropped."""
    grid = network_grid(chi, box, model)
    probabilities = predict_on_grid(chi, grid, model, weights=weights, device=device)
    block = ProbabilityBlock(probabilities, (slice(None),) * 3, voxel_size_mm=grid.voxel_size_mm)
    labels = postprocess(block, model)
    probabilities[1:, (labels == 0) & (probabilities.argmax(axis=0) > 0)] = 0
    return most_probable(
        ((channel, Volume(part, grid.affine)) for channel, part in enumerate(probabilities[1:], start=1)), fine
    )


def soft_masks(labels: Volume) -> Iterator[tuple[int, Volume]]:
    """Turn labels into fractions that rise with the distance from the outline, 0.5 on it.

    Interpolated linearly they move the outline gradually from one thick slice to the next (Raya and Udupa 1990), where
    fractions of 0 and 1 would repeat each slice.
    """
    width_mm = 2 * max(labels.voxel_size_mm)
    for channel, found in enumerate(ndimage.find_objects(labels.array), start=1):
        if found is None:
            continue
        block = tuple(slice(max(side.start - 3, 0), side.stop + 3) for side in found)
        mask = np.pad(labels.array[block] == channel, 1)
        inner, outer = (ndimage.distance_transform_edt(side, labels.voxel_size_mm) for side in (mask, ~mask))
        depth_mm = (inner - outer)[1:-1, 1:-1, 1:-1]
        soft = np.clip(0.5 + depth_mm / (2 * width_mm), 0, 1).astype(np.float32)
        yield channel, Volume(soft, block_affine(labels.affine, block))


def most_probable(
    fractions: Iterable[tuple[int, Volume]], grid: Grid, *, at_least: float | None = None
) -> NDArray[np.uint8]:
    """Carry fractions of classes to a grid, linearly, and label each voxel with the largest.

    Parameters
    ----------
    fractions : iterable of (int, Volume)
        Class and its fraction of each voxel, from 0 to 1.
    grid : Grid
        Target.
    at_least : float, optional
        What is less is background; by default what is less than is missing to a sum of 1.

    Returns
    -------
    ndarray of uint8
        Classes on `grid`, 0 for background.
    """
    labels = np.zeros(grid.shape, np.uint8)
    largest, total = np.zeros(grid.shape, np.float32), np.zeros(grid.shape, np.float32)
    for number, volume in fractions:
        there = volume.array > 0.02
        if not there.any():
            continue
        around = box_of_mask(volume.with_array(there)).expanded(max(volume.voxel_size_mm))
        block = covering_block(grid, around)
        shape = tuple(piece.stop - piece.start for piece in block)
        if not all(shape):
            continue
        x, y, z = shape
        part = resample(volume, Grid((x, y, z), block_affine(grid.affine, block))).array
        larger = part > largest[block]
        labels[block][larger] = number
        largest[block][larger] = part[larger]
        total[block] += part
    labels[largest < (1 - total if at_least is None else at_least)] = 0
    return labels


class LabelledPatches(Dataset[tuple[Tensor, Tensor]]):
    """Patches of labelled maps, each seen in a new way; sample i of a seed is always the same.

    Parameters
    ----------
    maps : sequence of Prepared
        Each is drawn once before any is drawn again.
    model : Model
        Gives patch, spacing, normalization and sides.
    seed : int
        Two seeds share no sample.
    variation : Variation
        How far samples differ from their maps.
    size_mm : tuple of 3 float, optional
        Edges of samples, which lie anywhere in the box; by default the model's patch.

    Raises
    ------
    ValueError
        If the model's voxels are not cubes.
    """

    def __init__(
        self,
        maps: Sequence[Prepared],
        model: Model,
        *,
        seed: int,
        variation: Variation = Variation(),
        size_mm: tuple[float, float, float] | None = None,
    ) -> None:
        if len(set(model.input.spacing_mm)) > 1:
            raise ValueError(f"{model.name}: its voxels are not cubes: {model.input.spacing_mm} mm")
        self.maps, self.seed, self.variation = tuple(maps), seed, variation
        self.spacing_mm = model.input.spacing_mm[0]
        self.size_mm = size_mm or model.input.patch_mm
        x, y, z = (round(size / self.spacing_mm) for size in self.size_mm)
        self.shape = (x, y, z)
        self.normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]
        self.normalize = NORMALIZATIONS[model.input.normalization]
        self.mirror = mirrored_channels(model)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and channels (X, Y, Z)."""
        if get_worker_info() is not None:
            torch.set_num_threads(1)
        turn, place = divmod(index, len(self.maps))
        prepared = self.maps[np.random.default_rng((self.seed, turn)).permutation(len(self.maps))[place]]
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + index)
        points = draw_head_points(
            self.shape,
            self.spacing_mm,
            centre_mm=prepared.box.centre_mm,
            ranges=self._ranges(prepared.box),
            generator=generator,
        )
        if prepared.box.oriented:  # as the network will be shown it
            centre_mm = torch.tensor(prepared.box.centre_mm, dtype=torch.float32)
            points = (points - centre_mm) @ torch.tensor(prepared.box.oriented.axes.T, dtype=torch.float32) + centre_mm
        indices = points @ prepared.world_to_index[:3, :3].T + prepared.world_to_index[:3, 3]
        chi = sample_points(prepared.chi[None], indices)[0]
        labels = prepared.target.at(prepared.target.indices(points))
        chi = self._disturb(chi, generator)
        if chance(generator, self.variation.mirrored):
            chi, labels = chi.flip(0), self.mirror[labels.flip(0).long()]
        return torch.from_numpy(self.normalize(chi.numpy()))[None], labels

    def _ranges(self, box: Box) -> HeadRanges:
        """Let samples lie anywhere in a box that is larger than they are."""
        x, y, z = (
            shift + max(size - seen, 0) / 2
            for shift, size, seen in zip(self.variation.head.shift_mm, box.frame[0], self.size_mm, strict=True)
        )
        return replace(self.variation.head, shift_mm=(x, y, z))

    def _disturb(self, chi: Tensor, generator: torch.Generator) -> Tensor:
        """Change values inside the brain as other scans and reconstructions would."""
        inside = chi != 0
        low, high = np.log(self.variation.gain)
        changed = chi * float(np.exp(uniform(generator, low, high)))
        if chance(generator, 1 / 3):
            sigma = [uniform(generator, 0, self.variation.blur_mm) / self.spacing_mm for _ in range(3)]
            changed = blur(changed, sigma)
        slow = smooth_noise(self.shape, 40 / self.spacing_mm, generator)[0]
        changed = changed + uniform(generator, 0, self.variation.slow_ppm) * slow
        low, high = np.log(self.variation.noise_ppm)
        changed += torch.randn(chi.shape, generator=generator) * float(np.exp(uniform(generator, low, high)))
        changed += uniform(generator, -self.variation.shift_ppm, self.variation.shift_ppm)
        return torch.where(inside, changed, chi)


def mirrored_channels(model: Model) -> Tensor:
    """Table of channels with the sides exchanged; a nucleus whose other side the model lacks becomes background."""
    other = {"L": "R", "R": "L"}
    names = [f"{structure.nucleus}_{other[structure.hemisphere]}" for structure in model.structures]
    channels = [model.labels.index(name) + 1 if name in model.labels else 0 for name in names]
    return torch.tensor([0, *channels], dtype=torch.uint8)
