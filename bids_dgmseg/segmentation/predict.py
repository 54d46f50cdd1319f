"""Second step: probabilities of the nuclei inside the box, on the map's own grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
"""Batch size per kind of device; two windows exceed the caches of a CPU, which makes it slower."""

_SLICES = 8
"""Batch size of 2D networks."""


class Predictor(Protocol):
    """Computes probabilities (C + 1, X, Y, Z) of a resampled crop on its grid, background first.

    The channels are ``model.classes``; nuclei without a side are split afterwards.
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
        Region of interest.
    model : Model
        Registry entry.
    weights : path, optional
        Model folder to use instead of the weights in the package.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.

    Returns
    -------
    ProbabilityBlock
        On the map's own grid; a voxel larger than the network's contains the mean over it.
    """
    chi = clip_and_remove_small_components(chi)
    if model.localizer.kind == "nnunet":  # resamples on its own
        from bids_dgmseg.segmentation.nnunet import predict_block

        return predict_block(chi, box, model, weights=weights, device=device)
    grid = network_grid(chi, box, read_model_folder(model, weights))
    probabilities = predict_on_grid(chi, grid, model, weights=weights, device=device)
    own = Grid(chi.shape, chi.affine)
    slices = covering_block(own, box)
    seen = labelled_nuclei(probabilities, model)
    probabilities = resample_back(probabilities, grid, own, slices)
    if model.postprocessing.valid_voxels_only:
        outside = outside_field_of_view(is_valid(chi.array))[slices]
        hidden = set(labelled_nuclei(probabilities[:, outside], model))
        probabilities[0, outside] = 1
        probabilities[1:, outside] = 0
        if hidden:  # rare, and looking at all voxels takes a tenth of a second
            hidden -= set(labelled_nuclei(probabilities, model))
            seen = tuple(name for name in seen if name not in hidden)
    return ProbabilityBlock(probabilities, slices, seen, chi.voxel_size_mm)


def network_grid(chi: Volume, box: Box, model: Model) -> Grid:
    """Return the grid on which the network of a model sees a box of a map."""
    return aligned_grid(box, model.input.spacing_mm, Grid(chi.shape, chi.affine), model.input.native_voxel_tolerance)


def predict_on_grid(
    chi: Volume, grid: Grid, model: Model, *, weights: Path | None = None, device: str = "cpu"
) -> NDArray[np.float32]:
    """Compute probabilities (C + 1, X, Y, Z), background first, on a grid with the model's spacing; see `predict`."""
    kind = load_object(model.predictor) if isinstance(model.predictor, str) else model.predictor
    predictor: Predictor = kind(model, weights=weights, device=device)
    probabilities = predictor(resample(chi, grid, antialias=True))
    if model.classes == model.labels:
        return probabilities
    return split_hemispheres(probabilities, grid, model, find_midplane(chi))


class NetworkPredictor:
    """Torch networks, one per fold or checkpoint, whose probabilities in sliding windows are averaged."""

    def __init__(self, model: Model, *, weights: Path | None, device: str) -> None:
        self.model, self.device = read_model_folder(model, weights), device
        self.networks = load_segmenters(model, weights)

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        """Average windows, networks and, if the model uses mirroring, mirror images; then merge the heads."""
        predict_one = self._predict_slices if self.model.input.slices else self._predict_windows
        total, count = np.zeros((self._n_channels, *volume.shape), np.float32), 0
        for network in self.networks:
            total += predict_one(network, volume)
            count += 1
            if self.model.uses_mirroring:
                image = volume.with_array(volume.array[::-1])
                total += predict_one(network, image)[mirrored_channels(self.model.groups), ::-1]
                count += 1
        return merge_heads(total / np.float32(count), self.model.groups)

    def _predict_windows(self, network: nn.Module, chi: Volume) -> NDArray[np.float32]:
        """Average the probabilities (channels of all heads, X, Y, Z) of overlapping windows."""
        options = self.model.input
        values = NORMALIZATIONS[options.normalization](chi.array)[None]
        patch = shape_to_cover(options.patch_mm, chi.voxel_size_mm)
        windows = list(sliding_windows(chi.shape, patch, options.window_step, options.window_slack))
        total = np.zeros((self._n_channels, *chi.shape), np.float32)
        weights = np.zeros(chi.shape, np.float32)
        for batch in _batches(windows, _WINDOWS[pick_device(self.device).type]):
            predicted = self._probabilities(network, np.stack([values[:, *window] for window in batch]))
            for window, one in zip(batch, predicted, strict=True):
                uniform = options.window_step or len(windows) == 1
                weight = np.float32(1) if uniform else gaussian_weight(one.shape[1:])
                total[:, *window] += one * weight
                weights[window] += weight
        total /= weights
        return total

    def _predict_slices(self, network: nn.Module, chi: Volume) -> NDArray[np.float32]:
        """Predict the probabilities (channels, X, Y, Z) of all coronal slices, each stacked with its neighbours."""
        normalize = NORMALIZATIONS[self.model.input.normalization]
        stacks = coronal_stacks(chi.array, self.model.input.slices)
        total = np.empty((self._n_channels, *chi.shape), np.float32)
        for batch in _batches(range(len(stacks)), _SLICES):
            values = np.stack([normalize(stacks[index]) for index in batch])
            total[:, :, batch] = self._probabilities(network, values).swapaxes(0, 1).swapaxes(1, 2)
        return total

    @property
    def _n_channels(self) -> int:
        return sum(1 + len(group) for group in self.model.groups)

    def _probabilities(self, network: nn.Module, values: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = forward_batch(network, values, self.device)
        probabilities = softmax_heads(logits, self.model.groups, temperatures=self.model.temperatures)
        array: NDArray[np.float32] = probabilities.cpu().numpy()
        return array


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
