"""Step two: class probabilities inside the box, on the map's own grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.images.boxes import Box
from bids_dgmseg.images.resample import Grid, covering_block, resample, world_grid
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import Model
from bids_dgmseg.segment.normalize import NORMALIZATIONS
from bids_dgmseg.segment.weights import load_object, load_weights, pick_device, segmenter_network, to_channels_last


class Predictor(Protocol):
    """Maps a cropped and resampled map to probabilities (C + 1, X, Y, Z) on its grid, background first."""

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        """Predict one crop."""


@dataclass(frozen=True)
class Block:
    """Probabilities on a part of a map's grid; all else is background.

    Parameters
    ----------
    probabilities : ndarray of shape (C + 1, x, y, z)
        float32, channel 0 background, then the model's labels; the channels sum to 1.
    slices : tuple of 3 slice
        Where the part lies in the map's array.
    """

    probabilities: NDArray[np.float32]
    slices: tuple[slice, slice, slice]


def predict(chi: Volume, box: Box, model: Model, *, weights: Path | None = None, device: str = "cpu") -> Block:
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
    Block
        On the map's own grid; a voxel larger than the network's holds the mean over it.
    """
    if model.localizer.kind == "nnunet":  # which has its own way from grid to grid
        from bids_dgmseg.segment.nnunet import NnunetPredictor  # imports this module

        return NnunetPredictor(model, weights=weights, device=device).predict_block(chi, box)
    grid = world_grid(box, model.input.spacing_mm)
    probabilities = predict_on_grid(chi, grid, model, weights=weights, device=device)
    own = Grid(chi.shape, chi.affine)
    slices = covering_block(own, box)
    return Block(_carry(probabilities, grid, own, slices), slices)


def predict_on_grid(
    chi: Volume, grid: Grid, model: Model, *, weights: Path | None = None, device: str = "cpu"
) -> NDArray[np.float32]:
    """Compute probabilities (C + 1, X, Y, Z), background first, on a grid of the model's spacing; else as `predict`."""
    kind = load_object(model.predictor) if isinstance(model.predictor, str) else model.predictor
    predictor: Predictor = kind(model, weights=weights, device=device)
    return predictor(resample(chi, grid, antialias=True))


class NetworkPredictor:
    """A torch network run over windows of its own patch size."""

    def __init__(self, model: Model, *, weights: Path | None, device: str) -> None:
        self.model, self.device = model, device
        self.network = load_weights(segmenter_network(model), model, "segmenter", weights)

    def __call__(self, volume: Volume) -> NDArray[np.float32]:
        """Average the windows' probabilities, weighted towards their middles."""
        shown = self.model.input
        values = NORMALIZATIONS[shown.normalization](volume.array)[None]
        patch = [round(size / step) for size, step in zip(shown.patch_mm, shown.spacing_mm, strict=True)]
        windows = list(_windows(volume.shape, patch))
        if len(windows) == 1:
            return _to_numpy(forward(self.network, values, self.device))
        total = np.zeros((len(self.model.labels) + 1, *volume.shape), np.float32)
        for window in windows:
            part = _to_numpy(forward(self.network, values[:, *window], self.device))
            total[:, *window] += part * _middle_weight(part.shape[1:])
        total /= total.sum(axis=0)
        return total


def _windows(shape: tuple[int, ...], patch: list[int]) -> Iterator[tuple[slice, ...]]:
    """Cover a grid with patches that overlap by half or more, as few as that allows."""
    starts = []
    for size, width in zip(shape, patch, strict=True):
        room = max(size - width, 0)
        count = int(np.ceil(room / (width / 2))) + 1
        starts.append(np.unique(np.linspace(0, room, count).round().astype(int)).tolist())
    for corner in product(*starts):
        yield tuple(slice(start, start + width) for start, width in zip(corner, patch, strict=True))


def _middle_weight(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Gaussian with an SD of an eighth of the window: predictions near its edge have seen little."""
    profiles = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 8)) ** 2) for size in shape]
    weight = np.einsum("i,j,k->ijk", *profiles).astype(np.float32)
    floored: NDArray[np.float32] = np.maximum(weight, np.float32(1e-4))
    return floored


def forward(network: nn.Module, values: NDArray[np.float32], device: str) -> Tensor:
    """Run a network over one patch.

    Parameters
    ----------
    network : Module
        Ready to predict.
    values : ndarray of shape (channels, X, Y, Z)
        Normalized input.
    device : {"cpu", "cuda", "auto"}
        Where to run.

    Returns
    -------
    Tensor of shape (classes, X, Y, Z)
        Probabilities, float32.
    """
    where = pick_device(device)
    network = to_channels_last(network, where)
    batch = torch.from_numpy(np.ascontiguousarray(values))[None].to(where, memory_format=torch.channels_last_3d)
    with torch.inference_mode(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=_has_fast_bfloat16(where)):
        logits: Tensor = network(batch)
    return logits[0].float().softmax(dim=0)


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Tell whether bfloat16 is computed in hardware; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, lambda: False)()) for check in checks)


def _carry(
    probabilities: NDArray[np.float32], grid: Grid, own: Grid, slices: tuple[slice, slice, slice]
) -> NDArray[np.float32]:
    """Carry probabilities to a block of the map's grid, trilinear, averaged over voxels larger than the network's."""
    corner = np.eye(4)
    corner[:3, 3] = [piece.start for piece in slices]
    shape = tuple(piece.stop - piece.start for piece in slices)
    to_source = np.linalg.inv(grid.affine) @ own.affine @ corner
    source = torch.from_numpy(probabilities)[None]
    total = torch.zeros(source.shape[1], *shape)
    offsets = list(_offsets_inside_voxel(to_source))
    for offset in offsets:
        total += _sample(source, to_source, shape, offset)
    total /= len(offsets)
    total[0] = 1 - total[1:].sum(dim=0)  # beyond the network's grid all is background
    return total.numpy()


def _offsets_inside_voxel(to_source: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield points spread over a voxel, about one a voxel of the source."""
    widths = np.linalg.norm(to_source[:3, :3], axis=0)
    counts = np.maximum(np.round(widths).astype(int), 1)
    for position in np.ndindex(*counts):
        yield (np.array(position) + 0.5) / counts - 0.5


def _sample(source: Tensor, to_source: NDArray[np.float64], shape: tuple[int, ...], offset: NDArray[Any]) -> Tensor:
    """Sample all channels at the voxels of a block, moved by a part of a voxel; 0 outside the source."""
    size = np.array(source.shape[2:])
    # grid_sample wants coordinates from -1 to 1 over the outer edges, last axis first.
    scale = 2 / size
    matrix = (to_source[:3, :3].T * scale)[:, ::-1]
    start = ((to_source[:3, :3] @ offset + to_source[:3, 3] + 0.5) * scale - 1)[::-1]
    points = torch.tensor(start.copy())
    for width, step in zip(shape, matrix, strict=True):
        points = points.unsqueeze(-2) + torch.arange(width)[:, None] * torch.tensor(step.copy())
    sampled: Tensor = functional.grid_sample(source, points[None].float(), mode="bilinear", align_corners=False)
    return sampled[0]


def _to_numpy(probabilities: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = probabilities.cpu().numpy()
    return array
