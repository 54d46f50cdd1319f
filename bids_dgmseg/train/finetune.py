"""Go on training a model's segmenter on labelled maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bids_dgmseg.models.model_folder import read_model_folder
from bids_dgmseg.models.registry import Model
from bids_dgmseg.models.weights import load_weights, pick_device, save_weights, segmenter_network, to_channels_last
from bids_dgmseg.train.curve import Curve
from bids_dgmseg.train.labelled_patches import LabelledPatches
from bids_dgmseg.train.loop import Progress, Schedule, train, use_cores
from bids_dgmseg.train.simulated import Outcome
from bids_dgmseg.train.status_line import unseen

_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class FineTuning:
    """How long and how fast."""

    minutes: float = 10.0
    """Whole length, all slices together; with `steps` the length of this slice."""
    steps: int | None = None
    """Whole length in steps, which takes as long as it takes; by default the time rules."""
    learning_rate: float = 5e-4
    """A quarter of the one that trained the starting weights."""
    seed: int = 1
    device: str = "auto"
    workers: int = 1
    checkpoint_minutes: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The rate falls with the steps or with the time spent learning."""
        fixed = self.steps is not None
        return Schedule(
            steps=self.steps or _NO_LIMIT,
            minutes=None if fixed else self.minutes,
            learning_rate=self.learning_rate,
            warmup_steps=20,
            checkpoint_minutes=self.checkpoint_minutes,
        )


def fine_tune(
    model: Model,
    samples: LabelledPatches,
    out: Path,
    this: FineTuning,
    *,
    start: Path | None,
    say: Callable[[str], None],
    show: Callable[[str], None] = unseen,
) -> Outcome:
    """Train the segmenter, going on where ``OUT`` stopped or from the starting weights.

    Parameters
    ----------
    model : Model
        With a network of its own.
    samples : LabelledPatches
        What to learn from.
    out : path
        Model folder: gets ``segmenter_checkpoint.pt``, ``segmenter_curve.tsv`` and ``segmenter.safetensors``. Its
        ``model.toml`` has the temperatures, for which the network is trained: with them its labels are right.
    this : FineTuning
        How long and how fast.
    start : path or None
        Folder of the starting weights; None for the model's own.
    say, show : callable
        Get lines to keep, and lines that the next one may replace.
    """
    model = read_model_folder(model, out)
    use_cores()
    torch.manual_seed(this.seed)
    out.mkdir(parents=True, exist_ok=True)
    device, schedule = pick_device(this.device), this.schedule
    network = load_weights(segmenter_network(model), model, "segmenter", start).requires_grad_(True)
    progress = Progress.start(to_channels_last(network, device), schedule)
    checkpoint = out / "segmenter_checkpoint.pt"
    if checkpoint.is_file():
        progress.load(checkpoint)
    curve = Curve(out / "segmenter_curve.tsv", model.labels, say=say, show=show, step=progress.step, steps=this.steps)
    done = train(
        progress,
        samples,
        schedule=schedule,
        checkpoint=checkpoint,
        minutes=this.minutes,
        device=device,
        report=curve.add,
        workers=this.workers,
        temperatures=model.temperatures,
    )
    return Outcome(progress.step, done, save_weights(progress.average, out / "segmenter.safetensors"))
