"""Pathology: diseases of the nuclei, lesions of white matter, bleedings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, LAST_NUCLEUS, merge_parts
from bids_dgmseg.lab.simulate.details import Path, TemplateLocator, draw_course, draw_medullary, mirrored
from bids_dgmseg.lab.simulate.ranges import (
    PathologyRanges,
    chance,
    cpu_generator,
    log_uniform,
    smooth_noise,
    uniform,
)
from bids_dgmseg.models.structures import STRUCTURES

_CALCIFICATION_MM = (3.0, 6.0)
"""Size of calcifications in the pallidum."""

_BLEEDING_CENTRES = (
    ((31.0, -3.0, 2.0), (3.0, 10.0, 6.0)),  # external capsule
    ((14.0, -18.0, 8.0), (3.0, 5.0, 4.0)),  # thalamus
    ((32.0, -45.0, 22.0), (8.0, 12.0, 8.0)),  # parietal lobe
    ((26.0, 28.0, 14.0), (8.0, 8.0, 8.0)),  # frontal lobe
    ((20.0, -62.0, -36.0), (6.0, 6.0, 5.0)),  # cerebellum
)
"""Of haemorrhages in the right hemisphere: mean and SD per axis in mm of the template."""

_BRAIN_CENTRE_MM, _BRAIN_SD_MM = (0.0, -20.0, 5.0), (30.0, 32.0, 25.0)
"""Of microbleeds."""

_WHITE_MATTER, _FLUID = (22, 33), (23, 24, 25, 26)


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
    pallida = merge_parts(labels)
    left, right = (structure.index for structure in STRUCTURES.both_sides(["GP"]))
    noise = smooth_noise(tuple(chi.shape), uniform(generator, *_CALCIFICATION_MM) / spacing_mm, generator)[0]
    fraction = (2 * noise - uniform(generator, -0.5, 1.5) + 0.5).clamp(0, 1) * ((pallida == left) | (pallida == right))
    return chi + fraction * (pathology.mineral_ppm - chi)


def add_lesions(
    chi: Tensor,
    labels: Tensor,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: PathologyRanges,
    generator: torch.Generator,
) -> Tensor:
    """Draw lesions of white matter, wide perivascular spaces, microbleeds and haemorrhages.

    The map in ppm and its labels, in which veins may be marked by `IN_VEIN`, have shape (X, Y, Z), the template
    coordinates of their voxels (X, Y, Z, 3). Only microbleeds may lie in nuclei; labels do not change.
    """
    tissue = labels % IN_VEIN
    white = torch.isin(tissue, torch.tensor(_WHITE_MATTER, dtype=torch.uint8, device=tissue.device))
    locator = TemplateLocator(points_mm, spacing_mm)
    if chance(generator, ranges.white_matter):
        lesions = []
        for _ in range(round(log_uniform(generator, *ranges.white_matter_lesions))):
            radius_mm = uniform(generator, 0.8, 4.0)
            _, middle, _ = draw_medullary(generator)
            lesions.append((_draw_stroke(_draw_side((middle,), generator), radius_mm, generator), radius_mm))
        inside = _paint(locator, lesions) * white
        chi = chi + inside * uniform(generator, *ranges.white_matter_ppm)
        if chance(generator, 0.125):
            chi = chi + 4 * inside * (1 - inside) * uniform(generator, *ranges.rim_ppm)
    if chance(generator, ranges.spaces):
        spaces = [
            (draw_course(mirrored(draw_medullary(generator)[1:], side), generator), uniform(generator, 0.25, 0.7))
            for side in (-1.0, 1.0)
            for _ in range(round(uniform(generator, *ranges.perivascular)))
        ]
        chi = chi + _paint(locator, spaces) * white * (uniform(generator, -0.02, 0.03) - chi)
    solid = (tissue > 0) & ~torch.isin(tissue, torch.tensor(_FLUID, dtype=torch.uint8, device=tissue.device))
    if chance(generator, ranges.microbleeds):
        bleeds = [
            (_draw_point(_BRAIN_CENTRE_MM, _BRAIN_SD_MM, generator), uniform(generator, 0.6, 2.5))
            for _ in range(round(log_uniform(generator, *ranges.bleeds)))
        ]
        chi = chi + _paint(locator, bleeds) * solid * (uniform(generator, *ranges.blood_ppm) - chi)
    if chance(generator, ranges.haemorrhage):
        centre, sd = _BLEEDING_CENTRES[int(uniform(generator, 0, len(_BLEEDING_CENTRES)))]
        radius_mm = uniform(generator, 3.0, 9.0)
        start = _draw_side((centre,), generator) + torch.tensor(sd) * _normal((1, 3), generator)
        course = _draw_stroke(start, radius_mm, generator)
        outside_nuclei = solid & (tissue > LAST_NUCLEUS)
        blood = _paint(locator, [(course, radius_mm)]) * outside_nuclei
        chi = chi + blood * (uniform(generator, *ranges.blood_ppm) - chi)
        if chance(generator, 0.5):  # a cavity, or clot that is less bright than the rim
            core = _paint(locator, [(course, uniform(generator, 0.4, 0.8) * radius_mm)])
            chi = chi + core * outside_nuclei * (uniform(generator, -0.02, 0.2) - chi)
    return chi


def _paint(locator: TemplateLocator, strokes: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return the fraction of each voxel that balls along courses (N, 3) in mm of the template fill, by radius in mm."""
    layer = torch.zeros(math.prod(locator.shape), device=locator.device)
    for indices, (_, radius_mm) in zip(locator.find_all([course for course, _ in strokes]), strokes, strict=True):
        numbers, fraction = locator.volume_fractions(indices, radius_mm)
        layer.scatter_reduce_(0, numbers, fraction, "amax")
    return layer.view(locator.shape)


def _draw_stroke(start: Tensor, radius_mm: float, generator: torch.Generator) -> Tensor:
    """Draw a course (N, 3) about as long as wide from a point (1, 3)."""
    return draw_course(torch.cat([start, start + radius_mm * _normal((1, 3), generator)]), generator)


def _draw_side(path: Path, generator: torch.Generator) -> Tensor:
    """Put a path of the right hemisphere on either side."""
    return mirrored(path, -1.0 if chance(generator, 0.5) else 1.0)


def _draw_point(mean_mm: Sequence[float], sd_mm: Sequence[float], generator: torch.Generator) -> Tensor:
    return torch.tensor(mean_mm) + torch.tensor(sd_mm) * _normal((1, 3), generator)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=cpu_generator(generator))
