"""Calibrate a trained segmenter on simulated maps: a temperature for its probabilities, biases for its volumes.

    python workflows/calibrate.py MODEL OUT [--template FILE] [--maps N] [--seed S] [--device cpu]

OUT is a model folder of `dgmseg train-simulated`, whose last biases and ``model.toml`` are changed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bids_dgmseg.arguments import positive_int, seed
from bids_dgmseg.errors import InputError, run_command
from bids_dgmseg.image.grids import Box, block_affine, covering_block, resample
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.lab.simulate.anatomy import LabelMap
from bids_dgmseg.lab.simulate.sample import (
    TYPICAL_WIDTH,
    class_labels,
    draw_sample,
    typical_view,
    without_resampling,
)
from bids_dgmseg.lab.simulate.simulated_dataset import scanner_grid, whole_head_view
from bids_dgmseg.lab.train.simulated import simulated_maps
from bids_dgmseg.models.model_folder import (
    load_weights,
    read_model_folder,
    save_weights,
    segmenter_network,
    write_model_toml,
)
from bids_dgmseg.models.registry import Model, get_model
from bids_dgmseg.networks.plain_unet import PlainUNet
from bids_dgmseg.segmentation.inference import NORMALIZATIONS, forward_batch
from bids_dgmseg.segmentation.predict import Location, mirrored_channels, network_grid
from bids_dgmseg.segmentation.segment import localize, segment_map

_FIRST_MAP = 9_000_000
"""Beyond the samples of a training of any length."""

_VOXELS_PER_MAP = 10_000

_FIRST_HEAD, _HEADS_PER_SEED = 4 * 10**13, 100_000
"""Apart from the seeds of training, of `dgmseg simulate` and of the benchmarks."""

_ROUNDS, _MARGIN_MM = 2, 10.0

_MIN_PROBABILITY = 1e-6
"""With the largest shift a class of this probability is still not the most probable."""

_CERTAIN_BACKGROUND = 0.99
"""Probability of background above which even an overconfident network has no doubt."""

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 0.01, 100.0

_RATE = 1.5
"""Change of a shift per logarithm of a volume ratio: stable even for nuclei of which every voxel is uncertain."""

LARGEST_SHIFT, _MIN_RATIO = 1.5, 0.7

_LBFGS_ITERATIONS, _SHIFT_ITERATIONS = 50, 40


@dataclass(frozen=True)
class _Head:
    """A simulated head as the segmenter sees it in use."""

    chi: Volume
    """Around the box."""
    box: Box
    labels: Tensor
    """True classes on the map's grid."""


@dataclass(frozen=True)
class _Fit:
    """Result of a calibration."""

    temperature: float
    probabilities: Tensor
    """Of uncertain voxels (n, classes), as in use."""
    labels: Tensor
    """True classes of these voxels."""
    errors_before: list[float]
    """Relative volume error of each nucleus."""
    errors_after: list[float]


def calibrate(
    model: Model, template: Path | None, out: Path, *, n_maps: int, seed: int, device: str, log: Callable[[str], None]
) -> float:
    """Fit the temperature and the volumes of a trained segmenter in turn, on new simulated maps.

    Parameters
    ----------
    model : Model
        Model of the weights.
    template : path, optional
        Label template; None for the analytic phantom.
    out : path
        Folder with ``segmenter.safetensors``, whose last biases are shifted; the temperature is written to its
        ``model.toml``.
    n_maps : int
        Number of crops of all kinds and of typical whole heads: the temperature from both, volumes from the heads.
    seed : int
        Of the maps and of the voxels chosen from them.
    device : {"cpu", "cuda", "auto"}
        Where the network runs.
    log : callable
        Gets a line per class (expected calibration error) and per nucleus (volume error before and after).

    Returns
    -------
    float
        The temperature.

    Raises
    ------
    InputError
        If the folder has no weights of this model, or those of another network.
    """
    model = read_model_folder(model, out)
    network = segmenter_network(model)
    if not isinstance(network, PlainUNet):
        raise InputError(f"{out.name}: {model.network} is not trained on simulated maps; pass a folder of {model.name}")
    load_weights(network, model, "segmenter", out)
    maps = simulated_maps(model, template, "segmenter", seed=seed)
    anatomy = maps.heads[0][0]  # the template, if there is one
    heads = _draw_heads(model, anatomy, out, n_maps=n_maps, seed=seed, device=device)
    crops = (maps[_FIRST_MAP + number] for number in range(n_maps))
    generator = torch.Generator().manual_seed(seed)
    chosen = [
        choose_voxels(_logits(network, values, model, device), labels, n_voxels=_VOXELS_PER_MAP, generator=generator)
        for values, labels in chain(crops, (_network_input(head, model) for head in heads))
    ]
    fit = _fit_in_turn(model, network, heads, chosen, device)
    save_weights(network.state_dict(), out / "segmenter.safetensors")
    _write_temperature(model, out, fit.temperature, {"calibrated_on": f"{2 * n_maps} simulated maps, seed {seed}"})
    for channel, name in enumerate(model.labels, start=1):
        error = _calibration_error(fit.probabilities[:, channel].numpy(), (fit.labels == channel).numpy())
        log(f"{name:6} calibration error {error:.4f}")
    for name, before, after in zip(_nuclei(model), fit.errors_before, fit.errors_after, strict=True):
        log(f"{name:4} volume error (median) {before:+.1%} before, {after:+.1%} after")
    return fit.temperature


