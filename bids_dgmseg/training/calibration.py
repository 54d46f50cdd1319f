"""Learn how much surer than right a network is, class by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.measure.calibration import expected_calibration_error
from bids_dgmseg.models import Model
from bids_dgmseg.segment.folder import as_trained, describe_folder
from bids_dgmseg.segment.forward import forward_batch
from bids_dgmseg.segment.weights import load_weights, segmenter_network
from bids_dgmseg.training.simulated import simulated_maps

_FIRST_MAP = 9_000_000
"""Beyond the samples that a training of any length has seen."""
_VOXELS_A_MAP = 20_000
_SURELY_BACKGROUND = 0.99
"""Where even a network that is too sure has no doubt."""


def fit_temperatures(logits: Tensor, labels: Tensor, *, n_iterations: int = 50) -> Tensor:
    """Find the temperatures that make the probabilities hold.

    Parameters
    ----------
    logits : Tensor of shape (N, classes)
        Of voxels that the network has not learned from.
    labels : Tensor of shape (N,), integer
        Their true classes.
    n_iterations : int
        Of L-BFGS, at most.

    Returns
    -------
    Tensor of shape (classes,)
        ``softmax(logits / temperatures)`` has the least cross-entropy; above 1 where the network was too sure.

    Notes
    -----
    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks), one temperature a class.
    """
    logits, labels = logits.double(), labels.long()
    log_temperatures = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperatures], max_iter=n_iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(logits * torch.exp(-log_temperatures), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return log_temperatures.detach().exp().float()


def pick_voxels(logits: Tensor, labels: Tensor, *, n_voxels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw voxels in and near the nuclei, where a map has its doubts.

    Parameters
    ----------
    logits : Tensor of shape (classes, X, Y, Z)
        Of one map, background first.
    labels : Tensor of shape (X, Y, Z), integer
        Their true classes.
    n_voxels : int
        How many, at most.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    logits : Tensor of shape (n, classes)
    labels : Tensor of shape (n,)
    """
    near = (logits.softmax(dim=0)[0] < _SURELY_BACKGROUND) | (labels > 0)
    chosen = near.flatten().nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=generator)[:n_voxels]]
    return logits.flatten(1)[:, chosen].T, labels.flatten()[chosen]


def calibrate(
    model: Model, template: Path | None, out: Path, *, n_maps: int, seed: int, device: str, say: Callable[[str], None]
) -> Tensor:
    """Fit the temperatures of a trained segmenter on new simulated maps and note them in its folder.

    Parameters
    ----------
    model : Model
        Whose network.
    template : path, optional
        Label template; without one maps show the analytic phantom alone.
    out : path
        Folder with ``segmenter.safetensors``; its ``model.toml`` gets ``temperatures``.
    n_maps : int
        How many maps to draw.
    seed : int
        Of the maps and of the voxels taken from them.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.
    say : callable
        Gets a line a nucleus: its expected calibration error before and after.

    Returns
    -------
    Tensor of shape (classes + 1,)
        Temperatures, background first.

    Raises
    ------
    InputError
        If the folder has no weights of this model.
    """
    model = as_trained(model, out)
    network = load_weights(segmenter_network(model), model, "segmenter", out)
    maps = simulated_maps(model, template, "segmenter", seed=seed)
    generator, picked = torch.Generator().manual_seed(seed), []
    for index in range(n_maps):
        values, labels = maps[_FIRST_MAP + index]
        logits = forward_batch(network, values[None].numpy(), device)[0].cpu()
        picked.append(pick_voxels(logits, labels, n_voxels=_VOXELS_A_MAP, generator=generator))
    logits, labels = (torch.cat(parts) for parts in zip(*picked, strict=True))
    temperatures = fit_temperatures(logits, labels)
    before, after = logits.softmax(dim=1), (logits / temperatures).softmax(dim=1)
    for channel, name in enumerate(model.classes, start=1):
        errors = [expected_calibration_error(p[:, channel], labels == channel) for p in (before, after)]
        say(f"{name:6} temperature {temperatures[channel]:.2f}, calibration error {errors[0]:.4f} to {errors[1]:.4f}")
    describe_folder(model, out, about={"temperatures": [round(float(value), 4) for value in temperatures],
                                       "calibrated_on": f"{n_maps} simulated maps, seed {seed}"})  # fmt: skip
    return temperatures
