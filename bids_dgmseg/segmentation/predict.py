"""Step two: class probabilities inside the box, on the map's own grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import Grid, aligned_grid, covering_block, shape_to_cover
from bids_dgmseg.image.masks import is_valid, outside_field_of_view
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.weights import load_object, load_segmenters, pick_device
from bids_dgmseg.segmentation.hemispheres import find_midplane, split_hemispheres
from bids_dgmseg.segmentation.inference import (
    NORMALIZATIONS,
    coronal_stacks,
    forward_batch,
    gaussian_weight,
    sliding_windows,
)
from bids_dgmseg.segmentation.postprocess import labelled_nuclei
from bids_dgmseg.segmentation.probabilities import merge_heads, mirrored_channels, resample_back, softmax_heads
from bids_dgmseg.segmentation.regions import clip_and_remove_small_components
from bids_dgmseg.segmentation.results import ProbabilityBlock

Item = TypeVar("Item")

_WINDOWS: Mapping[str, int] = {"cpu": 1, "cuda": 4}
"""At once on each kind of device: a second one does not fit into the caches of a CPU, which is then slower."""

_SLICES = 8
"""At once."""


class Predictor(Protocol):
    """Maps a cropped and resampled map to probabilities (C + 1, X, Y, Z) on its grid, background first.

    The channels are ``model.classes``; nuclei without a side are divided afterwards.
    """

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        """Predict one crop."""


def predict(
    chi: Volume, box: Box, model: Model, *, weights: Path | None = None, device: str = "cpu"
) -> ProbabilityBlock:
    """Compute the probability of each nucleus.

    Parameters
    ----------
    chi : Volume
        Map in ppm, finite.
    box : Box
        Where to look.
    model : Model
        Which network, at which spacing.
    weights : path, optional
        Folder that takes the place of the model's own weights.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.

    Returns
    -------
    ProbabilityBlock
        On the map's own grid; a voxel larger than the network's holds the mean over it.
    """
    chi = clip_and_remove_small_components(chi)
    if model.localizer.kind == "nnunet":  # which has its own way from grid to grid
        from bids_dgmseg.segmentation.nnunet import NnunetPredictor

        return NnunetPredictor(model, weights=weights, device=device).predict_block(chi, box)
    grid = network_grid(chi, box, read_model_folder(model, weights))
    probabilities = predict_on_grid(chi, grid, model, weights=weights, device=device)
    own = Grid(chi.shape, chi.affine)
    slices = covering_block(own, box)
    seen = labelled_nuclei(probabilities, model)
    probabilities = resample_back(probabilities, grid, own, slices)
    if model.postprocessing.valid_voxels_only:
        gone = _clear(probabilities, outside_field_of_view(is_valid(chi.array))[slices], model)
        seen = tuple(name for name in seen if name not in gone)
    return ProbabilityBlock(probabilities, slices, seen, chi.voxel_size_mm)


def _clear(probabilities: NDArray[np.float32], outside: NDArray[np.bool_], model: Model) -> set[str]:
    """Make the marked voxels background, in place; returns the nuclei that had all their voxels there."""
    hidden = set(labelled_nuclei(probabilities[:, outside], model))
    probabilities[0, outside] = 1
    probabilities[1:, outside] = 0
    # Most maps hide nothing, and looking at every voxel takes a tenth of a second.
    return hidden - set(labelled_nuclei(probabilities, model)) if hidden else hidden


def network_grid(chi: Volume, box: Box, model: Model) -> Grid:
    """Lay the grid on which a model's network sees a box of a map."""
    return aligned_grid(box, model.input.spacing_mm, Grid(chi.shape, chi.affine), model.input.native_voxel_tolerance)


def predict_on_grid(
    chi: Volume, grid: Grid, model: Model, *, weights: Path | None = None, device: str = "cpu"
) -> NDArray[np.float32]:
    """Compute probabilities (C + 1, X, Y, Z), background first, on a grid of the model's spacing; else as `predict`."""
    kind = load_object(model.predictor) if isinstance(model.predictor, str) else model.predictor
    predictor: Predictor = kind(model, weights=weights, device=device)
    probabilities = predictor(resample(chi, grid, antialias=True))
    if model.classes == model.labels:
        return probabilities
    return split_hemispheres(probabilities, grid, model, find_midplane(chi))


class NetworkPredictor:
    """Torch networks, one a fold, run over windows of their own patch size and averaged."""

    def __init__(self, model: Model, *, weights: Path | None, device: str) -> None:
        self.model, self.device = read_model_folder(model, weights), device
        self.networks = load_segmenters(model, weights)

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        """Average windows, folds and, where the best is wanted, mirror images; then merge the heads."""
        predict_one = self._by_slices if self.model.input.slices else self._by_windows
        total, count = np.zeros((self._channels, *volume.shape), np.float32), 0
        for network in self.networks:
            total += predict_one(network, volume)
            count += 1
            if self.model.uses_mirroring:
                image = volume.with_array(volume.array[::-1])
                total += predict_one(network, image)[mirrored_channels(self.model.groups), ::-1]
                count += 1
        return merge_heads(total / np.float32(count), self.model.groups)

    def _by_windows(self, network: nn.Module, chi: Volume) -> NDArray[np.float32]:
        """Average the probabilities (channels of all heads, X, Y, Z) of overlapping windows."""
        shown = self.model.input
        values = self._normalize(chi.array)[None]
        patch = shape_to_cover(shown.patch_mm, chi.voxel_size_mm)
        windows = list(sliding_windows(chi.shape, patch, shown.window_step, shown.window_slack))
        total = np.zeros((self._channels, *chi.shape), np.float32)
        votes = np.zeros(chi.shape, np.float32)
        for some in _in_batches(windows, _WINDOWS[pick_device(self.device).type]):
            answers = self._probabilities(network, np.stack([values[:, *window] for window in some]))
            for window, answer in zip(some, answers, strict=True):
                weight = np.float32(1) if shown.window_step or len(windows) == 1 else gaussian_weight(answer.shape[1:])
                total[:, *window] += answer * weight
                votes[window] += weight
        total /= votes
        return total

    def _by_slices(self, network: nn.Module, chi: Volume) -> NDArray[np.float32]:
        """Assemble the probabilities (channels, X, Y, Z) of all coronal slices, each seen among its neighbours."""
        stacks = coronal_stacks(chi.array, self.model.input.slices)
        total = np.empty((self._channels, *chi.shape), np.float32)
        for some in _in_batches(range(len(stacks)), _SLICES):
            shown = np.stack([self._normalize(stacks[place]) for place in some])
            total[:, :, some] = self._probabilities(network, shown).swapaxes(0, 1).swapaxes(1, 2)
        return total

    @property
    def _channels(self) -> int:
        return sum(1 + len(group) for group in self.model.groups)

    @property
    def _normalize(self) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        return NORMALIZATIONS[self.model.input.normalization]

    def _probabilities(self, network: nn.Module, values: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = forward_batch(network, values, self.device)
        probabilities = softmax_heads(logits, self.model.groups, temperatures=self.model.temperatures)
        array: NDArray[np.float32] = probabilities.cpu().numpy()
        return array


def _in_batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
