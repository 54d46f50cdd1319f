"""nnU-Net's trainer without mirroring, with elastic deformation, resumable and with a time limit."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring
from torch import Tensor

from bids_dgmseg.io.files import write_bytes, write_text
from bids_dgmseg.lab.train.log import Log, PlainLog, format_status
from bids_dgmseg.lab.train.nnunet.settings import NnunetTraining
from bids_dgmseg.lab.train.schedule import fraction_done, seconds_left
from bids_dgmseg.models.model_folder import to_channels_last
from bids_dgmseg.models.nnunet_folder import read_checkpoint
from bids_dgmseg.segmentation.inference import batch_to_device, mixed_precision

STOCK_TRAINER = "nnUNetTrainerNoMirroring"
"""Named in our model folders, since stock ``nnUNetv2_predict`` knows it; it builds the same network."""

_PR_SET_PDEATHSIG = 1  # of Linux' prctl.h

_ELASTIC = 0.2
"""Fraction of the samples with elastic deformation; nnU-Net's own trainer uses none."""

_WAVE = (0.08, 0.25)
"""SD of the smoothing of the deformation relative to the patch size: 4 to 12 mm for a patch of 48 mm."""

_STEEPNESS = 0.25
"""Largest displacement relative to that SD, far from folding."""


def _draw_displacement(*, deformation_scale: float, patch_size: Sequence[int], dim: int, **_: Any) -> float:
    """Draw the largest displacement along an axis in voxels; nnU-Net's default is less than one."""
    return float(np.random.uniform(0, _STEEPNESS * deformation_scale * patch_size[dim]))  # noqa: NPY002 - as nnU-Net


class _PrepareWorker:
    """A transform that changes nothing; a worker process that calls it ends with its trainer and is seeded.

    nnU-Net seeds NumPy in each worker, but not torch, from which elastic deformations and noise are drawn: all workers
    would draw the same ones.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid  # of the trainer, which must not get the signal itself

    def __call__(self, **sample: Any) -> dict[str, Any]:
        if self.pid != os.getpid():
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            torch.manual_seed(np.random.randint(2**31))  # noqa: NPY002 - seeded by nnU-Net
            self.pid = os.getpid()
        return sample


class _PolynomialRate:
    """nnU-Net's learning rate, which falls to 0 with the power 0.9; by epochs or by time."""

    def __init__(self, trainer: DentateTrainer) -> None:
        self.trainer = trainer

    def step(self, epoch: int) -> None:
        """Set the rate of an epoch."""
        rate = self.trainer.initial_lr * (1 - self.trainer.fraction_done(epoch)) ** 0.9
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = rate


