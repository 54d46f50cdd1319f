"""The training loop and its state, schedules and checkpoints: one for simulated, labelled and pseudo-labelled maps.

What differs between trainings is data: the samples, the schedule (steps or epochs) and the loss.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bids_dgmseg.errors import InputError
from bids_dgmseg.io.files import write_bytes
from bids_dgmseg.lab.train.losses import AnyLoss, class_counts, dice_of_counts, main_logits, most_probable_classes
from bids_dgmseg.models.registry import Positive
from bids_dgmseg.resources import HAS_FORKSERVER, count_cpus, end_with_parent, keep_freed_memory
from bids_dgmseg.segmentation.inference import FastLayers, batch_to_device, mixed_precision
from bids_dgmseg.segmentation.predict import apply_temperature

Samples = Dataset[tuple[Tensor, Tensor]]


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
        """Check if the steps or the minutes are over."""
        return self.fraction_done(at) >= 1

    def batches(self, n_samples: int, at: Position, *, seed: int) -> Iterator[list[int]]:
        """Yield consecutive indices, from the first sample that was not used yet."""
        for step in range(at.step, self.steps):
            yield list(range(step * self.batch, (step + 1) * self.batch))


class Pace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Training in epochs with Adam, as the papers describe it; sample i of epoch e has index e · n_samples + i."""

    epochs: Count
    batch: Count
    learning_rate: Positive
    patience: Count | None = None
    """Epochs without a lower validation loss after which the training ends; None for never."""
    milestones: tuple[Count, ...] = ()
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
        """Check if all samples were used or the time is over."""
        return at.step == epoch_steps or self._is_late(at)

    def finished(self, at: Position) -> bool:
        """Check if epochs, minutes or patience are over; only at the end of an epoch."""
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
        return msgspec.structs.replace(self, epochs=epochs, milestones=milestones)

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


def mix(*numbers: int) -> int:
    """Combine several numbers into one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


@dataclass(kw_only=True)
class State(Position):
    """Everything that a training needs to resume; changed in place."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None = None
    """Exponential moving average of the weights."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """Weights with the lowest validation loss."""
    best_loss: float = math.inf
    loss_sum: float = 0.0
    """Over the steps of the current epoch."""
    rows: list[dict[str, float]] = field(default_factory=list)
    """Learning curve."""
    unlogged: list[list[float]] = field(default_factory=list)
    """Loss and Dice of each step that is not in the learning curve yet, of trainings without epochs."""
    record: dict[str, Any] = field(default_factory=dict)
    """What is trained on what, as in ``training.json``."""

    @classmethod
    def start(cls, network: nn.Module, schedule: Schedule) -> State:
        """Begin with an untrained or pretrained network."""
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        average = None
        if schedule.average is not None:
            average = {name: value.clone() for name, value in network.state_dict().items()}
        return cls(network=network, optimizer=optimizer, average=average)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to keep: the average, else the best, else the current ones."""
        if self.average is not None:
            return self.average
        return self.best or dict(self.network.state_dict())

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        buffer = io.BytesIO()
        torch.save({**content, **{name: content[name].state_dict() for name in ("network", "optimizer")}}, buffer)
        write_bytes(buffer.getvalue(), path)

    def load(self, path: Path) -> None:
        """Return to a checkpoint."""
        content = read_checkpoint(path)
        self.network.load_state_dict(content.pop("network"))
        self.optimizer.load_state_dict(content.pop("optimizer"))
        for name, value in (content.pop("average") or {}).items():
            cast("dict[str, Tensor]", self.average)[name].copy_(value)  # stays on the device of the training
        for name, value in content.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Run:
    """Settings of one call of `train`."""

    schedule: Schedule
    loss: AnyLoss
    checkpoint: Path
    """Written every few minutes and at the end."""
    classes: Sequence[str] = ()
    """Names of the classes except background; needed for validation."""
    seed: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Computes in bfloat16 if that is faster."""
    workers: int = 0
    """Processes that generate samples."""
    minutes: float = math.inf
    """Time limit of this call; the next call resumes the training."""
    checkpoint_minutes: float = 2.0
    temperatures: Sequence[float] = ()
    """One per class, by which logits are divided in use; empty if they are not."""
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class StepResult:
    """What `train` reports after each step."""

    loss: float
    logits: Tensor
    labels: Tensor
    epoch_steps: int | None
    """Steps per epoch."""
    seconds_left: float
    """Estimated remaining time of this call."""

    @property
    def dice(self) -> Tensor:
        """Dice per class of this step's samples before the step; NaN for absent classes."""
        n_classes = self.logits.shape[1]
        return dice_of_counts(class_counts(most_probable_classes(self.logits, n_classes), self.labels, n_classes))


