"""Pathology that changes the volume or the susceptibility of nuclei."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.ranges import chance, smooth_noise, uniform

_CALCIFICATION_MM = (3.0, 6.0)
"""Size of calcifications in the pallidum."""


@dataclass(frozen=True)
class PathologyRanges:
    """Prevalence and severity of pathology."""

    ataxia: float = 0.06
    """Prevalence of small dentates, half of them with more iron and half with less."""
    dentate_volume: tuple[float, float] = (0.4, 0.8)
    """In ataxia, relative."""
    dentate_iron: tuple[float, float, float, float] = (0.4, 0.7, 1.3, 1.9)
    """In ataxia, relative: between the first two or between the last two."""
    atrophy: float = 0.06
    """Prevalence of small caudates and putamina between wide ventricles, as in Huntington's disease."""
    striatal_volume: tuple[float, float] = (0.5, 0.85)
    """In atrophy, relative; drawn for caudate and putamen each."""
    wider_mm: tuple[float, float] = (1.0, 4.0)
    """In atrophy, outward shift of each wall of the ventricles."""
    calcified: float = 0.04
    """Prevalence of calcifications in both pallida."""
    mineral_ppm: tuple[float, float] = (-0.7, -0.1)
    """In calcifications."""


NO_PATHOLOGY = PathologyRanges(ataxia=0.0, atrophy=0.0, calcified=0.0)


@dataclass(frozen=True)
class Pathology:
    """Pathology of one head."""

    volume: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its volume."""
    iron: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its iron."""
    wider_mm: float = 0.0
    """Outward shift of each wall of the ventricles."""
    mineral_ppm: float = 0.0
    """In calcifications of the pallidum; 0 without any."""


HEALTHY = Pathology()


def draw_pathology(ranges: PathologyRanges, generator: torch.Generator) -> Pathology:
    """Draw the pathology of one head; diseases may coincide."""
    volume: dict[str, float] = {}
    iron: dict[str, float] = {}
    wider_mm = mineral_ppm = 0.0
    if chance(generator, ranges.ataxia):
        volume["DN"] = uniform(generator, *ranges.dentate_volume)
        low, high = ranges.dentate_iron[:2], ranges.dentate_iron[2:]
        iron["DN"] = uniform(generator, *(high if chance(generator, 0.5) else low))
    if chance(generator, ranges.atrophy):
        volume |= {nucleus: uniform(generator, *ranges.striatal_volume) for nucleus in ("CN", "PUT")}
        wider_mm = uniform(generator, *ranges.wider_mm)
    if chance(generator, ranges.calcified):
        mineral_ppm = uniform(generator, *ranges.mineral_ppm)
    return Pathology(volume, iron, wider_mm, mineral_ppm)


def add_calcifications(
    chi: Tensor, labels: Tensor, pathology: Pathology, *, spacing_mm: float, generator: torch.Generator
) -> Tensor:
    """Add calcifications to the pallida of a map (X, Y, Z) in ppm; return it unchanged if there are none."""
    if pathology.mineral_ppm == 0:
        return chi
    left, right = (structure.index for structure in STRUCTURES.both_sides(["GP"]))
    noise = smooth_noise(tuple(chi.shape), uniform(generator, *_CALCIFICATION_MM) / spacing_mm, generator)[0]
    fraction = (2 * noise - uniform(generator, -0.5, 1.5) + 0.5).clamp(0, 1) * ((labels == left) | (labels == right))
    return chi + fraction * (pathology.mineral_ppm - chi)
