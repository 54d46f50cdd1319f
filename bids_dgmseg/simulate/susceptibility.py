"""Fill an anatomy with susceptibilities (ppm) as they vary between people."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, LabelMap, chance, look_up, normal, uniform
from bids_dgmseg.simulate.patterns import Canvas, draw_look
from bids_dgmseg.simulate.shapes import ShapedHead, ShapeRanges, draw_bodies
from bids_dgmseg.simulate.tissue_details import (
    HEALTHY,
    DetailRanges,
    Disease,
    DiseaseRanges,
    add_details,
    calcify,
    draw_disease,
)

TISSUES = {
    21: "cortex",
    22: "white matter",
    23: "lateral ventricle",
    24: "third ventricle",
    25: "fourth ventricle",
    26: "cerebrospinal fluid",
    27: "thalamus",
    28: "brainstem",
    29: "cerebellar cortex",
    30: "cerebellar white matter",
    31: "hippocampus and amygdala",
    32: "accumbens, basal forebrain, hypothalamus, claustrum",
    33: "corpus callosum",
    34: "fastigial nucleus",
    35: "caudate tail",
}

_IRON = {
    "DN": (18.5, 0.06, 0.4),
    "IN": (11.5, 0.06, 0.4),
    "RN": (19.5, 0.06, 0.4),
    "SN": (18.5, 0.08, 0.4),
    "STN": (15.0, 0.07, 0.4),
    "CN": (9.66, 0.05, 0.33),
    "PUT": (14.62, 0.04, 0.46),
    "GP": (21.41, 0.09, 0.37),
}
"""Iron in mg/100 g is a·(1 − exp(−b·age)) + c. Caudate, putamen and pallidum: Hallgren and Sourander (1958); the others
rise as on maps of the young, to the literature's susceptibility of adults."""

_PPM_OF_IRON, _PPM_WITHOUT_IRON = 0.0072, -0.020

_TISSUE_PPM = {
    21: (0.018, 0.012),
    22: (-0.030, 0.012),
    23: (0.015, 0.015),
    24: (0.015, 0.015),
    25: (0.015, 0.020),
    26: (0.015, 0.020),
    27: (0.012, 0.015),
    28: (-0.025, 0.015),
    29: (0.008, 0.014),
    30: (-0.020, 0.014),
    31: (0.008, 0.014),
    32: (0.010, 0.020),
    33: (-0.040, 0.015),
    34: (0.050, 0.030),
    35: (0.040, 0.018),
}

_MIDDLE_AGE_YEARS = 45.0

_HILUM = 40
"""Added to the dentate's label for its inside, which is darker than its wall on most maps."""

_SHAPES = ShapeRanges()


@dataclass(frozen=True)
class ValueRanges:
    """How far susceptibilities differ; a pair is the lowest and highest value, drawn uniformly."""

    age_years: tuple[float, float] = (10.0, 80.0)
    """Iron, ventricles, caudate and putamen go with it."""
    mixture: float = 0.2
    """Part of the people whose values follow no law: each label draws its own."""
    iron_sd: float = 0.2
    """Of a nucleus between people of one age, relative."""
    odd: float = 0.08
    """Part of the nuclei with far more or less iron than is usual at that age."""
    nuclei_gain: tuple[float, float] = (0.55, 1.2)
    tissue_gain: tuple[float, float] = (0.3, 1.5)
    side_difference: float = 0.1
    """SD of left against right, relative."""
    hilum: tuple[float, float] = (0.35, 1.05)
    """Dentate's inside relative to its wall."""
    details: DetailRanges = field(default_factory=DetailRanges)
    disease: DiseaseRanges = field(default_factory=DiseaseRanges)


def split_dentate(labels: LabelMap, wall_mm: float = 1.6) -> LabelMap:
    """Give the inside of each dentate a label of its own (`drop_hilum` undoes it)."""
    array = labels.labels.numpy().copy()
    step_mm = (1 / labels.world_to_index[:3, :3].norm(dim=0)).tolist()
    places = ndimage.find_objects(array, max_label=FIRST_TISSUE)
    for structure in STRUCTURES.both_sides(["DN"]):
        place = places[structure.index - 1]
        if place is not None:
            inside = np.pad(array[place] == structure.index, 1)
            depth_mm = ndimage.distance_transform_edt(inside, sampling=step_mm)[1:-1, 1:-1, 1:-1]
            array[place][depth_mm > wall_mm] = structure.index + _HILUM
    return LabelMap(torch.from_numpy(array), labels.world_to_index)


def drop_hilum(labels: Tensor) -> Tensor:
    """Return the labels with the dentate whole again."""
    return torch.where(labels > _HILUM, labels - _HILUM, labels)


