"""nnU-Net's trainer without mirroring, with elastic deformation, a time limit and seeds.

nnU-Net finds it by the environment variable ``nnUNet_extTrainer``. As its constructor has no further arguments, epochs,
minutes, seed and steps per epoch are the environment variables ``DGMSEG_EPOCHS``, ``DGMSEG_MINUTES``, ``DGMSEG_SEED``
and ``DGMSEG_STEPS``.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

from bids_dgmseg.models.model_folder import to_channels_last
from bids_dgmseg.segmentation.inference import mixed_precision

_ELASTIC = 0.2
"""Fraction of the samples with elastic deformation; nnU-Net's own trainer uses none."""

_WAVE = (0.08, 0.25)
"""SD of the smoothing of the deformation relative to the patch size: 4 to 12 mm for a patch of 48 mm."""

_STEEPNESS = 0.25
"""Largest displacement relative to that SD, far from folding."""

_CHECKPOINT_S = 120
_CUDA = torch.device("cuda")


def _draw_displacement(*, deformation_scale: float, patch_size: Sequence[int], dim: int, **_: Any) -> float:
    """Draw the largest displacement along an axis in voxels; nnU-Net's default is less than one."""
    return float(np.random.uniform(0, _STEEPNESS * deformation_scale * patch_size[dim]))  # noqa: NPY002 - as nnU-Net


class _SeedWorker:
    """A transform that changes nothing, but seeds torch in each worker process.

    nnU-Net seeds NumPy in each worker, but not torch, from which elastic deformations and noise are drawn: all workers
    would draw the same ones.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()

    def __call__(self, **sample: Any) -> dict[str, Any]:
        if self.pid != os.getpid():
            torch.manual_seed(np.random.randint(2**31))  # noqa: NPY002 - seeded by nnU-Net
            self.pid = os.getpid()
        return sample


class _TimeIsOverError(Exception):
    """Ends a training between two epochs."""


class _PolynomialRate:
    """nnU-Net's learning rate, which falls to 0 with the power 0.9."""

    def __init__(self, trainer: DentateTrainer, optimizer: torch.optim.Optimizer) -> None:
        self.trainer, self.optimizer = trainer, optimizer

    def step(self, epoch: int) -> None:
        """Set the rate of an epoch."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.initial_lr * (1 - self.trainer.fraction_done(epoch)) ** 0.9


class DentateTrainer(nnUNetTrainerNoMirroring):
    """Trainer with rotation, scaling, elastic deformation and intensity augmentation, but no mirroring."""

    def __init__(
        self, plans: dict[str, Any], configuration: str, fold: int, dataset_json: dict[str, Any], device: Any = _CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ["DGMSEG_EPOCHS"])
        self.minutes = float(os.environ.get("DGMSEG_MINUTES") or math.inf)
        steps = int(os.environ.get("DGMSEG_STEPS", 50))  # an interruption loses little
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = steps, max(1, steps // 5)
        self.logger.plot_progress_png = lambda folder: None  # takes seconds per epoch
        self._saved_s = -math.inf

    def fraction_done(self, epoch: int) -> float:
        """Return the finished fraction of the training by epochs or time, over all calls."""
        starts, ends = (self.logger.get_value(f"epoch_{end}_timestamps", step=None) for end in ("start", "end"))
        seconds = sum(end - start for start, end in zip(starts, ends, strict=False))
        return float(min(max(epoch / self.num_epochs, seconds / (60 * self.minutes)), 1.0))

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """Add elastic deformation to nnU-Net's transforms."""
        transforms = nnUNetTrainerNoMirroring.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            if isinstance(transform, SpatialTransform):
                transform.p_elastic_deform = _ELASTIC
                transform.elastic_deform_scale, transform.elastic_deform_magnitude = _WAVE, _draw_displacement
        transforms.transforms.insert(0, _SeedWorker())
        return transforms

    def initialize(self) -> None:
        """Build the network; on a CPU in the memory layout that is fastest, and in bfloat16 if that is faster."""
        seed = np.random.SeedSequence([int(os.environ["DGMSEG_SEED"]), self.fold, self.current_epoch])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        np.random.seed(seed.generate_state(1)[0])  # noqa: NPY002 - as nnU-Net
        super().initialize()
        if self.device.type == "cpu":
            forward = to_channels_last(self.network, self.device).forward

            def forward_in_mixed_precision(chi: Any) -> Any:
                with mixed_precision(self.device):
                    logits = forward(chi)
                return logits.float() if isinstance(logits, torch.Tensor) else [scale.float() for scale in logits]

            self.network.forward = forward_in_mixed_precision

    def run_training(self) -> None:
        """Train until the epochs or the minutes are over."""
        try:
            super().run_training()
        except _TimeIsOverError:
            self.on_train_end()

    def on_epoch_start(self) -> None:
        """End the training if its time is over."""
        if self.current_epoch and self.fraction_done(self.current_epoch) >= 1:
            raise _TimeIsOverError
        super().on_epoch_start()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return nnU-Net's optimizer with a learning rate that falls with epochs or time."""
        optimizer, _ = super().configure_optimizers()
        return optimizer, _PolynomialRate(self, optimizer)

    def on_epoch_end(self) -> None:
        """Save a checkpoint every two minutes."""
        due = time.monotonic() - self._saved_s > _CHECKPOINT_S
        self.save_every = 1 if due else self.num_epochs + 1
        self._saved_s = time.monotonic() if due else self._saved_s
        super().on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint atomically."""
        super().save_checkpoint(f"{filename}.part")
        Path(f"{filename}.part").replace(filename)

    def plot_network_architecture(self) -> None:
        """Draw nothing: it needs graphviz."""

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Segment nothing: the two networks are evaluated together."""
