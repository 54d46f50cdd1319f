"""Simulated field measurement and QSM reconstruction, with their errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.background import spherical_mean_kernel, v_sharp
from bids_dgmseg.qsm.field import apply_kernel, dipole_kernel, fast_size, field_noise_sd, r2star_hz
from bids_dgmseg.qsm.inversion import conjugate_gradients, least_squares, total_variation, truncated_division
from bids_dgmseg.simulate.acquisition import blur
from bids_dgmseg.simulate.ranges import chance, log_uniform, pick, smooth_noise, uniform

_MARGIN_MM = 5.0
"""Replicated padding around the field of view, against aliasing between its opposite faces."""


@dataclass(frozen=True)
class ReconstructionRanges:
    """Variation of scanners and reconstruction methods."""

    b0_tesla: tuple[float, ...] = (1.5, 3.0, 3.0, 7.0)
    """Field strengths to choose from."""
    snr: tuple[float, float] = (20.0, 200.0)
    """At echo time 0; log-uniform."""
    r2_hz: tuple[float, float] = (10.0, 20.0)
    """Decay rate where the susceptibility is 0, at 3 T."""
    last_echo_ms_t: tuple[float, float] = (60.0, 110.0)
    """Last echo time multiplied by field strength."""
    tilt: float = 0.35
    """Largest tangent of the angle between B0 and the vertical, in the sagittal and coronal plane."""
    rim_ppm: tuple[float, float] = (0.0, 0.015)
    """Residual background field at the border of the mask."""
    slow_ppm: tuple[float, float] = (0.0, 0.002)
    """Residual smooth field everywhere."""
    largest_radius_mm: tuple[float, float] = (5.0, 12.0)
    smallest_radius_mm: tuple[float, float] = (2.0, 3.0)
    """Of V-SHARP."""
    methods: tuple[float, float, float, float] = (0.40, 0.25, 0.20, 0.15)
    """Probabilities of truncated division, least squares, conjugate gradients and total variation."""
    threshold: tuple[float, float] = (0.08, 0.25)
    """Of truncated division."""
    least_squares: tuple[float, float] = (0.004, 0.05)
    """Regularization of the closed-form solutions; log-uniform, as for the other methods."""
    ridge: tuple[float, float] = (0.003, 0.02)
    """Weight of the squared values, next to gradient or total variation."""
    conjugate_gradients: tuple[float, float] = (1e-4, 1e-2)
    iterations: tuple[float, float] = (4.0, 24.0)
    """Of conjugate gradients."""
    total_variation: tuple[float, float] = (5e-5, 1e-3)


def simulate_reconstruction(
    chi: Tensor,
    mask: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    ranges: ReconstructionRanges,
    generator: torch.Generator,
    rotation: Tensor | None = None,
) -> Tensor:
    """Simulate a reconstruction: forward field, noise of several echoes, background removal, dipole inversion.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        True susceptibility in ppm on the scan's grid.
    mask : Tensor of shape (X, Y, Z), bool
        Brain after erosion by background removal.
    voxel_size_mm : sequence of 3 float
        Voxel size of the scan.
    ranges : ReconstructionRanges
    generator : torch.Generator
    rotation : Tensor of shape (3, 3), optional
        Axes of an oblique scan as columns.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Map in ppm with the true mean over the mask; not masked.
    """
    inner: list[slice] = []
    padding: list[int] = []
    for size, step in zip(chi.shape, voxel_size_mm, strict=True):
        total = fast_size(size + 2 * math.ceil(_MARGIN_MM / step))
        before = (total - size) // 2
        inner.append(slice(before, before + size))
        padding = [before, total - size - before, *padding]
    chi = functional.pad(chi[None, None], padding, mode="replicate")[0, 0]
    mask = functional.pad(mask.float()[None, None], padding, mode="replicate")[0, 0] > 0.5
    b0 = draw_b0_direction(ranges.tilt, generator, rotation)
    kernel = dipole_kernel(chi.shape, voxel_size_mm, b0, device=chi.device)
    field = apply_kernel(chi, kernel)
    noise_sd = _draw_noise_sd(chi, ranges, generator)
    field = field + noise_sd * torch.randn(chi.shape, generator=generator, device=chi.device)
    field = _remove_background(field, mask, voxel_size_mm, ranges, generator)
    weight = (mask * (noise_sd.median() / noise_sd)).clamp(max=2)
    inverted = _draw_inversion(kernel, weight, voxel_size_mm, ranges, generator)(field)
    window = tuple(inner)
    inside = mask[window].sum().clamp(min=1)
    return inverted[window] + ((chi - inverted)[window] * mask[window]).sum() / inside


def draw_b0_direction(
    tilt: float, generator: torch.Generator, rotation: Tensor | None = None
) -> tuple[float, float, float]:
    """Draw the direction of B0 along the scan's axes; it does not rotate with oblique slices."""
    upright = (uniform(generator, -tilt, tilt), uniform(generator, -tilt, tilt), 1.0)
    if rotation is None:
        return upright
    x, y, z = (np.transpose(rotation.tolist()) @ upright).tolist()
    return x, y, z


