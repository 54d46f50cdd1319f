"""Artefacts of acquisition and reconstruction, applied to the true susceptibility."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from bids_dgmseg.qsm.field import dipole_kernel
from bids_dgmseg.simulate.acquisition import ScanGrid, blur, diffuse_anisotropically, truncate_frequencies
from bids_dgmseg.simulate.field_reconstruction import ReconstructionRanges, draw_b0_direction, simulate_reconstruction
from bids_dgmseg.simulate.ranges import chance, smooth_noise, uniform


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
    scan = _draw_point_spread(scan, voxel_size_mm, ranges, generator)
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


def _draw_point_spread(
    scan: Tensor, voxel_size_mm: Sequence[float], ranges: ArtefactRanges, generator: torch.Generator
) -> Tensor:
    """Blur, or truncate the high frequencies in plane as zero-filling does."""
    if chance(generator, 0.2):
        kept = [uniform(generator, 0.6, 1.0)] * 3
        kept[max(range(3), key=lambda axis: (voxel_size_mm[axis], axis))] = 1.0  # the slice direction
        return truncate_frequencies(scan, kept)
    return blur(scan, [uniform(generator, *ranges.blur_mm) / step for step in voxel_size_mm])


def _degrade_by_filters(
    chi: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ArtefactRanges,
    generator: torch.Generator,
    rotation: Tensor | None,
) -> Tensor:
    """Attenuate low frequencies and those near the magic angle; add noise."""
    if chance(generator, 0.5):
        width_mm = uniform(generator, 8, 25)
        chi = chi - uniform(generator, *ranges.highpass) * blur(chi, [width_mm / step for step in voxel_size_mm])
    if chance(generator, 0.7):
        chi = _invert_with_streaks(chi, voxel_size_mm, ranges, generator, rotation)
    low, high = ranges.noise_ppm
    level_ppm = low * (high / low) ** uniform(generator, 0, 1)
    noise = torch.randn(chi.shape, generator=generator, device=chi.device) * level_ppm
    return chi + (blur(noise, [uniform(generator, 0.3, 0.9)] * 3) if chance(generator, 0.6) else noise)


def _invert_with_streaks(
    chi: Tensor,
    voxel_size_mm: Sequence[float],
    ranges: ArtefactRanges,
    generator: torch.Generator,
    rotation: Tensor | None,
) -> Tensor:
    """Attenuate frequencies near the magic angle as truncated division does, and amplify field noise there."""
    b0 = draw_b0_direction(ranges.tilt, generator, rotation)
    kernel = dipole_kernel(chi.shape, voxel_size_mm, b0, device=chi.device).abs()
    threshold = uniform(generator, *ranges.threshold)
    kept = (kernel / threshold).clamp(max=1) ** uniform(generator, 0.3, 1.0)
    kept[0, 0, 0] = 1.0
    spectrum = torch.fft.rfftn(chi) * kept
    if chance(generator, 0.7):
        level_ppm = uniform(generator, *ranges.field_noise_ppm)
        noise = torch.randn(chi.shape, generator=generator, device=chi.device) * level_ppm
        spectrum = spectrum + torch.fft.rfftn(noise) / kernel.clamp(min=threshold)
    inverted: Tensor = torch.fft.irfftn(spectrum, s=chi.shape)
    return inverted


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
