"""nnU-Net's trainer without mirroring, with elastic deformation, that resumes after a kill and keeps to a time."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from torch import Tensor

from bids_dgmseg.io.files import atomic_write, write_text
from bids_dgmseg.models.nnunet_folder import read_checkpoint
from bids_dgmseg.models.weights import to_channels_last
from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision
from bids_dgmseg.train.nnunet.data import NnunetTraining
from bids_dgmseg.train.status_line import live_line, part_over, seconds_left, unseen

STOCK_TRAINER = "nnUNetTrainerNoMirroring"
"""What our model folders name, since stock ``nnUNetv2_predict`` knows it; it builds the same network."""

_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h

_ELASTIC = 0.2
"""Part of the samples that are bent, as those that are turned and scaled; nnU-Net's own trainer bends none."""

_WAVE = (0.08, 0.25)
"""SD over which a bend is smooth, relative to the edge of a patch: 4 to 12 mm of one of 48 mm."""

_STEEPNESS = 0.25
"""Largest displacement relative to that SD: far from folding space."""


def _draw_displacement(*, deformation_scale: float, patch_size: Sequence[int], dim: int, **_: Any) -> float:
    """Draw by how many voxels a sample is bent along an axis at most; nnU-Net's default is less than one."""
    return float(np.random.uniform(0, _STEEPNESS * deformation_scale * patch_size[dim]))  # noqa: NPY002 - as nnU-Net


