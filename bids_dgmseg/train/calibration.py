"""Make the probabilities and volumes of a trained network hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.boxes import Box
from bids_dgmseg.image.grids import block_affine, covering_block
from bids_dgmseg.image.resample import resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.model_folder import read_model_folder, write_model_toml
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.weights import load_weights, save_weights, segmenter_network
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, forward_batch
from bids_dgmseg.segmentation.localize import localize
from bids_dgmseg.segmentation.predict import network_grid, predict
from bids_dgmseg.segmentation.probabilities import mirrored_channels
from bids_dgmseg.simulate.anatomy import LabelMap
from bids_dgmseg.simulate.dataset import scanner_grid, whole_head_view
from bids_dgmseg.simulate.sample import View, draw_sample, nuclei_labels, typical_view, without_resampling
from bids_dgmseg.stats.overlap import expected_calibration_error
from bids_dgmseg.train.sampling import ORDINARY_WIDTH
from bids_dgmseg.train.simulated import simulated_maps
from bids_dgmseg.train.temperatures import doubtful_voxels, fit_temperatures, pick_voxels

_FIRST_MAP = 9_000_000
"""Beyond the samples that a training of any length has seen."""

_VOXELS_A_MAP = 10_000

_FIRST_HEAD, _HEADS_A_SEED = 4 * 10**13, 100_000
"""Away from the seeds of training, of `dgmseg simulate` and of the benchmarks."""

_ROUNDS, _ROOM_MM = 2, 10.0

_LEAST = 1e-6
"""Probability that even the largest shift does not make the most probable."""


@dataclass(frozen=True)
class _Head:
    """A simulated head as the segmenter is shown it in use."""

    chi: Volume
    """About the box."""
    box: Box
    labels: Tensor
    """True nuclei on the map's grid."""


@dataclass(frozen=True)
class _Fitted:
    """What a calibration gives."""

    temperatures: Tensor
    probabilities: Tensor
    """Of doubtful voxels (n, classes), as in use."""
    labels: Tensor
    """True classes of these voxels."""
    first: list[float]
    """Part by which each nucleus was too large before."""
    last: list[float]
    """By which it is now."""


def calibrate(
    model: Model, template: Path | None, out: Path, *, n_maps: int, seed: int, device: str, say: Callable[[str], None]
) -> Tensor:
    """Fit the temperatures of a trained segmenter and its volumes in turn, on new simulated maps.

    Parameters
    ----------
    model : Model
        Whose network.
    template : path, optional
        Label template; without one maps show the analytic phantom alone.
    out : path
        Folder with ``segmenter.safetensors``, whose last biases are shifted; its ``model.toml`` gets ``temperatures``.
    n_maps : int
        How many crops of all kinds and how many ordinary whole heads to draw: temperatures are fitted on both, volumes
        on the heads.
    seed : int
        Of the maps and of the voxels taken from them.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.
    say : callable
        Gets a line a class, its temperature and its expected calibration error in use, and a line a nucleus, by how
        much its median volume is too large at first and at last.

    Returns
    -------
    Tensor of shape (classes + 1,)
        Temperatures, background first; left and right share theirs.

    Raises
    ------
    InputError
        If the folder has no weights of this model, or those of another network.
    """
    model = read_model_folder(model, out)
    network = segmenter_network(model)
    if not isinstance(network, PlainUNet):
        raise InputError(f"{out.name}: {model.network} is not trained on simulated maps; give a folder of {model.name}")
    load_weights(network, model, "segmenter", out)
    maps = simulated_maps(model, template, "segmenter", seed=seed)
    anatomy = maps.heads[0][0]  # the template, where there is one
    heads = _draw_heads(model, anatomy, out, n_maps=n_maps, seed=seed, device=device)
    crops = (maps[_FIRST_MAP + number] for number in range(n_maps))
    generator = torch.Generator().manual_seed(seed)
    picked = [
        pick_voxels(_see(network, values, model, device), labels, n_voxels=_VOXELS_A_MAP, generator=generator)
        for values, labels in chain(crops, (_show(head, model) for head in heads))
    ]
    fitted = _fit_in_turn(model, network, heads, picked, device)
    save_weights(network.state_dict(), out / "segmenter.safetensors")
    _describe(model, out, fitted.temperatures, {"calibrated_on": f"{2 * n_maps} simulated maps, seed {seed}"})
    _say_calibration(model, fitted, say)
    for name, first, last in zip(_sides(model), fitted.first, fitted.last, strict=True):
        say(f"{name:4} median volume {first:+.1%} to {last:+.1%}")
    return fitted.temperatures


def _fit_in_turn(
    model: Model, network: PlainUNet, heads: Sequence[_Head], picked: Sequence[tuple[Tensor, Tensor]], device: str
) -> _Fitted:
    """Fit temperatures on picked voxels and volumes on heads; shifts the network's logits."""
    logits, labels = torch.cat([one for one, _ in picked], dim=1), torch.cat([one for _, one in picked])
    sides = list(_sides(model).values())
    first, moved = None, torch.zeros(len(model.classes) + 1)
    with TemporaryDirectory() as scratch:  # a calibration that is stopped leaves the folder as it was
        tried = Path(scratch)
        for _ in range(_ROUNDS):  # what one of the two changes, the other has to follow
            save_weights(network.state_dict(), tried / "segmenter.safetensors")
            temperatures = fit_temperatures(logits, labels, sides)
            _describe(model, tried, temperatures, {})
            doubtful = [_doubt(head, read_model_folder(model, tried), tried, device) for head in heads]
            shifts = (moved + fit_shifts(doubtful, sides)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT) - moved
            first, moved = first or volume_errors(doubtful, sides, torch.zeros_like(shifts)), moved + shifts
            network.shift_logits(shifts * temperatures)
            logits = logits + shifts * temperatures
    probabilities = torch.cat([(logits + shifts).softmax(dim=1) for logits, _ in doubtful])
    return _Fitted(
        temperatures,
        probabilities,
        torch.cat([own for _, own in doubtful]),
        first or [],
        volume_errors(doubtful, sides, shifts),
    )


