"""Pathology: diseases of the nuclei, lesions of white matter, bleedings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bids_dgmseg.lab.simulate.anatomy import IN_VEIN, LAST_NUCLEUS, merge_parts
from bids_dgmseg.lab.simulate.details import (
    TemplateLocator,
    draw_course,
    draw_medullary,
    draw_shift,
    draw_side,
    mirrored,
)
from bids_dgmseg.lab.simulate.ranges import (
    PathologyRanges,
    chance,
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
    tissue, locator = labels % IN_VEIN, TemplateLocator(points_mm, spacing_mm)
    if chance(generator, ranges.white_matter):
        chi = _add_lesions_of_white_matter(chi, tissue, locator, ranges, generator)
    if chance(generator, ranges.spaces):
        spaces, radii_mm = [], []
        for side in (-1.0, 1.0):
            for _ in range(round(uniform(generator, *ranges.perivascular))):
                spaces.append(draw_course(mirrored(draw_medullary(generator)[1:], side), generator))
                radii_mm.append(uniform(generator, 0.25, 0.7))
        chi = _fill(chi, _paint(locator, spaces, radii_mm) * _is_any(tissue, _WHITE_MATTER), (-0.02, 0.03), generator)
    if chance(generator, ranges.microbleeds):
        bleeds, radii_mm = [], []
        for _ in range(round(log_uniform(generator, *ranges.bleeds))):
            bleeds.append(torch.tensor(_BRAIN_CENTRE_MM) + draw_shift(_BRAIN_SD_MM, generator))
            radii_mm.append(uniform(generator, 0.6, 2.5))
        solid = (tissue > 0) & ~_is_any(tissue, _FLUID)
        chi = _fill(chi, _paint(locator, bleeds, radii_mm) * solid, ranges.blood_ppm, generator)
    if chance(generator, ranges.haemorrhage):
        chi = _add_haemorrhage(chi, tissue, locator, ranges, generator)
    return chi


def _add_lesions_of_white_matter(
    chi: Tensor, tissue: Tensor, locator: TemplateLocator, ranges: PathologyRanges, generator: torch.Generator
) -> Tensor:
    """Add lesions of white matter, some with a bright rim."""
    lesions, radii_mm = [], []
    for _ in range(round(log_uniform(generator, *ranges.white_matter_lesions))):
        radii_mm.append(uniform(generator, 0.8, 4.0))
        _, middle, _ = draw_medullary(generator)
        lesions.append(_draw_stroke(mirrored((middle,), draw_side(generator)), radii_mm[-1], generator))
    inside = _paint(locator, lesions, radii_mm) * _is_any(tissue, _WHITE_MATTER)
    chi = chi + inside * uniform(generator, *ranges.white_matter_ppm)
    if chance(generator, 0.125):
        chi = chi + 4 * inside * (1 - inside) * uniform(generator, *ranges.rim_ppm)
    return chi


def _add_haemorrhage(
    chi: Tensor, tissue: Tensor, locator: TemplateLocator, ranges: PathologyRanges, generator: torch.Generator
) -> Tensor:
    """Add a haemorrhage beside nuclei, some with a cavity or clot that is less bright than the rim."""
    centre, sd_mm = _BLEEDING_CENTRES[int(uniform(generator, 0, len(_BLEEDING_CENTRES)))]
    radius_mm = uniform(generator, 3.0, 9.0)
    start = mirrored((centre,), draw_side(generator)) + draw_shift(sd_mm, generator)
    course = _draw_stroke(start, radius_mm, generator)
    beside = (tissue > LAST_NUCLEUS) & ~_is_any(tissue, _FLUID)
    chi = _fill(chi, _paint(locator, [course], [radius_mm]) * beside, ranges.blood_ppm, generator)
    if chance(generator, 0.5):
        core_mm = uniform(generator, 0.4, 0.8) * radius_mm
        chi = _fill(chi, _paint(locator, [course], [core_mm]) * beside, (-0.02, 0.2), generator)
    return chi


def _paint(locator: TemplateLocator, courses_mm: Sequence[Tensor], radii_mm: Sequence[float]) -> Tensor:
    return locator.paint(courses_mm, [(radius_mm, 1.0) for radius_mm in radii_mm])


def _fill(chi: Tensor, fraction: Tensor, ppm: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw one susceptibility and give it to a fraction of each voxel."""
    return chi + fraction * (uniform(generator, *ppm) - chi)


def _is_any(tissue: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.isin(tissue, torch.tensor(numbers, dtype=tissue.dtype, device=tissue.device))


def _draw_stroke(start: Tensor, radius_mm: float, generator: torch.Generator) -> Tensor:
    """Draw a course (N, 3) about as long as wide from a point (1, 3)."""
    return draw_course(torch.cat([start, start + draw_shift(radius_mm, generator)]), generator)
