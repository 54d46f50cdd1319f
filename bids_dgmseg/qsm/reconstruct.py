"""Reconstruct a chi map from the phase and magnitude of GRE echoes, given as files or arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from bids_dgmseg.errors import InputError
from bids_dgmseg.image.grids import describe_grid_mismatch
from bids_dgmseg.image.volume import Volume
from bids_dgmseg.io.nifti import check_intact
from bids_dgmseg.qsm.background import BACKGROUNDS, REFINED, SMALLEST_EROSIONS
from bids_dgmseg.qsm.complex_signal import read_signal
from bids_dgmseg.qsm.field import fit_r2star, is_evenly_spaced
from bids_dgmseg.qsm.inversion import INVERSIONS
from bids_dgmseg.qsm.local_sources import Acquisition, Methods, find_local_sources, padded_shape
from bids_dgmseg.qsm.phase import (
    MAX_RESIDUAL_RAD,
    UNWRAPPINGS,
    fit_total_field,
)
from bids_dgmseg.qsm.phase_sign import compare_tails, correlate_with_head_field, decide_sign
from bids_dgmseg.segmentation.brain_mask import find_brain, find_mask_problems

PHASE_SIGNS = {"auto": None, "positive": 1, "negative": -1}
"""How the phase follows the field → ``phase_sign`` of `reconstruct_chi`."""

_MAX_SPREAD_PPM = 0.5
"""Largest plausible difference of the 99th and the 1st percentile of a map; brains have 0.05 to 0.4 ppm."""

_RIM_MM = 5.0
"""Near the border of the mask good maps have extreme values, too, as background removal is least accurate there."""


@dataclass(frozen=True)
class Reconstruction:
    """A chi map with the choices made on the way."""

    chi_ppm: NDArray[np.float32]
    """Shape (X, Y, Z), with mean 0 over the mask; 0 outside."""
    mask: NDArray[np.bool_]
    """Shape (X, Y, Z): tissue, eroded by background removal."""
    brain: NDArray[np.bool_]
    """The brain before the erosion, found in the magnitude or given."""
    magnitude: NDArray[np.float32]
    """Root of the sum of squares of the echoes."""
    total_field_ppm: NDArray[np.float32]
    """Unwrapped field of all sources; 0 outside the reliable part of the brain."""
    local_field_ppm: NDArray[np.float32]
    """Field of the sources in the brain; 0 outside the mask."""
    phase_sign: int
    """1 if phase increases with the field, -1 if it decreases."""
    phase_sign_from: str
    """What the sign was judged from, or ``the caller``."""
    head_correlation: float
    """Correlation of the total field, with this sign, with the field that the shape of the head induces; can be NaN."""
    tail_ratio: float
    """Distance of the positive tail of the deep brain from its median, over that of the negative tail."""
    readout_ramp_rad: float | None
    """Range of the bipolar readout ramp that was removed; 0 if there was none, None if unknown."""
    noise_ppm: float
    """SD of the errors of the field."""
    thermal_noise_ppm: float | None
    """Part of it that is noise of the receiver; None with a single echo."""
    misfit_ppm: float
    """SD, in the mask, of the part of the local field that the map does not explain."""
    regularization: float | None
    """Weight λ of the inversion; None if it has none."""
    erosion_mm: float | None
    """Erosion of the mask that the caller asked for."""
    n_corrections: int
    """How often λ was increased because the map fitted noise."""
    b0_direction: tuple[float, float, float]
    """Direction of the main field along the axes of the images."""
    interpolation: tuple[float, float, float]
    """Factors by which the images were interpolated along each axis, 1 if they were not."""
    background: str
    """Key of `BACKGROUNDS`: the method that was used."""
    inversion: str
    """Key of `INVERSIONS`."""
    unwrapping: str
    """Key of `UNWRAPPINGS`."""
    r2star_hz: NDArray[np.float32] | None = None
    """R2* in 1/s, shape (X, Y, Z), in the mask before its erosion; 0 outside. None with a single echo."""
    problems: tuple[str, ...] = ()
    """Why the map is not usable, see `find_problems`."""
    conversion: str = ""
    """How the phase in the files was converted."""
    warnings: tuple[str, ...] = ()
    """Doubts about the files."""


def describe_steps(
    echo_times_s: Sequence[float],
    *,
    background: str,
    inversion: str,
    unwrapping: str = "region-growing",
    erosion_mm: float | None = None,
) -> dict[str, str]:
    """Describe the steps of a reconstruction, for the sidecar of the map."""
    several = len(echo_times_s) > 1
    r2star = "ARLO" if is_evenly_spaced(echo_times_s) else "weighted log-linear fit"
    unwrapped = UNWRAPPINGS[unwrapping]
    if several:
        temporal = "the same" if unwrapping == "laplacian" else "temporal"
        unwrapped += f", for the phase difference of the first two echoes, {temporal} for all"
    refined = ["repeated without the field of a first map"] if background in REFINED else []
    eroded = f"mask eroded by {SMALLEST_EROSIONS[background]}"
    if erosion_mm is not None:
        eroded += f", at least {erosion_mm:g} mm"
    return {
        "Unwrapping": f"{unwrapped}; "
        + ("smooth " if several else "")
        + "coil phase offset "
        + ("removed" if several else "not removed"),
        "FieldFit": f"weighted least squares; voxels with a residual above {MAX_RESIDUAL_RAD:g} rad excluded"
        if several
        else "phase divided by echo time",
        "BackgroundFieldRemoval": "; ".join([BACKGROUNDS[background], *refined, eroded]),
        "DipoleInversion": INVERSIONS[inversion],
        **({"R2starFit": r2star} if several else {}),
    }


def reconstruct_files(
    echoes: Sequence[Mapping[str, Path]],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    phase_units: Sequence[str] = (),
    mask: Path | None = None,
    phase_sign: str = "auto",
    background: str = "auto",
    inversion: str = "star",
    unwrapping: str = "region-growing",
    regularization: float | None = None,
    erosion_mm: float | None = None,
) -> Reconstruction:
    """Read the echoes of a scan, all on one grid, and reconstruct its chi map.

    Parameters
    ----------
    echoes : sequence of E mapping
        NIfTI files of each echo by part, see `bids_dgmseg.qsm.complex_signal.read_signal`.
    echo_times_s, b0_tesla
        As for `reconstruct_chi`.
    phase_units : sequence of E str
        ``Units`` of the phase files; by default the values determine the scale.
    mask : path, optional
        Brain mask, voxels above 0.5; by default the brain is found in the magnitude.
    phase_sign : {"auto", "positive", "negative"}
        Whether phase increases or decreases with the field.
    background, inversion, unwrapping, regularization, erosion_mm
        As for `reconstruct_chi`.

    Returns
    -------
    Reconstruction
        Arrays in RAS+ axes on the grid of the first echo.

    Raises
    ------
    InputError
        If a file cannot be read or used, the grids differ, or no tissue is left inside the mask.
    """
    signal = read_signal(echoes, units=phase_units)
    grid, brain = signal.grid, None
    if mask is not None:
        given = Volume.read(mask)
        if difference := describe_grid_mismatch(grid, given):
            raise InputError(f"{mask.name}: is not on the same grid as {signal.name} ({difference}); resample the mask")
        check_intact(mask)
        brain = given.array > 0.5
    try:
        done = reconstruct_chi(
            signal.phase,
            signal.magnitude,
            echo_times_s=echo_times_s,
            b0_tesla=b0_tesla,
            voxel_size_mm=grid.voxel_size_mm,
            b0_direction=signal.b0_direction,
            mask=brain,
            phase_sign=PHASE_SIGNS[phase_sign],
            background=background,
            inversion=inversion,
            unwrapping=unwrapping,
            regularization=regularization,
            erosion_mm=erosion_mm,
        )
    except ValueError as error:
        where = mask.name if mask else signal.name
        raise InputError(f"{where}: {error}; provide a brain mask that fits the brain") from error
    return replace(done, conversion=signal.conversion, warnings=signal.warnings)


def reconstruct_chi(
    phase: NDArray[np.float32],
    magnitude: NDArray[np.float32],
    *,
    echo_times_s: Sequence[float],
    b0_tesla: float,
    voxel_size_mm: Sequence[float],
    b0_direction: Sequence[float] = (0, 0, 1),
    mask: NDArray[np.bool_] | None = None,
    phase_sign: int | None = None,
    background: str = "auto",
    inversion: str = "star",
    unwrapping: str = "region-growing",
    regularization: float | None = None,
    erosion_mm: float | None = None,
) -> Reconstruction:
    """Reconstruct a chi map: unwrapping, field fit, background field removal, dipole inversion.

    Parameters
    ----------
    phase : ndarray of shape (E, X, Y, Z)
        Wrapped phase in rad; voxels with a non-finite value are excluded.
    magnitude : ndarray of shape (E, X, Y, Z)
        Signal in any unit.
    echo_times_s : sequence of E float
        Echo times in s, in ascending order.
    b0_tesla : float
        Field strength in T.
    voxel_size_mm : sequence of 3 float
        Voxel size in mm.
    b0_direction : sequence of 3 float
        Direction of B0 along the grid's axes.
    mask : ndarray of bool, shape (X, Y, Z), optional
        Brain; by default `find_brain` of the combined magnitude.
    phase_sign : {1, -1}, optional
        Whether phase increases or decreases with the field; by default judged by
        `bids_dgmseg.qsm.phase_sign.decide_sign`.
    unwrapping : str
        Key of `bids_dgmseg.qsm.phase.UNWRAPPINGS`.
    background, inversion : str
        Keys of `bids_dgmseg.qsm.background.BACKGROUNDS` and `bids_dgmseg.qsm.inversion.INVERSIONS`. The background
        ``auto`` is ``pdf`` for several echoes with a mask that is given, else ``vsharp``, which tolerates errors of the
        mask and of the phase better.
    regularization : float, optional
        Weight λ of the inversion; by default in proportion to the noise of the field, and increased if the map fits
        noise. Without effect on inversions that have none.
    erosion_mm : float, optional
        Depth below the border of the mask from which the map has values; by default that of the background removal.

    Raises
    ------
    ValueError
        If no brain is found, or no voxel of the mask is far enough from its border.

    See Also
    --------
    correct_bipolar_readout, unwrap_echoes, combine_echoes, exclude_unreliable, remove_background, invert : The steps,
        with references.
    """
    finite = np.isfinite(phase).all(axis=0)
    phases = torch.from_numpy(np.where(finite, phase, np.float32(0)))
    signal = torch.from_numpy(
        np.where(np.isfinite(magnitude), magnitude, np.float32(0))
    )  # the head, also without phase
    is_found = mask is None
    if background == "auto":
        background = "vsharp" if is_found or len(phase) == 1 else "pdf"
    combined = signal.square().sum(dim=0).sqrt().numpy()
    if mask is None:
        mask = find_brain(combined, voxel_size_mm=voxel_size_mm)
        if not mask.any():
            raise ValueError("no brain found in the magnitude")
    brain = torch.from_numpy(mask & finite)
    r2star = None
    if len(echo_times_s) > 1:
        r2star = torch.zeros(mask.shape)
        r2star[brain] = fit_r2star(signal[:, brain], echo_times_s=echo_times_s)
    total = fit_total_field(
        phases,
        signal,
        brain,
        combined,
        echo_times_s=echo_times_s,
        b0_tesla=b0_tesla,
        voxel_size_mm=voxel_size_mm,
        unwrapping=unwrapping,
    )
    first = phases[0].clone()
    del phases  # the inversion needs the memory
    correlation = correlate_with_head_field(
        total.field_ppm, total.reliable, combined, voxel_size_mm=voxel_size_mm, b0_direction=b0_direction
    )
    source = find_local_sources(
        total,
        first,
        signal,
        combined,
        r2star,
        acquisition=Acquisition(echo_times_s, b0_tesla, voxel_size_mm, b0_direction),
        methods=Methods(background, inversion, regularization, erosion_mm),
    )
    depth_mm = ndimage.distance_transform_edt(source.mask, sampling=voxel_size_mm)
    ratio = compare_tails(source.chi_ppm, depth_mm, voxel_size_mm=voxel_size_mm)
    sign, sign_from = (phase_sign, "the caller") if phase_sign else decide_sign(correlation, ratio)
    return Reconstruction(
        chi_ppm=sign * source.chi_ppm,
        mask=source.mask,
        brain=mask,
        magnitude=combined,
        total_field_ppm=sign * np.where(total.reliable, total.field_ppm, np.float32(0)),
        local_field_ppm=sign * source.local_field_ppm,
        phase_sign=sign,
        phase_sign_from=sign_from,
        head_correlation=sign * correlation,
        tail_ratio=ratio if sign > 0 else 1 / ratio,
        readout_ramp_rad=total.readout_ramp_rad,
        noise_ppm=source.noise_ppm,
        thermal_noise_ppm=source.thermal_noise_ppm,
        misfit_ppm=source.misfit_ppm,
        regularization=source.regularization,
        erosion_mm=erosion_mm,
        n_corrections=source.n_corrections,
        b0_direction=(b0_direction[0], b0_direction[1], b0_direction[2]),
        interpolation=source.interpolation,
        background=background,
        inversion=inversion,
        unwrapping=unwrapping,
        r2star_hz=None if r2star is None else r2star.numpy(),
        problems=(
            *(find_mask_problems(mask, combined, voxel_size_mm=voxel_size_mm) if is_found else ()),
            *find_problems(source.chi_ppm, depth_mm),
        ),
    )


def find_problems(chi_ppm: NDArray[np.float32], depth_mm: NDArray[np.float64]) -> Iterator[str]:
    """Yield the reasons why the susceptibilities in a mask are implausible.

    `depth_mm` (X, Y, Z) is the distance from the outside of the mask, 0 there. The outer 5 mm of the mask do not count;
    of a thinner one, the outer half.
    """
    low, high = np.percentile(chi_ppm[depth_mm > min(_RIM_MM, depth_mm.max() / 2)], (1, 99))
    if not high - low <= _MAX_SPREAD_PPM:
        yield (
            f"its values have a spread of {high - low:.2g} ppm (streaks?), expected 0.05 to 0.4 ppm in a brain, at "
            f"most {_MAX_SPREAD_PPM:g} ppm"
        )


def estimate_memory_gb(
    shape: Sequence[int], voxel_size_mm: Sequence[float], *, n_echoes: int, inversion: str = "star"
) -> float:
    """Estimate the peak memory of `reconstruct_chi`, its arguments included, for echoes of a shape (X, Y, Z).

    Five arrays of all echoes, 85 bytes per voxel of the padded grid of the inversion (135 for ``medi``), and the
    imported libraries; at least 160 bytes per voxel of that grid for ``star``, when the echoes are no longer needed.
    `benchmarks/reconstruction.py --memory` compares the estimate with measurements.
    """
    padded = math.prod(padded_shape(shape, voxel_size_mm))
    with_echoes = 4 * 5 * n_echoes * math.prod(shape) + (135 if inversion == "medi" else 85) * padded
    later = 160 * padded if inversion == "star" else 0
    return (900e6 + max(with_echoes, later)) / 1e9