def _calibration_error(probability: NDArray[np.floating], truth: NDArray[np.bool_], *, n_bins: int = 15) -> float:
    """Compute the expected calibration error of one class over bins of equal width (Guo et al. 2017, eq. 3)."""
    bins = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    return float(np.abs(np.bincount(bins, weights=probability - truth)).sum() / len(probability))


def _fit_in_turn(
    model: Model, network: PlainUNet, heads: Sequence[_Head], chosen: Sequence[tuple[Tensor, Tensor]], device: str
) -> _Fit:
    """Fit the temperature on chosen voxels and volumes on heads; shifts the network's logits."""
    logits, labels = torch.cat([part for part, _ in chosen], dim=1), torch.cat([part for _, part in chosen])
    nuclei = list(_nuclei(model).values())
    n_channels = len(model.labels) + 1
    before, total_shift = None, torch.zeros(n_channels)
    with TemporaryDirectory() as scratch:  # an interrupted calibration leaves the folder unchanged
        folder = Path(scratch)
        # The temperature changes volumes, since the two passes over mirror images are averaged after the softmax, and
        # shifts change which voxels are uncertain: so both are fitted twice.
        for _ in range(_ROUNDS):
            save_weights(network.state_dict(), folder / "segmenter.safetensors")
            temperature = fit_temperature(logits, labels)
            _write_temperature(model, folder, temperature, {})
            calibrated = read_model_folder(model, folder)
            uncertain = []
            for head in heads:
                location = Location(head.box)
                block = segment_map(head.chi, calibrated, weights=folder, device=device, location=location).block
                logs = torch.from_numpy(block.probabilities).clamp(min=_MIN_PROBABILITY).log()
                true = torch.where(head.labels < n_channels, head.labels, 0)  # auxiliary classes are background
                places = _find_uncertain(logs.softmax(dim=0)[0], true[block.slices])
                uncertain.append((logs.flatten(1)[:, places].T, true[block.slices].flatten()[places]))
            shifts = (total_shift + fit_shifts(uncertain, nuclei)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT) - total_shift
            before = before or volume_errors(uncertain, nuclei, torch.zeros_like(shifts))
            total_shift = total_shift + shifts
            # Shifts are fitted after division by the temperature, but the biases of the network come before it.
            of_network = functional.pad(shifts, (0, len(model.auxiliary))) * temperature
            network.shift_logits(of_network)
            logits = logits + of_network
    probabilities = torch.cat([(logits + shifts).softmax(dim=1) for logits, _ in uncertain])
    classes = torch.cat([part for _, part in uncertain])
    return _Fit(temperature, probabilities, classes, before or [], volume_errors(uncertain, nuclei, shifts))


def _nuclei(model: Model) -> dict[str, list[int]]:
    """Return the channels of each nucleus, left and right."""
    channels: dict[str, list[int]] = {}
    for channel, name in enumerate(model.labels, start=1):
        channels.setdefault(name.split("_")[0], []).append(channel)
    return channels


def _write_temperature(model: Model, folder: Path, temperature: float, about: Mapping[str, str]) -> None:
    of_classes = [round(temperature, 4)] * (len(model.classes) + 1)
    write_model_toml(model, folder, about={"temperatures": of_classes, **about})


def _draw_heads(model: Model, anatomy: LabelMap, out: Path, *, n_maps: int, seed: int, device: str) -> list[_Head]:
    """Simulate typical whole heads in the network's voxels, and crop each around its box.

    Thick slices would make nuclei larger or smaller at random, hence the network's own voxels.
    """
    view = without_resampling(typical_view(whole_head_view(model.input.spacing_mm[0]), TYPICAL_WIDTH))
    localizer = out if (out / "localizer.safetensors").is_file() else None
    heads = []
    for number in range(n_maps):
        values, labels, _ = draw_sample([(anatomy, 1.0)], view, _FIRST_HEAD + seed * _HEADS_PER_SEED + number)
        grid = scanner_grid(view)
        box = localize(Volume(values.numpy(), grid.affine), model, weights=localizer, device=device).box
        block = covering_block(grid, box.expanded(_MARGIN_MM))
        chi = Volume(values[block].clone().numpy(), block_affine(grid.affine, block))
        heads.append(_Head(chi, box, class_labels(labels, model.classes)[block].clone()))
    return heads


