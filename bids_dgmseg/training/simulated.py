"""Train the shipped model's two networks on maps that are simulated while they learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from bids_dgmseg.images.volume import Volume
from bids_dgmseg.models import Model
from bids_dgmseg.segment.normalize import NORMALIZATIONS
from bids_dgmseg.segment.weights import (
    localizer_network,
    pick_device,
    save_weights,
    segmenter_network,
    to_channels_last,
)
from bids_dgmseg.simulate.sample import LOCALIZER_VIEW, SEGMENTER_VIEW, nuclei_labels, region_labels
from bids_dgmseg.training.curve import Curve
from bids_dgmseg.training.loop import Progress, Schedule, train, use_cores
from bids_dgmseg.training.sampling import SimulatedMaps, training_heads


@dataclass(frozen=True)
class Slice:
    """One slice of a training."""

    part: Literal["localizer", "segmenter"]
    steps: int
    """Length of the whole training."""
    minutes: float
    """Length of this slice."""
    seed: int = 0
    device: str = "auto"
    workers: int = 1


@dataclass(frozen=True)
class Outcome:
    """Where a training stands after a slice."""

    step: int
    done: bool
    sha256: str
    """Of the averaged weights, ``OUT/PART.safetensors``."""


def train_on_simulations(
    model: Model, template: Path | None, out: Path, this: Slice, *, say: Callable[[str], None]
) -> Outcome:
    """Train one part of a model for a slice of time, going on where ``OUT`` stopped.

    Parameters
    ----------
    model : Model
        With a network and a network localizer.
    template : path, optional
        Label template; without one maps show the analytic phantom alone.
    out : path
        Model folder: checkpoint, learning curve and weights a part.
    this : Slice
        What to train and how long.
    say : callable
        Gets lines to show.
    """
    use_cores()
    torch.manual_seed(this.seed)
    out.mkdir(parents=True, exist_ok=True)
    device, schedule = pick_device(this.device), Schedule(steps=this.steps)
    network = localizer_network(model) if this.part == "localizer" else segmenter_network(model)
    progress = Progress.start(to_channels_last(network, device), schedule)
    checkpoint = out / f"{this.part}_checkpoint.pt"
    if checkpoint.is_file():
        progress.load(checkpoint)
    classes = model.localizer.labels if this.part == "localizer" else model.labels
    done = train(
        progress, _samples(model, template, this), schedule=schedule, checkpoint=checkpoint, minutes=this.minutes,
        device=device, workers=this.workers,
        report=Curve(out / f"{this.part}_curve.tsv", classes, say=say, step=progress.step).add,
    )  # fmt: skip
    return Outcome(progress.step, done, save_weights(progress.average, out / f"{this.part}.safetensors"))


def _samples(model: Model, template: Path | None, this: Slice) -> SimulatedMaps:
    heads = training_heads(None if template is None else Volume.read(template, np.uint8))
    if this.part == "localizer" and model.localizer.input is not None:
        view, classes_of, shown = LOCALIZER_VIEW, region_labels, model.localizer.input
    else:
        view, classes_of, shown = SEGMENTER_VIEW, nuclei_labels, model.input
    return SimulatedMaps(
        heads, view, seed=this.seed, classes_of=classes_of, normalize=NORMALIZATIONS[shown.normalization]
    )
