"""How far simulated maps vary, and random draws.

In the `…Ranges`, a pair is the lowest and the highest value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Ranges = TypeVar("Ranges", bound="DataclassInstance")

_LOGARITHMIC = {"noise_ppm", "snr", "least_squares", "conjugate_gradients", "total_variation"}
"""Fields drawn log-uniformly; they are narrowed on the same scale."""


@dataclass(frozen=True)
class DilationRanges:
    """Variation of the size of the lateral and third ventricles."""

    spread_mm: float = 1.2
    """SD of the displacement of the walls in most heads."""
    wide: float = 0.35
    """Fraction of heads with enlarged ventricles."""
    wide_mm: tuple[float, float] = (1.0, 14.0)
    """Displacement before tissue resists, in enlarged ventricles."""
    narrowest_mm: float = 2.0
    length_mm: tuple[float, float] = (6.0, 12.0)
    """Distance over which the displacement decreases."""
    asymmetry: float = 0.12
    """Relative SD of the difference between left and right."""
    irregularity: float = 0.6
    wavelength_mm: float = 35.0
    """Of differences between horns."""


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
    person: tuple[float, float] = (0.6, 1.2)
    """How much of a person's deformation of the template is used, if there are any."""
    mixed: float = 0.3
    """Fraction of heads between two people."""
    bends_of_people: float = 0.6
    """Factor of the smooth deformations where a person's is used."""
    anatomies: Sequence[tuple[str, float]] = (("BigBrain", 0.3), ("7TAMIBrain", 0.3))
    """Fraction of heads with nuclei of another anatomy, if its template is there."""
    dilation: DilationRanges = field(default_factory=DilationRanges)


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
    white_matter: float = 0.25
    """Prevalence of lesions of white matter, as in small vessel disease or multiple sclerosis."""
    white_matter_lesions: tuple[float, float] = (1.0, 40.0)
    """Their number; log-uniform."""
    white_matter_ppm: tuple[float, float] = (-0.01, 0.045)
    """In them, relative to white matter."""
    rim_ppm: tuple[float, float] = (0.02, 0.07)
    """At their rim, relative to their inside, in an eighth of these heads."""
    spaces: float = 0.25
    """Prevalence of wide perivascular spaces in white matter."""
    perivascular: tuple[float, float] = (2.0, 40.0)
    """Number of these spaces per hemisphere."""
    microbleeds: float = 0.1
    """Prevalence of microbleeds anywhere in the brain."""
    bleeds: tuple[float, float] = (1.0, 20.0)
    """Number of microbleeds; log-uniform."""
    haemorrhage: float = 0.03
    """Prevalence of a haemorrhage beside the nuclei or in a lobe."""
    blood_ppm: tuple[float, float] = (0.1, 0.7)
    """In microbleeds and haemorrhages."""


NO_PATHOLOGY = PathologyRanges(
    ataxia=0.0, atrophy=0.0, calcified=0.0, white_matter=0.0, spaces=0.0, microbleeds=0.0, haemorrhage=0.0
)


@dataclass(frozen=True)
class ShapeRanges:
    """Variation of each nucleus relative to the head; drawn separately for left and right."""

    amount: float = 1.0
    """Factor for everything below; 0 uses the labels of the template unchanged."""
    volume_sd: float = 0.12
    """SD of the relative volume; its mean is 1."""
    odd: tuple[float, float] = (0.2, 0.3)
    """Fraction of subjects with a larger SD of the volume, and that SD."""
    stretch: float = 0.08
    """SD of the relative proportions at constant volume."""
    shift_mm: float = 0.8
    rotation_deg: float = 8.0
    bend_mm: float = 1.2
    """Largest displacement of the ends of a nucleus relative to its middle."""
    bumps: tuple[float, float] = (0.45, 0.25)
    """SD of the surface displacement in mm at wavelengths of 8 and 4 mm; smaller for thin nuclei."""
    fold_mm: tuple[float, float] = (0.3, 1.0)
    """SD of the folds of the dentate."""
    hilum_mm: tuple[float, float] = (0.6, 3.0)
    """Radius of the hilum of the dentate at its bottom."""
    spread: tuple[float, float] = (1.0, 1.15)
    """Extent of the folded dentate relative to the atlas at the same volume."""
    gap_mm: tuple[float, float] = (-0.5, 1.8)
    """Between the two parts of the interposed nucleus; none below 0."""
    ventricle_mm: tuple[float, float] = (0.5, 0.5)
    """SD of the shift of the ventricles' walls, and outward shift from 45 to 75 years."""


