"""Errors of acquisition, field measurement and reconstruction, applied to the true susceptibility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.field import (
    apply_kernel,
    dipole_kernel,
    fast_size,
    field_noise_sd,
    r2star_hz,
)
from bids_dgmseg.qsm.inversion import (
    conjugate_gradients,
    least_squares,
    spherical_mean_kernel,
    total_variation,
    truncated_division,
    v_sharp,
)
from bids_dgmseg.simulate.acquisition import ScanGrid, blur, diffuse_anisotropically, truncate_frequencies
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


@dataclass(frozen=True)
class ArtefactRanges:
    """Variation of acquisition and image quality."""

    physics: float = 0.5
    """Fraction of maps reconstructed from a simulated field; the others are degraded by filters and noise."""
    in_plane_mm: tuple[float, float] = (0.5, 1.2)
    """Voxel size in plane."""
    slice_mm: tuple[float, float] = (1.0, 3.2)
    """Slice thickness of thick-slice scans, half of all scans."""
    oblique_deg: float = 20.0
    """Largest rotation of oblique slices, a quarter of the thick-slice scans."""
    blur_mm: tuple[float, float] = (0.0, 0.8)
    """SD of the point spread function along each axis."""
    threshold: tuple[float, float] = (0.03, 0.18)
    """Of truncated division, in maps degraded by filters."""
    field_noise_ppm: tuple[float, float] = (0.0005, 0.004)
    noise_ppm: tuple[float, float] = (0.002, 0.02)
    """Log-uniform."""
    tilt: float = 0.35
    """Largest tangent of the angle between B0 and the vertical, in the sagittal and coronal plane."""
    highpass: tuple[float, float] = (0.2, 0.8)
    """Fraction of low frequencies removed by background removal and regularization."""
    edge_ppm: tuple[float, float] = (0.01, 0.04)
    """Contrast that anisotropic diffusion preserves."""
    reference_ppm: float = 0.015
    """Largest offset of the susceptibility reference."""
    reconstruction: ReconstructionRanges = field(default_factory=ReconstructionRanges)


def degrade(
    chi: Tensor, *, spacing_mm: float, ranges: ArtefactRanges, generator: torch.Generator, mask: Tensor | None = None
) -> Tensor:
    """Simulate acquisition and reconstruction of a map.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        True susceptibility in ppm, 0 outside the head.
    spacing_mm : float
        Isotropic voxel size.
    ranges : ArtefactRanges
    generator : torch.Generator
        On the device of `chi`.
    mask : Tensor of shape (X, Y, Z), bool, optional
        Brain mask of the map; by default where `chi` is not 0.

    Returns
    -------
    Tensor of shape (X, Y, Z)
        Map in ppm, not masked.
    """
    grid = draw_scan_grid(tuple(chi.shape), spacing_mm, ranges, generator)
    voxel_size_mm = [spacing_mm * step for step in grid.steps]
    scan = grid.average(chi)
    if chance(generator, 0.2):  # zero-filling in plane
        kept = [uniform(generator, 0.6, 1.0)] * 3
        kept[max(range(3), key=lambda axis: (voxel_size_mm[axis], axis))] = 1.0  # the slice direction
        scan = truncate_frequencies(scan, kept)
    else:
        scan = blur(scan, [uniform(generator, *ranges.blur_mm) / step for step in voxel_size_mm])
    if chance(generator, ranges.physics):
        brain = grid.average((chi != 0 if mask is None else mask).float()) > 0.5
        scan = simulate_reconstruction(
            scan,
            brain,
            voxel_size_mm=voxel_size_mm,
            ranges=ranges.reconstruction,
            generator=generator,
            rotation=grid.rotation,
        )
    else:
        scan = _degrade_by_filters(scan, voxel_size_mm, ranges, generator, grid.rotation)
    if chance(generator, 0.1):
        scan = diffuse_anisotropically(scan, edge_ppm=uniform(generator, *ranges.edge_ppm), steps=3)
    return grid.interpolate(scan) + uniform(generator, -ranges.reference_ppm, ranges.reference_ppm)


def draw_scan_grid(
    shape: tuple[int, ...], spacing_mm: float, ranges: ArtefactRanges, generator: torch.Generator
) -> ScanGrid:
    """Draw the voxel grid of a scan, with voxels no smaller than those of the array."""
    x, y, z = shape
    steps = [max(1.0, uniform(generator, *ranges.in_plane_mm) / spacing_mm)] * 3
    if not chance(generator, 0.5):
        return ScanGrid((x, y, z), (steps[0], steps[1], steps[2]))
    axis = 2 if chance(generator, 0.8) else int(uniform(generator, 0, 2))
    steps[axis] = max(1.0, uniform(generator, *ranges.slice_mm) / spacing_mm)
    offsets = [0.0, 0.0, 0.0]
    offsets[axis] = uniform(generator, -0.5, 0.5)
    rotation = None
    if chance(generator, 0.25):
        angles_deg = [uniform(generator, -ranges.oblique_deg, ranges.oblique_deg) for _ in range(3)]
        matrix = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
        rotation = torch.tensor(matrix, dtype=torch.float32, device=generator.device)
    return ScanGrid((x, y, z), (steps[0], steps[1], steps[2]), (offsets[0], offsets[1], offsets[2]), rotation)


def _degrade_by_filters(
    chi: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ArtefactRanges,
    generator: torch.Generator,
    rotation: Tensor | None,
) -> Tensor:
    """Attenuate low frequencies and, as truncated division does, those near the magic angle; add noise."""
    if chance(generator, 0.5):
        width_mm = uniform(generator, 8, 25)
        chi = chi - uniform(generator, *ranges.highpass) * blur(chi, [width_mm / step for step in voxel_size_mm])
    if chance(generator, 0.7):
        b0_direction = draw_b0_direction(ranges.tilt, generator, rotation)
        kernel = dipole_kernel(chi.shape, voxel_size_mm, b0_direction, device=chi.device).abs()
        threshold = uniform(generator, *ranges.threshold)
        kept = (kernel / threshold).clamp(max=1) ** uniform(generator, 0.3, 1.0)
        kept[0, 0, 0] = 1.0
        spectrum = torch.fft.rfftn(chi) * kept
        if chance(generator, 0.7):  # streaks: field noise amplified near the magic angle
            level_ppm = uniform(generator, *ranges.field_noise_ppm)
            noise = torch.randn(chi.shape, generator=generator, device=chi.device) * level_ppm
            spectrum = spectrum + torch.fft.rfftn(noise) / kernel.clamp(min=threshold)
        chi = torch.fft.irfftn(spectrum, s=chi.shape)
    low, high = ranges.noise_ppm
    level_ppm = low * (high / low) ** uniform(generator, 0, 1)
    noise = torch.randn(chi.shape, generator=generator, device=chi.device) * level_ppm
    return chi + (blur(noise, [uniform(generator, 0.3, 0.9)] * 3) if chance(generator, 0.6) else noise)


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
    b0_direction = draw_b0_direction(ranges.tilt, generator, rotation)
    kernel = dipole_kernel(chi.shape, voxel_size_mm, b0_direction, device=chi.device)
    field = apply_kernel(chi, kernel)
    # The scanner and its echoes: iron accelerates the decay and so increases the noise of the field.
    b0_tesla = ranges.b0_tesla[int(uniform(generator, 0, len(ranges.b0_tesla)))]
    last_s = uniform(generator, *ranges.last_echo_ms_t) / b0_tesla / 1000
    decay = r2star_hz(chi, b0_tesla=b0_tesla, r2_hz=uniform(generator, *ranges.r2_hz) * b0_tesla / 3)
    noise_sd = field_noise_sd(
        decay.clamp(max=2 / last_s),
        snr=log_uniform(generator, *ranges.snr),
        echo_times_s=[last_s * (echo + 1) / 4 for echo in range(4)],
        b0_tesla=b0_tesla,
    )
    field = field + noise_sd * torch.randn(chi.shape, generator=generator, device=chi.device)
    field = _remove_background(field, mask, voxel_size_mm, ranges, generator)
    weight = (mask * (noise_sd.median() / noise_sd)).clamp(max=2)
    inverted = _invert_dipole(field, kernel, weight, voxel_size_mm, ranges, generator)
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


def _remove_background(
    field: Tensor,
    mask: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ReconstructionRanges,
    generator: torch.Generator,
) -> Tensor:
    """Apply V-SHARP, with its errors inside the brain, and add a residual background field at the border."""
    largest, smallest = uniform(generator, *ranges.largest_radius_mm), uniform(generator, *ranges.smallest_radius_mm)
    sphere = spherical_mean_kernel(mask.shape, voxel_size_mm, smallest, device=mask.device)
    within = apply_kernel(mask.float(), sphere) > 1e-4
    radii = (largest, math.sqrt(largest * smallest), smallest)
    local, _ = v_sharp(field, within, voxel_size_mm=voxel_size_mm, radii_mm=radii, periodic=True)

    def smooth_field(level_ppm: tuple[float, float], wavelengths_mm: tuple[float, float]) -> Tensor:
        wavelength_mm = uniform(generator, *wavelengths_mm)
        noise = smooth_noise(field.shape, [wavelength_mm / step for step in voxel_size_mm], generator)[0]
        return noise * uniform(generator, *level_ppm)

    rim = 1 - blur(mask.float(), [4 / step for step in voxel_size_mm])
    residual = smooth_field(ranges.rim_ppm, (10, 20)) * 2 * rim + smooth_field(ranges.slow_ppm, (25, 60))
    return (local + residual) * mask


def _invert_dipole(
    field: Tensor,
    kernel: Tensor,
    weight: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ReconstructionRanges,
    generator: torch.Generator,
) -> Tensor:
    """Invert the field by a method drawn with its regularization."""
    method, ridge = pick(generator, ranges.methods), uniform(generator, *ranges.ridge)
    if method == 0:
        return truncated_division(field, kernel, threshold=uniform(generator, *ranges.threshold))
    if method == 1:
        strength = log_uniform(generator, *ranges.least_squares)
        if chance(generator, 0.5):
            return least_squares(field, kernel, strength=strength)
        return least_squares(field, kernel, strength=strength, voxel_size_mm=voxel_size_mm, ridge=ridge)
    if method == 2:
        strength = log_uniform(generator, *ranges.conjugate_gradients)
        iterations = round(uniform(generator, *ranges.iterations))
        return conjugate_gradients(field, kernel, weight=weight, strength=strength, iterations=iterations)
    strength = log_uniform(generator, *ranges.total_variation)
    return total_variation(field, kernel, strength=strength, voxel_size_mm=voxel_size_mm, ridge=ridge, iterations=5)


def draw_coverage(
    inside: Tensor, *, spacing_mm: float, cut_mm: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draw the coverage of a map: brain mask too tight or too loose, slices missing below or above.

    `inside` is the mask of the head (X, Y, Z), `cut_mm` the largest extent that is missing below and above.
    """
    covered = inside.clone()
    if chance(generator, 0.5):
        distance = blur(inside.float(), [2.5 / spacing_mm] * 3)
        rim = 0.5 + uniform(generator, -0.35, 0.4) + 0.15 * smooth_noise(inside.shape, 12 / spacing_mm, generator)[0]
        covered = distance > rim
    below, above = (int(uniform(generator, 0, limit) / spacing_mm) for limit in cut_mm)
    if chance(generator, 0.4):
        covered[:, :, :below] = False
    if chance(generator, 0.3) and above:
        covered[:, :, -above:] = False
    return covered
