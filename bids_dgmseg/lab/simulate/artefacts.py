"""Artefacts of acquisition, field measurement and reconstruction, applied to the true susceptibility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.grids import sample_points
from bids_dgmseg.lab.simulate.ranges import (
    ArtefactRanges,
    ReconstructionRanges,
    chance,
    log_uniform,
    pick,
    smooth_noise,
    uniform,
)
from bids_dgmseg.qsm.field import (
    apply_kernel,
    conjugate_gradients,
    dipole_kernel,
    fast_size,
    field_noise_sd,
    r2star_per_s,
)
from bids_dgmseg.qsm.inversion import least_squares, total_variation

_MARGIN_MM = 5.0
"""Replicated padding around the field of view, against aliasing between its opposite faces."""

_INSIDE = 1 - 1e-5
"""Mask average above which a sphere counts as inside: one voxel of the largest sphere weighs more than the rest."""

_SHARPEST = 0.05
"""Frequencies with a smaller response of the largest sphere are set to 0 by the deconvolution of V-SHARP."""


def degrade(
    chi: Tensor,
    grid: ScanGrid,
    *,
    spacing_mm: float,
    ranges: ArtefactRanges,
    generator: torch.Generator,
    mask: Tensor | None = None,
) -> Tensor:
    """Simulate acquisition and reconstruction of a true susceptibility (X, Y, Z) in ppm, 0 outside the head.

    The map, in ppm, is not masked. `mask` is the brain mask of its reconstruction, by default where `chi` is not 0.
    """
    voxel_size_mm = [spacing_mm * step for step in grid.steps]
    scan = grid.average(chi)
    if chance(generator, 0.2):  # zero-filling in plane
        kept = [uniform(generator, 0.6, 1.0)] * 3
        if max(voxel_size_mm) > min(voxel_size_mm):
            kept[max(range(3), key=lambda axis: voxel_size_mm[axis])] = 1.0  # the slice direction
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
        scan = diffuse_anisotropically(scan, edge_ppm=uniform(generator, *ranges.edge_ppm))
    return grid.interpolate(scan) + uniform(generator, -ranges.reference_ppm, ranges.reference_ppm)


def draw_scan_grid(
    shape: tuple[int, ...], spacing_mm: float, ranges: ArtefactRanges, generator: torch.Generator
) -> ScanGrid:
    """Draw the voxel grid of a scan, with voxels no smaller than those of the array."""
    x, y, z = shape
    coarse = chance(generator, ranges.coarse)
    in_plane_mm = uniform(generator, *(ranges.coarse_mm if coarse else ranges.in_plane_mm))
    steps = [max(1.0, in_plane_mm / spacing_mm)] * 3
    if coarse or not chance(generator, ranges.thick):
        return ScanGrid((x, y, z), (steps[0], steps[1], steps[2]))
    axis = 2 if chance(generator, 0.8) else int(uniform(generator, 0, 2))
    slice_mm = ranges.slice_mm if chance(generator, 0.5) else ranges.clinical_mm
    steps[axis] = max(1.0, uniform(generator, *slice_mm) / spacing_mm)
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

    `chi` in ppm and `mask` (the brain after erosion by background removal) are on the grid of the scan (X, Y, Z), whose
    axes are the columns of `rotation` if it is oblique. The map in ppm has the true mean over the mask, but is not
    masked.
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
    decay = r2star_per_s(chi, b0_tesla=b0_tesla, r2_per_s=uniform(generator, *ranges.r2_hz) * b0_tesla / 3)
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
    local, _ = v_sharp(field, within, voxel_size_mm=voxel_size_mm, radii_mm=radii)

    def smooth_field(level_ppm: tuple[float, float], wavelengths_mm: tuple[float, float]) -> Tensor:
        wavelength_mm = uniform(generator, *wavelengths_mm)
        noise = smooth_noise(field.shape, [wavelength_mm / step for step in voxel_size_mm], generator)[0]
        return noise * uniform(generator, *level_ppm)

    rim = 1 - blur(mask.float(), [4 / step for step in voxel_size_mm])
    residual = smooth_field(ranges.rim_ppm, (10, 20)) * 2 * rim + smooth_field(ranges.slow_ppm, (25, 60))
    return (local + residual) * mask


def v_sharp(
    field: Tensor, mask: Tensor, *, voxel_size_mm: Sequence[float], radii_mm: Sequence[float]
) -> tuple[Tensor, Tensor]:
    r"""Remove the background field by spherical mean values of variable radius (V-SHARP), on a periodic grid.

    Parameters
    ----------
    field : Tensor of shape (X, Y, Z)
        Total field in any unit.
    mask : Tensor of shape (X, Y, Z), bool
        Brain; values outside are ignored.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    radii_mm : sequence of float
        Radii of the spheres, the largest first.

    Returns
    -------
    local : Tensor of shape (X, Y, Z)
        Local field, 0 outside the eroded mask.
    eroded : Tensor of shape (X, Y, Z), bool
        Voxels whose smallest sphere lies inside the mask.

    Notes
    -----
    A field whose sources lie outside a sphere is harmonic in it, so its value at the centre equals its mean over the
    sphere. With :math:`S_r` the mean over a sphere of radius r, what remains is :math:`(1 - S_{r(x)}) f`, where
    :math:`r(x)` is the largest radius whose sphere about x fits into the mask. Deconvolution with
    :math:`1 - \hat S_R`, R the largest radius, recovers the local field [1]_, [2]_.

    References
    ----------
    .. [1] Schweser F, et al. NeuroImage 54 (2011) 2789-2807. doi:10.1016/j.neuroimage.2010.10.070
    .. [2] Wu B, et al. Magn Reson Med 67 (2012) 137-147. doi:10.1002/mrm.23000
    """
    spheres = [spherical_mean_kernel(field.shape, voxel_size_mm, radius, device=field.device) for radius in radii_mm]
    field = torch.where(mask, field, 0.0)
    spectrum, mask_spectrum = torch.fft.rfftn(field), torch.fft.rfftn(mask.to(field.dtype))
    remainder, eroded = torch.zeros_like(field), torch.zeros_like(mask)
    for sphere in spheres:
        fits = torch.fft.irfftn(mask_spectrum * sphere, s=field.shape) > _INSIDE
        remainder = torch.where(fits & ~eroded, field - torch.fft.irfftn(spectrum * sphere, s=field.shape), remainder)
        eroded |= fits
    sharp = 1 - spheres[0]
    inverse = torch.where(sharp.abs() > _SHARPEST, 1 / sharp, 0.0)
    return torch.where(eroded, apply_kernel(remainder, inverse), 0.0), eroded


def spherical_mean_kernel(
    shape: Sequence[int], voxel_size_mm: Sequence[float], radius_mm: float, *, device: torch.device | None = None
) -> Tensor:
    """Compute the Fourier transform (X, Y, Z // 2 + 1) of the mean over a sphere about each voxel.

    The radius is at least 1.01 times the shortest voxel edge: with a sphere of one voxel nothing would remain.
    """
    radius_mm = max(radius_mm, 1.01 * min(voxel_size_mm))
    x, y, z = (
        torch.fft.fftfreq(int(size), 1 / (size * step), device=device)
        for size, step in zip(shape, voxel_size_mm, strict=True)
    )
    ball = (x.view(-1, 1, 1) ** 2 + y.view(1, -1, 1) ** 2 + z.view(1, 1, -1) ** 2 <= radius_mm**2).float()
    return torch.fft.rfftn(ball / ball.sum()).real


def truncated_division(field: Tensor, kernel: Tensor, *, threshold: float) -> Tensor:
    r"""Thresholded k-space division (TKD).

    .. math:: \hat\chi = \hat f / D \ \text{where}\ |D| > t, \qquad \hat f\,\mathrm{sign}(D) / t \ \text{elsewhere}.

    References
    ----------
    Shmueli K, et al. Magn Reson Med 62 (2009) 1510-1522. doi:10.1002/mrm.22135
    Wharton S, Schaefer A, Bowtell R. Magn Reson Med 63 (2010) 1292-1304. doi:10.1002/mrm.22334
    """
    return apply_kernel(field, torch.sign(kernel) / kernel.abs().clamp(min=threshold))


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


@dataclass(frozen=True)
class ScanGrid:
    """Voxel grid of a scan over an array of smaller isotropic voxels."""

    shape: tuple[int, int, int]
    """Of the fine array."""
    steps: tuple[float, float, float]
    """Voxel size of the scan in fine voxels, at least 1."""
    offsets: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Shift of the scan's centre in its own voxels, along the axes with a step above 1."""
    rotation: Tensor | None = None
    """Axes of the scan as columns (3, 3), on the device of the arrays; by default those of the array."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of voxels of the scan, enough to cover the array without rotation."""
        x, y, z = (math.ceil(n / step - 1e-6) + (step > 1) for n, step in zip(self.shape, self.steps, strict=True))
        return x, y, z

    def average(self, fine: Tensor) -> Tensor:
        """Average the array (X, Y, Z) over each voxel of the scan; faces are replicated."""
        if self.rotation is not None:
            fine = sample_points(fine[None], self._rotated_indices(self.rotation), extend=True)[0]
        for axis, (size, step) in enumerate(zip(self.size, self.steps, strict=True)):
            if size != self.shape[axis] or step > 1:
                edges = torch.arange(self.shape[axis] + 1, device=fine.device) - 0.5
                edges[0], edges[-1] = -math.inf, math.inf
                low = (self._first_centre(axis) + (torch.arange(size, device=fine.device) - 0.5) * step)[:, None]
                overlap = (edges[1:].minimum(low + step) - edges[:-1].maximum(low)).clamp(min=0) / step
                fine = multiply_along(fine, overlap, axis)
        return fine

    def interpolate(self, scan: Tensor) -> Tensor:
        """Resample the scan to the array by linear interpolation, as real maps are resampled."""
        if self.rotation is None:
            for axis, (size, step) in enumerate(zip(self.size, self.steps, strict=True)):
                if step > 1:
                    index = (torch.arange(self.shape[axis], device=scan.device) - self._first_centre(axis)) / step
                    distance = index.clamp(0, size - 1)[:, None] - torch.arange(size, device=scan.device)
                    scan = multiply_along(scan, (1 - distance.abs()).clamp(min=0), axis)
            return scan
        indices = self._rotated_indices(self.rotation.T)
        for axis in range(3):
            indices[..., axis] = (indices[..., axis] - self._first_centre(axis)) / self.steps[axis]
        return sample_points(scan[None], indices, extend=True)[0]

    def majority(self, labels: Tensor) -> Tensor:
        """Return the label (X, Y, Z) with the largest share of the scan's voxels at each voxel of the array."""
        if max(self.steps) == 1:
            return labels
        largest, winner = torch.zeros(labels.shape, device=labels.device), torch.zeros_like(labels)
        for label in torch.unique(labels):
            share = self.interpolate(self.average((labels == label).float()))
            winner = torch.where(share > largest, label, winner)
            largest = torch.maximum(share, largest)
        return winner

    def _first_centre(self, axis: int) -> float:
        """Centre of the scan's first voxel in fine voxels."""
        middle = (self.shape[axis] - 1) / 2
        offset = self.offsets[axis] if self.steps[axis] > 1 else 0.0
        return middle + (offset - (self.size[axis] - 1) / 2) * self.steps[axis]

    def _rotated_indices(self, rotation: Tensor) -> Tensor:
        """Rotate the indices of the fine voxels about the centre."""
        middle = torch.tensor(self.shape, device=rotation.device).sub(1).div(2)
        axes = [torch.arange(n, device=rotation.device) - m for n, m in zip(self.shape, middle, strict=True)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1) @ rotation.T + middle


def multiply_along(array: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply the lines of an array along an axis by a matrix (new size, old size)."""
    product: Tensor = torch.tensordot(matrix, array, dims=([1], [axis]))
    return product.movedim(0, axis).contiguous()


def blur(chi: Tensor, sigma_voxels: Sequence[float]) -> Tensor:
    """Apply a Gaussian filter with an SD per axis; faces are replicated."""
    for axis, sigma in enumerate(sigma_voxels):
        size = chi.shape[axis]
        radius = min(math.ceil(3 * sigma), size - 1)
        if radius < 1 or sigma < 0.05:
            continue
        # On the CPU, since a GPU adds the repeated columns at a face in any order.
        offsets = torch.arange(-radius, radius + 1, device="cpu")
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
        columns = (torch.arange(size, device="cpu")[:, None] + offsets).clamp(0, size - 1)
        matrix = torch.zeros((size, size), device="cpu")
        matrix.scatter_add_(1, columns, (taps / taps.sum()).expand(size, -1))
        chi = multiply_along(chi, matrix.to(chi.device), axis)
    return chi


def truncate_frequencies(chi: Tensor, kept: Sequence[float]) -> Tensor:
    """Set frequencies above a fraction of the Nyquist frequency, given per axis, to 0 (Gibbs ringing)."""
    spectrum = torch.fft.rfftn(chi)
    for axis, (size, part) in enumerate(zip(chi.shape, kept, strict=True)):
        frequency = torch.fft.fftfreq(size, device=chi.device)[: spectrum.shape[axis]]
        shape = [1, 1, 1]
        shape[axis] = -1
        spectrum = spectrum * (frequency.abs() <= 0.5 * part).view(shape)
    truncated: Tensor = torch.fft.irfftn(spectrum, s=chi.shape)
    return truncated


def diffuse_anisotropically(chi: Tensor, *, edge_ppm: float) -> Tensor:
    """Smooth differences between neighbours well below `edge_ppm` and preserve larger ones.

    References
    ----------
    Perona P, Malik J. Scale-space and edge detection using anisotropic diffusion. IEEE Trans Pattern Anal Mach Intell
    12 (1990) 629-639. doi:10.1109/34.56205
    """
    for _ in range(3):
        change = torch.zeros_like(chi)
        for axis, size in enumerate(chi.shape):
            difference = chi.narrow(axis, 1, size - 1) - chi.narrow(axis, 0, size - 1)
            flow = difference / (1 + (difference / edge_ppm) ** 2)
            change.narrow(axis, 0, size - 1).add_(flow)
            change.narrow(axis, 1, size - 1).sub_(flow)
        chi = chi + change / 7  # stable: a weight of 1/7 for each of six neighbours and the voxel itself
    return chi