def train(
    state: State,
    samples: Samples,
    run: Run,
    *,
    validation: Samples | None = None,
    report: Callable[[State, StepResult], None] = lambda state, result: None,
    finish_epoch: Callable[[State], bool | None] = lambda state: None,
) -> None:
    """Train until the schedule or this call's time is over; changes `state` in place.

    Sample i of the map-style `samples` is the same whenever it is read. `validation` is evaluated after each epoch;
    without it the last weights are kept. `report` is called after each step, and `finish_epoch` after each epoch, when
    its row of the learning curve exists; True ends this call. FloatingPointError if the loss is not finite.
    """
    schedule = run.schedule
    if schedule.finished(state):
        return
    n_samples = len(samples) if isinstance(samples, Sized) else 0
    epoch_steps = schedule.epoch_steps(n_samples)
    started = saved = last = run.clock()
    batches = schedule.batches(n_samples, state, seed=run.seed)
    ended: bool | None = False
    for inputs, labels in _draw(samples, batches, workers=run.workers):
        rate = schedule.rate(state)
        loss, logits, labels = _step(state, inputs, labels, run, rate)
        now = run.clock()
        state.step, state.loss_sum = state.step + 1, state.loss_sum + loss
        state.seconds, last = state.seconds + now - last, now
        fraction = schedule.fraction_done(state, epoch_steps)
        left = min(state.seconds * (1 / fraction - 1), max(60 * run.minutes - (now - started), 0.0))
        report(state, StepResult(loss, logits, labels, epoch_steps, left))
        if schedule.epoch_finished(state, epoch_steps):
            _finish_epoch(state, validation, run, rate)
            ended = finish_epoch(state)
            last = run.clock()  # validation does not count as training time
        if ended or schedule.finished(state) or now - started > 60 * run.minutes:
            break
        if now - saved > 60 * run.checkpoint_minutes:
            state.save(run.checkpoint)
            saved = now
    state.save(run.checkpoint)


def _step(state: State, inputs: Tensor, labels: Tensor, run: Run, rate: float) -> tuple[float, Tensor, Tensor]:
    """Do one step of gradient descent; return loss, logits and labels."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    torch.manual_seed(mix(run.seed, state.epoch, state.step))  # dropout does not depend on earlier calls
    state.network.train()
    loss, answer, labels = _forward(state.network, inputs, labels, run)
    if not torch.isfinite(loss):
        where = f"step {state.step + 1} of epoch {state.epoch + 1}"
        raise FloatingPointError(f"the loss is {float(loss.detach())} in {where}")
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    if run.schedule.gradient_norm is not None:
        nn.utils.clip_grad_norm_(state.network.parameters(), run.schedule.gradient_norm)
    state.optimizer.step()
    if state.average is not None and run.schedule.average is not None:
        decay = min(run.schedule.average, state.step / (state.step + 20))
        for name, value in state.network.state_dict().items():
            mean = state.average[name]
            # Counters, such as those of batch normalization, have no mean.
            mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)
    return float(loss.detach()), main_logits(answer).detach(), labels


def _forward(network: nn.Module, inputs: Tensor, labels: Tensor, run: Run) -> tuple[Tensor, Any, Tensor]:
    """Compute the loss (in float32) and the network's output (in mixed precision)."""
    labels = labels.to(run.device)
    with mixed_precision(run.device):
        answer = network(batch_to_device(inputs, run.device))
        if run.temperatures:
            answer = apply_temperature(answer, run.temperatures)
    return run.loss(network, answer, labels), answer, labels


def _finish_epoch(state: State, validation: Samples | None, run: Run, rate: float) -> None:
    """Validate, append a row to the learning curve and keep the weights if they are the best."""
    loss, dice = validate(state.network, validation, run)
    row = {
        "epoch": state.epoch + 1,
        "steps": state.step,
        "learning_rate": rate,
        "loss": state.loss_sum / state.step,
        "validation_loss": loss,
    }
    state.rows.append({**row, **dict(zip(run.classes, dice, strict=True))})
    if validation is None:
        state.best = {}  # the last weights are kept
    elif loss < state.best_loss:
        state.best_loss, state.stale = loss, 0
        state.best = {name: value.detach().cpu().clone() for name, value in state.network.state_dict().items()}
    else:
        state.stale += 1
    state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0


def validate(network: nn.Module, samples: Samples | None, run: Run) -> tuple[float, tuple[float, ...]]:
    """Compute the mean loss of samples, and the Dice per class over all of them together; NaN without samples."""
    if samples is None:
        return math.nan, (math.nan,) * len(run.classes)
    network.eval()
    n_classes = len(run.classes) + 1
    counts, total, n_samples = torch.zeros(3, n_classes), 0.0, 0
    with torch.inference_mode(), FastLayers():
        for inputs, labels in DataLoader(samples, batch_size=run.schedule.batch):
            loss, answer, _ = _forward(network, inputs, labels, run)
            total, n_samples = total + float(loss) * len(inputs), n_samples + len(inputs)
            predicted = most_probable_classes(main_logits(answer).float(), n_classes).cpu()
            counts += class_counts(predicted, labels, n_classes)
    return total / n_samples, tuple(dice_of_counts(counts).tolist())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `State.save` wrote: tensors and plain values; InputError if it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: is damaged; copy the whole folder again, or delete it to start again") from error
    return state


def use_all_cores() -> None:
    """Set the number of torch threads to OMP_NUM_THREADS, or to the cores available to this process."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count_cpus())


def _draw(samples: Samples, batches: Any, *, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw batches, in `workers` processes; InputError if the samples do not fit into the shared memory."""
    try:
        yield from DataLoader(samples, batch_sampler=batches, **worker_options(workers))
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise InputError("no space in /dev/shm; enlarge it (docker run --shm-size 16g) or use `workers` 0") from error


def worker_options(count: int) -> dict[str, Any]:
    """Return the options of a DataLoader with that number of processes; 0 reads the dataset in this one."""
    if count == 0:
        return {"num_workers": 0}
    # By default each tensor is sent as a file descriptor, of which a new process accepts 251: too few for 130 maps.
    torch.multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
    torch.multiprocessing.set_forkserver_preload([__name__])  # else each process loads torch
    return {
        "num_workers": count,
        "prefetch_factor": 4,
        "multiprocessing_context": "forkserver" if HAS_FORKSERVER else "spawn",
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    """Prepare a worker process.

    torch watches the worker's parent, which with forkserver is the server, not the training.
    """
    keep_freed_memory()
    end_with_parent()
