"""Gradient echoes of a head whose susceptibility is known: what a scanner gives, before any reconstruction."""

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
from bids_dgmseg.qsm.field import GYROMAGNETIC_MHZ_PER_T, dipole_field, r2star_hz
from bids_dgmseg.simulate.anatomy import normal, uniform

ECHO_TIMES_S = (0.005, 0.010, 0.015, 0.020)

B0_TESLA = 3.0

AIR, FLUID, BONE, SCALP, FLESH = 0, 26, 51, 52, 53
"""Labels about the brain; fluid is that of `susceptibility.TISSUES`, the last three are no label of a template."""

_AIR_PPM = 9.2
"""Relative to soft tissue [Buch 2015]."""

_FLUID_PPM = 0.015

_GREY, _WHITE, _WATER = (0.82, 12.0), (0.70, 14.0), (1.0, 2.0)
"""Proton density relative to water, and R2 in 1/s at 3 T."""

_SIGNALS = {
    AIR: (0.0, 0.0),
    22: _WHITE,
    23: _WATER,
    24: _WATER,
    25: _WATER,
    FLUID: _WATER,
    28: _WHITE,
    30: _WHITE,
    33: _WHITE,
    BONE: (0.05, 30.0),
    SCALP: (1.1, 20.0),
    FLESH: (0.7, 30.0),
}
"""Of each label; the others are grey."""

_MARGIN_MM = 25.0
"""Room about the field of view for what of the head it does not show."""

_CISTERN_MM = 8.0
"""Radius of a ball that does not fit between the parts of the brain: what lies there is fluid, no bone."""

_FACE_MM = 6.0
"""Flesh about the sinus."""

_NECK_MM = 12.0
"""How far neck and face stay behind the sides of the brain."""


@dataclass(frozen=True)
class EchoRanges:
    """How far heads and scanners differ; a pair is the lowest and highest value, drawn uniformly."""

    fluid_mm: tuple[float, float] = (2.0, 4.0)
    bone_mm: tuple[float, float] = (5.0, 7.0)
    scalp_mm: tuple[float, float] = (4.0, 6.0)
    """Thickness of the layers about the brain, from the inside."""
    bone_ppm: tuple[float, float] = (-2.5, -1.7)
    scalp_ppm: tuple[float, float] = (0.0, 0.3)
    """Relative to soft tissue."""
    sinus_mm: tuple[float, float] = (9.0, 15.0)
    """Each semi-axis of the cavity below the front of the brain."""
    snr: tuple[float, float] = (40.0, 120.0)
    """Mean signal of the brain at the first echo, over the SD of the noise in the real part."""
    offset_rad: tuple[float, float] = (2.0, 6.0)
    """How far the coil's phase goes over the field of view; the same in all echoes."""
    sensitivity: tuple[float, float] = (0.3, 1.0)
    """Logarithm of the strongest over the weakest sensitivity of the coil in the field of view."""


_RANGES = EchoRanges()