def _draw_noise_sd(chi: Tensor, ranges: ReconstructionRanges, generator: torch.Generator) -> Tensor:
    """Draw a scanner and its echoes: SD of the field noise in ppm, larger where iron accelerates the decay."""
    b0_tesla = ranges.b0_tesla[int(uniform(generator, 0, len(ranges.b0_tesla)))]
    last_s = uniform(generator, *ranges.last_echo_ms_t) / b0_tesla / 1000
    echo_times_s = [last_s * (echo + 1) / 4 for echo in range(4)]
    decay = r2star_hz(chi, b0_tesla=b0_tesla, r2_hz=uniform(generator, *ranges.r2_hz) * b0_tesla / 3)
    return field_noise_sd(
        decay.clamp(max=2 / last_s),
        snr=log_uniform(generator, *ranges.snr),
        echo_times_s=echo_times_s,
        b0_tesla=b0_tesla,
    )


def _remove_background(
    field: Tensor,
    mask: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ReconstructionRanges,
    generator: torch.Generator,
) -> Tensor:
    """Apply V-SHARP, with its errors inside the brain, and add a residual background field at the border."""
    largest, smallest = uniform(generator, *ranges.largest_radius_mm), uniform(generator, *ranges.smallest_radius_mm)
    within = (
        apply_kernel(mask.float(), spherical_mean_kernel(mask.shape, voxel_size_mm, smallest, device=mask.device))
        > 1e-4
    )
    radii = (largest, math.sqrt(largest * smallest), smallest)
    local, _ = v_sharp(field, within, voxel_size_mm=voxel_size_mm, radii_mm=radii, periodic=True)

    def smooth_field(level_ppm: tuple[float, float], wavelengths_mm: tuple[float, float]) -> Tensor:
        wavelength_mm = uniform(generator, *wavelengths_mm)
        noise = smooth_noise(field.shape, [wavelength_mm / step for step in voxel_size_mm], generator)[0]
        return noise * uniform(generator, *level_ppm)

    rim = 1 - blur(mask.float(), [4 / step for step in voxel_size_mm])
    residual = smooth_field(ranges.rim_ppm, (10, 20)) * 2 * rim + smooth_field(ranges.slow_ppm, (25, 60))
    return (local + residual) * mask


def _draw_inversion(
    kernel: Tensor,
    weight: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ReconstructionRanges,
    generator: torch.Generator,
) -> Callable[[Tensor], Tensor]:
    method, ridge = pick(generator, ranges.methods), uniform(generator, *ranges.ridge)
    if method == 0:
        threshold = uniform(generator, *ranges.threshold)
        return lambda field: truncated_division(field, kernel, threshold=threshold)
    if method == 1:
        strength = log_uniform(generator, *ranges.least_squares)
        if chance(generator, 0.5):
            return lambda field: least_squares(field, kernel, strength=strength)
        return lambda field: least_squares(field, kernel, strength=strength, voxel_size_mm=voxel_size_mm, ridge=ridge)
    if method == 2:
        strength = log_uniform(generator, *ranges.conjugate_gradients)
        steps = round(uniform(generator, *ranges.iterations))
        return lambda field: conjugate_gradients(field, kernel, weight=weight, strength=strength, iterations=steps)
    strength = log_uniform(generator, *ranges.total_variation)
    return lambda field: total_variation(
        field, kernel, strength=strength, voxel_size_mm=voxel_size_mm, ridge=ridge, iterations=5
    )