def _sides(model: Model) -> dict[str, list[int]]:
    """Gather the channels of each nucleus, left and right, by its name."""
    channels: dict[str, list[int]] = {}
    for channel, name in enumerate(model.classes, start=1):
        channels.setdefault(name.split("_")[0], []).append(channel)
    return channels


def _describe(model: Model, folder: Path, temperatures: Tensor, about: Mapping[str, str]) -> None:
    write_model_toml(model, folder, about={"temperatures": [round(float(one), 4) for one in temperatures], **about})


def _draw_heads(model: Model, anatomy: LabelMap, out: Path, *, n_maps: int, seed: int, device: str) -> list[_Head]:
    """Draw ordinary whole heads in the network's own voxels, and keep of each what lies about its box."""
    view = _ordinary_head(model.input.spacing_mm[0])
    located_by = out if (out / "localizer.safetensors").is_file() else None
    heads = []
    for number in range(n_maps):
        values, labels = draw_sample([(anatomy, 1.0)], view, _FIRST_HEAD + seed * _HEADS_A_SEED + number)
        grid = scanner_grid(view)
        box = localize(Volume(values.numpy(), grid.affine), model, weights=located_by, device=device).box
        place = covering_block(grid, box.expanded(_ROOM_MM))
        chi = Volume(values[place].clone().numpy(), block_affine(grid.affine, place))
        heads.append(_Head(chi, box, nuclei_labels(labels)[place].clone()))
    return heads


def _show(head: _Head, model: Model) -> tuple[Tensor, Tensor]:
    """Give what the network is shown of a head (1, X, Y, Z) with its true classes (X, Y, Z)."""
    grid = network_grid(head.chi, head.box, model)
    values = NORMALIZATIONS[model.input.normalization](resample(head.chi, grid, antialias=True).array)
    labels = resample(Volume(head.labels.numpy(), head.chi.affine), grid, order=0).array
    return torch.from_numpy(values)[None], torch.from_numpy(labels)


def _see(network: nn.Module, values: Tensor, model: Model, device: str) -> Tensor:
    """Compute the logits (passes, classes, X, Y, Z) of a map (1, X, Y, Z) and, as in use, of its mirror image."""
    passes = [forward_batch(network, values[None].numpy(), device)[0].cpu()]
    if model.uses_mirroring:
        image = forward_batch(network, values.flip(1)[None].numpy(), device)[0].cpu()
        passes.append(image[mirrored_channels(model.groups)].flip(1))
    return torch.stack(passes)


def _doubt(head: _Head, model: Model, out: Path, device: str) -> tuple[Tensor, Tensor]:
    """Take the doubtful voxels of what the folder's model gives in use, as logarithms of probabilities."""
    block = predict(head.chi, head.box, model, weights=out, device=device)
    return doubtful_voxels(torch.from_numpy(block.probabilities).clamp(min=_LEAST).log(), head.labels[block.slices])


def _say_calibration(model: Model, fitted: _Fitted, say: Callable[[str], None]) -> None:
    for channel, name in enumerate(model.classes, start=1):
        error = expected_calibration_error(fitted.probabilities[:, channel], fitted.labels == channel)
        say(f"{name:6} temperature {fitted.temperatures[channel]:.2f}, calibration error {error:.4f}")


def _ordinary_head(spacing_mm: float) -> View:
    """See whole heads as ordinary scans show them; slices that are thick make a nucleus larger or smaller at random."""
    return without_resampling(typical_view(whole_head_view(spacing_mm), ORDINARY_WIDTH))


_RATE = 1.5
"""Of a shift to the logarithm of a volume: small enough for nuclei of which every voxel is doubtful."""

LARGEST_SHIFT, _LEAST_RATIO = 1.5, 0.7


def fit_shifts(
    maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]], *, n_iterations: int = 40
) -> Tensor:
    """Find what the logits of each nucleus lack for its median volume to be right.

    Parameters
    ----------
    maps : sequence of (Tensor, Tensor)
        Logits (n, classes) and true classes (n,) of the doubtful voxels of each map.
    nuclei : sequence of sequence of int
        Classes that share a shift: left and right.
    n_iterations : int
        In each all nuclei move, since they border on one another.

    Returns
    -------
    Tensor of shape (classes,)
        To be added to logits; 0 for the background, and no more than ±1.5: who lacks more is not found at all.
    """
    shifts = torch.zeros(maps[0][0].shape[1])
    for _ in range(n_iterations):
        for classes, error in zip(nuclei, volume_errors(maps, nuclei, shifts), strict=True):
            ratio = max(1 + error, _LEAST_RATIO)
            shifts[classes] = (shifts[classes] - _RATE * math.log(ratio)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    return shifts


def volume_errors(
    maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]], shifts: Tensor
) -> list[float]:
    """Measure by what part each nucleus is too large with shifted logits: the median of the maps that show it."""
    counts = torch.stack(
        [
            torch.stack(
                [
                    (logits + shifts).argmax(dim=1).bincount(minlength=len(shifts)),
                    labels.bincount(minlength=len(shifts)),
                ]
            )
            for logits, labels in maps
        ]
    )
    errors = []
    for classes in nuclei:
        found, true = counts[:, :, classes].sum(dim=2).double().T
        ratios = (found / true)[true > 0]
        errors.append(float(ratios.quantile(0.5)) - 1 if len(ratios) else 0.0)
    return errors
