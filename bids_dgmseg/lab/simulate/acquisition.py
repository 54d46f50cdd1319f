"""Simulated multi-echo GRE acquisition of a head with known susceptibility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.image.masks import close_with_ball
from bids_dgmseg.lab.simulate.ranges import EchoRanges, normal, uniform
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, dipole_field, r2star_per_s

ECHO_TIMES_S = (0.005, 0.010, 0.015, 0.020)

B0_TESLA = 3.0

AIR, FLUID, BONE, SCALP, SOFT_TISSUE = 0, 26, 51, 52, 53
"""Labels around the brain; fluid as in `anatomy.TISSUES`, the last three do not occur in templates."""

_AIR_PPM = 9.2
"""Relative to soft tissue [Buch 2015]."""

_FLUID_PPM = 0.015

_GREY, _WHITE, _WATER = (0.82, 12.0), (0.70, 14.0), (1.0, 2.0)
"""Proton density relative to water, and R2 in 1/s at 3 T."""

_SIGNALS = {
    AIR: (0.0, 0.0),
    **dict.fromkeys((22, 28, 30, 33), _WHITE),
    **dict.fromkeys((23, 24, 25, FLUID), _WATER),
    BONE: (0.05, 30.0),
    SCALP: (1.1, 20.0),
    SOFT_TISSUE: (0.7, 30.0),
}
"""Per label; all others are grey matter."""

_MARGIN_MM = 25.0
"""Padding around the field of view for the part of the head outside it."""

_CISTERN_MM = 8.0
"""Radius of the closing that finds fluid between the parts of the brain, where there is no bone."""

_FACE_MM = 6.0
"""Soft tissue around the sinus."""

_NECK_MM = 12.0
"""Neck and face are narrower than the brain by this much on each side."""


_RANGES = EchoRanges()


@dataclass(frozen=True)
class Echoes:
    """Simulated echoes with the true susceptibility."""

    phase: Tensor
    """Shape (E, X, Y, Z): rad in (-pi, pi], increasing with the field."""
    magnitude: Tensor
    """Shape (E, X, Y, Z): signal relative to water at echo time 0 and coil sensitivity 1."""
    echo_times_s: tuple[float, ...]
    b0_tesla: float
    chi: Tensor
    """Shape (X, Y, Z): true susceptibility of the brain in ppm, 0 outside."""


@dataclass(frozen=True)
class Tissues:
    """What a head adds to the signal: maps of shape (X, Y, Z)."""

    chi: Tensor
    """Susceptibility in ppm; that of air outside the head."""
    density: Tensor
    """Proton density relative to water."""
    r2star: Tensor
    """R2* in 1/s."""
    field: Tensor
    """Field in ppm."""


def draw_echoes(
    chi: Tensor,
    labels: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    echo_times_s: Sequence[float] = ECHO_TIMES_S,
    b0_tesla: float = B0_TESLA,
    generator: torch.Generator,
    ranges: EchoRanges = _RANGES,
) -> Echoes:
    r"""Add head tissues to a brain and simulate its gradient echoes.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        True susceptibility in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues of the brain, 0 outside, in RAS+ orientation.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    b0_direction : sequence of 3 float
        Direction of B0 along the grid's axes.
    echo_times_s : sequence of E float
        Echo times in s.
    b0_tesla : float
        Field strength in T.
    generator : torch.Generator
        On the device of `chi`.
    ranges : EchoRanges

    Returns
    -------
    Echoes
        Noise outside the head.

    Raises
    ------
    ValueError
        If the shapes differ, or if there is no brain.

    Notes
    -----
    With the field f in ppm, proton density :math:`\rho`, coil sensitivity C and coil phase :math:`\varphi_0`, the
    signal at echo time T is, plus complex Gaussian noise,

    .. math:: S = C \rho \, e^{-T R_2^*} e^{i (2 \pi \gamma B_0 T f + \varphi_0)}.

    Brain, head tissues and neck that are cut by the field of view continue 25 mm beyond it, with air outside. Air
    directly at the cut, 9.2 ppm above tissue, would cause an unrealistic field.
    """
    if labels.shape != chi.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected that of chi, {tuple(chi.shape)}")
    brain = labels > 0
    if not brain.any():
        raise ValueError("labels contain no brain")
    tissues = draw_tissues(
        chi,
        labels,
        voxel_size_mm=voxel_size_mm,
        b0_direction=b0_direction,
        b0_tesla=b0_tesla,
        generator=generator,
        ranges=ranges,
    )
    decay = tissues.r2star
    offset = _polynomial(chi.shape, generator) * uniform(generator, *ranges.offset_rad)
    proton = tissues.density * torch.exp(_polynomial(chi.shape, generator) * uniform(generator, *ranges.sensitivity))
    first = (proton * torch.exp(-echo_times_s[0] * decay))[brain].mean()
    noise_sd = first / uniform(generator, *ranges.snr)
    phase, magnitude = chi.new_empty((2, len(echo_times_s), *chi.shape))
    for echo, time_s in enumerate(echo_times_s):
        angle = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * time_s * tissues.field + offset
        noise = noise_sd * torch.randn((2, *chi.shape), generator=generator, device=chi.device)
        signal = torch.polar(proton * torch.exp(-time_s * decay), angle) + torch.complex(noise[0], noise[1])
        angle = signal.angle()
        phase[echo], magnitude[echo] = torch.where(angle > -math.pi, angle, -angle), signal.abs()  # -pi is pi
    return Echoes(phase, magnitude, tuple(echo_times_s), b0_tesla, torch.where(brain, chi, 0.0))


def draw_tissues(
    chi: Tensor,
    labels: Tensor,
    *,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    b0_tesla: float = B0_TESLA,
    generator: torch.Generator,
    ranges: EchoRanges = _RANGES,
) -> Tissues:
    """Add the tissues of a head to a brain, on the grid of the brain; arguments are those of `draw_echoes`."""
    margin = [math.ceil(_MARGIN_MM / step) for step in voxel_size_mm]
    inner = tuple(slice(before, before + size) for before, size in zip(margin, chi.shape, strict=True))
    brain = np.pad(labels.cpu().numpy(), [(size, size) for size in margin], mode="edge")
    head = torch.from_numpy(add_head_tissues(brain, voxel_size_mm=voxel_size_mm, generator=generator, ranges=ranges))
    head = head.to(chi.device)
    values = torch.zeros(64)
    values[[AIR, FLUID, BONE, SCALP]] = torch.tensor(
        [_AIR_PPM, _FLUID_PPM, uniform(generator, *ranges.bone_ppm), uniform(generator, *ranges.scalp_ppm)]
    )
    padding = [n for size in reversed(margin) for n in (size, size)]
    continued = functional.pad(chi[None, None], padding, mode="replicate")[0, 0]
    inside = torch.from_numpy(brain > 0).to(chi.device)
    everywhere = torch.where(inside, continued, values.to(chi.device)[head.int()])
    # Relative to air, so that zero padding is air too; a constant does not change the field.
    field = dipole_field(everywhere - _AIR_PPM, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction)
    signals = torch.tensor([_SIGNALS.get(label, _GREY) for label in range(64)], device=head.device)
    density, r2_hz = signals[head[inner].int()].unbind(-1)
    decay = r2star_per_s(everywhere[inner], b0_tesla=b0_tesla, r2_per_s=0.0) + r2_hz * b0_tesla / 3
    return Tissues(everywhere[inner], density, decay, field[inner])


def add_head_tissues(
    brain: NDArray[np.uint8],
    *,
    voxel_size_mm: Sequence[float],
    generator: torch.Generator,
    ranges: EchoRanges = _RANGES,
) -> NDArray[np.uint8]:
    """Add fluid, skull and scalp around a brain, face and neck below it, and a frontal sinus.

    The labels of the brain (X, Y, Z), 0 outside, are in RAS+ orientation. Added are `FLUID` in the fissures, `FLUID`,
    `BONE`, `SCALP` and `AIR` by distance from the brain, `SOFT_TISSUE` for face and neck down to the end of the grid.

    References
    ----------
    Buch S, et al. Susceptibility mapping of air, bone, and calcium in the head. Magn Reson Med 73 (2015) 2185-2194.
    doi:10.1002/mrm.25350
    """
    thickness_mm = [uniform(generator, *pair) for pair in (ranges.fluid_mm, ranges.bone_mm, ranges.scalp_mm)]
    closed = close_with_ball(brain > 0, _CISTERN_MM, voxel_size_mm)
    distance_mm = ndimage.distance_transform_edt(~closed, sampling=voxel_size_mm)
    layers = np.array([FLUID, BONE, SCALP, AIR], np.uint8)
    head = layers[np.digitize(distance_mm, np.cumsum(thickness_mm), right=True)]
    semi_axes_mm = [uniform(generator, *ranges.sinus_mm) for _ in range(3)]
    wall_mm = thickness_mm[0] + 1.0
    x, y, z = (index * step for index, step in zip(np.nonzero(brain), voxel_size_mm, strict=True))
    frontal = y >= y.max() - 0.25 * (y.max() - y.min())
    below = np.array([x[frontal].mean(), y[frontal].mean(), z[frontal].min()])
    centre_mm = below - (0.0, 0.0, wall_mm + semi_axes_mm[2])

    def within(semi_axes_mm: Sequence[float]) -> NDArray[np.bool_]:
        axes = np.ogrid[tuple(slice(size) for size in brain.shape)]
        parts = zip(axes, voxel_size_mm, centre_mm, semi_axes_mm, strict=True)
        squared: NDArray[np.float64] = sum(((i * step - c) / a) ** 2 for i, step, c, a in parts)
        return squared < 1

    under_head = np.logical_or.accumulate((head != AIR)[:, :, ::-1], axis=2)[:, :, ::-1]
    aside_mm = ndimage.distance_transform_edt((brain > 0).any(axis=2), sampling=voxel_size_mm[:2])
    neck = under_head & (aside_mm > _NECK_MM)[:, :, None]
    head[(neck | within([length + _FACE_MM for length in semi_axes_mm])) & (head == AIR)] = SOFT_TISSUE
    head[within(semi_axes_mm) & (distance_mm > wall_mm)] = AIR
    return np.where(brain > 0, brain, head)


def _polynomial(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw a quadratic polynomial of the coordinates without constant, scaled to a range of 1."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    powers = [(i, j, k) for i in range(3) for j in range(3 - i) for k in range(3 - i - j)]
    drawn = torch.zeros(tuple(shape))
    for i, j, k in powers[1:]:
        drawn += normal(generator) * x**i * y**j * z**k
    return (drawn / (drawn.max() - drawn.min())).to(generator.device)
