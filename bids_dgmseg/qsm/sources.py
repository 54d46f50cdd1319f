"""The acquisition, the methods, and from the total field to the local one and its susceptibility."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bids_dgmseg.qsm.background import BACKGROUNDS, FIRST_EROSION_MM, remove_background
from bids_dgmseg.qsm.field import (
    GYROMAGNETIC_MHZ_PER_T,
    apply_kernel,
    dipole_kernel,
    estimate_noise_sd,
    fast_size,
    interpolation_factors,
    noise_beyond_dipoles,
    subtract_mean,
    zero_pad,
)
from bids_dgmseg.qsm.inversion import INVERSIONS, WEIGHTED, find_ventricles, invert, regularization_weight
from bids_dgmseg.qsm.phase import UNWRAPPINGS, TotalField

PHASE_SIGNS = {"auto": None, "positive": 1, "negative": -1}
"""How the phase follows the field → sign; None if the map decides."""

_MARGIN_MM = 20.0
"""Zero padding around the brain, against aliasing between its opposite faces."""

_COARSE_MM = 1.5
"""Smaller voxels are joined in pairs for the first map: the background, which it serves to find, is smooth."""

FITS_NOISE = 0.8
"""A map that explains the field better than to this fraction of its noise contains noise."""

_CORRECTION, _MAX_CORRECTIONS = 1.5, 4
"""By which factor the weight is then increased, and how often."""


@dataclass(frozen=True)
class Acquisition:
    """Echo times in s (ascending), B0 in T, voxel size in mm and the direction of B0 along the axes of the grid."""

    echo_times_s: Sequence[float]
    b0_tesla: float
    voxel_size_mm: Sequence[float]
    b0_direction: Sequence[float] = (0, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Methods of a reconstruction; ValueError if a name is unknown or a number out of range."""

    phase_sign: str = "auto"
    """Key of `PHASE_SIGNS`: phase increases or decreases with the field; ``auto`` lets `decide_sign` judge."""
    unwrapping: str = "region-growing"
    """Key of `bids_dgmseg.qsm.phase.UNWRAPPINGS`."""
    background: str = "auto"
    """Key of `bids_dgmseg.qsm.background.BACKGROUNDS`; ``auto`` is ``pdf`` for several echoes with a mask of the user,
    else ``vsharp``, which tolerates errors of the mask and of the phase better."""
    inversion: str = "star"
    """Key of `bids_dgmseg.qsm.inversion.INVERSIONS`."""
    regularization: float | None = None
    """Weight λ; by default in proportion to the noise of the field, and increased if the map fits noise."""
    erosion_mm: float | None = None
    """Depth below the border of the mask from which the map has values; by default that of the background removal."""

    def __post_init__(self) -> None:
        """Check the names and numbers."""
        for name, choices in (
            ("phase_sign", PHASE_SIGNS),
            ("unwrapping", UNWRAPPINGS),
            ("background", {"auto": "", **BACKGROUNDS}),
            ("inversion", INVERSIONS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: {value!r}, expected one of {', '.join(choices)}")
        if self.regularization is not None and self.inversion not in WEIGHTED:
            raise ValueError(f"regularization: {self.inversion} has no weight; leave it out")
        if self.regularization is not None and not 0 < self.regularization < math.inf:
            raise ValueError(f"regularization: {self.regularization}, expected a positive number")
        if self.erosion_mm is not None and not 0 <= self.erosion_mm < math.inf:
            raise ValueError(f"erosion_mm: {self.erosion_mm}, expected a depth in mm")


@dataclass(frozen=True, kw_only=True)
class LocalSources:
    """Local field and susceptibility, for either sign of the phase; arrays have shape (X, Y, Z)."""

    chi_ppm: NDArray[np.float32]
    """Susceptibility with mean 0 over the mask; 0 outside."""
    mask: NDArray[np.bool_]
    """Tissue, eroded by background removal."""
    local_field_ppm: NDArray[np.float32]
    """Field of the sources in the brain; 0 outside the mask."""
    noise_ppm: float
    """SD of the errors of the field."""
    thermal_noise_ppm: float | None
    """Part of the noise that is of the receiver; None with a single echo."""
    misfit_ppm: float
    """SD of the part of the local field that the map does not explain."""
    regularization: float | None
    """Weight λ that was used; None if the inversion has none."""
    n_adjustments: int
    """How often λ was increased because the map fitted noise."""
    interpolation: tuple[float, float, float]
    """Factors by which the images were interpolated along each axis."""


def find_local_sources(
    total: TotalField,
    phase: Tensor,
    magnitude: Tensor,
    combined: NDArray[Any],
    r2star: Tensor | None,
    *,
    acquisition: Acquisition,
    methods: Methods,
) -> LocalSources:
    """Remove the background field and invert the local one, in the box around the reliable voxels.

    Background removal takes part of the local field for background. The field of a first map is therefore subtracted
    before the background is removed a second time, and added to what remains.

    Parameters
    ----------
    total : TotalField
    phase : Tensor of shape (X, Y, Z)
        Of the first echo, in rad.
    magnitude : Tensor of shape (E, X, Y, Z)
        Of all echoes, in any unit.
    combined : ndarray of shape (X, Y, Z)
        Root of the sum of their squares.
    r2star : Tensor of shape (X, Y, Z), optional
        R2* in 1/s.
    acquisition : Acquisition
    methods : Methods

    Raises
    ------
    ValueError
        If no voxel is far enough from the border of the mask.
    """
    size_mm, n_echoes = acquisition.voxel_size_mm, len(acquisition.echo_times_s)
    interpolation = interpolation_factors(phase, magnitude[0])
    box = ndimage.find_objects(total.reliable.astype("uint8"))[0]  # nothing outside of it has any effect
    field, inside, signal = (torch.from_numpy(array)[box] for array in (total.field_ppm, total.reliable, combined))
    echoes = magnitude[(slice(None), *box)]
    times = torch.tensor(acquisition.echo_times_s).view(-1, 1, 1, 1)
    weight = (echoes * times).square().sum(dim=0).sqrt()  # proportional to the inverse SD of the field
    inverter = _Inverter(field.shape, acquisition, methods, interpolation)
    removal: dict[str, Any] = {
        "method": methods.background,
        "voxel_size_mm": size_mm,
        "b0_direction": acquisition.b0_direction,
        "weight": weight,
    }

    def measure_noise(local: Tensor, mask: Tensor) -> tuple[float, float | None]:
        spectral = noise_beyond_dipoles(
            local,
            mask,
            voxel_size_mm=size_mm,
            b0_direction=acquisition.b0_direction,
            interpolation=interpolation,
        )
        if spectral is None:
            spectral = estimate_noise_sd(local, mask, spacing=[max(round(factor), 1) for factor in interpolation])
        if total.signal_noise is None:
            return spectral, None
        sd_rad_per_s = total.signal_noise / float(weight[mask].median())
        thermal = sd_rad_per_s / (2 * math.pi * GYROMAGNETIC_MHZ_PER_T * acquisition.b0_tesla)
        return max(spectral, thermal), thermal  # the residual does not show the errors that all echoes share

    first = torch.zeros_like(field)
    local, mask = remove_background(field, inside, erosion_mm=FIRST_EROSION_MM, **removal)
    if mask.any():
        first = inverter.first_field(local, mask, signal, noise_ppm=measure_noise(local, mask)[0])
    local, mask = remove_background(field - first, inside, erosion_mm=methods.erosion_mm, **removal)
    if not mask.any():
        raise ValueError("no voxel is far enough from the border of the mask")
    local = torch.where(mask, local + first, 0.0)
    noise_ppm, thermal_ppm = measure_noise(local, mask)
    fluid = None
    if methods.inversion == "medi" and r2star is not None and n_echoes > 2:
        fluid = find_ventricles(r2star[box], mask, voxel_size_mm=size_mm)
    prior = {"magnitude": signal, "weight": weight, "fluid": fluid}
    chi, misfit_ppm, regularization, n_adjustments = inverter.invert_to_noise(local, noise_ppm, mask, prior)
    parts = (subtract_mean(chi, mask), mask, local)
    whole_chi, whole_mask, whole_local = (torch.zeros(combined.shape, dtype=part.dtype) for part in parts)
    for whole, part in zip((whole_chi, whole_mask, whole_local), parts, strict=True):
        whole[box] = part
    return LocalSources(
        chi_ppm=whole_chi.numpy(),
        mask=whole_mask.numpy(),
        local_field_ppm=whole_local.numpy(),
        noise_ppm=noise_ppm,
        thermal_noise_ppm=thermal_ppm,
        misfit_ppm=misfit_ppm,
        regularization=regularization,
        n_adjustments=n_adjustments,
        interpolation=interpolation,
    )


class _Inverter:
    """Inversions of fields of one shape, in a box that is padded against aliasing."""

    def __init__(
        self, shape: Sequence[int], acquisition: Acquisition, methods: Methods, interpolation: Sequence[float]
    ) -> None:
        self.acquisition, self.methods, self.interpolation = acquisition, methods, interpolation
        self.shape = padded_shape(shape, acquisition.voxel_size_mm)
        self.kernel = dipole_kernel(self.shape, acquisition.voxel_size_mm, acquisition.b0_direction)
        self.inner = tuple(slice(size) for size in shape)

    def invert_to_noise(
        self, local: Tensor, noise_ppm: float, mask: Tensor, prior: Mapping[str, Tensor | None]
    ) -> tuple[Tensor, float, float | None, int]:
        """Return the map, the SD of the field that it leaves, the weight, and how often it was increased."""
        padded = {key: None if array is None else zero_pad(array, self.shape) for key, array in prior.items()}
        field, inside = zero_pad(local, self.shape), zero_pad(mask, self.shape)
        size_mm = self.acquisition.voxel_size_mm
        acquired_mm = [step * factor for step, factor in zip(size_mm, self.interpolation, strict=True)]
        weight = regularization_weight(self.methods.inversion, noise_ppm=noise_ppm, voxel_size_mm=acquired_mm)
        if weight is not None and self.methods.regularization is not None:
            weight = self.methods.regularization
        n_adjustments = 0
        while True:
            chi = invert(
                field,
                self.kernel,
                method=self.methods.inversion,
                strength=weight,
                voxel_size_mm=size_mm,
                mask=inside,
                **padded,
            )
            misfit_ppm = float((self.forward(chi) - local)[mask].std())
            is_fixed = self.methods.regularization is not None
            if weight is None or is_fixed or misfit_ppm >= FITS_NOISE * noise_ppm or n_adjustments == _MAX_CORRECTIONS:
                break
            weight, n_adjustments = _CORRECTION * weight, n_adjustments + 1
        return chi[self.inner], misfit_ppm, weight, n_adjustments

    def forward(self, chi: Tensor) -> Tensor:
        """Return the field of a map on the padded grid, in the box."""
        return apply_kernel(chi, self.kernel)[self.inner]

    def first_field(self, local: Tensor, mask: Tensor, magnitude: Tensor, *, noise_ppm: float) -> Tensor:
        """Return the field of a first map of the sources in a mask."""
        size_mm, shape = list(self.acquisition.voxel_size_mm), local.shape
        joined = [2 if step < _COARSE_MM else 1 for step in size_mm]
        coarse_mm = [step * n for step, n in zip(size_mm, joined, strict=True)]
        whole = [math.ceil(size / n) * n for size, n in zip(shape, joined, strict=True)]

        def average(array: Tensor) -> Tensor:
            return functional.avg_pool3d(zero_pad(array, whole)[None, None], joined)[0, 0]

        share = average(mask.to(local.dtype))
        inside = share > 0.5
        field = torch.where(inside, average(local) / share.clamp(min=0.5), 0.0)
        padded = padded_shape(field.shape, coarse_mm)
        chi = invert(
            zero_pad(field, padded),
            dipole_kernel(padded, coarse_mm, self.acquisition.b0_direction),
            method="star",
            # errors of neighbours are hardly independent: half the noise in voxels of twice the edge
            strength=regularization_weight("star", noise_ppm=noise_ppm, voxel_size_mm=size_mm),
            voxel_size_mm=coarse_mm,
            mask=zero_pad(inside, padded),
            magnitude=zero_pad(average(magnitude), padded),
        )[tuple(slice(size) for size in field.shape)]
        for axis, n in enumerate(joined):
            chi = chi.repeat_interleave(n, axis)
        chi = chi[self.inner]
        return self.forward(zero_pad(subtract_mean(chi, mask), self.shape))


def padded_shape(shape: Sequence[int], voxel_size_mm: Sequence[float]) -> list[int]:
    """Return the shape (X, Y, Z) of the grid of an inversion."""
    sizes = zip(shape, voxel_size_mm, strict=True)
    return [fast_size(size + 2 * math.ceil(_MARGIN_MM / step)) for size, step in sizes]
