"""Draw heads: one labelled anatomy, moved, bent and seen through many fields of view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.volume import Volume

FIRST_TISSUE = 20
"""Labels up to here are nuclei (structures.tsv), above are tissues of `susceptibility.TISSUES`."""


@dataclass(frozen=True)
class LabelMap:
    """A labelled head in template space, looked up by nearest neighbour.

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
        """Take over a label volume."""
        inverse = torch.tensor(np.linalg.inv(volume.affine), dtype=torch.float32)
        return cls(torch.from_numpy(volume.array.astype(np.uint8)), inverse)

    def indices(self, points_mm: Tensor) -> Tensor:
        """Voxel indices (..., 3), with fractions, of world points (..., 3)."""
        return points_mm @ self.world_to_index[:3, :3].T + self.world_to_index[:3, 3]

    def at(self, indices: Tensor) -> Tensor:
        """Labels (uint8) at voxel indices (..., 3); 0 outside."""
        return look_up(self.labels, indices)


def look_up(labels: Tensor, indices: Tensor) -> Tensor:
    """Nearest label (uint8) at voxel indices (..., 3); 0 outside."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int32, device=indices.device)
    inside = torch.ones(flat.shape, dtype=torch.bool, device=indices.device)
    for axis, size in enumerate(labels.shape):  # one axis after the other: `all` over an axis of 3 is slow
        nearest = indices[..., axis].round().int()
        inside &= (nearest >= 0) & (nearest < size)
        flat = flat.mul_(size).add_(nearest)
    found = labels.view(-1)[flat.mul_(inside)]
    return found.mul_(inside)


@dataclass(frozen=True)
class HeadRanges:
    """How far heads differ; a pair is the lowest and highest value, drawn uniformly."""

    scale: tuple[float, float] = (0.78, 1.05)
    """Size relative to the template; MNI is larger than life."""
    axis_scale: tuple[float, float] = (0.92, 1.08)
    rotation_deg: tuple[float, float, float] = (22.0, 14.0, 14.0)
    """Largest pitch, roll and yaw."""
    shear: float = 0.1
    shift_mm: tuple[float, float, float] = (6.0, 8.0, 6.0)
    """Largest distance of the field of view's centre from the middle of the nuclei."""
    bends: Sequence[tuple[float, float]] = ((30.0, 4.0), (12.5, 2.0), (6.25, 0.7))
    """Of smooth deformations: wavelength in mm, and the largest amplitude in mm of a noise whose SD is 0.55."""


_hosts: WeakKeyDictionary[torch.Generator, torch.Generator] = WeakKeyDictionary()


def host(generator: torch.Generator) -> torch.Generator:
    """Give the CPU's generator that draws the few numbers beside a generator's many.

    On the CPU it is the generator itself. A GPU's numbers are waited for one by one, which would take longer than all
    else; so they come from a generator of the CPU that begins with the same seed.
    """
    if not _is_waited_for(generator):
        return generator
    if generator not in _hosts:
        _hosts[generator] = torch.Generator().manual_seed(generator.initial_seed())
    return _hosts[generator]


def _is_waited_for(generator: torch.Generator) -> bool:
    return generator.device.type != "cpu"


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw one number."""
    return low + (high - low) * float(torch.rand((), **_at_host(generator)))


def chance(generator: torch.Generator, probability: float) -> bool:
    """Draw yes or no."""
    return float(torch.rand((), **_at_host(generator))) < probability


def normal(generator: torch.Generator) -> float:
    """Draw one number of mean 0 and SD 1."""
    return float(torch.randn((), **_at_host(generator)))


def pick(generator: torch.Generator, weights: Sequence[float]) -> int:
    """Draw an index, each as often as its weight says."""
    return int(torch.multinomial(torch.tensor(weights, device="cpu"), 1, generator=host(generator)))


def _at_host(generator: torch.Generator) -> dict[str, Any]:
    drawn_by = host(generator)
    return {"generator": drawn_by, "device": drawn_by.device}


def smooth_noise(
    shape: Sequence[int], wavelength_voxels: float | Sequence[float], generator: torch.Generator, channels: int = 1
) -> Tensor:
    """Gaussian noise on a coarse grid, interpolated: (channels, X, Y, Z), SD below 1; one wavelength or one an axis."""
    lengths = np.broadcast_to(wavelength_voxels, 3)
    coarse = [max(2, round(size / length) + 1) for size, length in zip(shape, lengths, strict=True)]
    noise = torch.randn((1, channels, *coarse), generator=generator, device=generator.device)
    return functional.interpolate(noise, size=list(shape), mode="trilinear", align_corners=True)[0]


def draw_head_points(
    shape: tuple[int, int, int],
    spacing_mm: float,
    *,
    centre_mm: Sequence[float],
    ranges: HeadRanges,
    generator: torch.Generator,
) -> Tensor:
    """Draw where each voxel of a scan lies in template space.

    Parameters
    ----------
    shape : tuple of 3 int
        Grid of the scan, RAS+.
    spacing_mm : float
        Its isotropic voxel size.
    centre_mm : sequence of 3 float
        Template point about which the field of view is centred.
    ranges : HeadRanges
        How far the head may differ from the template.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (X, Y, Z, 3)
        Template coordinates in RAS+ mm.
    """
    device = generator.device
    axes = [(torch.arange(size, device=device) - (size - 1) / 2) * spacing_mm for size in shape]
    scan = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    shift = [c + uniform(generator, -s, s) for c, s in zip(centre_mm, ranges.shift_mm, strict=True)]
    points = scan @ _draw_matrix(ranges, generator).T.to(device) + torch.tensor(shift, device=device)
    for wavelength_mm, amplitude_mm in ranges.bends:
        amplitude = uniform(generator, 0.2, 1.0) * amplitude_mm
        points += smooth_noise(shape, wavelength_mm / spacing_mm, generator, 3).permute(1, 2, 3, 0) * amplitude
    return points


def _draw_matrix(ranges: HeadRanges, generator: torch.Generator) -> Tensor:
    """Draw the linear map from scan to template: rotation, size, proportions, shear."""
    angles = [np.deg2rad(uniform(generator, -limit, limit)) for limit in ranges.rotation_deg]
    size = uniform(generator, *ranges.scale)
    zoom = np.diag([1 / (size * uniform(generator, *ranges.axis_scale)) for _ in range(3)])
    shear = np.eye(3)
    shear[0, 1:] = [uniform(generator, -ranges.shear / 2, ranges.shear / 2) for _ in range(2)]
    shear[1, 2] = uniform(generator, -ranges.shear, ranges.shear)
    matrix = Rotation.from_euler("xyz", angles).as_matrix() @ zoom @ shear
    return torch.tensor(matrix, dtype=torch.float32)


def fill_places(labels: NDArray[np.uint8], bodies: Sequence[int]) -> NDArray[np.uint8]:
    """Give the voxels of some labels to the nearest tissue beside them."""
    inside = np.isin(labels, bodies)
    filled = labels.copy()
    for place in ndimage.find_objects(ndimage.label(inside)[0]):
        block = tuple(slice(max(0, along.start - 2), along.stop + 2) for along in place)
        nearest = ndimage.distance_transform_edt(
            inside[block] | (labels[block] == 0), return_distances=False, return_indices=True
        )
        filled[block][inside[block]] = labels[block][tuple(nearest)][inside[block]]
    return filled