@dataclass(frozen=True)
class DetailRanges:
    """Variation of details within tissues."""

    texture: tuple[float, float] = (0.1, 0.7)
    """Amplitude within nuclei, relative."""
    fine_ppm: tuple[float, float] = (0.003, 0.022)
    slow_ppm: tuple[float, float] = (0.0, 0.015)
    tracts: float = 0.7
    """Probability that a tract, or the pulvinar, differs from the surrounding tissue."""
    halo_ppm: tuple[float, float] = (0.0, 0.12)
    """How much darker the white matter next to nuclei is, due to myelin and reconstruction."""
    medullary: tuple[float, float] = (0.0, 60.0)
    """Number of medullary veins per hemisphere."""
    vein_ppm: tuple[float, float] = (0.08, 0.45)
    veins: float = 0.85
    """Probability of each of the deep veins."""
    lesions: float = 1.0
    """Factor of the probabilities of calcifications of pallidum, choroid plexus and pineal gland."""
    spots: tuple[float, float] = (0.0, 14.0)
    """Number of vessels, perivascular spaces and calcifications in and near the nuclei."""


@dataclass(frozen=True)
class SusceptibilityRanges:
    """Variation of susceptibility between subjects."""

    age_years: tuple[float, float] = (10.0, 80.0)
    """Determines iron, ventricles, caudate and putamen."""
    mixture: float = 0.2
    """Fraction of subjects with a random value per label, unrelated to age and tissue."""
    iron_sd: float = 0.2
    """Relative SD of a nucleus's iron between subjects of one age."""
    odd: float = 0.08
    """Fraction of nuclei with far more or less iron than expected for the age."""
    nuclei_gain: tuple[float, float] = (0.65, 1.35)
    putamen_gain: tuple[float, float] = (0.3, 0.95)
    """Of the putamen, which is darker than the caudate on most real maps, its front part above all."""
    caudate_gain: tuple[float, float] = (1.0, 1.35)
    uniform_striatum: float = 0.25
    """Fraction of heads whose caudate, putamen and accumbens are alike, below a hardly visible internal capsule."""
    pale_midbrain: float = 0.12
    """Fraction of heads with little iron in red nucleus, nigra and subthalamic nucleus."""
    bright_fluid: float = 0.12
    """Fraction of heads whose ventricles are as bright as the caudate."""
    tissue_gain: tuple[float, float] = (0.4, 1.7)
    fluid_ppm: tuple[float, float] = (-0.02, 0.08)
    """Ventricular fluid relative to white matter."""
    side_difference: float = 0.1
    """Relative SD of the difference between left and right."""
    hilum: tuple[float, float] = (0.35, 1.05)
    """Inside of the dentate relative to its wall."""
    details: DetailRanges = field(default_factory=DetailRanges)
    pathology: PathologyRanges = field(default_factory=PathologyRanges)


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
    thick: float = 0.65
    """Fraction of thick-slice scans."""
    slice_mm: tuple[float, float] = (1.0, 2.0)
    """Slice thickness of half of the thick-slice scans."""
    clinical_mm: tuple[float, float] = (2.0, 3.5)
    """Of the other half, as in clinical routine."""
    coarse: float = 0.08
    """Fraction of scans with large isotropic voxels."""
    coarse_mm: tuple[float, float] = (1.2, 2.2)
    """Voxel size of these."""
    oblique_deg: float = 20.0
    """Largest rotation of oblique slices, a quarter of the thick-slice scans."""
    blur_mm: tuple[float, float] = (0.0, 0.8)
    """SD of the point spread function along each axis."""
    threshold: tuple[float, float] = (0.03, 0.18)
    """Of truncated division, in maps degraded by filters."""
    field_noise_ppm: tuple[float, float] = (0.0005, 0.004)
    noise_ppm: tuple[float, float] = (0.002, 0.03)
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