class DentateTrainer(nnUNetTrainerNoMirroring):
    """Trainer with rotation, scaling, elastic deformation and intensity augmentation, but no mirroring."""

    settings = NnunetTraining()
    log: Log = PlainLog()
    step_name = ""
    _saved = 0.0

    def configure(self, settings: NnunetTraining, *, log: Log, step: str) -> None:
        """Set what nnU-Net's constructor has no arguments for."""
        self.settings, self.log, self.step_name = settings, log, step
        self.num_epochs = settings.epochs
        self.num_iterations_per_epoch = settings.iterations
        self.num_val_iterations_per_epoch = settings.validation_iterations
        self._plot = self.logger.plot_progress_png
        self.logger.plot_progress_png = lambda folder: None  # takes seconds; once at the end is enough

    @property
    def latest(self) -> Path:
        """The checkpoint to resume from."""
        return Path(self.output_folder) / "checkpoint_latest.pth"

    def fraction_done(self, epoch: float) -> float:
        """Return the finished fraction of the training after some epochs, from 0 to 1."""
        return fraction_done(epoch / self.num_epochs, self.seconds(), self.settings.minutes)

    def seconds(self) -> float:
        """Return the training time so far, over all calls."""
        starts, ends = (self.logger.get_value(f"epoch_{end}_timestamps", step=None) for end in ("start", "end"))
        running = time.time() - starts[-1] if len(starts) > len(ends) else 0.0
        return float(running + sum(end - start for start, end in zip(starts, ends, strict=False)))

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """Add elastic deformation to nnU-Net's transforms."""
        transforms = nnUNetTrainerNoMirroring.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            if isinstance(transform, SpatialTransform):
                transform.p_elastic_deform = _ELASTIC
                transform.elastic_deform_scale, transform.elastic_deform_magnitude = _WAVE, _draw_displacement
        transforms.transforms.insert(0, _PrepareWorker(os.getpid()))
        return transforms

    @staticmethod
    def get_validation_transforms(*args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's transforms."""
        transforms = nnUNetTrainerNoMirroring.get_validation_transforms(*args, **kwargs)
        transforms.transforms.insert(0, _PrepareWorker(os.getpid()))
        return transforms

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return nnU-Net's optimizer with a learning rate that may also fall with time."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, _PolynomialRate(self)

    def plot_network_architecture(self) -> None:
        """Draw nothing: it needs graphviz."""

    def initialize(self) -> None:
        """Build the network, on a CPU in the memory layout that is fastest."""
        super().initialize()
        if self.device.type == "cpu":
            to_channels_last(self.network, self.device)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run one training step of nnU-Net."""
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
        """Compute in bfloat16 if the CPU is faster with it (nnU-Net does so on GPUs only); the loss in float32."""
        if self.device.type != "cpu":
            yield
            return

        def to_float32(network: Any, inputs: Any, outputs: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
            return outputs.float() if isinstance(outputs, Tensor) else [logits.float() for logits in outputs]

        batch["data"] = batch_to_device(batch["data"], self.device)
        hook = self.network.register_forward_hook(to_float32)
        try:
            with mixed_precision(self.device):
                yield
        finally:
            hook.remove()

    def run_training(self) -> None:
        """Train until the epochs or the minutes are over; the last epoch may be short."""
        self.on_train_start()
        while self.fraction_done(self.current_epoch) < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            steps = []
            for _ in range(self.num_iterations_per_epoch):
                steps.append(self.train_step(next(self.dataloader_train)))
                self._show_step(len(steps), float(steps[-1]["loss"]))
                if self.settings.minutes and self.seconds() > 60 * self.settings.minutes:
                    break
            self.on_train_epoch_end(steps)
            with torch.no_grad():
                self.on_validation_epoch_start()
                validated = [
                    self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)
                ]
                self.on_validation_epoch_end(validated)
            self.on_epoch_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, NonDetMultiThreadedAugmenter):
                loader._finish()  # otherwise the collecting thread complains about the end of its workers
        self._plot(self.output_folder)
        self.current_epoch -= 1  # a checkpoint names the epoch after the one it was saved in
        self.save_checkpoint(str(self.latest))
        self.current_epoch += 1

    def _show_step(self, step: int, loss: float) -> None:
        """Show the status, with the Dice of the last epoch."""
        steps, seconds = self.num_iterations_per_epoch, self.seconds()
        dice = self.logger.get_value("dice_per_class_or_region", step=None)
        self.log.update(
            format_status(
                f"{self.step_name}: epoch {self.current_epoch + 1}/{self.num_epochs}, step {step}/{steps}",
                seconds=seconds,
                left=seconds_left(seconds, self.fraction_done(self.current_epoch + step / steps)),
                loss=loss,
                dice=dice[-1] if dice else (),
            )
        )

    def on_epoch_end(self) -> None:
        """Save a checkpoint every few minutes, and write the learning curve."""
        due = time.monotonic() - self._saved > 60 * self.settings.checkpoint_minutes
        self.save_every = 1 if due else self.num_epochs + 1
        if due:
            self._saved = time.monotonic()
        super().on_epoch_end()
        keys = ("train_losses", "val_losses", "lrs", "dice_per_class_or_region")
        train, validation, rates, dice = (self.logger.get_value(key, step=None) for key in keys)
        names = list(self.dataset_json["labels"])[1:]
        lines = ["\t".join(["epoch", "loss", "loss_tune", "learning_rate", *names])]
        for epoch, row in enumerate(zip(train, validation, rates, dice, strict=False), start=1):
            cells = [f"{row[0]:.4f}", f"{row[1]:.4f}", f"{row[2]:.6f}", *(f"{value:.3f}" for value in row[3])]
            lines.append("\t".join([str(epoch), *cells]))
        write_text("\n".join(lines), Path(self.output_folder) / "curve.tsv")
        scores = " ".join(f"{name} {value:.2f}" for name, value in zip(names, dice[-1], strict=True))
        self.log.log(
            f"{self.step_name}: epoch {self.current_epoch}, {self.seconds():.0f} s, loss {train[-1]:.3f}, "
            f"validation Dice {scores}"
        )

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint atomically."""
        content = io.BytesIO()  # on a full disk, torch would raise a RuntimeError about its own file
        super().save_checkpoint(content)
        write_bytes(content.getvalue(), Path(filename))

    def start_from(self, weights: Mapping[str, Tensor], *, new_heads: bool) -> None:
        """Begin with the weights of another training; with `new_heads` except those of the output layers.

        RuntimeError if they do not belong to the planned network.
        """
        self.initialize()
        own = self.network.state_dict()
        kept = {name: values for name, values in own.items() if new_heads and ".seg_layers." in name}
        self.network.load_state_dict({**weights, **kept})

    def resume(self) -> None:
        """Resume from the latest checkpoint, if there is one."""
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