@dataclass(frozen=True)
class Echoes:
    """What a scanner measures, and what there was to measure."""

    phase: Tensor
    """Shape (E, X, Y, Z): rad in (-pi, pi]; where the field is higher, it grows faster from echo to echo."""
    magnitude: Tensor
    """Shape (E, X, Y, Z): signal relative to that of water at echo time 0 where the coil's sensitivity is 1."""
    echo_times_s: tuple[float, ...]
    b0_tesla: float
    chi: Tensor
    """Shape (X, Y, Z): true susceptibility of the brain in ppm, 0 outside."""


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
    r"""Put a head about a brain and draw the echoes that a scanner measures of it.

    Parameters
    ----------
    chi : Tensor of shape (X, Y, Z)
        True susceptibility in ppm.
    labels : Tensor of shape (X, Y, Z), uint8
        Nuclei and tissues of the brain, 0 outside; the axes run to the right, front and top.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    b0_direction : sequence of 3 float
        Direction of the main field along the grid's axes.
    echo_times_s : sequence of E float
        Echo times in s.
    b0_tesla : float
        Strength of the main field.
    generator : torch.Generator
        Source of randomness, on the device of `chi`.
    ranges : EchoRanges
        How far heads and scanners differ.

    Returns
    -------
    Echoes
        Outside the head they are noise.

    Raises
    ------
    ValueError
        If `labels` has another shape than `chi`, or shows no brain.

    Notes
    -----
    With the field f in ppm, proton density :math:`\rho` and the coil's sensitivity C and phase :math:`\varphi_0`, the
    signal of the echo at time T is, but for complex Gaussian noise,

    .. math:: S = C \rho \, e^{-T R_2^*} e^{i (2 \pi \gamma B_0 T f + \varphi_0)}.

    A brain that the field of view cuts goes on for 25 mm beyond it, as its face is, with the layers about it, and so
    does the neck; beyond these all is air. Air right at the cut, 9.2 ppm above tissue, would make a field that no head
    has.
    """
    if labels.shape != chi.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected that of chi, {tuple(chi.shape)}")
    brain = labels > 0
    if not brain.any():
        raise ValueError("labels show no brain")
    inside, whole, field = _magnetize(chi, labels, voxel_size_mm, b0_direction, generator, ranges)
    density = _by_label(whole, 0)
    decay = r2star_hz(inside, b0_tesla=b0_tesla, r2_hz=0.0) + _by_label(whole, 1) * b0_tesla / 3
    offset = _polynomial(chi.shape, generator) * uniform(generator, *ranges.offset_rad)
    proton = density * torch.exp(_polynomial(chi.shape, generator) * uniform(generator, *ranges.sensitivity))
    first = (proton * torch.exp(-echo_times_s[0] * decay))[brain].mean()
    noise_sd = first / uniform(generator, *ranges.snr)
    phase, magnitude = chi.new_empty((2, len(echo_times_s), *chi.shape))
    for echo, time_s in enumerate(echo_times_s):
        turn = 2 * math.pi * GYROMAGNETIC_MHZ_PER_T * b0_tesla * time_s * field + offset
        noise = noise_sd * torch.randn((2, *chi.shape), generator=generator, device=chi.device)
        signal = torch.polar(proton * torch.exp(-time_s * decay), turn) + torch.complex(noise[0], noise[1])
        phase[echo], magnitude[echo] = _angle(signal), signal.abs()
    return Echoes(phase, magnitude, tuple(echo_times_s), b0_tesla, torch.where(brain, chi, 0.0))


def _magnetize(
    chi: Tensor,
    labels: Tensor,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float],
    generator: torch.Generator,
    ranges: EchoRanges,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the head about a brain: its susceptibility, its labels and its field, on the brain's grid."""
    margin = [math.ceil(_MARGIN_MM / step) for step in voxel_size_mm]
    inner = tuple(slice(spare, spare + size) for spare, size in zip(margin, chi.shape, strict=True))
    brain = np.pad(labels.cpu().numpy(), [(spare, spare) for spare in margin], mode="edge")
    whole = torch.from_numpy(surround(brain, voxel_size_mm=voxel_size_mm, generator=generator, ranges=ranges))
    whole = whole.to(chi.device)
    values = torch.zeros(64)
    values[[AIR, FLUID, BONE, SCALP]] = torch.tensor(
        [_AIR_PPM, _FLUID_PPM, uniform(generator, *ranges.bone_ppm), uniform(generator, *ranges.scalp_ppm)]
    )
    spare = [n for size in reversed(margin) for n in (size, size)]
    continued = functional.pad(chi[None, None], spare, mode="replicate")[0, 0]
    inside = torch.from_numpy(brain > 0).to(chi.device)
    everywhere = torch.where(inside, continued, values.to(chi.device)[whole.int()])
    # Relative to air, so that the zeros beyond the grid are air too; the field does not change with a constant.
    field = dipole_field(everywhere - _AIR_PPM, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction)
    return everywhere[inner], whole[inner], field[inner]


