"""Settings of the training of nnunet2step: length, machine, and sizes of the networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PlanName = Literal["paper", "small"]


@dataclass(frozen=True, kw_only=True)
class NnunetTraining:
    """Length, size and machine of a training; lengths are totals over all calls."""

    epochs: int = 5000
    """Of 50 iterations; nnU-Net's own 1000 have 250."""
    minutes: float | None = None
    seed: int = 1
    device: str = "auto"
    workers: int = 1
    """Processes that generate samples; with 1 the training process does."""
    checkpoint_minutes: float = 2.0
    iterations: int = 50
    """Steps per epoch, a fifth of nnU-Net's, so that an interruption loses little."""
    validation_iterations: int = 10
    """Validation batches per epoch."""
    fold: int = 0
    """Counted from 0."""
    plan: PlanName = "paper"
    """Network, patch and voxels: DentateSeg's and nnU-Net's own, or small enough for a package."""


@dataclass(frozen=True)
class Size:
    """Size of the network of a step; by default DentateSeg's voxels and nnU-Net's own network."""

    spacing_mm: float = 0.86
    memory_gb: float = 8.0
    """GPU memory for which nnU-Net's planner chooses the patch size."""
    features: int = 32
    """Filters of the first stage, doubled at each stage."""
    parameters: float = math.inf
    """Maximum number; the filters of the last stages are limited to reach it."""


SIZES: Mapping[PlanName, Mapping[str, Size]] = {
    "paper": {"cerebellum": Size(), "dentate": Size()},
    "small": {
        "cerebellum": Size(spacing_mm=2.58, memory_gb=0.3, features=8, parameters=1_100_000),
        "dentate": Size(memory_gb=0.6, features=16, parameters=3_800_000),
    },
}
"""In half precision (two bytes per parameter) both small networks stay below 10 MB together. Step one only finds a box,
so it uses three times 0.86 mm."""