def _network_input(head: _Head, model: Model) -> tuple[Tensor, Tensor]:
    """Return the network's input for a head (1, X, Y, Z) with its true classes (X, Y, Z)."""
    grid = network_grid(head.chi, head.box, model)
    values = NORMALIZATIONS[model.input.normalization](resample(head.chi, grid, antialias=True).array)
    labels = resample(Volume(head.labels.numpy(), head.chi.affine), grid, order=0).array
    return torch.from_numpy(values)[None], torch.from_numpy(labels)


def _logits(network: nn.Module, values: Tensor, model: Model, device: str) -> Tensor:
    """Compute the logits (passes, classes, X, Y, Z) of a map (1, X, Y, Z) and, as in use, of its mirror image."""
    passes = [forward_batch(network, values[None].numpy(), device)[0].cpu()]
    if model.mirrored:
        image = forward_batch(network, values.flip(1)[None].numpy(), device)[0].cpu()
        passes.append(image[mirrored_channels(model.groups)].flip(1))
    return torch.stack(passes)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature with which the probabilities are calibrated.

    Temperature scaling (Guo et al. 2017, On calibration of modern neural networks): it minimizes the cross-entropy of
    the mean over passes of ``softmax(logits / temperature)``; above 1 the network was overconfident. One temperature
    for all classes leaves the most probable class of a pass unchanged; one per class would move the borders of small
    nuclei. Limited to 0.01 to 100: a network that needs more or less does not know the classes.

    Parameters
    ----------
    logits : Tensor of shape (passes, N, classes)
        Of voxels that were not used for training, in one or more passes, for example with a mirror image.
    labels : Tensor of shape (N,), integer
        Their true classes.
    """
    logits, labels = logits.double(), labels.long()
    fitted = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=_LBFGS_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        passes = (logits * torch.exp(-fitted)).log_softmax(dim=2)
        value = functional.nll_loss(passes.logsumexp(dim=0) - math.log(len(passes)), labels)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return float(fitted.detach().exp().clamp(_MIN_TEMPERATURE, _MAX_TEMPERATURE))


def choose_voxels(
    logits: Tensor, labels: Tensor, *, n_voxels: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose at most `n_voxels` uncertain voxels of a map at random.

    From logits (passes, classes, X, Y, Z) and true classes (X, Y, Z), returns those of the voxels, (passes, n, classes)
    and (n,).
    """
    uncertain = _find_uncertain(logits.softmax(dim=1)[:, 0].mean(dim=0), labels)
    chosen = uncertain[torch.randperm(len(uncertain), generator=generator)[:n_voxels]]
    return logits.flatten(2)[:, :, chosen].transpose(1, 2), labels.flatten()[chosen]


def _find_uncertain(background: Tensor, labels: Tensor) -> Tensor:
    """Return the flat indices of voxels that belong to a nucleus or are not certainly background."""
    return ((background < _CERTAIN_BACKGROUND) | (labels > 0)).flatten().nonzero()[:, 0]


def fit_shifts(maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]]) -> Tensor:
    """Fit a shift of each nucleus's logits with which its median volume is right.

    From the logits (n, classes) and true classes (n,) of the uncertain voxels of each map, returns shifts (classes,) to
    be added to logits: 0 for background, the same for classes of one nucleus (left and right), and at most ±1.5: a
    nucleus that needs more is not detected at all. All change in each iteration, since nuclei are adjacent.
    """
    shifts = torch.zeros(maps[0][0].shape[1])
    for _ in range(_SHIFT_ITERATIONS):
        for classes, error in zip(nuclei, volume_errors(maps, nuclei, shifts), strict=True):
            ratio = max(1 + error, _MIN_RATIO)
            shifts[classes] = (shifts[classes] - _RATE * math.log(ratio)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    return shifts


def volume_errors(
    maps: Sequence[tuple[Tensor, Tensor]], nuclei: Sequence[Sequence[int]], shifts: Tensor
) -> list[float]:
    """Compute the relative volume error of each nucleus with shifted logits: the median over the maps that show it."""
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
        predicted, true = counts[:, :, classes].sum(dim=2).double().T
        ratios = (predicted / true)[true > 0]
        errors.append(float(ratios.quantile(0.5)) - 1 if len(ratios) else 0.0)
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate a model folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="dgm16 or dgm24")
    parser.add_argument("out", type=Path, help="model folder")
    parser.add_argument("--template", type=Path, help="label template (default: the phantom)")
    parser.add_argument("--maps", type=positive_int, default=40, help="maps of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=1)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    return run_command("calibrate", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    temperature = calibrate(
        get_model(args.model),
        args.template,
        args.out,
        n_maps=args.maps,
        seed=args.seed,
        device=args.device,
        log=_print,
    )
    _print(f"temperature {temperature:.2f} in {args.out.name}/model.toml, biases in segmenter.safetensors")
    return 0


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