def surround(
    brain: NDArray[np.uint8],
    *,
    voxel_size_mm: Sequence[float],
    generator: torch.Generator,
    ranges: EchoRanges = _RANGES,
) -> NDArray[np.uint8]:
    """Put fluid, bone and scalp about a brain, flesh below it, and a sinus below its front.

    Parameters
    ----------
    brain : ndarray of shape (X, Y, Z)
        Labels, 0 outside; the axes run to the right, front and top.
    voxel_size_mm : sequence of 3 float
        Edge lengths in mm.
    generator : torch.Generator
        Source of randomness.
    ranges : EchoRanges
        How far heads differ.

    Returns
    -------
    ndarray of uint8, shape (X, Y, Z)
        The labels, with `FLUID` in the brain's clefts, `FLUID`, `BONE`, `SCALP` and `AIR` by their distance from both,
        and `FLESH` for face and neck, down to the end of the grid.

    References
    ----------
    Buch S, et al. Susceptibility mapping of air, bone, and calcium in the head. Magn Reson Med 73 (2015) 2185-2194.
    doi:10.1002/mrm.25350
    """
    thickness_mm = [uniform(generator, *pair) for pair in (ranges.fluid_mm, ranges.bone_mm, ranges.scalp_mm)]
    whole = close_with_ball(brain > 0, _CISTERN_MM, voxel_size_mm)
    distance_mm = ndimage.distance_transform_edt(~whole, sampling=voxel_size_mm)
    layers = np.array([FLUID, BONE, SCALP, AIR], np.uint8)
    head = layers[np.digitize(distance_mm, np.cumsum(thickness_mm), right=True)]
    semi_axes_mm = [uniform(generator, *ranges.sinus_mm) for _ in range(3)]
    wall_mm = thickness_mm[0] + 1.0
    centre_mm = _below_the_front(brain, voxel_size_mm) - (0.0, 0.0, wall_mm + semi_axes_mm[2])

    def within(semi_axes_mm: Sequence[float]) -> NDArray[np.bool_]:
        axes = np.ogrid[tuple(slice(size) for size in brain.shape)]
        parts = zip(axes, voxel_size_mm, centre_mm, semi_axes_mm, strict=True)
        squared: NDArray[np.float64] = sum(((i * step - c) / a) ** 2 for i, step, c, a in parts)
        return squared < 1

    below = np.logical_or.accumulate((head != AIR)[:, :, ::-1], axis=2)[:, :, ::-1]
    aside_mm = ndimage.distance_transform_edt((brain > 0).any(axis=2), sampling=voxel_size_mm[:2])
    neck = below & (aside_mm > _NECK_MM)[:, :, None]
    head[(neck | within([length + _FACE_MM for length in semi_axes_mm])) & (head == AIR)] = FLESH
    head[within(semi_axes_mm) & (distance_mm > wall_mm)] = AIR
    return np.where(brain > 0, brain, head)


def _below_the_front(brain: NDArray[np.uint8], voxel_size_mm: Sequence[float]) -> NDArray[np.float64]:
    """Find the point in mm below the middle of the front quarter of a brain, as deep as that quarter goes."""
    x, y, z = (index * step for index, step in zip(np.nonzero(brain), voxel_size_mm, strict=True))
    front = y >= y.max() - 0.25 * (y.max() - y.min())
    return np.array([x[front].mean(), y[front].mean(), z[front].min()])


def _by_label(labels: Tensor, column: int) -> Tensor:
    """Look up proton density (0) or R2 at 3 T (1)."""
    table = torch.full((64,), _GREY[column])
    for label, signal in _SIGNALS.items():
        table[label] = signal[column]
    return table.to(labels.device)[labels.int()]


def _polynomial(shape: Sequence[int], generator: torch.Generator, order: int = 2) -> Tensor:
    """Draw a polynomial of the coordinates without constant, from its lowest to its highest value 1 apart."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    powers = [(i, j, k) for i in range(order + 1) for j in range(order + 1 - i) for k in range(order + 1 - i - j)]
    drawn = torch.zeros(tuple(shape))
    for i, j, k in powers[1:]:
        drawn += normal(generator) * x**i * y**j * z**k
    return (drawn / (drawn.max() - drawn.min())).to(generator.device)


def _angle(signal: Tensor) -> Tensor:
    """Phase in (-pi, pi]."""
    angle = signal.angle()
    return torch.where(angle > -math.pi, angle, -angle)
