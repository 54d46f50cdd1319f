"""Make the probabilities and volumes of a trained network hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bids_dgmseg.errors import InputError
from bids_dgmseg.images.volume import Volume
from bids_dgmseg.measure.calibration import expected_calibration_error
from bids_dgmseg.models import Model
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.segment.folder import as_trained, describe_folder
from bids_dgmseg.segment.forward import forward_batch
from bids_dgmseg.segment.localize import localize
from bids_dgmseg.segment.predict import predict
from bids_dgmseg.segment.weights import load_weights, save_weights, segmenter_network
from bids_dgmseg.simulate.dataset import read_template, scanner_grid, whole_head_view
from bids_dgmseg.simulate.ordinary import in_own_voxels, ordinary_view
from bids_dgmseg.simulate.sample import View, draw_sample, nuclei_labels, phantom_head, template_head
from bids_dgmseg.training.sampling import ORDINARY_WIDTH, SimulatedMaps
from bids_dgmseg.training.shifts import fit_shifts, volume_errors
from bids_dgmseg.training.simulated import simulated_maps
from bids_dgmseg.training.temperatures import doubtful_voxels, fit_temperatures, pick_voxels

_FIRST_MAP = 9_000_000
"""Beyond the samples that a training of any length has seen."""
_VOXELS_A_MAP = 20_000
_FIRST_HEAD, _HEADS_A_SEED = 4 * 10**13, 100_000
"""Away from the seeds of training, of `dgmseg simulate` and of the benchmarks."""
_LEAST = 1e-6
"""Probability that even the largest shift does not make the most probable."""


def calibrate(
    model: Model, template: Path | None, out: Path, *, n_maps: int, seed: int, device: str, say: Callable[[str], None]
) -> Tensor:
    """Fit the temperatures of a trained segmenter, then its volumes, on new simulated maps.

    Parameters
    ----------
    model : Model
        Whose network.
    template : path, optional
        Label template; without one maps show the analytic phantom alone.
    out : path
        Folder with ``segmenter.safetensors``, whose last biases are shifted; its ``model.toml`` gets ``temperatures``.
    n_maps : int
        How many maps of all kinds to draw for the temperatures, and how many ordinary ones for the volumes.
    seed : int
        Of the maps and of the voxels taken from them.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.
    say : callable
        Gets a line a class, its expected calibration error before and after, and a line a nucleus, by how much its
        median volume is too large before and after.

    Returns
    -------
    Tensor of shape (classes + 1,)
        Temperatures, background first.

    Raises
    ------
    InputError
        If the folder has no weights of this model, or those of another network.
    """
    model = as_trained(model, out)
    network = segmenter_network(model)
    if not isinstance(network, PlainUNet):
        raise InputError(f"{out.name}: {model.network} is not trained on simulated maps; give a folder of {model.name}")
    load_weights(network, model, "segmenter", out)
    maps = simulated_maps(model, template, "segmenter", seed=seed)
    temperatures = _fit_temperatures(network, model, maps, n_maps=n_maps, seed=seed, device=device, say=say)
    describe_folder(model, out, about={"temperatures": [round(float(value), 4) for value in temperatures],
                                       "calibrated_on": f"{2 * n_maps} simulated maps, seed {seed}"})  # fmt: skip
    shifts = _fit_shifts(as_trained(model, out), template, out, n_maps=n_maps, seed=seed, device=device, say=say)
    network.shift_logits(shifts * temperatures)
    save_weights(network.state_dict(), out / "segmenter.safetensors")
    return temperatures


def _fit_temperatures(
    network: nn.Module, model: Model, maps: SimulatedMaps, *, n_maps: int, seed: int, device: str,
    say: Callable[[str], None],
) -> Tensor:  # fmt: skip
    generator, picked = torch.Generator().manual_seed(seed), []
    for number in range(n_maps):
        values, labels = maps[_FIRST_MAP + number]
        logits = forward_batch(network, values[None].numpy(), device)[0].cpu()
        picked.append(pick_voxels(logits, labels, n_voxels=_VOXELS_A_MAP, generator=generator))
    logits, labels = (torch.cat(parts) for parts in zip(*picked, strict=True))
    temperatures = fit_temperatures(logits, labels)
    before, after = logits.softmax(dim=1), (logits / temperatures).softmax(dim=1)
    for channel, name in enumerate(model.classes, start=1):
        errors = [expected_calibration_error(p[:, channel], labels == channel) for p in (before, after)]
        say(f"{name:6} temperature {temperatures[channel]:.2f}, calibration error {errors[0]:.4f} to {errors[1]:.4f}")
    return temperatures


def _fit_shifts(
    model: Model, template: Path | None, out: Path, *, n_maps: int, seed: int, device: str, say: Callable[[str], None]
) -> Tensor:
    """Fit the shifts of what the folder's model gives in use, on whole heads seen in the network's own voxels."""
    head = phantom_head() if template is None else template_head(read_template(template))
    view = _ordinary_head(model.input.spacing_mm[0])
    located_by = out if (out / "localizer.safetensors").is_file() else None
    doubtful = []
    for number in range(n_maps):
        values, labels = draw_sample([(head, 1.0)], view, _FIRST_HEAD + seed * _HEADS_A_SEED + number)
        chi = Volume(values.numpy(), scanner_grid(view).affine)
        box = localize(chi, model, weights=located_by, device=device).box
        block = predict(chi, box, model, weights=out, device=device)
        probabilities = torch.from_numpy(block.probabilities)
        doubtful.append(doubtful_voxels(probabilities.clamp(min=_LEAST).log(), nuclei_labels(labels)[block.slices]))
    channels: dict[str, list[int]] = {}
    for channel, name in enumerate(model.classes, start=1):
        channels.setdefault(name.split("_")[0], []).append(channel)
    sides = list(channels.values())
    shifts = fit_shifts(doubtful, sides)
    before, after = volume_errors(doubtful, sides, torch.zeros_like(shifts)), volume_errors(doubtful, sides, shifts)
    for name, (first, *_), *errors in zip(channels, sides, before, after, strict=True):
        say(f"{name:4} shift {shifts[first]:+.2f}, median volume {errors[0]:+.1%} to {errors[1]:+.1%}")
    return shifts


def _ordinary_head(spacing_mm: float) -> View:
    """See whole heads as ordinary scans show them; slices that are thick make a nucleus larger or smaller at random."""
    return in_own_voxels(ordinary_view(whole_head_view(spacing_mm), ORDINARY_WIDTH))
