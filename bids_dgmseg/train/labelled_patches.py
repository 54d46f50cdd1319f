"""Samples of fine-tuning: patches of labelled maps, with targets from the manual labels and the starting weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from bids_dgmseg.image.grids import Box, Grid, OrientedBox, block_affine, box_of_mask, covering_block, world_grid
from bids_dgmseg.image.resample import resample, sample_points, smooth_for_grid
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.registry import Model
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.segmentation.postprocess import postprocess
from bids_dgmseg.segmentation.predict import ProbabilityBlock, network_grid, predict_on_grid
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.ranges import chance
from bids_dgmseg.train.augment import Variation, mirrored_labels
from bids_dgmseg.train.data import LabelledMap

_FINER = 0.75
"""Voxel size of the targets relative to the network's: they are read by nearest neighbour."""

_MARGIN_MM = 30.0
"""Margin around the patch, for samples that are rotated, shifted and bent."""


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


def prepare_map(
    labelled: LabelledMap, box: Box, model: Model, *, weights: Path | None, device: str = "cpu"
) -> PreparedMap:
    """Compute the target of each voxel.

    Manual labels count. Elsewhere a nucleus without manual labels in this map lies where the starting weights
    predict it; one with manual labels does not, whatever they predict.

    Parameters
    ----------
    labelled : LabelledMap
        Map and labels; slices may be thick and in any orientation.
    box : Box
        Box of the model's localizer.
    model : Model
        With a network in this package.
    weights : path or None
        Folder of the starting weights; None for those in the package.
    device : {"cpu", "cuda", "auto"}
        Where they run.
    """
    spacing_mm = model.input.spacing_mm
    centre_mm, (_, axes) = np.array(box.centre_mm), box.frame
    wide = Box.around(centre_mm, OrientedBox.from_axes(axes, model.input.patch_mm)).expanded(_MARGIN_MM)
    x, y, z = (_FINER * step for step in spacing_mm)
    fine = world_grid(wide, (x, y, z))
    predicted = _predict(labelled.chi, box, model, fine, weights=weights, device=device)
    drawn = most_probable(soft_masks(labelled.labels), fine, at_least=0.5)
    target = np.where(np.isin(predicted, labelled.channels), 0, predicted)
    target[drawn > 0] = drawn[drawn > 0]
    chi = smooth_for_grid(labelled.chi, Grid(fine.shape, np.diag([*spacing_mm, 1.0])))
    block = covering_block(Grid(chi.shape, chi.affine), wide)
    to_index = torch.tensor(np.linalg.inv(block_affine(chi.affine, block)), dtype=torch.float32)
    values = torch.from_numpy(np.ascontiguousarray(chi.array[block], np.float32))
    return PreparedMap(values, to_index, LabelMap.from_volume(Volume(target, fine.affine)), box)


def _predict(
    chi: Volume, box: Box, model: Model, fine: Grid, *, weights: Path | None, device: str
) -> NDArray[np.uint8]:
    """Label a grid with the starting weights, without the parts that postprocessing removes."""
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

    Interpolated linearly they move the outline gradually from one thick slice to the next (Raya and Udupa 1990);
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
    """Resample fractions of classes linearly, and label each voxel with the largest.

    Parameters
    ----------
    fractions : iterable of (int, Volume)
        Class and its fraction of each voxel, from 0 to 1.
    grid : Grid
        Target.
    at_least : float, optional
        Smaller fractions become background; by default those smaller than what all classes lack to a sum of 1.

    Returns
    -------
    ndarray of uint8
        Classes on `grid`, 0 for background.
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


class LabelledPatches(Dataset[tuple[Tensor, Tensor]]):
    """Augmented patches of labelled maps; sample i of a seed is always the same.

    Parameters
    ----------
    maps : sequence of PreparedMap
        Each is drawn once before any is drawn again.
    model : Model
        Gives patch, spacing, normalization and hemispheres.
    seed : int
        Two seeds share no sample.
    variation : Variation
        Augmentation; by default that of `Variation`.
    size_mm : tuple of 3 float, optional
        Size of samples, which lie anywhere in the box; by default the model's patch.

    Raises
    ------
    ValueError
        If the model's voxels are not isotropic.
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
        if len(set(model.input.spacing_mm)) > 1:
            raise ValueError(f"{model.name}: its voxels are not isotropic: {model.input.spacing_mm} mm")
        self.maps, self.seed, self.variation = tuple(maps), seed, variation or Variation()
        self.spacing_mm = model.input.spacing_mm[0]
        self.size_mm = size_mm or model.input.patch_mm
        x, y, z = (round(size / self.spacing_mm) for size in self.size_mm)
        self.shape = (x, y, z)
        self.normalize: Callable[[NDArray[np.float32]], NDArray[np.float32]]
        self.normalize = NORMALIZATIONS[model.input.normalization]
        self.mirrored = mirrored_labels(model)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw sample `index`: input (1, X, Y, Z) and channels (X, Y, Z)."""
        if get_worker_info() is not None:
            torch.set_num_threads(1)
        turn, number = divmod(index, len(self.maps))
        one = self.maps[np.random.default_rng((self.seed, turn)).permutation(len(self.maps))[number]]
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + index)
        points = self.variation.draw_points(one.box, self.shape, self.spacing_mm, self.size_mm, generator)
        indices = points @ one.world_to_index[:3, :3].T + one.world_to_index[:3, 3]
        chi = sample_points(one.chi[None], indices)[0]
        labels = one.target.at(one.target.indices(points))
        chi = self.variation.change_values(chi, self.spacing_mm, generator)
        if chance(generator, self.variation.mirrored):
            chi, labels = chi.flip(0), self.mirrored[labels.flip(0).long()]
        return torch.from_numpy(self.normalize(chi.numpy()))[None], labels
