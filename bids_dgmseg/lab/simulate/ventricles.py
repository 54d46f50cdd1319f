"""Elastic enlargement of the ventricles, which pushes and thins the tissue around them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from bids_dgmseg.lab.simulate.people import interpolate
from bids_dgmseg.lab.simulate.ranges import DilationRanges, chance, normal, smooth_noise, uniform

_VENTRICLES = (23, 24)

_STEP_MM, _MARGIN_MM = 2.0, 30.0
"""Of the lattice of distances, and its margin around the ventricles."""

_SMOOTH_MM = 1.5

_REACH_MM = 1.0
"""Points outside a ventricle are mapped into it by no more than this, so that they do not pass through thin horns."""


@dataclass(frozen=True)
class VentricleDistance:
    """Distance from lateral and third ventricles.

    Parameters
    ----------
    values : Tensor of shape (4, X, Y, Z)
        Distance in mm, negative inside, and the direction away from the ventricles (unit vector).
    world_to_index : Tensor of shape (4, 4)
        RAS+ mm to indices of the lattice.
    """

    values: Tensor
    world_to_index: Tensor

    def to(self, device: str | torch.device) -> VentricleDistance:
        """Copy the distances to a device."""
        return VentricleDistance(self.values.to(device), self.world_to_index.to(device))


def measure_distance(labels: Tensor, world_to_index: Tensor) -> VentricleDistance | None:
    """Compute the distances for a label map (X, Y, Z); None if it has no ventricles."""
    affine = np.linalg.inv(world_to_index.cpu().numpy().astype(np.float64))
    steps_mm = np.linalg.norm(affine[:3, :3], axis=0)
    inside = np.isin(labels.cpu().numpy(), _VENTRICLES)
    if not inside.any():
        return None
    stride = np.maximum(1, np.rint(_STEP_MM / steps_mm)).astype(int)
    voxels = np.argwhere(inside)
    margin = np.ceil(_MARGIN_MM / steps_mm).astype(int)
    low, high = voxels.min(axis=0) - margin, voxels.max(axis=0) + margin + 1
    block = tuple(slice(max(0, start), stop) for start, stop in zip(low, high, strict=True))
    padding = list(zip(np.maximum(0, -low), np.maximum(0, high - inside.shape), strict=True))
    near = np.pad(inside[block], padding)
    signed = ndimage.distance_transform_edt(~near, sampling=steps_mm)
    signed -= ndimage.distance_transform_edt(near, sampling=steps_mm)
    signed = ndimage.gaussian_filter(signed, _SMOOTH_MM / steps_mm)
    thinned = signed[tuple(slice(None, None, int(step)) for step in stride)]
    gradient = np.stack(np.gradient(thinned))
    gradient = np.tensordot(np.linalg.inv(affine[:3, :3] * stride).T, gradient, axes=1)
    direction = gradient / np.maximum(np.linalg.norm(gradient, axis=0), 0.3)
    lattice = affine @ np.block([[np.diag(stride), low[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])
    values = np.concatenate([thinned[None], direction]).astype(np.float32)
    return VentricleDistance(torch.from_numpy(values), torch.tensor(np.linalg.inv(lattice), dtype=torch.float32))


def dilate(
    points_mm: Tensor, distance: VentricleDistance, *, ranges: DilationRanges, generator: torch.Generator
) -> Tensor:
    """Draw wider or narrower ventricles: change the template coordinates of the voxels of a scan (X, Y, Z, 3).

    Tissue at distance d is moved away by about w·exp(−d/L): it is pushed and thinned next to the ventricles and stays
    in place far away. Sides and horns differ.
    """
    amount_mm = ranges.spread_mm * normal(generator)
    if chance(generator, ranges.wide):
        amount_mm = uniform(generator, *ranges.wide_mm)
    amount_mm = max(amount_mm, -ranges.narrowest_mm)
    length_mm = uniform(generator, *ranges.length_mm)
    spacing_mm = float((points_mm[1, 0, 0] - points_mm[0, 0, 0]).norm())
    noise = smooth_noise(points_mm.shape[:3], ranges.wavelength_mm / spacing_mm, generator)[0]
    left, right = (1 + ranges.asymmetry * normal(generator) for _ in range(2))
    side = torch.sigmoid(points_mm[..., 0] / 3)
    factor = (left + (right - left) * side) * (1 + ranges.irregularity * noise).clamp(min=0)
    values = interpolate(distance.values, distance.world_to_index, points_mm)
    away_mm, direction = values[..., :1], values[..., 1:]
    shift = amount_mm * factor[..., None] * torch.exp(-away_mm.clamp(min=0) / length_mm)
    shift = torch.minimum(shift, (away_mm + _REACH_MM).clamp(min=0))
    return points_mm - shift * direction
