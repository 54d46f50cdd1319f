"""Learn in epochs, with validation and early stopping, in slices that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from bids_dgmseg.train.checkpoints import read_checkpoint, write_checkpoint
from bids_dgmseg.train.data_workers import in_workers
from bids_dgmseg.train.loop import class_counts, dice_of_counts
from bids_dgmseg.train.objectives import Objective, main_logits, most_probable_classes
from bids_dgmseg.train.patches import WindowSamples, mix
from bids_dgmseg.train.recipe import Pace


@dataclass(frozen=True)
class Row:
    """One epoch of the learning curve."""

    epoch: int
    """Counted from 1."""
    steps: int
    learning_rate: float
    loss: float
    """Mean over the steps."""
    validation_loss: float
    """NaN where nothing is validated."""
    dice: tuple[float, ...]
    """Of each class over all validation samples together; NaN where none shows it."""


@dataclass
class State:
    """Everything a training needs to go on where it stopped."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    """Epochs that are over."""
    step: int = 0
    """Steps of the next epoch that are over."""
    loss_sum: float = 0.0
    """Of these steps."""
    seconds: float = 0.0
    """Time spent learning, all slices together."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the epoch with the least validation loss."""
    best_loss: float = math.inf
    stale: int = 0
    """Epochs since then."""
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def start(cls, network: nn.Module, pace: Pace) -> State:
        """Begin with an untrained (or pre-trained) network."""
        return cls(network, torch.optim.Adam(network.parameters(), lr=pace.learning_rate))

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        content = {
            **plain,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rows": [tuple(vars(row).values()) for row in self.rows],
        }
        write_checkpoint(content, path)

    def load(self, path: Path) -> None:
        """Go back to a checkpoint."""
        content = read_checkpoint(path)
        self.network.load_state_dict(content.pop("network"))
        self.optimizer.load_state_dict(content.pop("optimizer"))
        self.rows = [Row(*values) for values in content.pop("rows")]
        for name, value in content.items():
            setattr(self, name, value)

    def over(self, pace: Pace) -> bool:
        """Whether epochs, time or patience have come to their end."""
        late = pace.minutes is not None and self.seconds >= 60 * pace.minutes
        stuck = pace.patience is not None and self.stale >= pace.patience
        return self.step == 0 and (self.epoch >= pace.epochs or late or stuck)

    def result(self) -> dict[str, Tensor]:
        """Give the weights to keep: the best, or before any validation those reached."""
        return self.best or dict(self.network.state_dict())


_PLAIN = ("epoch", "step", "loss_sum", "seconds", "best", "best_loss", "stale")


class _Batches(Sampler[list[int]]):
    """Batches of all epochs from a place on, each epoch in an order of its own."""

    def __init__(self, samples: int, pace: Pace, *, seed: int, epoch: int, step: int) -> None:
        self.samples, self.pace, self.seed, self.epoch, self.step = samples, pace, seed, epoch, step

    def __iter__(self) -> Iterator[list[int]]:
        first = self.step
        for epoch in range(self.epoch, self.pace.epochs):
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = (torch.randperm(self.samples, generator=generator) + epoch * self.samples).tolist()
            for start in range(first * self.pace.batch, self.samples, self.pace.batch):
                yield order[start : start + self.pace.batch]
            first = 0


@dataclass(frozen=True)
class Run:
    """What one call of `learn` works with."""

    pace: Pace
    loss: Objective
    checkpoint: Path
    """Written every few minutes and at the end."""
    classes: int
    """Background included."""
    seed: int = 1
    device: str = "cpu"
    """``cpu`` or ``cuda``; either computes in bfloat16 where that is quicker."""
    workers: int = 0
    """Processes that make samples."""
    checkpoint_minutes: float = 2.0
    clock: Callable[[], float] = time.monotonic


