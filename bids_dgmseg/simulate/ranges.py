"""Random draws from ranges, and ranges narrowed about their middle.

Every `…Ranges` dataclass of this package states how far maps vary; a pair is the lowest and the highest value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Ranges = TypeVar("Ranges", bound="DataclassInstance")

_LOGARITHMIC = {"noise_ppm", "snr", "least_squares", "conjugate_gradients", "total_variation"}
"""Fields drawn log-uniformly; they are narrowed on the same scale."""

_cpu_generators: WeakKeyDictionary[torch.Generator, torch.Generator] = WeakKeyDictionary()


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """Return the CPU generator for single numbers that accompanies a generator.

    A CPU generator accompanies itself. Single numbers drawn on a GPU would each have to be waited for, which takes
    longer than everything else; they come from a CPU generator with the same initial seed.
    """
    if not _is_on_gpu(generator):
        return generator
    if generator not in _cpu_generators:
        _cpu_generators[generator] = torch.Generator().manual_seed(generator.initial_seed())
    return _cpu_generators[generator]


def _is_on_gpu(generator: torch.Generator) -> bool:
    return generator.device.type != "cpu"


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number uniformly between two limits."""
    cpu = cpu_generator(generator)
    return low + (high - low) * float(torch.rand((), generator=cpu, device=cpu.device))


def log_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return low * math.exp(math.log(high / low) * uniform(generator, 0, 1))


def normal(generator: torch.Generator) -> float:
    """Draw a standard normal number."""
    cpu = cpu_generator(generator)
    return float(torch.randn((), generator=cpu, device=cpu.device))


def chance(generator: torch.Generator, probability: float) -> bool:
    """Draw True with a probability."""
    cpu = cpu_generator(generator)
    return float(torch.rand((), generator=cpu, device=cpu.device)) < probability


def pick(generator: torch.Generator, weights: Sequence[float]) -> int:
    """Draw an index with probabilities proportional to the weights."""
    return int(torch.multinomial(torch.tensor(weights, device="cpu"), 1, generator=cpu_generator(generator)))


def smooth_noise(
    shape: Sequence[int], wavelength_voxels: float | Sequence[float], generator: torch.Generator, channels: int = 1
) -> Tensor:
    """Draw Gaussian noise on a coarse grid and interpolate it: (channels, X, Y, Z), SD below 1.

    The wavelength, which is the spacing of the coarse grid, is the same for all axes or given per axis.
    """
    lengths = np.broadcast_to(wavelength_voxels, 3)
    coarse = [max(2, round(size / length) + 1) for size, length in zip(shape, lengths, strict=True)]
    noise = torch.randn((1, channels, *coarse), generator=generator, device=generator.device)
    return functional.interpolate(noise, size=list(shape), mode="trilinear", align_corners=True)[0]


def narrow(ranges: Ranges, width: float) -> Ranges:
    """Narrow every pair of a dataclass to the fraction `width` of its width about its middle."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(ranges):
        value = getattr(ranges, field.name)
        if isinstance(value, tuple) and len(value) == 2:
            changed[field.name] = _narrow_pair(*value, width, logarithmic=field.name in _LOGARITHMIC)
    return dataclasses.replace(ranges, **changed)


def _narrow_pair(low: float, high: float, width: float, *, logarithmic: bool) -> tuple[float, float]:
    if logarithmic:
        low, high = _narrow_pair(math.log(low), math.log(high), width, logarithmic=False)
        return math.exp(low), math.exp(high)
    middle, half = (low + high) / 2, width * (high - low) / 2
    return middle - half, middle + half
