"""What acquisition and reconstruction leave of the true susceptibility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.invert import dipole_kernel
from bids_dgmseg.simulate.anatomy import chance, smooth_noise, uniform


@dataclass(frozen=True)
class ArtefactRanges:
    """How far scans differ; a pair is the lowest and highest value, drawn uniformly."""

    blur_mm: tuple[float, float] = (0.2, 0.7)
    """SD of the point spread along each axis."""
    slice_mm: tuple[float, float] = (0.7, 1.6)
    """SD along the slices of thick-slice scans, half of all scans."""
    threshold: tuple[float, float] = (0.03, 0.18)
    """Where truncated division leaves the dipole kernel."""
    field_noise_ppm: tuple[float, float] = (0.0005, 0.004)
    noise_ppm: tuple[float, float] = (0.002, 0.02)
    """Log-uniform."""
    tilt: float = 0.35
    """Largest tangent of the angle between the main field and the vertical."""
    highpass: tuple[float, float] = (0.2, 0.8)
    """Part of the slow variation that background removal and regularization take away."""
    reference_ppm: float = 0.015
    """Largest shift of the zero."""


def degrade(chi: Tensor, *, spacing_mm: float, ranges: ArtefactRanges, generator: torch.Generator) -> Tensor:
    """Turn true susceptibility into a reconstructed map.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        True susceptibility in ppm, 0 outside the head.
    spacing_mm : float
        Isotropic voxel size.
    ranges : ArtefactRanges
        How far scans differ.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Map in ppm, with values outside the head too; the caller masks.
    """
    sigma_mm = [uniform(generator, *ranges.blur_mm) for _ in range(3)]
    if chance(generator, 0.5):
        axis = 2 if chance(generator, 0.8) else int(uniform(generator, 0, 2))
        sigma_mm[axis] = uniform(generator, *ranges.slice_mm)
    chi = blur(chi, [sigma / spacing_mm for sigma in sigma_mm])
    if chance(generator, 0.5):
        width = uniform(generator, 8, 25) / spacing_mm
        chi = chi - uniform(generator, *ranges.highpass) * blur(chi, [width] * 3)
    if chance(generator, 0.7):
        chi = _invert_with_streaks(chi, ranges, generator)
    return chi + _draw_noise(chi, ranges, generator) + uniform(generator, -ranges.reference_ppm, ranges.reference_ppm)


def blur(chi: Tensor, sigma_voxels: Sequence[float]) -> Tensor:
    """Gaussian blur by an SD along each axis, edges replicated."""
    blurred = chi[None, None]
    for axis, sigma in enumerate(sigma_voxels):
        radius = min(math.ceil(3 * sigma), chi.shape[axis] - 1)
        if radius < 1 or sigma < 0.05:
            continue
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
        shape = [1] * 5
        shape[axis + 2] = 2 * radius + 1
        padding = [0] * 6
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
        blurred = functional.conv3d(functional.pad(blurred, padding, mode="replicate"), (taps / taps.sum()).view(shape))
    return blurred[0, 0]


def _invert_with_streaks(chi: Tensor, ranges: ArtefactRanges, generator: torch.Generator) -> Tensor:
    """Lose what truncated division loses near the magic angle, and gain the field noise that it amplifies."""
    tilt = [uniform(generator, -ranges.tilt, ranges.tilt) for _ in range(2)]
    kernel = dipole_kernel(chi.shape, (1, 1, 1), (*tilt, 1.0)).abs()
    threshold = uniform(generator, *ranges.threshold)
    kept = (kernel / threshold).clamp(max=1) ** uniform(generator, 0.3, 1.0)
    kept[0, 0, 0] = 1.0
    spectrum = torch.fft.rfftn(chi) * kept
    if chance(generator, 0.7):
        noise = torch.randn(chi.shape, generator=generator) * uniform(generator, *ranges.field_noise_ppm)
        spectrum = spectrum + torch.fft.rfftn(noise) / kernel.clamp(min=threshold)
    inverted: Tensor = torch.fft.irfftn(spectrum, s=chi.shape)
    return inverted


def _draw_noise(chi: Tensor, ranges: ArtefactRanges, generator: torch.Generator) -> Tensor:
    low, high = ranges.noise_ppm
    level = low * (high / low) ** uniform(generator, 0, 1)
    noise = torch.randn(chi.shape, generator=generator) * level
    return blur(noise, [uniform(generator, 0.3, 0.9)] * 3) if chance(generator, 0.6) else noise


def draw_view(inside: Tensor, *, spacing_mm: float, cut_mm: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Draw which voxels the map covers: brain mask too tight or too loose, slices missing below or above.

    Parameters
    ----------
    inside : Tensor of shape (X, Y, Z), bool
        The head.
    spacing_mm : float
        Isotropic voxel size.
    cut_mm : tuple of 2 float
        Largest part that is cut off below and above.
    generator : torch.Generator
        Source of randomness.

    Returns
    -------
    Tensor of shape (X, Y, Z), bool
    """
    view = inside.clone()
    if chance(generator, 0.5):
        distance = blur(inside.float(), [2.5 / spacing_mm] * 3)
        rim = 0.5 + uniform(generator, -0.35, 0.4) + 0.15 * smooth_noise(inside.shape, 12 / spacing_mm, generator)[0]
        view = distance > rim
    below, above = (int(uniform(generator, 0, limit) / spacing_mm) for limit in cut_mm)
    if chance(generator, 0.4):
        view[:, :, :below] = False
    if chance(generator, 0.3) and above:
        view[:, :, -above:] = False
    return view
