"""Susceptibility (ppm) of a labelled head: values per structure by age, patterns within nuclei, partial volume."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.lab.simulate.anatomy import LAST_NUCLEUS, LabelMap, look_up
from bids_dgmseg.lab.simulate.details import (
    HEALTHY,
    Pathology,
    add_calcifications,
    add_details,
    add_lesions,
    blurred_mask,
    draw_pathology,
)
from bids_dgmseg.lab.simulate.ranges import ShapeRanges, SusceptibilityRanges, chance, normal, uniform
from bids_dgmseg.lab.simulate.shapes import RenderedShape, ShapedHead, StructureShape, draw_shapes
from bids_dgmseg.models.structures import STRUCTURES

_IRON = {
    "DN": (18.5, 0.06, 0.4),
    "IN": (11.5, 0.06, 0.4),
    "RN": (17.0, 0.06, 0.4),
    "SN": (27.0, 0.08, 0.4),
    "STN": (15.0, 0.07, 0.4),
    "CN": (9.66, 0.05, 0.33),
    "PUT": (14.62, 0.04, 0.46),
    "GP": (21.41, 0.09, 0.37),
}
"""Iron in mg/100 g is a·(1 − exp(−b·age)) + c. Caudate, putamen and pallidum: Hallgren and Sourander (1958),
doi:10.1111/j.1471-4159.1958.tb12607.x; the others rise as on maps of young subjects, to the literature's
susceptibility of adults."""

_PPM_PER_IRON, _PPM_WITHOUT_IRON = 0.0072, -0.020

_TISSUE_PPM = {
    21: (0.018, 0.012),
    22: (-0.030, 0.012),
    23: (0.015, 0.015),
    24: (0.015, 0.015),
    25: (0.015, 0.020),
    26: (0.015, 0.020),
    27: (0.004, 0.015),
    28: (-0.025, 0.015),
    29: (0.008, 0.014),
    30: (-0.020, 0.014),
    31: (0.008, 0.014),
    32: (0.010, 0.020),
    33: (-0.040, 0.015),
    34: (0.050, 0.030),
    35: (0.040, 0.018),
    36: (0.006, 0.030),
}
"""Mean and SD."""

_GRADIENTS = {
    "PUT": ((0.1, 0.03), (-0.06, 0.018), (-0.11, 0.03)),
    "CN": ((-0.06, 0.03), (-0.015, 0.012), (0.015, 0.012)),
    "GP": ((0.012, 0.03), (-0.006, 0.02), (-0.065, 0.025)),
    "SN": ((-0.06, 0.025), (0.015, 0.02), (-0.025, 0.02)),
    "RN": ((0.01, 0.04), (0.13, 0.04), (0.0, 0.04)),
}
"""Nucleus → mean and SD of the relative change per mm towards lateral, anterior and superior, as on real maps."""

_AGEING = {"PUT": (0.0, -0.01), "GP": (-0.015, 0.0)}
"""Nucleus → change of the first two of these over 30 years."""

_REFERENCE_AGE_YEARS = 45.0

_HILUM = 40
"""Added to the label of the dentate for its inside, which is darker than its wall on most maps."""

_HILUM_DEPTH_MM = 1.6

_TOUCHING = 0.25
"""Nuclei closer than this fraction of a voxel have no background between them."""

_SHAPES = ShapeRanges()


def split_hilum(labels: LabelMap) -> LabelMap:
    """Assign a separate label to the inside of each dentate, deeper than 1.6 mm."""
    array = labels.labels.numpy().copy()
    step_mm = (1 / labels.world_to_index[:3, :3].norm(dim=0)).tolist()
    boxes = ndimage.find_objects(array, max_label=LAST_NUCLEUS)
    for structure in STRUCTURES.both_sides(["DN"]):
        box = boxes[structure.index - 1]
        if box is not None:
            inside = np.pad(array[box] == structure.index, 1)
            depth_mm = ndimage.distance_transform_edt(inside, sampling=step_mm)[1:-1, 1:-1, 1:-1]
            array[box][depth_mm > _HILUM_DEPTH_MM] = structure.index + _HILUM
    return LabelMap(torch.from_numpy(array), labels.world_to_index)


def draw_susceptibility(
    head: LabelMap,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: SusceptibilityRanges,
    generator: torch.Generator,
    shapes: ShapeRanges = _SHAPES,
) -> tuple[Tensor, Tensor]:
    """Draw shapes and susceptibility of a head; the nuclei of a `ShapedHead` vary in shape.

    `points_mm` are the template coordinates of the voxels (X, Y, Z, 3), from `draw_head_points`. Returns the map
    (X, Y, Z) in ppm with partial volume, 0 outside the head, and nuclei and tissues at the voxel centres (uint8), in
    visible veins plus `IN_VEIN`.
    """
    pathology = draw_pathology(ranges.pathology, generator)
    values, age_years = draw_values(ranges, generator, pathology)
    indices, values_here = head.indices(points_mm), values.to(points_mm.device)
    if isinstance(head, ShapedHead) and shapes.amount > 0:
        background, chi = _look_up_values(head.background, head, indices, values_here, spacing_mm)
        ageing = (age_years - _REFERENCE_AGE_YEARS) / 30
        rendered = draw_shapes(head, points_mm, ranges=shapes, ageing=ageing, generator=generator, pathology=pathology)
        # One after the other: the pattern of a structure is drawn before the shape of the next.
        filled = ((shape, draw_pattern(shape.structure, values, ageing, generator)) for shape in rendered)
        sparse = points_mm[::8, ::8]
        voxel_mm = float((sparse[:, :, 1:] - sparse[:, :, :-1]).norm(dim=-1).mean())
        chi, labels = composite(filled, background, chi, voxel_mm=voxel_mm)
    else:
        labels, chi = _look_up_values(head.labels, head, indices, values_here, spacing_mm)
        labels = torch.where(labels > _HILUM, labels - _HILUM, labels)
    if _is_uniform_striatum(values):
        chi = _hide_capsule(chi, labels, points_mm, values, spacing_mm=spacing_mm, generator=generator)
    chi = add_calcifications(chi, labels, pathology, spacing_mm=spacing_mm, generator=generator)
    chi, labels = add_details(chi, labels, points_mm, spacing_mm=spacing_mm, ranges=ranges.details, generator=generator)
    chi = add_lesions(chi, labels, points_mm, spacing_mm=spacing_mm, ranges=ranges.pathology, generator=generator)
    return chi, labels


def draw_values(
    ranges: SusceptibilityRanges, generator: torch.Generator, pathology: Pathology = HEALTHY
) -> tuple[Tensor, float]:
    """Draw the susceptibility in ppm per label, a vector (64,) on the CPU, and the age in years."""
    values = torch.zeros(64)
    age_years = uniform(generator, *ranges.age_years)
    unrelated, pale = chance(generator, ranges.mixture), chance(generator, ranges.pale_midbrain)
    nuclei_gain, tissue_gain = uniform(generator, *ranges.nuclei_gain), uniform(generator, *ranges.tissue_gain)
    gains = {"CN": ranges.caudate_gain, "PUT": ranges.putamen_gain}
    for nucleus, (rise, rate, least) in _IRON.items():
        if unrelated:
            value = uniform(generator, 0.0, 0.2)
        else:
            iron = (rise * (1 - math.exp(-rate * age_years)) + least) * math.exp(ranges.iron_sd * normal(generator))
            if chance(generator, ranges.odd):
                iron *= uniform(generator, 0.4, 1.8)
            if pale and nucleus in ("RN", "SN", "STN"):
                iron *= uniform(generator, 0.35, 0.8)
            iron *= pathology.iron.get(nucleus, 1.0)
            value = max(_PPM_PER_IRON * iron + _PPM_WITHOUT_IRON, 0.008)
            value *= uniform(generator, *gains[nucleus]) if nucleus in gains else 1.0
        for structure in STRUCTURES.both_sides([nucleus]):
            values[structure.index] = value * nuclei_gain * (1 + ranges.side_difference * normal(generator))
    for label, (mean, sd) in _TISSUE_PPM.items():
        value = 0.03 * normal(generator) if unrelated else mean + sd * normal(generator)
        values[label] = value * tissue_gain
    fluid = values[22] + uniform(generator, *ranges.fluid_ppm)
    values[23:27] = fluid + 0.2 * values[23:27]
    values[1 + _HILUM : 3 + _HILUM] = values[1:3] * uniform(generator, *ranges.hilum)
    _hide_borders(values, ranges, generator)
    return values, age_years


def _hide_borders(values: Tensor, ranges: SusceptibilityRanges, generator: torch.Generator) -> None:
    """Make neighbours equally bright in some heads: their border is hardly visible, or not at all."""
    if chance(generator, 0.2):  # interposed and dentate
        values[3:5] = values[1:3] * uniform(generator, 0.8, 1.1)
    if chance(generator, 0.25):  # subthalamic nucleus and nigra
        values[9:11] = values[7:9] * uniform(generator, 0.9, 1.1)
    if chance(generator, ranges.bright_fluid):  # ventricles and caudate
        values[23:27] = values[11:13].mean() * uniform(generator, 0.7, 1.1)
    if chance(generator, ranges.uniform_striatum):
        values[13:15] = values[11:13] * uniform(generator, 0.9, 1.1)
        values[36] = values[11:13].mean() * uniform(generator, 0.85, 1.1)
    elif chance(generator, 0.5):  # accumbens and caudate
        values[36] = values[11:13].mean() * uniform(generator, 0.5, 1.1)


def _is_uniform_striatum(values: Tensor) -> bool:
    """Compare putamen and caudate in susceptibilities per label."""
    return abs(float(values[13] / values[11]) - 1) <= 0.1


def _hide_capsule(
    chi: Tensor, labels: Tensor, points_mm: Tensor, values: Tensor, *, spacing_mm: float, generator: torch.Generator
) -> Tensor:
    """Fill the lower part of the white matter between caudate and putamen with gray bridges, more or less densely."""
    caudate, putamen = (
        blurred_mask((labels == left) | (labels == left + 1), uniform(generator, 1.5, 3.0) / spacing_mm)
        for left in (11, 13)
    )
    share = (uniform(generator, 3.0, 20.0) * caudate * putamen).clamp(max=uniform(generator, 0.3, 1.0))
    share = share * torch.sigmoid((uniform(generator, -6.0, 8.0) - points_mm[..., 2]) / 2) * (labels == 22)
    return chi + share * (values[11:15].mean() - chi)


def _look_up_values(
    labels: Tensor, head: LabelMap, indices: Tensor, values: Tensor, spacing_mm: float
) -> tuple[Tensor, Tensor]:
    """Look up labels at the voxel centres, and the mean value of four points around each."""
    half = 0.28 * spacing_mm * head.world_to_index[:3, :3].norm(dim=0)
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, -1], [1, -1, -1], [-1, 1, 1]], device=half.device) * half
    chi = torch.stack([values[look_up(labels, indices + corner).int()] for corner in corners]).mean(dim=0)
    return look_up(labels, indices), chi


@dataclass(frozen=True)
class IntensityPattern:
    """Susceptibility within one structure, relative to `value`."""

    value: float
    gradient: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Relative change per mm."""
    core: float = 1.0
    """Relative value deeper than the wall."""
    wall_mm: float = 1.5
    normal: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Unit vector perpendicular to the stripe."""
    stripe_mm: tuple[float, float] = (0.0, 0.5)
    """Distance of the stripe from the centre, and its SD."""
    stripe: float = 1.0
    """Relative value in the stripe."""
    beyond: float = 1.0
    """Relative value on the far side of the stripe."""
    between_parts: bool = False
    """Whether the stripe lies between the two parts of the structure, if it has any."""
    spot_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Centre of a spot."""
    spot_radius_mm: float = 1.5
    spot: float = 1.0
    """Relative value in the spot."""

    def evaluate(self, shape: RenderedShape) -> Tensor:
        """Compute the values in ppm in the block of a shape."""
        local, depth = shape.local_mm, shape.depth_mm
        relative = torch.ones_like(depth)
        if any(self.gradient):
            relative += (local @ torch.tensor(self.gradient, device=local.device)).clamp_(-1.1, 1.5)
        if self.core != 1:
            relative *= 1 + (self.core - 1) * ((depth - self.wall_mm) / 0.8 + 0.5).clamp_(0, 1)
        if self.stripe != 1 or self.beyond != 1:
            if self.between_parts and shape.second_mm is not None:
                distance = shape.second_mm
            else:
                distance = local @ torch.tensor(self.normal, device=local.device) - self.stripe_mm[0]
            relative *= 1 + (self.beyond - 1) * (distance / 1.2 + 0.5).clamp(0, 1)
            relative *= 1 + (self.stripe - 1) * torch.exp(-0.5 * (distance / self.stripe_mm[1]) ** 2)
        if self.spot != 1:
            distance = (local - torch.tensor(self.spot_mm, device=local.device)).norm(dim=-1)
            relative *= 1 + (self.spot - 1) * (self.spot_radius_mm - distance + 0.5).clamp(0, 1)
        return relative * self.value


