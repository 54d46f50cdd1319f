"""Labelled anatomy in template space, its pathology, and its random deformation into the space of a scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor

from bids_dgmseg.image.volume import Volume
from bids_dgmseg.models.structures import STRUCTURES
from bids_dgmseg.simulate.ranges import chance, smooth_noise, uniform

LAST_NUCLEUS = 20
"""Labels up to here are nuclei (structures.tsv), labels above are `TISSUES`."""

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


_CALCIFICATION_MM = (3.0, 6.0)
"""Size of calcifications in the pallidum."""


@dataclass(frozen=True)
class LabelMap:
    """Labels of a head in template space.

    Parameters
    ----------
    labels : Tensor of shape (X, Y, Z), uint8
    world_to_index : Tensor of shape (4, 4)
        RAS+ mm to voxel indices.
    """

    labels: Tensor
    world_to_index: Tensor

    @classmethod
    def from_volume(cls, volume: Volume) -> LabelMap:
        """Create a label map from a label volume."""
        inverse = torch.tensor(np.linalg.inv(volume.affine), dtype=torch.float32)
        return cls(torch.from_numpy(volume.array.astype(np.uint8)), inverse)

    def to(self, device: str | torch.device) -> LabelMap:
        """Copy the labels to a device."""
        return LabelMap(self.labels.to(device), self.world_to_index.to(device))

    def indices(self, points_mm: Tensor) -> Tensor:
        """Return the fractional voxel indices (..., 3) of world points (..., 3)."""
        return points_mm @ self.world_to_index[:3, :3].T + self.world_to_index[:3, 3]

    def at(self, indices: Tensor) -> Tensor:
        """Return the labels (uint8) at voxel indices (..., 3); 0 outside."""
        return look_up(self.labels, indices)


def look_up(labels: Tensor, indices: Tensor) -> Tensor:
    """Return the nearest label (uint8) at voxel indices (..., 3); 0 outside."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int32, device=indices.device)
    inside = torch.ones(flat.shape, dtype=torch.bool, device=indices.device)
    for axis, size in enumerate(labels.shape):  # axis by axis: `all` over an axis of length 3 is slow
        nearest = indices[..., axis].round().int()
        inside &= (nearest >= 0) & (nearest < size)
        flat = flat.mul_(size).add_(nearest)
    found = labels.view(-1)[flat.mul_(inside)]
    return found.mul_(inside)


def fill_from_neighbours(labels: NDArray[np.uint8], removed: Sequence[int]) -> NDArray[np.uint8]:
    """Replace labels by the nearest of the other labels around them."""
    inside = np.isin(labels, removed)
    filled = labels.copy()
    for box in ndimage.find_objects(ndimage.label(inside)[0]):
        block = tuple(slice(max(0, along.start - 2), along.stop + 2) for along in box)
        nearest = ndimage.distance_transform_edt(
            inside[block] | (labels[block] == 0), return_distances=False, return_indices=True
        )
        filled[block][inside[block]] = labels[block][tuple(nearest)][inside[block]]
    return filled


@dataclass(frozen=True)
class HeadRanges:
    """Variation of position, size and shape of the head."""

    scale: tuple[float, float] = (0.78, 1.05)
    """Size relative to the template; MNI templates are larger than the average head."""
    axis_scale: tuple[float, float] = (0.92, 1.08)
    rotation_deg: tuple[float, float, float] = (22.0, 14.0, 14.0)
    """Largest pitch, roll and yaw."""
    shear: float = 0.1
    shift_mm: tuple[float, float, float] = (6.0, 8.0, 6.0)
    """Largest distance of the centre of the field of view from the centre of the nuclei."""
    bends: Sequence[tuple[float, float]] = ((30.0, 4.0), (12.5, 2.0), (6.25, 0.7))
    """Of smooth deformations: wavelength in mm, and largest amplitude in mm of noise with an SD of 0.55."""


def draw_head_points(
    shape: tuple[int, int, int],
    spacing_mm: float,
    *,
    centre_mm: Sequence[float],
    ranges: HeadRanges,
    generator: torch.Generator,
) -> Tensor:
    """Draw the template coordinates of each voxel of a scan: affine transform and smooth deformation.

    Parameters
    ----------
    shape : tuple of 3 int
        Grid of the scan, RAS+.
    spacing_mm : float
        Isotropic voxel size.
    centre_mm : sequence of 3 float
        Template point about which the field of view is centred.
    ranges : HeadRanges
    generator : torch.Generator

    Returns
    -------
    Tensor of shape (X, Y, Z, 3)
        Template coordinates in RAS+ mm.
    """
    device = generator.device
    axes = [(torch.arange(n, device=device) - (n - 1) / 2) * spacing_mm for n in shape]
    scan = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    shift = [c + uniform(generator, -s, s) for c, s in zip(centre_mm, ranges.shift_mm, strict=True)]
    angles = [np.deg2rad(uniform(generator, -limit, limit)) for limit in ranges.rotation_deg]
    size = uniform(generator, *ranges.scale)
    zoom = np.diag([1 / (size * uniform(generator, *ranges.axis_scale)) for _ in range(3)])
    shear = np.eye(3)
    shear[0, 1:] = [uniform(generator, -ranges.shear / 2, ranges.shear / 2) for _ in range(2)]
    shear[1, 2] = uniform(generator, -ranges.shear, ranges.shear)
    matrix = torch.tensor(Rotation.from_euler("xyz", angles).as_matrix() @ zoom @ shear, dtype=torch.float32)
    points = scan @ matrix.T.to(device) + torch.tensor(shift, device=device)
    for wavelength_mm, amplitude_mm in ranges.bends:
        amplitude = uniform(generator, 0.2, 1.0) * amplitude_mm
        points += smooth_noise(shape, wavelength_mm / spacing_mm, generator, 3).permute(1, 2, 3, 0) * amplitude
    return points


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