def learn(
    state: State,
    samples: WindowSamples,
    validation: WindowSamples | None,
    run: Run,
    *,
    report: Callable[[State, int, float], None],
    finish_epoch: Callable[[State], bool | None] = lambda state: None,
) -> None:
    """Learn until the epochs, the time or the patience are over.

    Parameters
    ----------
    state : State
        Where to start; changed in place.
    samples, validation : WindowSamples
        What to learn from, and what to watch; None to learn to the end and keep the last weights.
    run : Run
        How.
    report : callable
        Gets the state, the steps of an epoch and the loss after each step.
    finish_epoch : callable
        Gets the state when a row of the curve is there; True ends this call.

    Raises
    ------
    FloatingPointError
        If the loss is no number any more.
    """
    if state.over(run.pace):
        return
    saved = last = run.clock()
    steps = math.ceil(len(samples) / run.pace.batch)
    loader = DataLoader(
        samples,
        batch_sampler=_Batches(len(samples), run.pace, seed=run.seed, epoch=state.epoch, step=state.step),
        **in_workers(run.workers),
    )
    enough: bool | None = False
    for inputs, labels in loader:
        rate = run.pace.rate(state.epoch, state.seconds)
        loss = _step(state, inputs, labels, run, rate)
        state.step, state.loss_sum = state.step + 1, state.loss_sum + loss
        now = run.clock()
        state.seconds, last = state.seconds + now - last, now
        report(state, steps, loss)
        late = run.pace.minutes is not None and state.seconds >= 60 * run.pace.minutes
        if state.step == steps or late:
            _close_epoch(state, validation, run, rate)
            enough = finish_epoch(state)
            last = run.clock()
        if enough or state.over(run.pace):
            break
        if now - saved > 60 * run.checkpoint_minutes:
            state.save(run.checkpoint)
            saved = now
    state.save(run.checkpoint)


def _step(state: State, inputs: Tensor, labels: Tensor, run: Run, rate: float) -> float:
    """Take one step of gradient descent."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(mix(run.seed, state.epoch, state.step))  # dropout does not depend on what came before
    state.network.train()
    loss = _loss(state.network, inputs, labels, run)[0]
    if not torch.isfinite(loss):
        where = f"step {state.step + 1} of epoch {state.epoch + 1}"
        raise FloatingPointError(f"the loss is {float(loss.detach())} in {where}")
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    state.optimizer.step()
    return float(loss.detach())


def _loss(network: nn.Module, inputs: Tensor, labels: Tensor, run: Run) -> tuple[Tensor, Any]:
    device = torch.device(run.device)
    with mixed_precision(device):
        answer = network(batch_to_device(inputs, device))
    return run.loss(network, answer, labels.to(device)), answer


def _close_epoch(state: State, validation: WindowSamples | None, run: Run, rate: float) -> None:
    """Validate, add the row of the curve, and keep the weights if they are the best."""
    watched, dice = validate(state.network, validation, run)
    mean = state.loss_sum / state.step
    state.rows.append(Row(state.epoch + 1, state.step, rate, mean, watched, dice))
    if validation is None:
        state.best = {}  # the last weights are kept
    elif watched < state.best_loss:
        state.best_loss, state.stale = watched, 0
        state.best = {name: value.detach().cpu().clone() for name, value in state.network.state_dict().items()}
    else:
        state.stale += 1
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0


def validate(network: nn.Module, samples: WindowSamples | None, run: Run) -> tuple[float, tuple[float, ...]]:
    """Compute the mean loss over samples, and the Dice of each class over all of them."""
    if samples is None:
        return math.nan, (math.nan,) * (run.classes - 1)
    network.eval()
    counts, total = torch.zeros(3, run.classes), 0.0
    with torch.inference_mode():
        for inputs, labels in DataLoader(samples, batch_size=run.pace.batch):
            loss, answer = _loss(network, inputs, labels, run)
            total += float(loss) * len(inputs)
            predicted = most_probable_classes(main_logits(answer).float(), run.classes).cpu()
            counts += class_counts(predicted, labels, run.classes)
    return total / len(samples), tuple(dice_of_counts(counts).tolist())