def draw_pattern(
    structure: StructureShape, values: Tensor, ageing: float, generator: torch.Generator
) -> IntensityPattern:
    """Draw the pattern within a nucleus or ventricle.

    `values` are the susceptibilities per label in ppm (64, on the CPU); `ageing` is 0 at 45 years and 1 at 75: iron
    accumulates first in the posterior putamen and the medial pallidum.
    """
    value, medial, nucleus = float(values[structure.label]), -structure.side, structure.nucleus

    def draw(low: float, high: float) -> float:
        return uniform(generator, low, high)

    if nucleus == "DN":
        return IntensityPattern(value, core=draw(0.3, 1.05), wall_mm=draw(0.9, 1.8))
    gradient = tuple(
        mean + sd * normal(generator) for mean, sd in _GRADIENTS.get(nucleus, ((0.0, 0.0), (0.0, 0.0), (0.0, 0.015)))
    )
    lateral, anterior = (_AGEING.get(nucleus, (0.0, 0.0))[axis] * ageing for axis in (0, 1))
    gradient = ((gradient[0] + lateral) * structure.side, gradient[1] + anterior, gradient[2])
    if nucleus in ("PUT", "CN"):
        if _is_uniform_striatum(values):
            gradient = (gradient[0], 0.2 * gradient[1], gradient[2])
        return IntensityPattern(value, gradient=gradient)
    if nucleus == "RN" and chance(generator, 0.5):
        return IntensityPattern(value, core=draw(0.85, 1.4), wall_mm=draw(0.6, 1.4), gradient=gradient)
    if nucleus == "GP" and chance(generator, 0.6):
        return IntensityPattern(
            value,
            normal=_unit(medial, draw(-0.7, 0.0), draw(-0.6, 0.0)),
            gradient=gradient,
            stripe_mm=(draw(0.0, 3.0), draw(0.4, 0.8)),
            stripe=draw(0.5, 1.0),
            beyond=draw(0.7, 1.2),
            between_parts=chance(generator, 0.7),
        )
    if nucleus == "SN":
        pattern = IntensityPattern(value, gradient=gradient)
        if chance(generator, 0.4):  # nigrosome 1
            place = structure.side * draw(1.5, 4.0), draw(-5.5, -2.5), draw(-3.0, 1.0)
            pattern = replace(pattern, spot_mm=place, spot_radius_mm=draw(1.0, 2.2), spot=draw(0.2, 0.9))
        if not chance(generator, 0.6):
            return pattern
        return replace(
            pattern,
            normal=_unit(medial * draw(0.3, 1.0), -1.0, draw(0.0, 0.8)),
            stripe_mm=(draw(-0.5, 1.5), draw(0.4, 0.8)),
            stripe=draw(0.35, 0.9),
            beyond=draw(0.5, 1.1),
            between_parts=chance(generator, 0.7),
        )
    return IntensityPattern(value, gradient=gradient if structure.label <= LAST_NUCLEUS else (0.0, 0.0, 0.0))


