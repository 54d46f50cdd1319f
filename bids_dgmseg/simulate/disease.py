"""Diseases that change what deep nuclei look like on susceptibility maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bids_dgmseg.simulate.anatomy import chance, smooth_noise, uniform
from bids_dgmseg.structures import STRUCTURES

_LUMPS_MM = (3.0, 6.0)
"""Size of the lumps of mineral in a calcified pallidum."""


@dataclass(frozen=True)
class DiseaseRanges:
    """How many people have which disease; a pair is the lowest and highest value, drawn uniformly."""

    ataxia: float = 0.06
    """Part of the people whose dentates are small, in half of them full of iron and in half of them pale."""
    dentate_volume: tuple[float, float] = (0.4, 0.8)
    """Then, relative."""
    dentate_iron: tuple[float, float, float, float] = (0.4, 0.7, 1.3, 1.9)
    """Then, relative: from first to second or from third to fourth."""
    atrophy: float = 0.06
    """Part of the people whose caudates and putamina are small between wide ventricles, as in Huntington's disease."""
    striatal_volume: tuple[float, float] = (0.5, 0.85)
    """Then, relative; of caudate and putamen each."""
    wider_mm: tuple[float, float] = (1.0, 4.0)
    """Then, by which each wall of the ventricles lies farther outwards."""
    calcified: float = 0.04
    """Part of the people with lumps of mineral in both pallida."""
    mineral_ppm: tuple[float, float] = (-0.7, -0.1)
    """Then, in the lumps."""


@dataclass(frozen=True)
class Disease:
    """What is different in one head."""

    volume: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its volume."""
    iron: Mapping[str, float] = field(default_factory=dict)
    """Nucleus → factor of its iron."""
    wider_mm: float = 0.0
    """Of the ventricles: the way of each wall."""
    mineral_ppm: float = 0.0
    """In lumps of the pallidum; 0 for none."""


HEALTHY = Disease()
NOBODY_ILL = DiseaseRanges(ataxia=0.0, atrophy=0.0, calcified=0.0)


def draw_disease(ranges: DiseaseRanges, generator: torch.Generator) -> Disease:
    """Draw what a person has; one may have several."""
    volume: dict[str, float] = {}
    iron: dict[str, float] = {}
    wider_mm = mineral_ppm = 0.0
    if chance(generator, ranges.ataxia):
        volume["DN"] = uniform(generator, *ranges.dentate_volume)
        pale, bright = ranges.dentate_iron[:2], ranges.dentate_iron[2:]
        iron["DN"] = uniform(generator, *(bright if chance(generator, 0.5) else pale))
    if chance(generator, ranges.atrophy):
        volume |= {nucleus: uniform(generator, *ranges.striatal_volume) for nucleus in ("CN", "PUT")}
        wider_mm = uniform(generator, *ranges.wider_mm)
    if chance(generator, ranges.calcified):
        mineral_ppm = uniform(generator, *ranges.mineral_ppm)
    return Disease(volume, iron, wider_mm, mineral_ppm)


def calcify(chi: Tensor, labels: Tensor, disease: Disease, *, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Put lumps of mineral into the pallida.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
    disease : Disease
        Without mineral the map stays as it is.
    spacing_mm : float
        Voxel size.
    generator : torch.Generator
        Source of randomness.
    """
    if disease.mineral_ppm == 0:
        return chi
    left, right = (structure.index for structure in STRUCTURES.sides(["GP"]))
    waves = smooth_noise(tuple(chi.shape), uniform(generator, *_LUMPS_MM) / spacing_mm, generator)[0]
    share = (2 * waves - uniform(generator, -0.5, 1.5) + 0.5).clamp(0, 1) * ((labels == left) | (labels == right))
    return chi + share * (disease.mineral_ppm - chi)