def _as_floats(outputs: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Convert the logits of one scale or several."""
    return outputs.float() if isinstance(outputs, Tensor) else [logits.float() for logits in outputs]


class _DieWithTrainer:
    """A transform that changes nothing and lets no worker live on without its trainer, which may be killed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid  # of the trainer, which must not get the signal itself

    def __call__(self, **sample: Any) -> dict[str, Any]:
        if self.pid != os.getpid() and sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            self.pid = os.getpid()
        return sample


class _FallingRate:
    """Learning rate that falls to 0 over the training by the power 0.9, as nnU-Net's, by epochs or by time."""

    def __init__(self, trainer: DentateTrainer) -> None:
        self.trainer = trainer

    def step(self, epoch: int) -> None:
        """Set the rate of an epoch."""
        rate = self.trainer.initial_lr * (1 - self.trainer.share(epoch)) ** 0.9
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = rate


class DentateTrainer(nnUNetTrainerNoMirroring):
    """Rotation, scaling, elastic deformation and intensities vary; left and right are never exchanged."""

    length = NnunetTraining()
    say: Callable[[str], None] = staticmethod(unseen)
    show: Callable[[str], None] = staticmethod(unseen)
    step_name = ""
    _saved = 0.0

    def use(
        self, length: NnunetTraining, *, say: Callable[[str], None], show: Callable[[str], None] = unseen, step: str
    ) -> None:
        """Set what nnU-Net's constructor has no place for."""
        self.length, self.say, self.show, self.step_name = length, say, show, step
        self.num_epochs = length.epochs
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = length.iterations, length.watched
        self._plot = self.logger.plot_progress_png
        self.logger.plot_progress_png = lambda folder: None  # seconds an epoch; once at the end is enough

    @property
    def latest(self) -> Path:
        """The checkpoint that a resumed training goes on from."""
        return Path(self.output_folder) / "checkpoint_latest.pth"

    def share(self, epoch: float) -> float:
        """Part of the training that lies behind after some epochs, 0 to 1."""
        return part_over(epoch / self.num_epochs, self.seconds(), self.length.minutes)

    def seconds(self) -> float:
        """Time spent learning so far, all runs together."""
        starts, ends = (self.logger.get_value(f"epoch_{end}_timestamps", step=None) for end in ("start", "end"))
        running = time.time() - starts[-1] if len(starts) > len(ends) else 0.0
        return float(running + sum(end - start for start, end in zip(starts, ends, strict=False)))

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """Bend samples too; all else is nnU-Net's."""
        transforms = nnUNetTrainerNoMirroring.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            if isinstance(transform, SpatialTransform):
                transform.p_elastic_deform = _ELASTIC
                transform.elastic_deform_scale, transform.elastic_deform_magnitude = _WAVE, _draw_displacement
        transforms.transforms.insert(0, _DieWithTrainer(os.getpid()))
        return transforms

    @staticmethod
    def get_validation_transforms(*args: Any, **kwargs: Any) -> Any:
        """Prepare what is watched as nnU-Net does."""
        transforms = nnUNetTrainerNoMirroring.get_validation_transforms(*args, **kwargs)
        transforms.transforms.insert(0, _DieWithTrainer(os.getpid()))
        return transforms

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Keep nnU-Net's optimizer and let its rate fall by time too."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, _FallingRate(self)

    def plot_network_architecture(self) -> None:
        """Draw nothing: it needs a program that nobody has."""

    def initialize(self) -> None:
        """Build the network, on a CPU in the layout in which it is quickest."""
        super().initialize()
        if self.device.type == "cpu":
            to_channels_last(self.network, self.device)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take nnU-Net's step."""
        with self._on_cpu(batch):
            step: dict[str, Any] = super().train_step(batch)
        return step

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score a batch as nnU-Net does."""
        with self._on_cpu(batch):
            step: dict[str, Any] = super().validation_step(batch)
        return step

    @contextmanager
    def _on_cpu(self, batch: dict[str, Any]) -> Iterator[None]:
        """Compute in bfloat16 on a CPU that gains by it, which nnU-Net does on GPUs alone; the loss in float32."""
        if self.device.type != "cpu":
            yield
            return
        batch["data"] = batch_to_device(batch["data"], self.device)
        hook = self.network.register_forward_hook(lambda network, inputs, outputs: _as_floats(outputs))
        try:
            with mixed_precision(self.device):
                yield
        finally:
            hook.remove()

    def run_training(self) -> None:
        """Train until the epochs or the minutes are over; an epoch may end early."""
        self.on_train_start()
        while self.share(self.current_epoch) < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = []
            for _ in range(self.num_iterations_per_epoch):
                steps.append(self.train_step(next(self.dataloader_train)))
                self._show_step(len(steps), float(steps[-1]["loss"]))
                if self.length.minutes and self.seconds() > 60 * self.length.minutes:
                    break
            self.on_train_epoch_end(steps)
            with torch.no_grad():
                self.on_validation_epoch_start()
                watched = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
                self.on_validation_epoch_end(watched)
            self.on_epoch_end()
        self._end_workers()
        self._plot(self.output_folder)
        self.current_epoch -= 1  # a checkpoint names the epoch after the one it was saved in
        self.save_checkpoint(str(self.latest))
        self.current_epoch += 1

    def _end_workers(self) -> None:
        """End the processes that make samples; the thread that collects from them would else complain of their end."""
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()

    def _show_step(self, step: int, loss: float) -> None:
        """Show where the training is, with the Dice of the last epoch."""
        steps, seconds = self.num_iterations_per_epoch, self.seconds()
        dice = self.logger.get_value("dice_per_class_or_region", step=None)
        self.show(
            live_line(
                f"{self.step_name}: epoch {self.current_epoch + 1}/{self.num_epochs}, step {step}/{steps}",
                seconds=seconds,
                left=seconds_left(seconds, self.share(self.current_epoch + step / steps)),
                loss=loss,
                dice=dice[-1] if dice else (),
            )
        )

    def on_epoch_end(self) -> None:
        """Save now and then, by the clock, and tell how it goes."""
        due = time.monotonic() - self._saved > 60 * self.length.checkpoint_minutes
        self.save_every = 1 if due else self.num_epochs + 1
        if due:
            self._saved = time.monotonic()
        super().on_epoch_end()
        self._write_curve()

    def _write_curve(self) -> None:
        """Write the curve anew, from the first epoch on."""
        keys = ("train_losses", "val_losses", "lrs", "dice_per_class_or_region")
        train, watched, rates, dice = (self.logger.get_value(key, step=None) for key in keys)
        names = list(self.dataset_json["labels"])[1:]
        lines = ["\t".join(["epoch", "loss", "loss_tune", "learning_rate", *names])]
        for epoch, row in enumerate(zip(train, watched, rates, dice, strict=False), start=1):
            cells = [f"{row[0]:.4f}", f"{row[1]:.4f}", f"{row[2]:.6f}", *(f"{value:.3f}" for value in row[3])]
            lines.append("\t".join([str(epoch), *cells]))
        write_text("\n".join(lines), Path(self.output_folder) / "curve.tsv")
        scores = " ".join(f"{name} {value:.2f}" for name, value in zip(names, dice[-1], strict=True))
        self.say(
            f"{self.step_name}: epoch {self.current_epoch}, {self.seconds():.0f} s, loss {train[-1]:.3f}, "
            f"Dice of other patches {scores}"
        )

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint atomically."""
        with atomic_write(Path(filename)) as temporary:
            super().save_checkpoint(str(temporary))

    def resume(self) -> None:
        """Go on from the latest checkpoint, where there is one."""
        if not self.latest.is_file():
            return
        if not self.was_initialized:
            self.initialize()
        state = read_checkpoint(self.latest)
        self.network.load_state_dict(state["network_weights"])
        self.optimizer.load_state_dict(state["optimizer_state"])
        if self.grad_scaler is not None and state["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler_state"])
        self.logger.load_checkpoint(state["logging"])
        self.current_epoch, self._best_ema = state["current_epoch"], state["_best_ema"]