def _unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    length = (x * x + y * y + z * z) ** 0.5
    return x / length, y / length, z / length


def composite(
    shapes: Iterable[tuple[RenderedShape, IntensityPattern]], background: Tensor, chi: Tensor, *, voxel_mm: float
) -> tuple[Tensor, Tensor]:
    """Combine shapes and background: where nuclei overlap the deeper one wins, and borders are partial volumes.

    Ventricles become part of the background, whose labels and susceptibility in ppm have shape (X, Y, Z); `voxel_mm` is
    the voxel size in mm of the template. Returns susceptibility and labels.
    """
    background, chi = background.clone(), chi.clone()
    label = torch.zeros_like(background)
    # Depth and value of the deepest nucleus at each voxel and of the second deepest.
    first, second = torch.full_like(chi, -1e3), torch.full_like(chi, -1e3)
    first_ppm, second_ppm = torch.zeros_like(chi), torch.zeros_like(chi)
    for shape, pattern in shapes:
        block, depth, value, number = shape.block, shape.depth_mm, pattern.evaluate(shape), shape.structure.label
        if number > LAST_NUCLEUS:
            inside = background[block] > 0
            background[block] = torch.where((depth > 0) & inside, number, background[block])
            chi[block] += (depth / voxel_mm + 0.5).clamp_(0, 1) * inside * (value - chi[block])
            continue
        deepest, deepest_ppm = first[block], first_ppm[block]
        wins, follows = depth > deepest, depth > second[block]
        second_ppm[block] = torch.where(wins, deepest_ppm, torch.where(follows, value, second_ppm[block]))
        second[block] = torch.where(wins, deepest, torch.maximum(second[block], depth))
        first_ppm[block] = torch.where(wins, value, deepest_ppm)
        first[block] = torch.maximum(deepest, depth)
        label[block] = torch.where(wins, shape.labels, label[block])
    in_nucleus, in_head = first > 0, background > 0
    adjacent = in_nucleus & (second + first > -_TOUCHING * voxel_mm)
    # Between two nuclei, half the difference of their depths is the distance from the face between them.
    margin = torch.where(adjacent, (first - second) / 2, first)
    share = (margin / voxel_mm + 0.5).clamp_(0, 1)
    other_ppm = torch.where(adjacent, second_ppm, chi)
    labels = torch.where(in_nucleus & in_head, label, background)
    return torch.where(in_head, other_ppm + share * (first_ppm - other_ppm), chi), labels
