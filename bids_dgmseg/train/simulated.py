"""Train the shipped model's two networks on maps that are simulated while they learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bids_dgmseg.image.grids import shape_to_cover
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.weights import (
    load_weights,
    localizer_network,
    pick_device,
    save_weights,
    segmenter_network,
    to_channels_last,
)
from bids_dgmseg.segmentation.inference import NORMALIZATIONS
from bids_dgmseg.simulate.dataset import read_template
from bids_dgmseg.simulate.sample import LOCALIZER_VIEW, SEGMENTER_VIEW, nuclei_labels, region_labels, typical_view
from bids_dgmseg.train.curve import Curve
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy, dice_and_focal
from bids_dgmseg.train.loop import Progress, Reached, Schedule, train, use_cores
from bids_dgmseg.train.sampling import ORDINARY_WIDTH, SimulatedMaps, training_heads
from bids_dgmseg.train.status_line import unseen
from bids_dgmseg.train.validation import SEED, Validation

Part = Literal["localizer", "segmenter"]

Loss = Literal["cross-entropy", "focal"]

_LOSSES: Mapping[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": dice_and_cross_entropy,
    "focal": dice_and_focal,
}


@dataclass(frozen=True)
class Slice:
    """One slice of a training."""

    part: Part
    steps: int
    """Length of the whole training."""
    minutes: float
    """Length of this slice."""
    seed: int = 0
    device: str = "auto"
    workers: int = 1
    """Processes that draw maps; none where a GPU draws them."""
    learning_rate: float = Schedule.learning_rate
    validation_maps: int = 10
    """How many simulated maps, the same in every training, the averaged weights are tried on; 0 for none."""
    start: Path | None = None
    """Folder of the weights that a new training starts from; None for random ones."""
    loss: Loss = "cross-entropy"
    """What is added to Dice."""


@dataclass(frozen=True)
class Outcome:
    """Where a training stands after a slice."""

    step: int
    done: bool
    sha256: str
    """Of the averaged weights, ``OUT/PART.safetensors``."""


def train_on_simulations(
    model: Model,
    template: Path | None,
    out: Path,
    this: Slice,
    *,
    say: Callable[[str], None],
    show: Callable[[str], None] = unseen,
) -> Outcome:
    """Train one part of a model for a slice of time, going on where ``OUT`` stopped.

    Parameters
    ----------
    model : Model
        With a network and a network localizer.
    template : path, optional
        Label template; without one maps show the analytic phantom alone.
    out : path
        Model folder: checkpoint, learning curve, Dice on the fixed maps and weights a part.
    this : Slice
        What to train and how long.
    say, show : callable
        Get lines to keep, and lines that the next one may replace.
    """
    use_cores()
    torch.manual_seed(this.seed)
    out.mkdir(parents=True, exist_ok=True)
    device, schedule = pick_device(this.device), Schedule(steps=this.steps, learning_rate=this.learning_rate)
    network = localizer_network(model) if this.part == "localizer" else segmenter_network(model)
    if this.start is not None:
        network = load_weights(network, model, this.part, this.start).requires_grad_(True)
    progress = Progress.start(to_channels_last(network, device), schedule)
    checkpoint = out / f"{this.part}_checkpoint.pt"
    if checkpoint.is_file():
        progress.load(checkpoint)
    classes = model.localizer.labels if this.part == "localizer" else model.labels
    curve = Curve(out / f"{this.part}_curve.tsv", classes, say=say, show=show, step=progress.step, steps=this.steps)
    maps = simulated_maps(model, template, this.part, seed=this.seed, device=device)
    validation = Validation(
        replace(maps, seed=SEED),
        n_maps=this.validation_maps,
        network=progress.network,
        average=progress.average,
        path=out / f"{this.part}_validation.tsv",
        classes=classes,
        device=device,
        say=say,
        step=progress.step,
        seconds=progress.seconds,
    )

    def report(now: Reached) -> None:
        curve.add(now)
        validation.add(now)

    samples = among_ordinary(maps, model) if this.part == "segmenter" else maps
    done = train(
        progress,
        samples,
        schedule=schedule,
        checkpoint=checkpoint,
        minutes=this.minutes,
        device=device,
        workers=this.workers if device.type == "cpu" else 0,
        report=report,
        loss=_LOSSES[this.loss],
    )
    validation.measure(progress.step)
    return Outcome(progress.step, done, save_weights(progress.average, out / f"{this.part}.safetensors"))


def simulated_maps(
    model: Model, template: Path | None, part: Part, *, seed: int, device: str | torch.device = "cpu"
) -> SimulatedMaps:
    """Stream the maps from which one part of a model learns, drawn on a device."""
    heads = training_heads(None if template is None else read_template(template), device)
    if part == "localizer" and model.localizer.input is not None:
        view, classes_of, shown = LOCALIZER_VIEW, region_labels, model.localizer.input
    else:
        view, classes_of, shown = SEGMENTER_VIEW, nuclei_labels, model.input
    return SimulatedMaps(heads, view, seed=seed, classes_of=classes_of, normalize=NORMALIZATIONS[shown.normalization])


def among_ordinary(maps: SimulatedMaps, model: Model) -> SimulatedMaps:
    """Let some samples be ordinary, and these as large as what the network is shown in use."""
    view = maps.view
    shape = shape_to_cover(model.input.patch_mm, (view.spacing_mm,) * 3)
    # As many nuclei are cut off as in a smaller view.
    beyond_mm = (shape[2] - view.shape[2]) * view.spacing_mm / 2
    below_mm, above_mm = (cut_mm + beyond_mm for cut_mm in view.cut_mm)
    shown = replace(view, shape=shape, cut_mm=(below_mm, above_mm))
    return replace(maps, ordinary=typical_view(shown, ORDINARY_WIDTH))
