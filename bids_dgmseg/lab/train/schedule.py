"""Length, learning rate and batches of a training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import msgspec
import numpy as np
import torch

from bids_dgmseg.models.registry import Positive

Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass
class Position:
    """How far a training has come."""

    epoch: int = 0
    """Epochs that are finished."""
    step: int = 0
    """Steps of the current epoch that are finished; of a training without epochs all steps."""
    seconds: float = 0.0
    """Training time, over all calls."""
    stale: int = 0
    """Epochs since the lowest validation loss."""


@dataclass(frozen=True)
class StepSchedule:
    """Training without epochs: each sample is used once; linear warm-up, then half a cosine down to a hundredth."""

    steps: int
    """Total length, over all calls; an upper limit if `minutes` is given."""
    minutes: float | None = None
    """Total training time, which then determines the learning rate."""
    learning_rate: float = 2e-3
    """Maximum."""
    weight_decay: float = 1e-4
    """Of AdamW; without it AdamW is Adam."""
    warmup_steps: int = 50
    gradient_norm: float | None = 5.0
    """Norm to which gradients are clipped; None for no clipping."""
    average: float | None = 0.995
    """Decay of the exponential moving average of the weights; None for no average."""
    batch: int = 1
    """Samples per step."""

    def rate(self, at: Position) -> float:
        """Return the learning rate of the next step."""
        if at.step < self.warmup_steps:
            return self.learning_rate * (at.step + 1) / self.warmup_steps
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.fraction_done(at))))

    def epoch_steps(self, n_samples: int) -> int | None:
        """Return None: there are no epochs."""
        return None

    def fraction_done(self, at: Position, epoch_steps: int | None = None) -> float:
        """Return the finished fraction of the training, from 0 to 1."""
        return fraction_done(at.step / self.steps, at.seconds, self.minutes)

    def epoch_finished(self, at: Position, epoch_steps: int | None) -> bool:
        """Return False: there are no epochs."""
        return False

    def finished(self, at: Position) -> bool:
        """Return whether the steps or the minutes are over."""
        return self.fraction_done(at) >= 1

    def batches(self, n_samples: int, at: Position, *, seed: int) -> Iterator[list[int]]:
        """Yield consecutive indices, from the first sample that was not used yet."""
        for step in range(at.step, self.steps):
            yield list(range(step * self.batch, (step + 1) * self.batch))


@dataclass(frozen=True)
class Pace:
    """Training in epochs with Adam, as the papers describe it; sample i of epoch e has index e · n_samples + i."""

    epochs: Count
    batch: Count
    learning_rate: Positive
    patience: Count | None = None
    """Epochs without a lower validation loss after which the training ends; None for never."""
    milestones: tuple[int, ...] = ()
    """Epochs at which the learning rate drops to a tenth."""
    minutes: Positive | None = None
    """Training time after which the training ends."""

    weight_decay: ClassVar[float] = 0.0
    gradient_norm: ClassVar[float | None] = None
    average: ClassVar[float | None] = None

    def rate(self, at: Position) -> float:
        """Return the learning rate of an epoch; with `minutes`, milestones are reached at the same fraction of them."""
        done = self.fraction_done(Position(at.epoch, seconds=at.seconds))
        return float(self.learning_rate * 0.1 ** sum(done >= milestone / self.epochs for milestone in self.milestones))

    def epoch_steps(self, n_samples: int) -> int | None:
        """Return the number of steps in which each sample is used once."""
        return math.ceil(n_samples / self.batch)

    def fraction_done(self, at: Position, epoch_steps: int | None = None) -> float:
        """Return the finished fraction of the training, from 0 to 1; early stopping may end it before."""
        epochs = at.epoch + (at.step / epoch_steps if epoch_steps else 0)
        return fraction_done(epochs / self.epochs, at.seconds, self.minutes)

    def epoch_finished(self, at: Position, epoch_steps: int | None) -> bool:
        """Return whether all samples were used or the time is over."""
        return at.step == epoch_steps or self._is_late(at)

    def finished(self, at: Position) -> bool:
        """Return whether epochs, minutes or patience are over; only at the end of an epoch."""
        impatient = self.patience is not None and at.stale >= self.patience
        return at.step == 0 and (at.epoch >= self.epochs or self._is_late(at) or impatient)

    def batches(self, n_samples: int, at: Position, *, seed: int) -> Iterator[list[int]]:
        """Yield the samples of all remaining epochs, each epoch in a new order."""
        first = at.step
        for epoch in range(at.epoch, self.epochs):
            generator = torch.Generator().manual_seed(mix(seed, epoch))
            order = (torch.randperm(n_samples, generator=generator) + epoch * n_samples).tolist()
            for start in range(first * self.batch, n_samples, self.batch):
                yield order[start : start + self.batch]
            first = 0

    def shortened(self, epochs: int) -> Pace:
        """Change the number of epochs; milestones keep their fraction of it, but none lies before epoch 1."""
        milestones = tuple(max(1, round(milestone * epochs / self.epochs)) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)

    def _is_late(self, at: Position) -> bool:
        return self.minutes is not None and at.seconds >= 60 * self.minutes


Schedule = StepSchedule | Pace
"""What the training core accepts."""


def fraction_done(fraction: float, seconds: float, minutes: float | None) -> float:
    """Return the finished fraction of a training by its steps (`fraction`) or by its time, whichever is larger.

    Examples
    --------
    >>> fraction_done(0.25, seconds=30, minutes=1), fraction_done(0.75, seconds=30, minutes=1)
    (0.5, 0.75)
    """
    return min(fraction if minutes is None else max(fraction, seconds / (60 * minutes)), 1.0)


def seconds_left(seconds: float, fraction: float) -> float:
    """Estimate the remaining time from the time so far and the finished fraction (above 0)."""
    return seconds * (1 - fraction) / fraction


def mix(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