@dataclass(frozen=True)
class EchoRanges:
    """Variation of head tissues and scanners."""

    fluid_mm: tuple[float, float] = (2.0, 4.0)
    bone_mm: tuple[float, float] = (5.0, 7.0)
    scalp_mm: tuple[float, float] = (4.0, 6.0)
    """Thickness of the layers around the brain, from inside out."""
    bone_ppm: tuple[float, float] = (-2.5, -1.7)
    scalp_ppm: tuple[float, float] = (0.0, 0.3)
    """Relative to soft tissue."""
    sinus_mm: tuple[float, float] = (9.0, 15.0)
    """Each semi-axis of the air cavity below the frontal brain."""
    snr: tuple[float, float] = (40.0, 120.0)
    """Mean signal of the brain at the first echo over the SD of the noise in the real part."""
    offset_rad: tuple[float, float] = (2.0, 6.0)
    """Range of the coil phase over the field of view; the same in all echoes."""
    sensitivity: tuple[float, float] = (0.3, 1.0)
    """Logarithm of the ratio of the highest to the lowest coil sensitivity in the field of view."""


_cpu_generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}
"""Identity of a generator → it and its companion, of the last `_KEPT`; before torch 2.12 it has no weak references."""

_KEPT = 16


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """Return the CPU generator for single numbers that accompanies a generator.

    A CPU generator accompanies itself. Single numbers drawn on a GPU would each have to be waited for, which takes
    longer than everything else; they come from a CPU generator with the same initial seed.
    """
    if not _is_on_gpu(generator):
        return generator
    kept, companion = _cpu_generators.get(id(generator), (None, generator))
    if kept is not generator:
        companion = torch.Generator().manual_seed(generator.initial_seed())
        _cpu_generators.pop(id(generator), None)
        _cpu_generators[id(generator)] = generator, companion
        while len(_cpu_generators) > _KEPT:
            del _cpu_generators[next(iter(_cpu_generators))]
    return companion


def _is_on_gpu(generator: torch.Generator) -> bool:  # replaced in tests on a pretended GPU
    return generator.device.type != "cpu"


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number uniformly between two limits."""
    cpu = cpu_generator(generator)
    return low + (high - low) * float(torch.rand((), generator=cpu, device=cpu.device))


def log_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return low * math.exp(math.log(high / low) * uniform(generator, 0, 1))


def normal(generator: torch.Generator) -> float:
    """Draw a standard normal number."""
    cpu = cpu_generator(generator)
    return float(torch.randn((), generator=cpu, device=cpu.device))


def chance(generator: torch.Generator, probability: float) -> bool:
    """Draw True with a probability."""
    cpu = cpu_generator(generator)
    return float(torch.rand((), generator=cpu, device=cpu.device)) < probability


def pick(generator: torch.Generator, weights: Sequence[float]) -> int:
    """Draw an index with probabilities proportional to the weights."""
    return int(torch.multinomial(torch.tensor(weights, device="cpu"), 1, generator=cpu_generator(generator)))


def smooth_noise(
    shape: Sequence[int], wavelength_voxels: float | Sequence[float], generator: torch.Generator, channels: int = 1
) -> Tensor:
    """Draw Gaussian noise on a coarse grid and interpolate it: (channels, X, Y, Z), SD below 1.

    The wavelength, which is the spacing of the coarse grid, is the same for all axes or given per axis.
    """
    lengths = np.broadcast_to(wavelength_voxels, 3)
    coarse = [max(2, round(size / length) + 1) for size, length in zip(shape, lengths, strict=True)]
    noise = torch.randn((1, channels, *coarse), generator=generator, device=generator.device)
    return functional.interpolate(noise, size=list(shape), mode="trilinear", align_corners=True)[0]


def narrow(ranges: Ranges, width: float) -> Ranges:
    """Narrow every pair of a dataclass to the fraction `width` of its width about its middle."""
    changed: dict[str, Any] = {}
    for entry in fields(ranges):
        value = getattr(ranges, entry.name)
        if isinstance(value, tuple) and len(value) == 2:
            logarithmic = entry.name in _LOGARITHMIC
            low, high = map(math.log, value) if logarithmic else value
            middle, half = (low + high) / 2, width * (high - low) / 2
            low, high = middle - half, middle + half
            changed[entry.name] = (math.exp(low), math.exp(high)) if logarithmic else (low, high)
    return replace(ranges, **changed)