def draw_values(ranges: ValueRanges, generator: torch.Generator, disease: Disease = HEALTHY) -> tuple[Tensor, float]:
    """Draw a susceptibility in ppm for each label, a vector indexed by it on the CPU, and the age in years."""
    values = torch.zeros(64)
    age_years = uniform(generator, *ranges.age_years)
    lawless = chance(generator, ranges.mixture)
    nuclei_gain, tissue_gain = uniform(generator, *ranges.nuclei_gain), uniform(generator, *ranges.tissue_gain)
    for nucleus in _IRON:
        filled = disease.iron.get(nucleus, 1.0)
        value = (
            uniform(generator, 0.0, 0.2) if lawless else _draw_nucleus(nucleus, age_years, ranges, generator, filled)
        )
        for structure in STRUCTURES.both_sides([nucleus]):
            values[structure.index] = value * nuclei_gain * (1 + ranges.side_difference * normal(generator))
    if chance(generator, 0.2):  # interposed as bright as the dentate: they then form one body
        values[3:5] = values[1:3] * uniform(generator, 0.8, 1.1)
    if chance(generator, 0.25):  # subthalamic nucleus as bright as the nigra, without a border
        values[9:11] = values[7:9] * uniform(generator, 0.9, 1.1)
    for label, (mean, sd) in _TISSUE_PPM.items():
        value = 0.03 * normal(generator) if lawless else mean + sd * normal(generator)
        values[label] = value * tissue_gain
    values[1 + _HILUM : 3 + _HILUM] = values[1:3] * uniform(generator, *ranges.hilum)
    return values, age_years


def _draw_nucleus(
    nucleus: str, age_years: float, ranges: ValueRanges, generator: torch.Generator, filled: float
) -> float:
    """Draw a susceptibility that is plausible at an age; a disease has filled the nucleus with so much iron."""
    most, rate, least = _IRON[nucleus]
    iron = (most * (1 - math.exp(-rate * age_years)) + least) * math.exp(ranges.iron_sd * normal(generator))
    if chance(generator, ranges.odd):
        iron *= uniform(generator, 0.4, 1.8)
    iron *= filled
    return max(_PPM_OF_IRON * iron + _PPM_WITHOUT_IRON, 0.008)


def fill(
    head: LabelMap,
    points_mm: Tensor,
    *,
    spacing_mm: float,
    ranges: ValueRanges,
    generator: torch.Generator,
    shapes: ShapeRanges = _SHAPES,
) -> tuple[Tensor, Tensor]:
    """Fill a drawn head with susceptibilities.

    Parameters
    ----------
    head : LabelMap
        Anatomy in template space; the nuclei of a `ShapedHead` are shaped one by one.
    points_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of the voxels, from `draw_head_points`.
    spacing_mm : float
        Voxel size of the scan.
    ranges : ValueRanges
        How far values differ.
    generator : torch.Generator
        Source of randomness.
    shapes : ShapeRanges
        How far the nuclei's shapes differ.

    Returns
    -------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm, 0 outside the head; edges hold both tissues.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues at the voxel centres.
    """
    disease = draw_disease(ranges.disease, generator)
    values, age_years = draw_values(ranges, generator, disease)
    indices, here = head.indices(points_mm), values.to(points_mm.device)
    if isinstance(head, ShapedHead) and shapes.amount > 0:
        ground, chi = _mix(head.ground, head, indices, here, spacing_mm)
        canvas = Canvas(ground, chi, width_mm=_width_mm(points_mm))
        ageing = (age_years - _MIDDLE_AGE_YEARS) / 30
        for painted in draw_bodies(head, points_mm, ranges=shapes, ageing=ageing, generator=generator, disease=disease):
            canvas.paint(painted, draw_look(painted.body, values, ageing, generator))
        chi, labels = canvas.finish()
    else:
        labels, chi = _mix(head.labels, head, indices, here, spacing_mm)
        labels = drop_hilum(labels)
    chi = calcify(chi, labels, disease, spacing_mm=spacing_mm, generator=generator)
    chi = add_details(chi, labels, points_mm, spacing_mm=spacing_mm, ranges=ranges.details, generator=generator)
    return chi, labels


def _mix(labels: Tensor, head: LabelMap, indices: Tensor, values: Tensor, spacing_mm: float) -> tuple[Tensor, Tensor]:
    """Look up labels at voxel centres, and the mean value of four points around each."""
    half = 0.28 * spacing_mm * head.world_to_index[:3, :3].norm(dim=0)
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, -1], [1, -1, -1], [-1, 1, 1]], device=half.device) * half
    chi = torch.stack([values[look_up(labels, indices + corner).int()] for corner in corners]).mean(dim=0)
    return look_up(labels, indices), chi


def _width_mm(points_mm: Tensor) -> float:
    """Mean distance of neighbouring voxels in template space."""
    sparse = points_mm[::8, ::8]
    return float((sparse[:, :, 1:] - sparse[:, :, :-1]).norm(dim=-1).mean())
