"""Fill an anatomy with susceptibilities (ppm) as they vary between people."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.simulate.anatomy import FIRST_TISSUE, LabelMap, chance, smooth_noise, uniform
from bids_dgmseg.structures import STRUCTURES

TISSUES = {
    21: "cortex", 22: "white matter", 23: "lateral ventricle", 24: "third ventricle", 25: "fourth ventricle",
    26: "cerebrospinal fluid", 27: "thalamus", 28: "brainstem", 29: "cerebellar cortex", 30: "cerebellar white matter",
    31: "hippocampus and amygdala", 32: "accumbens, basal forebrain, hypothalamus, claustrum", 33: "corpus callosum",
    34: "fastigial nucleus", 35: "caudate tail",
}  # fmt: skip

_NUCLEUS_PPM = {
    "DN": (0.115, 0.045), "IN": (0.060, 0.030), "RN": (0.100, 0.040), "SN": (0.110, 0.040), "STN": (0.085, 0.035),
    "CN": (0.044, 0.018), "PUT": (0.042, 0.025), "GP": (0.125, 0.035),
}  # fmt: skip
"""Mean and SD between people; literature means with their SD widened, since diseases and protocols differ."""

_TISSUE_PPM = {
    21: (0.018, 0.012), 22: (-0.030, 0.012), 23: (0.015, 0.015), 24: (0.015, 0.015), 25: (0.015, 0.020),
    26: (0.015, 0.020), 27: (0.012, 0.015), 28: (-0.025, 0.015), 29: (0.008, 0.014), 30: (-0.020, 0.014),
    31: (0.008, 0.014), 32: (0.010, 0.020), 33: (-0.040, 0.015), 34: (0.050, 0.030), 35: (0.040, 0.018),
}  # fmt: skip

_HILUM = 40
"""Added to the dentate's label for its inside, which is darker than its wall on most maps."""


@dataclass(frozen=True)
class ValueRanges:
    """How far susceptibilities differ; a pair is the lowest and highest value, drawn uniformly."""

    nuclei_gain: tuple[float, float] = (0.6, 1.2)
    tissue_gain: tuple[float, float] = (0.5, 1.5)
    side_difference: float = 0.1
    """SD of left against right, relative."""
    texture: tuple[float, float] = (0.0, 0.4)
    fine_ppm: tuple[float, float] = (0.0, 0.012)
    slow_ppm: tuple[float, float] = (0.0, 0.015)
    vein_ppm: tuple[float, float] = (0.05, 0.30)
    hilum: tuple[float, float] = (0.35, 1.05)
    """Dentate's inside relative to its wall."""


def split_dentate(labels: LabelMap, wall_mm: float = 1.6) -> LabelMap:
    """Give the inside of each dentate a label of its own (`drop_hilum` undoes it)."""
    array = labels.labels.numpy().copy()
    step_mm = (1 / labels.world_to_index[:3, :3].norm(dim=0)).tolist()
    places = ndimage.find_objects(array, max_label=FIRST_TISSUE)
    for structure in STRUCTURES.sides(["DN"]):
        place = places[structure.index - 1]
        if place is not None:
            inside = np.pad(array[place] == structure.index, 1)
            depth_mm = ndimage.distance_transform_edt(inside, sampling=step_mm)[1:-1, 1:-1, 1:-1]
            array[place][depth_mm > wall_mm] = structure.index + _HILUM
    return LabelMap(torch.from_numpy(array), labels.world_to_index)


def drop_hilum(labels: Tensor) -> Tensor:
    """Return the labels with the dentate whole again."""
    return torch.where(labels > _HILUM, labels - _HILUM, labels)


def draw_values(ranges: ValueRanges, generator: torch.Generator) -> Tensor:
    """Draw a susceptibility in ppm for each label, a vector indexed by it."""
    values = torch.zeros(64)
    nuclei_gain, tissue_gain = uniform(generator, *ranges.nuclei_gain), uniform(generator, *ranges.tissue_gain)
    for nucleus, (mean, sd) in _NUCLEUS_PPM.items():
        value = max(mean + sd * _normal(generator), 0.012) * nuclei_gain
        for structure in STRUCTURES.sides([nucleus]):
            values[structure.index] = value * (1 + ranges.side_difference * _normal(generator))
    if chance(generator, 0.2):  # interposed as bright as the dentate: they then form one body
        likeness = uniform(generator, 0.8, 1.1)
        values[3:5] = values[1:3] * likeness
    for label, (mean, sd) in _TISSUE_PPM.items():
        values[label] = (mean + sd * _normal(generator)) * tissue_gain
    hilum = uniform(generator, *ranges.hilum)
    values[1 + _HILUM : 3 + _HILUM] = values[1:3] * hilum
    return values


def fill(
    head: LabelMap, points_mm: Tensor, *, spacing_mm: float, ranges: ValueRanges, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Fill a drawn head with susceptibilities.

    Parameters
    ----------
    head : LabelMap
        Anatomy in template space.
    points_mm : Tensor of shape (X, Y, Z, 3)
        Template coordinates of the voxels, from `draw_head_points`.
    spacing_mm : float
        Voxel size of the scan.
    ranges : ValueRanges
        How far values differ.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    chi : Tensor of shape (X, Y, Z)
        Susceptibility in ppm, 0 outside the head; edges hold both tissues.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues at the voxel centres.
    """
    indices = head.indices(points_mm)
    drawn = head.at(indices)
    labels = drop_hilum(drawn)
    values = draw_values(ranges, generator)
    half = 0.28 * spacing_mm * head.world_to_index[:3, :3].norm(dim=0)
    corners = torch.tensor([[-1.0, -1, 1], [1, 1, -1], [1, -1, -1], [-1, 1, 1]]) * half
    chi = torch.stack([values[head.at(indices + corner).long()] for corner in corners]).mean(dim=0)
    shape = tuple(chi.shape)
    nuclei = (labels > 0) & (labels <= FIRST_TISSUE)
    inside = labels > 0

    def noise(amplitude: tuple[float, float], wavelength_mm: tuple[float, float]) -> Tensor:
        wavelength = uniform(generator, *wavelength_mm) / spacing_mm
        return uniform(generator, *amplitude) * smooth_noise(shape, wavelength, generator)[0]

    chi = chi * (1 + nuclei * noise(ranges.texture, (3, 8)))
    chi = chi + noise(ranges.fine_ppm, (2.5, 6)) + noise(ranges.slow_ppm, (10, 25))
    if chance(generator, 0.9):
        chi += _draw_veins(shape, spacing_mm, generator) * (inside & ~nuclei) * uniform(generator, *ranges.vein_ppm)
    if chance(generator, 0.3):
        _add_spots(chi, generator)
    return chi * inside, labels


def _draw_veins(shape: tuple[int, ...], spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Draw thin tubes: where two smooth fields are both near zero."""
    wavelength = uniform(generator, 7.5, 14) / spacing_mm
    first, second = smooth_noise(shape, wavelength, generator, 2)
    width = uniform(generator, 0.03, 0.1)
    tubes: Tensor = (first.abs() < width) & (second.abs() < width)
    return tubes


def _add_spots(chi: Tensor, generator: torch.Generator) -> None:
    """Add three microbleeds or calcifications, two voxels wide, in place."""
    for _ in range(3):
        x, y, z = (int(uniform(generator, 2, size - 2)) for size in chi.shape)
        chi[x : x + 2, y : y + 2, z : z + 2] += uniform(generator, -0.3, 0.5)


def _normal(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator))
