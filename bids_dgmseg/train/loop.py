"""Train a network in slices of any length that resume exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from bids_dgmseg.segmentation.probabilities import apply_temperature
from bids_dgmseg.train.checkpoints import read_checkpoint, write_checkpoint
from bids_dgmseg.train.data_workers import in_workers
from bids_dgmseg.train.dice_loss import dice_and_cross_entropy
from bids_dgmseg.train.status_line import part_over, seconds_left


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn."""

    steps: int
    """Whole length of the training, all slices together; with `minutes` only a limit."""
    minutes: float | None = None
    """Whole length in minutes of learning, however many steps a machine takes in them."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    warmup_steps: int = 50
    gradient_norm: float = 5.0
    average: float = 0.995
    """Decay of the exponential moving average of the weights, which is what ships."""
    batch: int = 1
    checkpoint_minutes: float = 2.0

    def part(self, step: int, seconds: float = 0.0) -> float:
        """Part of the training that lies behind, 0 to 1, after some steps and seconds of learning."""
        return part_over(step / self.steps, seconds, self.minutes)

    def rate(self, step: int, seconds: float = 0.0) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine down to a hundredth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.part(step, seconds))))


@dataclass(frozen=True)
class Reached:
    """Where a training is after a step."""

    step: int
    """Counted from 1."""
    loss: float
    dice: Tensor
    """Of each class; NaN where it is absent."""
    seconds: float
    """Spent learning, all slices together."""
    left: float
    """Seconds that this slice will still take."""


@dataclass
class Progress:
    """Everything a training needs to go on where it stopped."""

    network: nn.Module
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    """Time spent learning, all slices together."""

    @classmethod
    def start(cls, network: nn.Module, schedule: Schedule) -> Progress:
        """Begin with an untrained (or pre-trained) network."""
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        return cls(network, {name: value.clone() for name, value in network.state_dict().items()}, optimizer)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_checkpoint(state, path)

    def load(self, path: Path) -> None:
        """Go back to a checkpoint."""
        state = read_checkpoint(path)
        self.network.load_state_dict(state["network"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)  # stays on the device of the training
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.seconds = state.get("seconds", 0.0)  # checkpoints of before had none


class _FromStep(torch.utils.data.Sampler[int]):
    """The indices of samples not yet seen, in order."""

    def __init__(self, first: int, last: int) -> None:
        self.indices = range(first, last)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def train(
    progress: Progress,
    samples: Dataset[tuple[Tensor, Tensor]],
    *,
    schedule: Schedule,
    checkpoint: Path,
    minutes: float,
    device: torch.device,
    report: Callable[[Reached], None],
    workers: int = 1,
    temperatures: Sequence[float] = (),
    loss: Callable[[Tensor, Tensor], Tensor] = dice_and_cross_entropy,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Learn until the schedule or the time is over.

    Parameters
    ----------
    progress : Progress
        Where to start; changed in place.
    samples : Dataset
        Map-style; sample i is the same whenever it is asked for.
    schedule : Schedule
        Steps and rates.
    checkpoint : path
        Written every few minutes and at the end.
    minutes : float
        Length of this slice.
    device : torch.device
        Where to compute; in bfloat16 where that is quicker.
    report : callable
        Is told after each step.
    workers : int
        Processes that make samples.
    temperatures : sequence of float
        One a class, by which the network's logits will be divided in use; none for not at all.
    loss : callable
        Of logits (B, C, X, Y, Z) and labels (B, X, Y, Z), a scalar.
    clock : callable
        Tells the time in seconds.

    Returns
    -------
    bool
        Whether the schedule is over.
    """
    if schedule.part(progress.step, progress.seconds) >= 1:
        return True
    started = saved = clock()
    before = progress.seconds
    batch = schedule.batch
    loader = DataLoader(
        samples,
        batch_size=batch,
        sampler=_FromStep(progress.step * batch, schedule.steps * batch),
        prefetch_factor=4 if workers else None,
        **in_workers(workers),
    )
    progress.network.train()
    for inputs, labels in loader:
        loss_value, dice = _step(progress, inputs, labels, schedule, device, temperatures, loss)
        progress.step += 1
        now = clock()
        progress.seconds = before + now - started
        part = schedule.part(progress.step, progress.seconds)
        left = min(seconds_left(progress.seconds, part), max(60 * minutes - (now - started), 0.0))
        report(Reached(progress.step, loss_value, dice, progress.seconds, left))
        if now - saved > 60 * schedule.checkpoint_minutes:
            progress.save(checkpoint)
            saved = now
        if now - started > 60 * minutes or part >= 1:
            break
    progress.save(checkpoint)
    return schedule.part(progress.step, progress.seconds) >= 1


def _step(
    progress: Progress,
    inputs: Tensor,
    labels: Tensor,
    schedule: Schedule,
    device: torch.device,
    temperatures: Sequence[float],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[float, Tensor]:
    """Take one step of gradient descent and move the average."""
    for group in progress.optimizer.param_groups:
        group["lr"] = schedule.rate(progress.step, progress.seconds)
    labels = labels.to(device)
    with mixed_precision(device):
        logits = apply_temperature(progress.network(batch_to_device(inputs, device)), temperatures)
    loss_value = loss(logits, labels)
    progress.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss_value)
    nn.utils.clip_grad_norm_(progress.network.parameters(), schedule.gradient_norm)
    progress.optimizer.step()
    decay = min(schedule.average, progress.step / (progress.step + 20))
    for name, value in progress.network.state_dict().items():
        average = progress.average[name]
        # Counters, such as batch normalization's, have no mean.
        average.lerp_(value, 1 - decay) if average.is_floating_point() else average.copy_(value)
    return float(loss_value.detach()), hard_dice(logits.detach(), labels)


def hard_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice a class of the most probable labels, background left out; NaN where the truth has none."""
    return dice_of_counts(class_counts(logits.argmax(dim=1), labels, logits.shape[1]))


def class_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count the voxels of each class (3, classes): in the truth, in the prediction, in both."""
    truth, both = labels.flatten(), labels[labels == predicted].flatten()
    return torch.stack(
        [torch.bincount(values.long(), minlength=classes).float() for values in (truth, predicted.flatten(), both)]
    )


def dice_of_counts(counts: Tensor) -> Tensor:
    """Dice of each class but the background from `class_counts`; NaN where the truth has none."""
    truth, predicted, both = counts
    return torch.where(truth > 0, 2 * both / (truth + predicted), torch.nan)[1:]


def use_cores() -> None:
    """Let torch use all the cores that this process may run on, or as many as OMP_NUM_THREADS says."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
